"""The command line that the kernel gets."""

from __future__ import annotations

import pytest

from vmm.boot.cmdline import make
from vmm.errors import ConfigError

SLOTS = [(0xF0100000, 512, 5), (0xF0100200, 512, 6)]
DEVICES = b"virtio_mmio.device=512@0xf0100000:5 virtio_mmio.device=512@0xf0100200:6"


@pytest.mark.parametrize(("append", "line"), [
    ("", DEVICES), ("console=ttyS0 quiet", b"console=ttyS0 quiet " + DEVICES),
    # What follows -- is init's, the kernel does not read it.
    ("quiet -- single", b"quiet " + DEVICES + b" -- single"),
    ("quiet --", b"quiet " + DEVICES + b" --"), ("-- x", DEVICES + b" -- x"),
    ('a="b -- c" d', b'a="b -- c" d ' + DEVICES),
    ('a="b -- c" -- d', b'a="b -- c" ' + DEVICES + b" -- d"),
    ("a--b --c", b"a--b --c " + DEVICES),
    ("tab\there", b"tab\there " + DEVICES), ("ü=\udcff", b"\xc3\xbc=\xff " + DEVICES)])
def test_devices_follow_what_the_kernel_reads(append: str, line: bytes) -> None:
    assert make(append, SLOTS, 2047) == line + b"\0"


def test_no_devices() -> None:
    assert make("quiet", [], 2047) == b"quiet\0" and make("", [], 2047) == b"\0"


@pytest.mark.parametrize("character", ["\0", "\n", "\r", "\x1b", "\x7f", "\ud800"])
def test_what_no_command_line_can_hold(character: str) -> None:
    with pytest.raises(ConfigError, match="-append: "):
        make(f"a{character}b", SLOTS, 2047)


def test_the_limit_is_the_kernels() -> None:
    append = "x" * (255 - len(DEVICES) - 1)
    assert len(make(append, SLOTS, 255)) == 256
    with pytest.raises(ConfigError, match=r"256 bytes with what the devices add, .* takes 255"):
        make(append + "x", SLOTS, 255)

"""The kernel's command line: the user's, then one `virtio_mmio.device=` a device.

Linux Documentation/admin-guide/kernel-parameters.txt, virtio_mmio.device=: kernels without ACPI
(or started with acpi=off) find the devices by it.
"""

from __future__ import annotations

from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence


def make(append: str, slots: Sequence[tuple[int, int, int]], limit: int) -> bytes:
    """The command line with its final NUL.

    :param limit: bytes that the kernel takes, NUL not counted.
    :raises ConfigError: `-append` has a byte that no command line can hold, or is too long.
    """
    for character in append:
        if (character < " " and character != "\t") or character == "\x7f":
            raise ConfigError(f"-append: a kernel command line can't hold the character "
                              f"{character!r}", "remove it")
    kernel, init = _split_at_init(append)
    words = [kernel] if kernel else []
    words += [f"virtio_mmio.device={size}@{base:#x}:{gsi}" for base, size, gsi in slots]
    if init:
        words.append(init)
    try:
        line = " ".join(words).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError("-append: not valid text", "use UTF-8") from None
    if len(line) > limit:
        raise ConfigError(f"-append: the command line has {len(line)} bytes with what the "
                          f"devices add, this kernel takes {limit}", "shorten it")
    return line + b"\0"


def _split_at_init(append: str) -> tuple[str, str]:
    """What the kernel reads, and what it hands to init: from the first `--` outside of quotes."""
    text = f" {append} "
    at = text.find(" -- ")
    while at >= 0 and text.count('"', 0, at) % 2:
        at = text.find(" -- ", at + 1)
    if at < 0:
        return append, ""
    return append[:at].rstrip(" "), append[at:].lstrip(" ")

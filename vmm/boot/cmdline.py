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
        if not " " <= character <= "\uffff" and character != "\t":
            raise ConfigError(f"-append: a kernel command line can't hold the character "
                              f"{character!r}", "remove it")
    words = [append] if append else []
    words += [f"virtio_mmio.device={size}@{base:#x}:{gsi}" for base, size, gsi in slots]
    line = " ".join(words).encode("utf-8", "surrogateescape")
    if len(line) > limit:
        raise ConfigError(f"-append: the command line has {len(line)} bytes with what the "
                          f"devices add, this kernel takes {limit}", "shorten it")
    return line + b"\0"

"""Tap interfaces: opening one, or making sure that a given descriptor is one.

A tap's descriptor carries frames with a `struct virtio_net_hdr_v1` in front of each
(Linux Documentation/networking/tuntap.rst; linux/if_tun.h).
"""

from __future__ import annotations

import errno
import fcntl
import posix as os
from _socket import AF_INET, SOCK_CLOEXEC, SOCK_DGRAM, if_nametoindex, socket
from _struct import Struct

from shared.errors import SharedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER_BYTES = 12
MAX_QUEUES = 16
NAME_BYTES = 15  # IFNAMSIZ, without its end

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_IFF_TUN_EXCL = 0x8000
_TEMPLATE = b"svtap%d"  # the kernel puts a number in
# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCBRADDIF, _IFF_UP = 0x8913, 0x8914, 0x89A2, 0x0001
_IFREQ, _IFREQ_INDEX = Struct("16sH22x"), Struct("16si20x")
_INT = Struct("i")

DEVICE = "/dev/net/tun"


class TapError(SharedError):
    """A tap can't be had, or a descriptor is none."""


def check_name(name: str) -> bytes:
    """The interface's name as the kernel takes it.

    :raises TapError: no interface can have this name.
    """
    raw = name.encode("utf-8", "surrogateescape")
    if not 0 < len(raw) <= NAME_BYTES or name in (".", "..") or any(
            c <= 32 or c in b"/:%" for c in raw):
        raise TapError(f"'{name}' can't be the name of an interface",
                       f"1 to {NAME_BYTES} bytes without spaces, '/', ':' and '%'")
    return raw


def exists(name: str) -> bool:
    """Whether there is a network interface of this name.

    :raises TapError: no interface can have this name.
    """
    try:
        if_nametoindex(check_name(name).decode(errors="surrogateescape"))
    except OSError:
        return False
    return True


def bring_up(name: str) -> None:
    """Let an interface carry frames (netdevice(7), SIOCSIFFLAGS).

    :raises TapError: there is none, or no permission.
    """
    raw = check_name(name)
    # By ioctl: the package pyroute2 costs 0.3 s and 20 MB of the process that imports it.
    sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        _, flags = _IFREQ.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(raw, 0)))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(raw, flags | _IFF_UP))
    except OSError as error:
        raise TapError(f"The interface '{name}' can't be brought up: {error.strerror}",
                       f"ip link set {name} up") from error
    finally:
        sock.close()


def join_bridge(name: str, bridge: str) -> None:
    """Make an interface a port of a bridge (Linux net/bridge/br_ioctl.c, SIOCBRADDIF).

    :raises TapError: one of them isn't there, or no permission.
    """
    raw = check_name(bridge)
    sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        index = if_nametoindex(check_name(name).decode(errors="surrogateescape"))
        fcntl.ioctl(sock, _SIOCBRADDIF, _IFREQ_INDEX.pack(raw, index))
    except OSError as error:
        raise TapError(f"'{name}' can't join the bridge '{bridge}': {error.strerror}",
                       f"is it a bridge? ip link show type bridge; ip link set {name} master "
                       f"{bridge}") from error
    finally:
        sock.close()


def open_tap(name: str, queues: int = 1) -> list[int]:
    """One descriptor a queue of the tap `name`, which is made if it doesn't exist.

    :raises TapError: it is busy, of another kind, or there is no permission.
    """
    raw = check_name(name)
    fds: list[int] = []
    try:
        if queues == 1:
            fds.append(_attach_one(raw, name))
        _attach_rest(fds, raw, name, queues)
    except BaseException:
        close_all(fds)
        raise
    return fds


def make_tap(name: str, queues: int = 1) -> tuple[str, list[int]]:
    """A tap that wasn't there before, and goes with its last descriptor: its name, and one
    descriptor a queue.

    :param name: "": one that is free.
    :raises TapError: there is such an interface, or there is no permission.
    """
    raw = check_name(name) if name else _TEMPLATE
    fds: list[int] = []
    try:
        fds.append(_attach(raw, name or "svtap0", queues,
                           _IFF_TUN_EXCL | (_IFF_MULTI_QUEUE if queues > 1 else 0)))
        raw, _ = _interface(fds[0])
        _attach_rest(fds, raw, _text(raw), queues)
    except BaseException:
        close_all(fds)
        raise
    return _text(raw), fds


def close_all(fds: list[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def _attach_rest(fds: list[int], raw: bytes, name: str, queues: int) -> None:
    while len(fds) < queues:
        fds.append(_attach(raw, name, queues, _IFF_MULTI_QUEUE))
    for fd in fds:
        _set_header(fd, name)


def _attach_one(raw: bytes, name: str) -> int:
    """The one queue that is wanted may be one of several that the tap can have."""
    try:
        return _attach(raw, name, 1, 0)
    except TapError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EINVAL:
            raise
    return _attach(raw, name, 1, _IFF_MULTI_QUEUE)


def _attach(raw: bytes, name: str, queues: int, more: int) -> int:
    fd = _open_device()
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | more
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(raw, flags))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY and more & _IFF_TUN_EXCL:
            raise TapError(f"There is an interface '{name}' already",
                           "take another name, or use it as it is") from error
        raise _refused(name, queues, error) from error
    return fd


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = ("load the module tun" if error.errno in (errno.ENOENT, errno.ENODEV)
                else "let this user open it, or hand a descriptor over: fd=")
        raise TapError(f"Can't open {DEVICE}: {error.strerror}", hint) from error


def _refused(name: str, queues: int, error: OSError) -> TapError:
    what = f"Can't open the tap '{name}': {error.strerror}"
    if error.errno == errno.EBUSY:
        return TapError(f"Tap device already in use: '{name}'",
                        "end who uses it, or take another one")
    if error.errno == errno.EPERM:
        return TapError(what, f"make it for this user: ip tuntap add {name} mode tap user NAME")
    if error.errno == errno.EINVAL:
        kind = "a tap with several queues" if queues > 1 else "a tap"
        wanted = " multi_queue" if queues > 1 else ""
        return TapError(f"{what}; '{name}' is not {kind}",
                        f"make it anew: ip tuntap add {name} mode tap vnet_hdr{wanted}")
    if error.errno == errno.E2BIG:
        return TapError(what, f"it has no {queues} free queues")
    return TapError(what, "look at: ip -d link show")


def adopt_taps(fds: Sequence[int]) -> None:
    """Check descriptors that were handed over, and set them up; they must be one interface's.

    :raises TapError: one is no tap, has no header, or belongs to another interface.
    """
    first = b""
    for number, fd in enumerate(fds):
        name, flags = _interface(fd)
        if not flags & _IFF_TAP or not flags & _IFF_NO_PI or not flags & _IFF_VNET_HDR:
            raise TapError(f"Descriptor {fd} is of the wrong kind",
                           "attach it with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR")
        if number and (name != first or not flags & _IFF_MULTI_QUEUE):
            raise TapError(f"Descriptors {fds[0]} and {fd} are no queues of one interface",
                           "attach all with IFF_MULTI_QUEUE to one name")
        first = name
        os.set_blocking(fd, False)
        _set_header(fd, _text(name))


def tap_name(fd: int) -> str:
    """The interface that a descriptor belongs to now: it may have been renamed.

    :raises TapError: to none, or no more.
    """
    return _text(_interface(fd)[0])


def _interface(fd: int) -> tuple[bytes, int]:
    """Its name and flags."""
    try:
        name, flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
    except OSError as error:
        raise TapError(f"Descriptor {fd} is no open tap: {error.strerror}",
                       "open /dev/net/tun and attach it with TUNSETIFF") from error
    return name.rstrip(b"\0"), flags


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _set_header(fd: int, name: str) -> None:
    try:
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, _INT.pack(HEADER_BYTES))
        fcntl.ioctl(fd, TUNSETVNETLE, _INT.pack(1))
    except OSError as error:
        raise TapError(f"The tap '{name}' takes no headers of {HEADER_BYTES} bytes: "
                       f"{error.strerror}", "a kernel from 4.0 on is needed") from error

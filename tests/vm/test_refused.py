"""Refused starts, by the product's own command: one line, exit 1, nothing left behind.

tests/unit/vmm/config has what the parser refuses; here is what only the start finds out, each
beside everything that a start could leave: a disk with its worker, sockets, a pidfile.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from tests.support.capabilities import require
from tests.support.guest import guest
from tests.support.starts import Ended, Starter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    require("kvm")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "garbage").write_bytes(b"\x7fELF" + bytes(range(256)) * 16)
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with Starter(tmp_path) as starter:
        yield starter


def whole(**changes: str | None) -> list[str]:
    """A good command line; `changes` replace the value of an option, None removes it."""
    line = {"machine": "microvm", "kernel": str(guest("guest.elf")), "m": "128",
            "qmp": "unix:q.sock,server,nowait", "pidfile": "pid",
            "serial": "socket,path=c.sock,server,nowait", "drive": "id=d,file=disk",
            "device": "virtio-blk-device,drive=d", **changes}
    return [word for name, value in line.items() if value is not None
            for word in (f"-{name.replace('_', '-')}", value)]


def check_refused(ended: Ended, says: str) -> None:
    assert ended.status == 1
    assert ended.out == ""
    assert ended.err.startswith("stratovirt: ") and ended.err.endswith("\n")
    assert ended.err.count("\n") == 1, ended.err
    assert says in ended.err


REFUSED: list[tuple[str, dict[str, str | None], list[str], str]] = [
    ("unknown", {}, ["-foo"], "'-foo'"),
    ("line-break", {}, ["-uuid", "a\nb"], "-uuid a b: not a UUID"),
    ("not-text", {}, ["-uuid", "\udcff"], "not a UUID"),
    ("kernel-missing", {"kernel": "nope"}, [], "-kernel nope: No such file"),
    ("kernel-folder", {"kernel": "folder"}, [], "-kernel folder"),
    ("kernel-empty", {"kernel": "empty"}, [], "empty"),
    ("kernel-fifo", {"kernel": "fifo"}, [], "-kernel fifo"),
    ("kernel-garbage", {"kernel": "garbage"}, [], "garbage"),
    ("initrd-missing", {"initrd": "nope"}, [], "-initrd nope: No such file"),
    ("initrd-folder", {"initrd": "folder"}, [], "-initrd folder"),
    ("append-control", {"append": "a\x01"}, [], "-append"),
    ("append-long", {"append": "x" * 70_000}, [], "-append"),
    ("image-missing", {"drive": "id=d,file=nope"}, [],
     "-drive id=d,file=nope: Failed to get metadata"),
    ("image-folder", {"drive": "id=d,file=folder"}, [], "folder is not a regular file"),
    ("image-fifo", {"drive": "id=d,file=fifo"}, [], "fifo is not a regular file"),
    ("image-null", {"drive": "id=d,file=/dev/null"}, [], "/dev/null is not a regular file"),
    ("image-direct", {"drive": "id=d,file=/proc/version"}, [], "/proc/version"),
    ("image-twice", {}, ["-drive", "id=e,file=./disk"], "drive 'd' of this VM has it"),
    ("qmp-folder", {"qmp": "unix:no/such/q,server,nowait"}, [], "-qmp unix:no/such/q: "),
    ("qmp-file", {"qmp": "unix:disk,server,nowait"}, [], "disk: it exists and is not a socket"),
    ("qmp-host", {"qmp": "tcp:300.0.0.1:9,server,nowait"}, [], "300.0.0.1:9"),
    ("pidfile-folder", {"pidfile": "no/such/pid"}, [], "-pidfile no/such/pid: No such file"),
    ("pidfile-file", {"pidfile": "empty"}, [], "-pidfile empty: Pidfile path is existed"),
    ("log", {}, ["-D", "no/such/log"], "-D no/such/log: Failed to init logger"),
    ("serial-file", {"serial": "file,path=no/such/c"}, [], "-serial file,path=no/such/c: "),
    ("serial-socket", {"serial": "socket,path=nobody.sock"}, [],
     "-serial socket: can't connect to nobody.sock"),
    ("serial-fd", {"serial": "socket,fd=77"}, [], "descriptor 77"),
    ("serial-image", {"serial": "file,path=disk"}, [], "drive 'd' uses this file too"),
    ("mon-fd", {}, ["-chardev", "socket,id=m,fd=77,server,nowait", "-mon", "chardev=m"], "77"),
    # Nobody hands any over: these numbers are the VMM's own, or will be.
    *((f"serial-fd-{fd}", {"serial": f"socket,fd={fd}{more}"}, [],
       f"-serial socket: descriptor {fd}: Bad file descriptor")
      for fd in (3, 4, 5, 12) for more in ("", ",server,nowait")),
    ("tap-fd", {}, ["-netdev", "tap,id=n,fds=3"], "descriptor 3: Bad file descriptor"),
    ("fd-twice", {"serial": "socket,fd=9,server,nowait"},
     ["-chardev", "socket,id=m,fd=9,server,nowait", "-mon", "chardev=m"],
     "-mon chardev=m: descriptor 9: -serial socket has it already"),
    ("vsock-fd-twice", {"serial": "socket,fd=9"},
     ["-device", "vhost-vsock-device,guest-cid=3,vhostfd=9"],
     "guest-cid=3: vhostfd=9: -serial socket has it already"),
    ("vhost-nobody", {}, ["-chardev", "socket,id=v,path=nobody.sock", "-device",
                          "vhost-user-blk-device,chardev=v"], "nobody.sock"),
    ("vhost-pty", {}, ["-chardev", "pty,id=v", "-device", "vhost-user-blk-device,chardev=v"],
     "a vhost-user device needs a socket"),
    ("folder-pty", {}, ["-chardev", "pty,id=v", "-device", "vhost-user-fs-device,chardev=v,tag=t"],
     "a vhost-user device needs a socket"),
    ("vsock-fd", {}, ["-device", "vhost-vsock-device,guest-cid=3,vhostfd=0"],
     "guest-cid=3: vhostfd=0: the descriptor is not /dev/vhost-vsock; hand in an open one"),
    ("vsock-closed", {}, ["-device", "vhost-vsock-device,guest-cid=3,vhostfd=77"],
     "guest-cid=3: vhostfd=77: Bad file descriptor"),
    ("mem-path", {"mem_path": "no/such"}, [], "-mem-path no/such"),
    ("none-device", {"machine": "none"}, [], "-machine none has no place"),
    ("seven-disks", {}, [word for n in range(6) for word in (
        "-drive", f"id=e{n},file=/proc/version,readonly=on,direct=off",
        "-device", f"virtio-blk-device,drive=e{n}")], "A maximum of 6 block"),
]


@pytest.mark.parametrize(("changes", "more", "says"), [row[1:] for row in REFUSED],
                         ids=[row[0] for row in REFUSED])
def test_refused(starter: Starter, changes: dict[str, str | None], more: list[str],
                 says: str) -> None:
    before = set(os.listdir(starter.folder))
    check_refused(starter.run(*whole(**changes), *more), says)
    starter.assert_nothing_left(before)


@pytest.mark.parametrize("name", ["unknown", "kernel-missing", "image-fifo", "qmp-folder", "log",
                                  "pidfile-folder", "serial-image"])
def test_a_daemon_is_refused_in_the_foreground(starter: Starter, name: str) -> None:
    changes, more, says = next(row[1:] for row in REFUSED if row[0] == name)
    before = set(os.listdir(starter.folder))
    check_refused(starter.run(*whole(**changes), *more, "-daemonize"), says)
    # The error comes last: nothing is left the very moment that the command ends.
    assert set(os.listdir(starter.folder)) == before
    starter.assert_nothing_left(before)


def test_an_image_that_another_process_writes_to(starter: Starter) -> None:
    before = set(os.listdir(starter.folder))
    with (starter.folder / "disk").open("r+b") as disk:
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
        fcntl.fcntl(disk, fcntl.F_OFD_SETLK, lock)
        check_refused(starter.run(*whole()), "Failed to get write lock on file: disk")
    starter.assert_nothing_left(before)


def test_a_tcp_port_that_is_taken(starter: Starter) -> None:
    before = set(os.listdir(starter.folder))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        check_refused(starter.run(*whole(qmp=f"tcp:127.0.0.1:{port},server,nowait")),
                      f"127.0.0.1:{port}: Address already in use")
    starter.assert_nothing_left(before)


def test_with_a_log_the_error_is_in_it_too(starter: Starter) -> None:
    check_refused(starter.run(*whole(pidfile="empty"), "-D", "log"), "-pidfile empty")
    assert ":ERROR: -pidfile empty" in (starter.folder / "log").read_text()


@pytest.mark.parametrize(("closed", "status"), [("0<&-", 1), ("1>&-", 1), ("2>&-", 1),
                                                ("0<&- 1>&- 2>&-", 1)])
def test_closed_standard_descriptors(starter: Starter, closed: str, status: int) -> None:
    before = set(os.listdir(starter.folder))
    shell = ("sh", "-c", f'exec "$@" {closed}', "sh")
    ended = starter.run(*whole(pidfile="empty"), before=shell)
    assert ended.status == status
    assert ended.err == "" if "2>" in closed else "-pidfile empty" in ended.err
    starter.assert_nothing_left(before)


@pytest.mark.parametrize("option", ["-help", "-h", "-version", "-V"])
def test_texts(starter: Starter, option: str) -> None:
    ended = starter.run(option)
    assert ended.status == 0 and ended.err == ""
    assert ("-kernel" if option[1] == "h" else "StratoVirt 2.5.0") in ended.out


def test_the_sandboxs_stages(starter: Starter) -> None:
    ended = starter.run("-sandbox", "help")
    assert ended.status == 0 and ended.err == "" and "landlock" in ended.out

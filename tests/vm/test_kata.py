"""Kata Containers' life of a sandbox, its whole command line and what follows, in its order (its
driver `stratovirt.go` and its client `govmm`, read as a specification).  What is missing is the
vsock: this kind of machine has no vhost for it, see tests/lab/test_kata.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.capabilities import require
from tests.support.guest import SECTOR, crc32, guest, pattern
from tests.support.net_namespace import NetNamespace
from tests.support.starts import Starter
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

MIB = 1 << 20
MAC = "02:42:ac:11:00:02"
LIMIT = 20.0
KERNEL_LINE = ("root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4 "
               "reboot=k panic=1 net.ifnames=0 pci=off iommu=off acpi=off")


class Govmm:
    """Its client: a connection every 50 ms until one is answered, no ids, a reply a line."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + LIMIT
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                self.socket.close()
                assert time.monotonic() < deadline, f"nobody listens at {path}"
                time.sleep(0.05)  # as it does
        self.socket.settimeout(LIMIT)
        self.stream = self.socket.makefile("rb")
        assert self.line()["QMP"]["version"]["qemu"]["major"] >= 5
        self.run("qmp_capabilities")

    def line(self) -> dict[str, Any]:
        raw = self.stream.readline()
        assert raw.endswith(b"\n") and len(raw) < 65536
        message = json.loads(raw)
        assert isinstance(message, dict)
        return message

    def run(self, command: str, arguments: dict[str, Any] | None = None, event: str = "") -> Any:
        """Until the reply, and the event if one is waited for, are there, in any order."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        reply: dict[str, Any] | None = None
        happened: dict[str, Any] | None = None
        while reply is None or (event and happened is None):
            message = self.line()
            if message.get("event") == event:
                happened = message["data"]
            elif "event" not in message:
                reply = message
                if "error" in reply:
                    assert all(isinstance(v, str) for v in reply["error"].values())
                    raise AssertionError(reply["error"]["desc"])
        return happened if event else reply["return"]

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


class Sandbox:
    """One sandbox: a folder, a VMM, taps with two queues, a console, a shared folder's daemon.

    The guest's script channel is the one thing that Kata doesn't have: a serial port.
    """

    def __init__(self, starter: Starter, name: str, space: NetNamespace) -> None:
        self.folder = starter.folder / name
        self.folder.mkdir()
        self.qmp = self.folder / "qmp.socket"
        self.daemon = socket.socket(socket.AF_UNIX)
        self.daemon.bind(str(self.folder / "virtiofs_kata.socket"))
        self.daemon.listen()
        taps = space.tap(f"tap_{name}", 2)
        self.peer = space.packet_socket(f"tap_{name}")
        self.process = starter.start(*self._arguments(starter, name, taps), pass_fds=tuple(taps))
        for fd in taps:
            os.close(fd)  # as it does, once the VMM has them

    def _arguments(self, starter: Starter, name: str, taps: list[int]) -> list[object]:
        fds = ":".join(map(str, taps))
        return [
            "-name", f"sandbox-{name}", "-uuid", "12345678-90ab-cdef-1234-567890abcdef",
            "-smp", "2", "-m", "128", "-kernel", guest("guest.elf"), "-append", KERNEL_LINE,
            "-qmp", f"unix:{self.qmp},server,nowait", "-D", "-disable-seccomp",
            "-machine", "type=microvm,dump-guest-core=off,mem-share=on",
            "-object", "rng-random,id=objrng0,filename=/dev/urandom",
            "-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0",
            "-device", "virtio-serial-device,id=virtio-serial0",
            "-chardev", f"socket,id=charconsole0,path={self.folder}/console.socket,server,nowait",
            "-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0",
            "-drive", f"id=rootfs,file={starter.folder}/rootfs,readonly=on,direct=off",
            "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0",
            "-netdev", f"tap,id=tap_{name},fds={fds}",
            "-device", f"virtio-net-device,netdev=tap_{name},id=tap_{name},mac={MAC}",
            "-chardev",
            f"socket,id=virtio_fs,path={self.folder}/virtiofs_kata.socket,server,nowait",
            "-device", "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0",
            "-chardev", f"socket,id=script,path={self.folder}/script.socket,server,nowait",
            "-serial", "chardev:script"]

    def begin(self) -> None:
        """What its start does once the process is there."""
        client = Govmm(self.qmp)
        assert len({cpu["thread_id"] for cpu in client.run("query-cpus")}) == 2
        client.close()
        self.daemon.settimeout(LIMIT)
        self.fs, _ = self.daemon.accept()  # the VMM is the client, whatever the chardev says
        self.script = self._connect("script.socket")
        self.console = self._connect("console.socket")

    def _connect(self, name: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(LIMIT)
        client.connect(str(self.folder / name))
        return client

    def ask(self, command: str) -> str:
        """The guest's answer; it may not have got as far as to listen yet."""
        self.script.sendall(command.encode() + b"\n")
        heard = b""
        while True:
            data = self.script.recv(4096)
            assert data, heard
            heard += data
            for line in heard.splitlines(keepends=True):
                if line.endswith(b"\n") and line.startswith((b"ok ", b"fail ")):
                    return line.decode().strip()

    def plug(self, client: Govmm, image: Path, drive: str, slot: int,
             driver: str = "file") -> None:
        client.run("blockdev-add", {"node-name": drive, "driver": "raw", "read-only": False,
                                    "file": {"driver": driver, "filename": str(image),
                                             "aio": "native"}})
        client.run("device_add", {"id": f"virtio-{drive}", "driver": "virtio-blk-mmio",
                                  "drive": drive, "addr": str(slot), "romfile": ""})

    def unplug(self, client: Govmm, drive: str) -> None:
        data = client.run("device_del", {"id": f"virtio-{drive}"}, "DEVICE_DELETED")
        assert data["device"] == f"virtio-{drive}"

    def end(self) -> str:
        """SIGKILL; its output has ended at once, whoever may have held it."""
        for peer in (self.script, self.console, self.peer):
            peer.close()
        self.process.send_signal(signal.SIGKILL)
        out, err = self.process.communicate(timeout=5)
        assert self.process.returncode == -signal.SIGKILL
        assert b"ERROR" not in err, err
        # The VMM was the only one at the other end, and said nothing before the guest did.
        self.fs.settimeout(LIMIT)
        said = b""
        while data := self.fs.recv(4096):
            said += data
        assert len(said) < 100, said
        self.fs.close()
        self.daemon.close()
        (self.folder / "virtiofs_kata.socket").unlink()  # its own
        return out.decode()


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    require("kvm")
    (tmp_path / "rootfs").write_bytes(os.urandom(MIB))
    for number in range(4):
        (tmp_path / f"volume{number}").write_bytes(os.urandom((number + 1) * MIB))
    with Starter(tmp_path) as starter:
        starter.environment = {"STRATOVIRT_LOG_LEVEL": "info"}
        yield starter


@pytest.fixture
def space() -> Iterator[NetNamespace]:
    require("net_admin")
    space = NetNamespace()
    yield space
    space.close()


def started(starter: Starter, space: NetNamespace, *names: str) -> list[Sandbox]:
    """Sandboxes that start at the same time."""
    sandboxes = [Sandbox(starter, name, space) for name in names]
    for sandbox in sandboxes:
        sandbox.begin()
    return sandboxes


def value(answer: str, name: str) -> int:
    return int(next(word for word in answer.split() if word.startswith(f"{name}=")
                    ).partition("=")[2], 0)


def test_a_sandboxs_life(starter: Starter, space: NetNamespace) -> None:
    before = set(os.listdir(starter.folder))
    sandbox, other = started(starter, space, "a", "b")
    volumes = [starter.folder / f"volume{number}" for number in range(4)]
    for round_ in range(2):  # the same ids come again; each call has a connection of its own
        for slot in (1, 2, 3):
            client = Govmm(sandbox.qmp)
            sandbox.plug(client, volumes[slot], f"drive-{slot}", slot)
            client.close()
            answer = sandbox.ask(f"blk.info {slot}")
            assert value(answer, "sectors") == (slot + 1) * MIB // SECTOR
            assert sandbox.ask(f"blk.write {slot} {8 * round_} 8 {slot}").startswith("ok")
        for slot in (3, 1, 2):
            client = Govmm(sandbox.qmp)
            sandbox.unplug(client, f"drive-{slot}")
            client.close()
            assert value(sandbox.ask(f"blk.info {slot}"), "sectors") == 0
    for slot in (1, 2, 3):
        assert volumes[slot].read_bytes()[:16 * SECTOR] == (pattern(0, 8, slot)
                                                            + pattern(8, 8, slot))

    # A volume goes from one sandbox to the other, and one stays until the end.
    client, neighbour = Govmm(sandbox.qmp), Govmm(other.qmp)
    sandbox.plug(client, volumes[1], "drive-1", 1)
    with pytest.raises(AssertionError, match="volume1"):
        other.plug(neighbour, volumes[1], "drive-1", 1)
    sandbox.unplug(client, "drive-1")
    wait_until(lambda: plugged(other, neighbour, volumes[1]), "the volume to be free", 5)
    sandbox.plug(client, volumes[2], "drive-2", 2)
    client.close()

    # Stopped by its pid alone; the neighbour sees nothing.
    log = sandbox.end()
    assert all(":INFO: " in line or ":WARN: " in line for line in log.splitlines()), log
    assert value(other.ask("blk.read 1 0 64"), "crc") == crc32(volumes[1], 0, 64)
    neighbour.close()
    other.end()
    wait_until(lambda: not os.listdir(sandbox.folder) and not os.listdir(other.folder),
               "the end of the sockets", 5)
    starter.assert_nothing_left(before | {"a", "b"}, sandbox.process.pid)


def plugged(sandbox: Sandbox, client: Govmm, image: Path) -> bool:
    """Whether the image was to be had."""
    try:
        sandbox.plug(client, image, "drive-1", 1)
    except AssertionError as error:
        assert str(image) in str(error)
        return False
    return True


def test_several_at_once(starter: Starter, space: NetNamespace) -> None:
    """A node that comes up: every one gets its devices, none is in another's way."""
    before = set(os.listdir(starter.folder))
    names = [f"s{number}" for number in range(6)]
    sandboxes = started(starter, space, *names)
    for sandbox in sandboxes:
        client = Govmm(sandbox.qmp)
        workers = client.run("query-workers")
        client.close()
        assert sorted(w["kind"] for w in workers) == ["blk", "console", "net", "rng"]
        assert all(w["state"] == "running" and w["restarts"] == 0 for w in workers)
        assert sandbox.ask("blk.read 0 0 64").startswith("ok")
        assert sandbox.ask("rng.read 64 1").startswith("ok")
    for sandbox in sandboxes:
        sandbox.end()
    wait_until(lambda: not any(os.listdir(s.folder) for s in sandboxes), "the ends", 10)
    starter.assert_nothing_left(before | set(names))


def test_what_fails_is_not_undone(starter: Starter, space: NetNamespace) -> None:
    """A device_add that fails leaves the back end: it asks for neither again."""
    sandbox, = started(starter, space, "a")
    client = Govmm(sandbox.qmp)
    sandbox.plug(client, starter.folder / "volume1", "drive-1", 1)
    with pytest.raises(AssertionError, match="occupied"):
        sandbox.plug(client, starter.folder / "volume2", "drive-2", 1)
    with pytest.raises(AssertionError, match="already registered"):
        sandbox.plug(client, starter.folder / "volume2", "drive-2", 2)
    client.run("device_add", {"id": "virtio-drive-2", "driver": "virtio-blk-mmio",
                              "drive": "drive-2", "addr": "2", "romfile": ""})
    assert value(sandbox.ask("blk.info 2"), "sectors") == 3 * MIB // SECTOR
    client.close()
    sandbox.end()


def test_a_block_device(starter: Starter, space: NetNamespace) -> None:
    """A volume of the host, as `host_device`."""
    require("root")
    image = starter.folder / "volume0"
    found = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True,
                           text=True, check=False)
    if found.returncode:
        pytest.skip(f"no loop device to be had: {found.stderr.strip()}")
    loop = Path(found.stdout.strip())
    try:
        sandbox, = started(starter, space, "a")
        client = Govmm(sandbox.qmp)
        sandbox.plug(client, loop, "drive-1", 3, "host_device")
        assert value(sandbox.ask("blk.read 3 0 64"), "crc") == crc32(image, 0, 64)
        sandbox.unplug(client, "drive-1")
        client.close()
        sandbox.end()
    finally:
        subprocess.run(["losetup", "-d", str(loop)], check=True)

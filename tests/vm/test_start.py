"""Starting and ending the product's command: daemon, signals, second start, users, consoles."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.capabilities import require
from tests.support.guest import guest
from tests.support.qmp import QmpClient
from tests.support.starts import Starter, children, peer_pid, wait_listening
from tests.support.test_vm import ROOT, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+: \[\d+\]\[\d+\]\[[\w.]+:\d+\]:(INFO|WARN): .+")


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    require("kvm")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with Starter(tmp_path) as starter:
        yield starter


def whole(serial: str = "socket,path=c.sock,server,nowait", qmp: str = "q.sock",
          kernel: str | Path = "") -> list[str]:
    return ["-machine", "microvm", "-m", "128", "-kernel", str(kernel or guest("guest.elf")),
            "-qmp", f"unix:{qmp},server,nowait", "-pidfile", "pid", "-serial", serial,
            "-drive", "id=d,file=disk", "-device", "virtio-blk-device,drive=d"]


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def ask(fd: int) -> None:
    """Have the guest answer over some console, whatever it had said before."""
    deadline = time.monotonic() + 20
    text = b""
    while not re.search(rb"(?m)^ok ", text):
        assert time.monotonic() < deadline, text
        os.write(fd, b"echo\n")  # again: a guest that just boots empties its port's FIFO
        if select.select([fd], [], [], 1)[0]:
            data = os.read(fd, 4096)
            assert data, text
            text += data


# ---- the process ------------------------------------------------------------------------------


def test_the_started_process_is_the_vmm(starter: Starter) -> None:
    process = starter.start(*whole())
    wait_listening(starter.folder / "q.sock", process)
    assert peer_pid(starter.folder / "q.sock") == process.pid
    assert peer_pid(starter.folder / "c.sock") == process.pid
    wait_until(lambda: text_of(starter.folder / "pid") == str(process.pid), "the pidfile")


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_end_it_orderly(starter: Starter, number: signal.Signals) -> None:
    before = set(os.listdir(starter.folder))
    process = starter.start(*whole())
    wait_listening(starter.folder / "q.sock", process)
    qmp = QmpClient(str(starter.folder / "q.sock"))
    qmp.command("query-status")
    process.send_signal(number)
    with pytest.raises((EOFError, ConnectionError)):
        while True:
            qmp.receive()
    assert [e["data"] for e in qmp.events if e["event"] == "SHUTDOWN"] == [
        {"guest": False, "reason": "host-signal"}]
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err.decode()) == (0, "")
    starter.assert_nothing_left(before, process.pid)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_start(starter: Starter, number: signal.Signals) -> None:
    before = set(os.listdir(starter.folder))
    for delay in (0.0, 0.06, 0.12, 0.18, 0.24, 0.3, 0.4):
        process = starter.start(*whole())
        time.sleep(delay)  # any moment will do
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        # Ended by the signal while it had nothing, else orderly. Python's own start isn't ours.
        assert process.returncode in (0, -number) or b"KeyboardInterrupt" in err
        starter.assert_nothing_left(before, process.pid)


def test_sigkill_leaves_no_process_and_the_next_start_works(starter: Starter) -> None:
    for _ in range(2):
        process = starter.start(*whole())
        wait_listening(starter.folder / "q.sock", process)
        wait_until(lambda process=process: text_of(starter.folder / "pid") == str(process.pid),
                   "the pidfile")
        process.kill()
        # Standard output ends with the VMM: nobody else had it.
        process.communicate(timeout=5)
        wait_until(lambda: not starter.orphans(), "the end of worker and nursery", 5)


def test_nobody_else_holds_what_the_vmm_inherited(starter: Starter) -> None:
    reader, writer = os.pipe()
    process = starter.start(*whole(), pass_fds=(writer,))
    wait_listening(starter.folder / "q.sock", process)
    qmp = QmpClient(str(starter.folder / "q.sock"))
    wait_until(lambda: qmp.command("query-workers")[0]["state"] == "running", "the worker")
    secret = os.readlink(f"/proc/self/fd/{writer}")
    assert process.stdout is not None and process.stderr is not None
    streams = {os.readlink(f"/proc/self/fd/{s.fileno()}") for s in (process.stdout,
                                                                     process.stderr)}
    found = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children")
             .read_text().split()]
    assert len(found) >= 2  # nursery and worker
    for pid in found:
        fds = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        assert not fds & (streams | {secret})
    os.close(reader)
    os.close(writer)


# ---- a second start ---------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["qmp", "console", "disk", "pidfile"])
def test_a_second_start_leaves_the_first_alone(starter: Starter, shared: str) -> None:
    first = starter.start(*whole())
    wait_listening(starter.folder / "q.sock", first)
    wait_until(lambda: text_of(starter.folder / "pid"), "the pidfile")
    (starter.folder / "disk2").write_bytes(bytes(1 << 20))
    before = set(os.listdir(starter.folder))
    line = " ".join(whole())
    for name, own in (("qmp", "q.sock q2.sock"), ("console", "c.sock c2.sock"),
                      ("disk", "file=disk file=disk2"), ("pidfile", "-pidfile&pid -pidfile&pid2")):
        if name != shared:
            old, new = own.replace("&", "\0").split()
            line = line.replace(old.replace("\0", " "), new.replace("\0", " "))
    ended = starter.run(*line.split())
    assert ended.status == 1 and ended.err.count("\n") == 1
    assert {"qmp": "q.sock: another process listens", "console": "c.sock: another process",
            "disk": "write lock on file: disk", "pidfile": "-pidfile pid"}[shared] in ended.err
    assert set(os.listdir(starter.folder)) == before
    assert peer_pid(starter.folder / "q.sock") == first.pid
    assert text_of(starter.folder / "pid") == str(first.pid)
    qmp = QmpClient(str(starter.folder / "q.sock"))
    assert qmp.command("query-status")["status"] == "running"
    qmp.command("quit")
    assert first.wait(20) == 0


def test_a_path_that_another_vm_took_over_stays(starter: Starter) -> None:
    first = starter.start(*whole())
    wait_listening(starter.folder / "q.sock", first)
    wait_until(lambda: text_of(starter.folder / "pid"), "the pidfile")
    for name in ("q.sock", "c.sock", "pid"):
        (starter.folder / name).unlink()  # Kata removes the whole folder
    (starter.folder / "disk2").write_bytes(bytes(1 << 20))
    second = starter.start(*" ".join(whole()).replace("file=disk", "file=disk2").split())
    wait_listening(starter.folder / "q.sock", second)
    wait_until(lambda: text_of(starter.folder / "pid"), "the pidfile")
    first.terminate()
    assert first.wait(20) == 0
    assert peer_pid(starter.folder / "q.sock") == second.pid
    assert peer_pid(starter.folder / "c.sock") == second.pid
    assert text_of(starter.folder / "pid") == str(second.pid)


# ---- the daemon -------------------------------------------------------------------------------


def test_a_daemon_is_ready_when_its_command_returns(starter: Starter) -> None:
    before = set(os.listdir(starter.folder))
    ended = starter.run(*whole(), "-daemonize")  # reads both streams to their ends
    assert (ended.status, ended.out, ended.err) == (0, "", "")
    pid = int(text_of(starter.folder / "pid"))
    assert pid in children() and pid not in {p.pid for p in starter.started}
    assert os.getsid(pid) == pid
    for fd in (0, 1, 2):
        assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
    assert peer_pid(starter.folder / "q.sock") == pid
    qmp = QmpClient(str(starter.folder / "q.sock"))
    assert qmp.command("query-status")["status"] == "running"
    qmp.command("quit")
    starter.assert_nothing_left(before, pid)


@pytest.mark.parametrize("accel", ["kvm:tcg", "tcg"])
def test_libvirts_probe(starter: Starter, accel: str) -> None:
    starter.environment = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin"}
    before = set(os.listdir(starter.folder))
    qmp_path = starter.folder / "qmp.monitor"
    ended = starter.run("-S", "-no-user-config", "-nodefaults", "-nographic", "-machine",
                        f"none,accel={accel}", "-qmp", f"unix:{qmp_path},server=on,wait=off",
                        "-pidfile", starter.folder / "qmp.pid", "-daemonize")
    assert (ended.status, ended.out, ended.err) == (0, "", "")
    pid = int(text_of(starter.folder / "qmp.pid"))
    qmp = QmpClient(str(qmp_path))
    qmp.command("qmp_capabilities")
    assert "none" in {machine["name"] for machine in qmp.command("query-machines")}
    os.kill(pid, signal.SIGTERM)
    starter.assert_nothing_left(before, pid)


def test_katas_start(starter: Starter) -> None:
    """Kata's command line and environment (managers.md), with the devices that there are."""
    starter.environment = {"STRATOVIRT_LOG_LEVEL": "info"}
    process = starter.start(
        "-name", "sandbox-1", "-uuid", "12345678-90ab-cdef-1234-567890abcdef", "-smp", "2",
        "-m", "128", "-kernel", guest("guest.elf"), "-append",
        "root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4 reboot=k "
        "panic=1 net.ifnames=0 pci=off iommu=off acpi=off", "-qmp", "unix:q.sock,server,nowait",
        "-D", "-disable-seccomp", "-machine", "type=microvm,dump-guest-core=off,mem-share=on",
        "-object", "rng-random,id=objrng0,filename=/dev/urandom",
        "-drive", "id=rootfs,file=disk,readonly=on,direct=off",
        "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0",
        "-chardev", "socket,id=charconsole0,path=c.sock,server,nowait")
    wait_listening(starter.folder / "q.sock", process)
    for _ in range(2):  # the start disconnects, the next call connects again at once
        qmp = QmpClient(str(starter.folder / "q.sock"))
        assert qmp.greeting["QMP"]["version"]["qemu"]["major"] >= 5
        qmp.command("qmp_capabilities")
        assert len({cpu["thread_id"] for cpu in qmp.command("query-cpus")}) == 2
        qmp.close()
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err.decode()) == (0, "")
    assert out
    for line in out.decode().splitlines():
        assert LOG_LINE.fullmatch(line), line


# ---- users ------------------------------------------------------------------------------------


def as_nobody(folder: str, mode: str) -> tuple[str, ...]:
    """A prefix: as nobody, with a /dev/kvm of this mode in a mount namespace."""
    script = (f"mount -t tmpfs none {folder}/dev && mknod {folder}/dev/kvm c 10 232 && "
              f"chmod {mode} {folder}/dev/kvm && mount --bind {folder}/dev/kvm /dev/kvm && "
              'exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"')
    return ("unshare", "--mount", "sh", "-c", script, "sh")


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Starter]:
    """Starts in a folder that nobody may write to."""
    require("kvm")
    require("root")
    if not os.stat(ROOT).st_mode & 0o001:
        pytest.skip("nobody can read the product")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, Starter(Path(folder)) as starter:
        os.chmod(folder, 0o777)
        shutil.copy(guest("guest.elf"), f"{folder}/kernel")
        Path(f"{folder}/disk").write_bytes(bytes(1 << 20))
        Path(f"{folder}/dev").mkdir()
        for name in ("kernel", "disk"):
            os.chown(f"{folder}/{name}", 65534, 65534)
        yield starter


def uid_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def test_an_ordinary_user_with_access_to_kvm(public: Starter) -> None:
    before = set(os.listdir(public.folder))
    process = public.start(*whole(kernel="kernel"), before=as_nobody(str(public.folder), "666"))
    wait_listening(public.folder / "q.sock", process)
    assert peer_pid(public.folder / "q.sock") == process.pid
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert re.search(r"Uid:\s+65534\s+65534\s+65534\s", status)
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(20)
        console.connect(str(public.folder / "c.sock"))
        ask(console.fileno())
    qmp = QmpClient(str(public.folder / "q.sock"))
    wait_until(lambda: qmp.command("query-workers")[0]["state"] == "running", "the worker")
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err.decode()) == (0, "")
    public.assert_nothing_left(before, process.pid)


def test_an_ordinary_user_without_access_to_kvm(public: Starter) -> None:
    before = set(os.listdir(public.folder))
    ended = public.run(*whole(kernel="kernel"), before=as_nobody(str(public.folder), "600"))
    assert ended.status == 1 and ended.err.count("\n") == 1
    assert "No permission to open /dev/kvm" in ended.err
    public.assert_nothing_left(before)


# ---- consoles ---------------------------------------------------------------------------------


def test_started_frozen(start_vm: Start) -> None:
    vm = start_vm("-S")
    assert vm.qmp.command("query-status") == {"running": False, "singlestep": False,
                                              "status": "prelaunch"}
    time.sleep(0.2)  # long enough for a guest that runs
    assert vm.output == b""
    vm.qmp.command("cont")
    assert vm.guest("echo").ok
    assert vm.qmp.command("query-status")["status"] == "running"


def test_serial_on_stdio(start_vm: Start) -> None:
    assert start_vm().guest("echo").ok


def test_serial_on_a_pty(starter: Starter) -> None:
    process = starter.start(*whole("pty"))
    wait_listening(starter.folder / "q.sock", process)
    qmp = QmpClient(str(starter.folder / "q.sock"))
    (chardev,) = qmp.command("query-chardev")
    assert chardev["filename"].startswith("pty:/dev/pts/")
    fd = os.open(chardev["filename"][4:], os.O_RDWR | os.O_NOCTTY)
    wait_until(lambda: qmp.command("query-chardev")[0]["frontend-open"], "the pty's reader")
    time.sleep(0.3)  # the VM looks for readers now and then
    ask(fd)
    os.close(fd)


def test_serial_on_a_socket(starter: Starter) -> None:
    process = starter.start(*whole("chardev:con"), "-chardev",
                            "socket,id=con,path=c.sock,server,nowait")
    wait_listening(starter.folder / "c.sock", process)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as console:
            console.settimeout(20)
            console.connect(str(starter.folder / "c.sock"))
            ask(console.fileno())


def test_serial_into_a_file(starter: Starter) -> None:
    process: subprocess.Popen[bytes] = starter.start(*whole("file,path=console"))
    wait_until(lambda: "ready" in text_of(starter.folder / "console"), "the guest's output")
    process.terminate()
    assert process.wait(20) == 0


def test_qmp_by_mon_and_tcp_and_an_inherited_socket(starter: Starter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(starter.folder / "inherited"))
    listener.listen()
    fd = listener.fileno()
    process = starter.start("-mon", "chardev=a", *whole(), "-chardev",
                            f"socket,id=a,host=127.0.0.1,port={port},server,nowait",
                            "-chardev", f"socket,id=m,fd={fd},server=on,wait=off",
                            "-mon", "chardev=m,mode=control", pass_fds=(fd,))
    listener.close()
    wait_listening(starter.folder / "q.sock", process)
    clients = [QmpClient(str(starter.folder / "inherited")), QmpClient(("127.0.0.1", port)),
               QmpClient(str(starter.folder / "q.sock"))]
    for client in clients:
        assert client.command("query-status")["running"]
    # The chardevs that are monitors aren't consoles too.
    names = {chardev["label"] for chardev in clients[0].command("query-chardev")}
    assert json.dumps(sorted(names)) and "m" not in names
    clients[1].command("quit")
    assert process.wait(20) == 0

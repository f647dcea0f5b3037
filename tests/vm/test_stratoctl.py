"""`stratoctl` with VMs that run."""

from __future__ import annotations

import os
import signal
import socket
import termios
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.ctl import Terminal, ctl, ctl_json
from tests.support.guest import SECTOR, crc32
from tests.support.killer import children
from tests.support.qmp import connect
from tests.support.test_vm import TestVm, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "web").mkdir(parents=True)
    return folder


@pytest.fixture
def web(start_vm: Start, run_dir: Path, tmp_path: Path) -> TestVm:
    """A VM `web` with a disk, in its folder below the run directory."""
    root = tmp_path / "root.img"
    root.write_bytes(os.urandom(MIB))
    vm = start_vm("-name", "title", "-chardev",
                  f"socket,id=qmp,path={run_dir}/web/qmp.sock,server,nowait",
                  "-mon", "chardev=qmp,mode=control", disks=(f"{root},direct=off",))
    vm.wait_output(r"^ready")
    return vm


def test_ps_and_status(web: TestVm, run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run_dir / "dead.sock"))  # nobody listens
    alone, = [vm for vm in ctl_json("ps", "--run-dir", run_dir) if vm["name"] == "web"]
    assert alone["state"] == "running"
    assert (alone["pid"], alone["cpus"], alone["devices"]) == (web.process.pid, 1, 1)
    assert alone["own-bytes"] > MIB
    assert alone["guest-bytes"] > 0
    text = ctl("--run-dir", run_dir, "ps")
    assert "web" in text and str(web.process.pid) in text
    assert "dead" in text and "unreachable" in text
    told = ctl_json("status", "web", "--run-dir", run_dir)
    assert (told["title"], told["state"]) == ("title", "running")
    assert [worker["device"] for worker in told["workers"]] == ["blk0"]
    text = ctl("--qmp", web.qmp_path, "status")
    assert "blk0" in text and "root.img" in text and "1.0 MiB" in text


def test_stop_cont_quit(web: TestVm, run_dir: Path) -> None:
    where = ("--run-dir", str(run_dir))
    assert ctl("stop", "web", *where) == ""
    assert web.qmp.command("query-status")["status"] == "paused"
    assert "paused" in ctl("stop", "web", *where, status=1)
    assert ctl_json("cont", "web", *where) == {}
    assert web.qmp.command("query-status")["status"] == "running"
    ctl("reset", "web", *where)
    web.qmp.wait_event("RESET")
    ctl("powerdown", "web", *where)
    web.qmp.wait_event("POWERDOWN")
    ctl("quit", "web", *where)
    assert web.process.poll() == 0  # not merely about to end
    assert "There is no VM 'web'" in ctl("status", "web", *where, status=1)
    assert ctl_json("ps", *where) == []


def test_disks_come_and_go(web: TestVm, run_dir: Path, tmp_path: Path) -> None:
    where = ("--run-dir", str(run_dir))
    image = tmp_path / "data.img"
    image.write_bytes(os.urandom(2 * MIB))
    assert ctl_json("attach-disk", "web", image, "--cached", *where) == {"id": "disk0", "slot": 1}
    assert web.guest("blk.read 1 3 100").value("crc") == crc32(image, 3, 100)
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    answer = ctl("attach-disk", "web", other, "--cached", "--addr", "5", "--id", "mine",
                 "--serial", "S1", "--read-only", *where)
    assert answer == "web: 'mine' is in slot 5\n"
    assert web.guest("blk.info 5").value("sectors") == MIB // SECTOR
    told = ctl_json("status", "web", *where)
    assert {entry["qdev"] for entry in told["block"]} == {"blk0", "disk0", "mine"}
    ctl("detach", "web", "disk0", *where)
    assert web.guest("blk.info 1").value("sectors") == 0
    assert ctl_json("attach-disk", "web", image, "--cached", *where) == {"id": "disk0", "slot": 1}


def test_what_fails_half_way_is_taken_back(web: TestVm, run_dir: Path, tmp_path: Path) -> None:
    where = ("--run-dir", str(run_dir))
    image = tmp_path / "data.img"
    image.write_bytes(bytes(MIB))
    add = ("attach-disk", "web", image, "--cached", *where)
    assert "occupied" in ctl(*add, "--addr", "0", status=1)
    assert "no slot 9" in ctl(*add, "--addr", "9", status=1)
    assert len(web.qmp.command("query-named-block-nodes")) == 1
    for number in range(5):
        extra = tmp_path / f"extra{number}.img"
        extra.write_bytes(bytes(MIB))
        assert ctl_json("attach-disk", "web", extra, "--cached", *where)["slot"] == number + 1
    assert "all 6 slots are occupied" in ctl(*add, status=1)
    assert len(web.qmp.command("query-named-block-nodes")) == 6
    assert "missing.img" in ctl("attach-disk", "web", tmp_path / "missing.img", *where, status=1)
    assert "nothing" in ctl("detach", "web", "nothing", *where, status=1)


def test_events(web: TestVm, run_dir: Path) -> None:
    shown: list[str] = []
    watcher = threading.Thread(target=lambda: shown.append(
        ctl("events", "web", "-n", "2", "--run-dir", run_dir)))
    watcher.start()
    # It has no way to say that it listens: give it something until it has seen two.
    deadline = time.monotonic() + 30
    while watcher.is_alive() and time.monotonic() < deadline:
        web.qmp.command("stop")
        web.qmp.command("cont")
        watcher.join(0.1)
    assert sorted(line.split()[2] for line in shown[0].splitlines()) == ["RESUME", "STOP"]


def test_the_end_of_the_vm_ends_events(web: TestVm, run_dir: Path) -> None:
    with Terminal("--json", "events", "web", "--run-dir", run_dir) as terminal:
        wait_until(lambda: web.qmp.command("stop") == web.qmp.command("cont")
                   and terminal.shows(b"RESUME"), "an event")
        web.qmp.command("quit")
        terminal.wait_for(b"SHUTDOWN")
        assert terminal.wait() == 0
        assert b"Traceback" not in terminal.output


def test_top_reads_pages_alone(web: TestVm, run_dir: Path) -> None:
    """The VM is stopped by SIGSTOP, so it can't answer anybody, and `top` shows it all the same."""
    where = ("--run-dir", str(run_dir))
    wait_until(lambda: "sv-blk-blk0" in children(web.process.pid).values(), "the worker's name")
    worker, = (pid for pid, name in children(web.process.pid).items() if name == "sv-blk-blk0")
    os.kill(worker, signal.SIGKILL)
    web.qmp.wait_event("WORKER_RESTARTED")
    assert web.guest("blk.write 0 0 512 7").ok
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            web.guest("blk.stress 0 0 256 8 4")

    loader = threading.Thread(target=load)
    loader.start()
    seen: list[Any] = []

    def is_busy() -> bool:
        """In this interval: on a machine with other work the guest may stand still for one."""
        seen[:] = ctl_json("top", "web", "-n", "1", "-i", "0.5", *where)
        device, = seen[0]["devices"]
        return device["in-per-second"] > 0 and device["out-bytes-per-second"] > 0

    try:
        wait_until(is_busy, "reads and writes")
    finally:
        stop.set()
        loader.join()
    vm, = seen
    assert (vm["name"], vm["pid"]) == ("web", web.process.pid)
    assert vm["cpu"] > 0
    device, = vm["devices"]
    assert (device["device"], device["kind"], device["restarts"]) == ("blk0", "blk", 1)
    assert 0 < device["latency-50-ns"] <= device["latency-99-ns"]
    os.kill(web.process.pid, signal.SIGSTOP)
    try:
        text = ctl("top", "web", "-n", "2", "-i", "0.1", *where)
        assert text.count("blk0") == 2
        vm, = ctl_json("top", "-n", "1", "-i", "0.1", *where)
        assert vm["devices"][0]["in-per-second"] == 0
        assert "GUEST RAM" in ctl("top", "-n", "1", "-i", "0.1")
    finally:
        os.kill(web.process.pid, signal.SIGCONT)


def test_top_on_a_terminal(web: TestVm, run_dir: Path) -> None:
    with Terminal("top", "web", "--run-dir", run_dir, "-i", "0.1") as terminal:
        terminal.wait_for(b"blk0")
        terminal.wait_for(b"blk0")
        os.kill(terminal.process.pid, signal.SIGINT)
        assert terminal.wait() == 0
        assert b"Traceback" not in terminal.output


def test_top_ends_with_the_vm(web: TestVm, run_dir: Path) -> None:
    with Terminal("top", "web", "--run-dir", run_dir, "-i", "0.1") as terminal:
        terminal.wait_for(b"blk0")
        os.kill(web.process.pid, signal.SIGKILL)
        web.process.wait(10)
        assert terminal.wait() == 0
        terminal.wait_for(b"web: no such VM any more")


def test_top_follows_who_comes_and_goes(web: TestVm, start_vm: Start, run_dir: Path) -> None:
    """Another VM takes the place of one: the same name, another process."""
    with Terminal("top", "--run-dir", run_dir, "-i", "0.1") as terminal:
        terminal.wait_for(str(web.process.pid).encode())
        web.qmp.command("quit")
        web.wait()
        terminal.wait_for(b"no VMs")
        (run_dir / "web/qmp.sock").unlink(missing_ok=True)
        other = start_vm("-qmp", f"unix:{run_dir}/web/qmp.sock,server,nowait", qmp=False)
        terminal.wait_for(str(other.process.pid).encode())
        terminal.type(b"q")
        assert terminal.wait() == 0


def test_a_vm_whose_socket_was_handed_in(start_vm: Start, run_dir: Path, tmp_path: Path) -> None:
    """Whoever made the socket isn't the VM."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{run_dir}/web/qmp.sock")
        listener.listen(8)
        vm = start_vm("-chardev", f"socket,id=m,fd={listener.fileno()},server=on,wait=off",
                      "-mon", "chardev=m,mode=control", pass_fds=(listener.fileno(),))
    wait_for_qmp(run_dir)
    where = ("--run-dir", str(run_dir))
    assert ctl_json("ps", *where)[0]["pid"] == vm.process.pid
    assert ctl_json("top", "web", "-n", "1", "-i", "0.1", *where)[0]["pid"] == vm.process.pid
    ctl("quit", "web", *where)
    assert vm.wait() == 0


def test_a_vm_that_hangs(web: TestVm, run_dir: Path) -> None:
    where = ("--run-dir", str(run_dir))
    os.kill(web.process.pid, signal.SIGSTOP)
    try:
        listed, = ctl_json("ps", *where)
        assert listed["state"] == "unreachable" and "no answer in time" in listed["reason"]
        assert ctl("__complete", *where, "detach", "web", "") == ""
    finally:
        os.kill(web.process.pid, signal.SIGCONT)
    assert ctl_json("ps", *where)[0]["state"] == "running"


# ---- the console ---------------------------------------------------------------------------


def wait_for_qmp(run_dir: Path) -> None:
    """Until the VM is there: stratoctl doesn't wait for one that is about to be."""
    connect(f"{run_dir}/web/qmp.sock", 30).close()


@pytest.mark.parametrize("kind", ["socket", "pty"])
def test_the_console_on_a_terminal(start_vm: Start, run_dir: Path, kind: str) -> None:
    serial = {"pty": "pty", "socket": f"socket,path={run_dir}/web/console.sock,server,nowait"}
    start_vm("-qmp", f"unix:{run_dir}/web/qmp.sock,server,nowait", "-serial", serial[kind],
             qmp=False, serial=False)
    wait_for_qmp(run_dir)
    with Terminal("console", "web", "--run-dir", run_dir) as terminal:
        before = termios.tcgetattr(terminal.follower)
        terminal.wait_for(b"Ctrl-] leaves")
        wait_until(lambda: not termios.tcgetattr(terminal.follower)[3] & termios.ICANON, "raw")
        terminal.type(b"echo one\n")
        terminal.wait_for(b"ok ")
        terminal.type(b"echo two\n")
        terminal.wait_for(b"ok ")
        assert terminal.process.poll() is None
        terminal.type(b"\x1d")
        assert terminal.wait() == 0
        assert termios.tcgetattr(terminal.follower) == before
    # The next one gets in at once, and the VM's end ends it.
    with Terminal("console", "web", "--run-dir", run_dir) as terminal:
        terminal.wait_for(b"Ctrl-] leaves")
        terminal.type(b"mem\n")
        terminal.wait_for(b"ok ")
        ctl("quit", "web", "--run-dir", run_dir)
        terminal.wait_for(b"has closed its console")
        assert terminal.wait() == 0


def test_a_console_in_a_pipe(start_vm: Start, run_dir: Path) -> None:
    vm = start_vm("-qmp", f"unix:{run_dir}/web/qmp.sock,server,nowait", "-serial",
                  f"socket,path={run_dir}/web/console.sock,server,nowait",
                  qmp=False, serial=False)
    wait_for_qmp(run_dir)
    with connect(f"{run_dir}/web/console.sock", 30) as peer:
        peer.settimeout(30)
        peer.sendall(b"echo\n")
        assert peer.recv(1)
        assert "somebody else" in ctl("console", "web", "--run-dir", run_dir, status=1)
    # Its end is that of the guest.
    text = ctl("console", "web", "--run-dir", run_dir, typed="echo\npoweroff\n")
    assert "ok " in text
    assert vm.wait() == 0


def test_no_console_to_connect_to(web: TestVm, run_dir: Path) -> None:
    where = ("--run-dir", str(run_dir))
    assert "no console to connect to" in ctl("console", "web", *where, status=1)
    assert "nobody can connect" in ctl("console", "web", "--chardev", "serial_chardev", *where,
                                       status=1)
    assert "no chardev 'x'" in ctl("console", "web", "--chardev", "x", *where, status=1)


def test_completion_knows_vms_and_devices(web: TestVm, run_dir: Path) -> None:
    where = ("--run-dir", str(run_dir))
    assert ctl("__complete", *where, "status", "") == "web\n"
    assert ctl("__complete", *where, "top", "web", "w") == "web\n"
    assert ctl("__complete", *where, "detach", "web", "b") == "blk0\n"
    assert ctl("__complete", "--qmp", web.qmp_path, "detach", "") == "blk0\n"

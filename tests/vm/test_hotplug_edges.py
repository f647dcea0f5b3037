"""Plugging where it hurts: other features than before, deaths on the way, ends in the middle."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import hostile_backend
from tests.support.guest import SECTOR, crc32, pattern
from tests.support.hostile_backend import HostileBackend
from tests.support.killer import children, kill
from tests.support.qmp import QmpClient
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20
F_RO, F_MQ = 1 << 5, 1 << 12


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "plugged.img"
    path.write_bytes(os.urandom(4 * MIB))
    return path


def blockdev(image: Path, name: str = "d", read_only: bool = False) -> str:
    return json.dumps({"execute": "blockdev-add", "arguments": {
        "node-name": name, "file": {"driver": "file", "filename": str(image)},
        "cache": {"direct": False}, "read-only": read_only}})


def device(slot: int, name: str = "d") -> str:
    return json.dumps({"execute": "device_add", "arguments": {
        "id": name, "driver": "virtio-blk-mmio", "addr": hex(slot)}})


def unplug(name: str = "d") -> str:
    return json.dumps({"execute": "device_del", "arguments": {"id": name}})


def run(vm: TestVm, *commands: str) -> None:
    for command in commands:
        answer = vm.qmp.raw(command, timeout=40)
        assert answer == {"return": {}}, (command, answer)


def worker_of(vm: TestVm, name: str = "d") -> int:
    pid = next(w["pid"] for w in vm.qmp.command("query-workers") if w["device"] == name)
    assert isinstance(pid, int)
    return pid


# ---- a driver keeps the features that it has taken ---------------------------------------------


def disk_of_the_command_line(start_vm: Start, tmp_path: Path, drive: str, options: str) -> TestVm:
    cold = tmp_path / "cold.img"
    cold.write_bytes(os.urandom(MIB))
    return start_vm("-drive", f"id=c,file={cold},direct=off{drive}", "-device",
                    f"virtio-blk-device,drive=c,id=cold{options}")


@pytest.mark.parametrize(("drive", "options"), [
    ("", ""), (",readonly=on", ""), ("", ",num-queues=4"), ("", ",queue-size=64,num-queues=2"),
    (",discard=unmap,detect-zeroes=unmap", ",serial=cold1")])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_disk_of_the_command_line_makes_way(start_vm: Start, tmp_path: Path, image: Path,
                                              drive: str, options: str, read_only: bool) -> None:
    vm = disk_of_the_command_line(start_vm, tmp_path, drive, options)
    assert vm.guest("blk.read 0 0 8").ok
    run(vm, unplug("cold"))
    assert not vm.guest("blk.read 0 0 8").ok
    run(vm, blockdev(image, read_only=read_only), device(0))
    assert vm.guest("blk.read 0 0 64").value("crc") == crc32(image, 0, 64)
    assert vm.guest("blk.write 0 0 8 1").ok is not read_only
    assert vm.guest("blk.init 0").ok  # the driver probes again
    assert vm.guest("blk.read 0 8 64").value("crc") == crc32(image, 8, 64)
    run(vm, unplug())
    assert not vm.guest("blk.read 0 0 8").ok


def test_a_read_only_disk_makes_way_for_a_writable_one(start_vm: Start, image: Path) -> None:
    vm = start_vm()
    run(vm, blockdev(image, read_only=True), device(2))
    assert vm.guest("blk.init 2").value("features") & F_RO
    run(vm, unplug(), blockdev(image), device(2))
    assert vm.guest("blk.write 2 0 8 7").ok
    assert image.read_bytes()[:8 * SECTOR] == pattern(0, 8, 7)
    kill(worker_of(vm))  # the next one is given the same features
    assert vm.guest("blk.read 2 0 64").value("crc") == crc32(image, 0, 64)


# ---- commands that meet something else ---------------------------------------------------------


def test_the_worker_dies_when_its_device_goes(start_vm: Start, image: Path) -> None:
    vm = start_vm()
    for round_ in range(6):
        run(vm, blockdev(image), device(1))
        assert vm.guest(f"blk.write 1 {8 * round_} 8 {round_}").ok
        kill(worker_of(vm))  # its end is noticed before, while or after the command runs
        run(vm, unplug())
        assert not vm.guest("blk.read 1 0 8").ok
    for round_ in range(6):
        at = 8 * round_ * SECTOR
        assert image.read_bytes()[at:at + 8 * SECTOR] == pattern(8 * round_, 8, round_)


def test_unplugged_while_its_worker_is_replaced(start_vm: Start, image: Path) -> None:
    vm = start_vm()
    run(vm, blockdev(image), device(1))
    assert vm.guest("blk.read 1 0 8").ok
    with QmpClient(str(vm.qmp_path)) as other:
        other.command("qmp_capabilities")
        other.socket.sendall(b'{"execute":"worker-restart","arguments":{"device":"d"}}')
        run(vm, unplug())
        while "event" in other.receive():
            pass  # the upgrade has ended, whichever way
    assert not vm.guest("blk.read 1 0 8").ok
    run(vm, blockdev(image), device(1))
    assert vm.guest("blk.read 1 0 8").ok


def test_a_client_that_leaves_is_obeyed(start_vm: Start, image: Path) -> None:
    vm = start_vm()
    client = QmpClient(str(vm.qmp_path))
    client.command("qmp_capabilities")
    client.socket.sendall((blockdev(image) + device(3)).encode())
    client.close()
    wait_until(lambda: vm.guest("blk.info 3").value("sectors") == 4 * MIB // SECTOR, "the disk")
    assert vm.guest("blk.read 3 0 64").value("crc") == crc32(image, 0, 64)


def test_pipelined_commands_in_order(start_vm: Start, image: Path) -> None:
    vm = start_vm()
    assert vm.qmp.greeting
    vm.qmp.command("query-status")
    cycle = (blockdev(image) + device(1) + unplug()) * 5
    vm.qmp.socket.sendall((cycle + '{"execute":"query-block"}').encode())
    answers: list[dict[str, Any]] = []
    while len(answers) < 16:
        answer = vm.qmp.receive()
        if answer.get("event") != "DEVICE_DELETED":
            answers.append(answer)
    assert answers == [{"return": {}}] * 15 + [{"return": []}]
    assert len([e for e in vm.qmp.events if e["event"] == "DEVICE_DELETED"]) == 5


def test_two_clients_race_for_a_slot(start_vm: Start, tmp_path: Path) -> None:
    vm = start_vm()
    images = [tmp_path / f"{n}.img" for n in range(2)]
    with QmpClient(str(vm.qmp_path)) as one, QmpClient(str(vm.qmp_path)) as two:
        for number, client in enumerate((one, two)):
            images[number].write_bytes(bytes(MIB))
            client.command("qmp_capabilities")
            assert client.raw(blockdev(images[number], f"d{number}")) == {"return": {}}
        for number, client in enumerate((one, two)):
            client.socket.sendall(device(1, f"d{number}").encode())
        answers = [one.raw(""), two.raw("")]
    assert answers.count({"return": {}}) == 1
    assert sum("occupied" in str(answer.get("error")) for answer in answers) == 1


@pytest.mark.parametrize("end", ["quit", "kill"])
def test_the_vm_ends_while_a_disk_is_plugged(start_vm: Start, image: Path, end: str) -> None:
    vm = start_vm()
    vm.qmp.command("query-status")
    processes = set(children(vm.process.pid))
    vm.qmp.socket.sendall((blockdev(image) + device(1)).encode())
    if end == "quit":
        vm.qmp.socket.sendall(b'{"execute":"quit"}')
        assert vm.wait() == 0
    else:
        wait_until(lambda: set(children(vm.process.pid)) - processes, "a worker")
        vm.process.kill()
    wait_until(lambda: not vm.processes(), "the end of all processes", 5)


def test_a_new_worker_that_hangs(start_vm: Start, image: Path) -> None:
    """One that never starts: an error that says so, and nothing is left of it."""
    vm = start_vm()
    vm.qmp.command("query-status")
    nursery = next(iter(children(vm.process.pid, "sv-nursery")))
    kill(nursery, signal.SIGSTOP)
    try:
        run(vm, blockdev(image))
        answer = vm.qmp.raw(device(1), timeout=40)
    finally:
        kill(nursery, signal.SIGCONT)
    if "error" in answer:  # else the core took another nursery
        assert "did not start" in answer["error"]["desc"]
        wait_until(lambda: not children(vm.process.pid, "sv-blk"), "the end of the late worker")
        run(vm, device(1))
    assert vm.guest("blk.read 1 0 64").value("crc") == crc32(image, 0, 64)


# ---- again and again ---------------------------------------------------------------------------


def test_nothing_is_kept(start_vm: Start, image: Path) -> None:
    """Descriptors, processes and pages of twelve disks that came and went are gone."""
    vm = start_vm()
    assert not vm.guest("blk.read 1 0 8").ok

    def count() -> tuple[int, ...]:
        pid = vm.process.pid
        return (len(os.listdir(f"/proc/{pid}/fd")), len(children(pid)),
                len(os.listdir(f"/proc/{pid}/task")))

    def cycle() -> None:
        run(vm, blockdev(image), device(1))
        assert vm.guest("blk.read 1 0 8").ok
        run(vm, unplug())

    for _ in range(2):
        cycle()
    wait_until(lambda: not children(vm.process.pid, "sv-blk"), "the end of the workers")
    wait_until(lambda: children(vm.process.pid, "sv-keeper"), "what comes after the start")
    before = count()
    for _ in range(12):
        cycle()
    wait_until(lambda: count() <= before, "everything to be given back", 10)


def test_a_driver_that_starts_and_stops_all_the_time(start_vm: Start, image: Path) -> None:
    vm = start_vm()
    stop = threading.Event()
    hung: list[Exception] = []

    def probe() -> None:
        try:
            while not stop.is_set():
                for command in ("blk.init 1", "blk.read 1 0 8", "blk.reset 1"):
                    vm.guest(command)
        except Exception as error:
            hung.append(error)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        for _ in range(15):
            run(vm, blockdev(image), device(1), unplug())
        run(vm, blockdev(image), device(1))
    finally:
        stop.set()
        thread.join(40)
    assert not hung, hung
    assert vm.guest("blk.read 1 0 64").value("crc") == crc32(image, 0, 64)


def test_nothing_acknowledged_is_lost(start_vm: Start, image: Path) -> None:
    vm = start_vm()
    run(vm, blockdev(image), device(1))
    acknowledged: list[int] = []

    def write() -> None:
        for number in range(1000):
            if not vm.guest(f"blk.write 1 {8 * number} 8 {number}").ok:
                return
            acknowledged.append(number)

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: len(acknowledged) > 5, "some writes")
    run(vm, unplug())
    thread.join(40)
    assert not thread.is_alive() and len(acknowledged) < 1000
    content = image.read_bytes()
    for number in acknowledged:
        at = 8 * number * SECTOR
        assert content[at:at + 8 * SECTOR] == pattern(8 * number, 8, number), number


# ---- what may not be plugged or unplugged ------------------------------------------------------


def refusal(vm: TestVm, command: str) -> str:
    answer = vm.qmp.raw(command)
    assert "error" in answer, answer
    return str(answer["error"]["desc"])


def test_a_foreign_back_end_stays(start_vm: Start, tmp_path: Path, image: Path) -> None:
    path = tmp_path / "backend.sock"
    with HostileBackend(path, hostile_backend.silent):
        vm = start_vm("-chardev", f"socket,id=b,path={path}",
                      "-device", "vhost-user-blk-device,chardev=b,id=foreign")
        assert "not ours" in refusal(vm, unplug("foreign"))
        run(vm, blockdev(image))
        assert "occupied already by 'foreign'" in refusal(vm, device(0))
        run(vm, device(1))
        vm.qmp.command("quit")
        assert vm.wait() == 0


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_root_disk_by_another_name(start_vm: Start, tmp_path: Path, image: Path,
                                       link: Callable[[Path, Path], None]) -> None:
    vm = start_vm(disks=(f"{image},direct=off",))
    link(image, tmp_path / "innocent.img")
    text = refusal(vm, blockdev(tmp_path / "innocent.img"))
    assert "innocent.img" in text and "drive 'd0' of this VM has it" in text


def test_all_slots_taken(start_vm: Start, tmp_path: Path) -> None:
    vm = start_vm()
    for number in range(6):
        path = tmp_path / f"{number}.img"
        path.write_bytes(bytes((number + 1) * MIB))
        run(vm, blockdev(path, f"d{number}"), device(number, f"d{number}"))
    for number in range(6):
        assert (vm.guest(f"blk.info {number}").value("sectors")
                == (number + 1) * MIB // SECTOR)
    (tmp_path / "more.img").write_bytes(bytes(MIB))
    run(vm, blockdev(tmp_path / "more.img", "more"))
    for number in range(6):
        assert "occupied" in refusal(vm, device(number, "more"))
    assert "no slot 6" in refusal(vm, device(6, "more"))
    for number in reversed(range(6)):
        run(vm, unplug(f"d{number}"))
    wait_until(lambda: not children(vm.process.pid, "sv-blk"), "the end of the workers")

"""The balloon with a bare-metal guest: memory really goes back, and comes again."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.capabilities import require
from tests.support.qmp import QmpError
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

MIB = 1 << 20
SIZE = 256 * MIB
AT = 128 * MIB   # memory of the guest that nothing is in, nor will be (docs/memory.md),
PAGES = 32 * MIB // 4096  # and so much of it
DEVICE = ("-device", "virtio-balloon-device,id=balloon0,free-page-reporting=true")
INACTIVE = {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}


@pytest.fixture
def start(start_vm: Start) -> Start:
    def with_balloon(*arguments: str | Path, device: tuple[str, ...] = DEVICE,
                     **options: object) -> TestVm:
        return start_vm(*device, *arguments, memory=SIZE // MIB, **options)

    return with_balloon


def present(vm: TestVm, at: int = AT, length: int = PAGES * 4096) -> int:
    """How many bytes of [at, at + length) of guest memory are there."""
    folder = Path(f"/proc/{vm.process.pid}/fd")
    path = next(fd for fd in folder.iterdir() if "guest-ram" in os.readlink(fd))
    fd = os.open(path, os.O_RDONLY)
    try:
        found, end = 0, at + length
        with contextlib.suppress(OSError):  # ENXIO: nothing more
            while at < end:
                data = min(os.lseek(fd, at, os.SEEK_DATA), end)
                at = min(os.lseek(fd, data, os.SEEK_HOLE), end)
                found += at - data
        return found
    finally:
        os.close(fd)


def actual(vm: TestVm) -> int:
    return int(vm.qmp.command("query-balloon")["actual"])


def worker(vm: TestVm) -> Any:
    return next(w for w in vm.qmp.command("query-workers") if w["kind"] == "balloon")


def statistics(vm: TestVm) -> Any:
    return vm.qmp.command("query-balloon-stats")


# ---- memory goes and comes ---------------------------------------------------------------------


def test_inflated_memory_is_the_host_s_again(start: Start) -> None:
    vm = start()
    assert vm.guest("balloon.init").ok
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 1").ok
    assert present(vm) == PAGES * 4096
    assert vm.guest(f"balloon.inflate {AT} {PAGES}").ok
    assert present(vm) <= MIB
    assert actual(vm) == SIZE - PAGES * 4096
    assert vm.guest(f"balloon.is-zero {AT} {PAGES}").ok
    assert vm.guest(f"balloon.deflate {AT} {PAGES}").ok
    assert actual(vm) == SIZE
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 2").ok
    assert vm.guest(f"memory.check {AT} {PAGES * 4096} 2").ok
    assert present(vm) == PAGES * 4096
    counters = worker(vm)["counters"]
    assert counters["inflated-pages"] == counters["deflated-pages"] == PAGES
    assert counters["removed-bytes"] == PAGES * 4096
    assert counters["refused-pages"] == counters["failed-bytes"] == counters["broken"] == 0


def test_the_rest_of_memory_stays(start: Start) -> None:
    vm = start()
    assert vm.guest("balloon.init").ok
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 1").ok
    for page in (100, 102, 2000):
        assert vm.guest(f"balloon.inflate {AT + page * 4096} 1").ok
    for first, last in ((0, 100), (101, 102), (103, 2000), (2001, PAGES)):
        begin, length = AT + first * 4096, (last - first) * 4096
        assert vm.guest(f"memory.check {begin} {length} 1").ok
    for page in (100, 102, 2000):
        assert vm.guest(f"balloon.is-zero {AT + page * 4096} 1").ok


@pytest.mark.parametrize("features", [0xFFFFFFFF, 0xFFFFFFFD])
def test_reported_memory_is_the_host_s_again(start: Start, features: int) -> None:
    """With the statistics queue and without it the queue has another number."""
    vm = start()
    assert vm.guest(f"balloon.init {features}").ok
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 1").ok
    assert present(vm) == PAGES * 4096
    assert vm.guest(f"balloon.report {AT} {PAGES * 4096}").ok
    assert present(vm) <= MIB
    assert worker(vm)["counters"]["reported-pages"] == PAGES
    assert actual(vm) == SIZE


# ---- what the host asks for --------------------------------------------------------------------


def test_the_guest_follows_the_target(start: Start) -> None:
    vm = start()
    assert vm.guest("balloon.init").ok
    assert actual(vm) == SIZE
    target = SIZE - 16 * MIB
    assert vm.qmp.command("balloon", value=target + 5) == {}
    assert vm.qmp.wait_event("BALLOON_CHANGED")["data"] == {"actual": SIZE}
    assert vm.guest(f"balloon.follow {AT} {PAGES} 5000").value("actual") == 4096
    assert actual(vm) == target
    assert vm.qmp.wait_event("BALLOON_CHANGED")["data"] == {"actual": target}
    vm.send(f"balloon.follow {AT} {PAGES} 20000\n")  # waits for the interrupt
    time.sleep(0.05)  # it may be asleep by then
    assert vm.qmp.command("balloon", value=1 << 60) == {}
    assert vm.qmp.wait_event("BALLOON_CHANGED")["data"] == {"actual": target}
    assert vm.script_answer().ok
    assert vm.qmp.wait_event("BALLOON_CHANGED")["data"] == {"actual": SIZE}
    assert actual(vm) == SIZE


def test_who_is_not_there_or_not_up(start_vm: Start, start: Start) -> None:
    vm = start_vm()
    for command, arguments in (("balloon", {"value": SIZE}), ("query-balloon", {}),
                               ("query-balloon-stats", {})):
        with pytest.raises(QmpError) as caught:
            vm.qmp.command(command, **arguments)
        assert caught.value.error == INACTIVE
    vm = start()
    assert vm.guest("echo").ok
    assert actual(vm) == SIZE
    with pytest.raises(QmpError) as caught:
        vm.qmp.command("balloon", value=SIZE)
    assert caught.value.error == INACTIVE
    assert vm.guest("balloon.init").ok
    assert vm.qmp.command("balloon", value=SIZE) == {}
    assert vm.guest("balloon.reset").ok
    with pytest.raises(QmpError) as caught:
        vm.qmp.command("balloon", value=SIZE)
    assert caught.value.error == INACTIVE


def test_features_are_the_options(start: Start) -> None:
    for options, features in (("", 2), (",deflate-on-oom=true", 6),
                              (",deflate-on-oom=false,free-page-reporting=true", 34)):
        vm = start(device=("-device", "virtio-balloon-device" + options))
        assert vm.guest("balloon.init 0xff").value("features") == features
        vm.close()


def test_a_pause_in_between(start: Start) -> None:
    vm = start()
    assert vm.guest("balloon.init").ok
    vm.qmp.command("stop")
    vm.qmp.command("balloon", value=SIZE - MIB)  # the driver learns it when it runs again
    vm.qmp.command("cont")
    assert vm.guest(f"balloon.follow {AT} {PAGES} 5000").value("actual") == 256
    assert statistics(vm)["stats"]["total-memory"] == 123456789
    vm.qmp.command("stop")
    told = statistics(vm)  # nobody is there to tell newer ones
    assert told["age-ms"] >= 1000 and told["stats"]["total-memory"] == 123456789
    vm.qmp.command("cont")
    assert statistics(vm)["age-ms"] < 1000


def test_a_machine_reset(start: Start) -> None:
    """The balloon is empty then, and the next driver is to fill it as much."""
    vm = start()
    assert vm.guest("balloon.init").ok
    vm.qmp.command("balloon", value=SIZE - MIB)
    assert vm.guest(f"balloon.follow {AT} {PAGES} 5000").ok
    assert actual(vm) == SIZE - MIB
    vm.qmp.command("system_reset")
    vm.wait_output(r"^ready\r?\n")
    assert actual(vm) == SIZE
    assert vm.guest("balloon.init").ok
    assert vm.guest(f"balloon.follow {AT} {PAGES} 5000").value("actual") == 256
    assert actual(vm) == SIZE - MIB


# ---- statistics --------------------------------------------------------------------------------


def test_statistics_before_and_after_other_workers(start: Start) -> None:
    vm = start()
    assert vm.guest("balloon.init").ok
    for asked in (1, 2):
        told = statistics(vm)
        assert told["stats"] == {"free-memory": 1000 + asked, "total-memory": 123456789}
        assert told["actual"] == told["target"] == SIZE
    os.kill(worker(vm)["pid"], 9)
    assert statistics(vm)["stats"]["free-memory"] == 1003
    vm.qmp.wait_event("WORKER_RESTARTED")
    vm.qmp.command("worker-restart", device="balloon0")
    assert statistics(vm)["stats"]["free-memory"] == 1004
    assert vm.guest("balloon.info").value("asked") == 4
    assert worker(vm)["counters"]["reports"] == 4


def test_a_driver_without_statistics(start: Start) -> None:
    vm = start()
    assert vm.guest("balloon.init 0xfffffffd").ok
    with pytest.raises(QmpError) as caught:
        statistics(vm)
    assert caught.value.error["desc"].startswith("The guest has told no statistics: ")


# ---- workers that die --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kill", "upgrade"])
def test_another_worker_in_the_middle(start: Start, way: str) -> None:
    """Nothing is lost of what is given, taken and used again while its workers come and go."""
    vm = start()
    assert vm.guest("balloon.init").ok
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 1").ok
    for _ in range(3):
        vm.send(f"balloon.inflate {AT} {PAGES}\nballoon.is-zero {AT} {PAGES}\n"
                f"balloon.deflate {AT} {PAGES}\n")
        for _ in range(4):
            if way == "kill":
                os.kill(worker(vm)["pid"], 9)
                vm.qmp.wait_event("WORKER_RESTARTED")
            else:
                vm.qmp.command("worker-restart", device="balloon0")
        answers = [vm.script_answer() for _ in range(3)]
        assert all(answer.ok for answer in answers), answers
    assert actual(vm) == SIZE
    counters = worker(vm)["counters"]
    # A chain that one worker had begun is done again by the next one.
    assert counters["inflated-pages"] >= 3 * PAGES
    assert counters["removed-bytes"] >= 3 * PAGES * 4096
    assert counters["refused-pages"] == 0


def test_a_balloon_that_is_given_up(start: Start) -> None:
    """Its driver goes on getting answers, and nothing more goes back to the host."""
    vm = start()
    assert vm.guest("balloon.init").ok

    def given_up() -> bool:
        state = worker(vm)
        if state["state"] != "dead" and state["pid"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(state["pid"], 9)
        return any(event["event"] == "WORKER_GIVEN_UP" for event in vm.qmp.events)

    wait_until(given_up, "the end of all patience")
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 1").ok
    assert vm.guest(f"balloon.inflate {AT} {PAGES}").ok
    assert vm.guest(f"balloon.report {AT} {PAGES * 4096}").ok
    assert present(vm) == PAGES * 4096
    assert vm.guest(f"memory.check {AT} {PAGES * 4096} 1").ok
    assert actual(vm) == SIZE - PAGES * 4096
    with pytest.raises(QmpError) as caught:
        statistics(vm)
    assert "its worker is being replaced" in caught.value.error["desc"]
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    assert vm.guest("balloon.init").ok, "the next driver is answered, too"
    assert vm.guest(f"balloon.inflate {AT} 10").ok
    vm.qmp.command("quit")
    assert vm.wait() == 0


# ---- hostile drivers ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "inflated", "refused"), [
    ("outside", 0, 256), ("far", 0, 256), ("same", 1, 0), ("odd", 1, 1), ("writable", 0, 0)])
def test_pages_that_are_none(start: Start, kind: str, inflated: int, refused: int) -> None:
    vm = start()
    assert vm.guest("balloon.init").ok
    assert vm.guest(f"balloon.hostile {kind}").ok
    counters = worker(vm)["counters"]
    assert (counters["inflated-pages"], counters["refused-pages"]) == (inflated, refused)
    assert vm.guest(f"balloon.inflate {AT} 10").ok
    assert worker(vm)["restarts"] == 0


def test_a_giant_chain_holds_up_nobody(start: Start) -> None:
    vm = start()
    assert vm.guest("balloon.init").ok
    assert vm.guest(f"memory.fill {32 * MIB} {64 * MIB} 3").ok  # the numbers: far beyond memory
    vm.send("balloon.hostile giant\n")
    began = time.monotonic()
    assert statistics(vm)["stats"]["total-memory"] == 123456789
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    assert time.monotonic() - began < 5
    assert vm.script_answer().ok
    assert worker(vm)["counters"]["refused-pages"] >= 240 * MIB - (1 << 18)


def test_a_broken_queue_is_the_driver_s_own_loss(start: Start) -> None:
    vm = start()
    assert vm.guest("balloon.init").ok
    assert vm.guest("balloon.hostile loop").ok
    assert worker(vm)["counters"]["broken"] == 1
    assert vm.guest("balloon.init").ok, "a reset makes it good"
    assert vm.guest(f"balloon.inflate {AT} 10").ok
    assert statistics(vm)["stats"]["total-memory"] == 123456789


def test_config_space_by_hand(start: Start) -> None:
    """Reads and writes of any width, and an `actual` that can't be."""
    vm = start()
    answer = vm.guest("balloon.init")
    config = answer.value("base") + 0x100
    for offset in (0, 1, 4, 7, 8, 12, 252):
        assert vm.guest(f"read8 {config + offset}").text.endswith(" 0x0")
    assert vm.guest(f"write32 {config} 7").ok  # num_pages: the device's
    assert vm.guest(f"read32 {config}").text.endswith(" 0x0")
    assert vm.guest(f"write8 {config + 5} 1").ok
    assert actual(vm) == SIZE - 256 * 4096
    assert vm.guest(f"write32 {config + 4} 0xffffffff").ok
    assert actual(vm) == 0
    assert vm.guest(f"write32 {config + 8} 0xffffffff").ok
    assert vm.guest(f"read32 {config + 8}").text.endswith(" 0x0")
    assert vm.qmp.wait_event("BALLOON_CHANGED")["data"] == {"actual": 0}


# ---- other memory ------------------------------------------------------------------------------


@pytest.fixture
def huge_folder(tmp_path: Path) -> Iterator[Path]:
    """A hugetlbfs with pages for one guest."""
    require("root")
    require("hugepages")
    number = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = int(number.read_text())
    number.write_text(str(before + SIZE // (2 * MIB)))
    folder = tmp_path / "huge"
    folder.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", str(folder)],
                   check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        number.write_text(str(before))


def test_huge_pages_go_as_a_whole(start: Start, huge_folder: Path) -> None:
    vm = start("-mem-path", huge_folder)
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    assert vm.guest("balloon.init").value("features") & 1, "MUST_TELL_HOST"
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 1").ok
    before = int(free.read_text())
    assert vm.guest(f"balloon.inflate {AT} {PAGES - 1}").ok
    assert int(free.read_text()) == before + PAGES // 512 - 1
    assert vm.guest(f"balloon.inflate {AT + (PAGES - 1) * 4096} 1").ok
    assert int(free.read_text()) == before + PAGES // 512
    assert vm.guest(f"balloon.is-zero {AT} {PAGES}").ok
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 2").ok
    assert vm.guest(f"balloon.report {AT + 4096} {2 * 2 * MIB}").ok
    assert int(free.read_text()) == before + 1
    assert vm.guest(f"memory.check {AT} {2 * MIB} 2").ok
    vm.close()


def test_memory_in_a_file(start: Start, tmp_path: Path) -> None:
    """The file gets holes, too."""
    path = tmp_path / "ram"
    vm = start("-mem-path", path)
    assert vm.guest("balloon.init").ok
    assert vm.guest(f"memory.fill {AT} {PAGES * 4096} 1").ok
    os.sync()
    before = path.stat().st_blocks * 512
    assert vm.guest(f"balloon.inflate {AT} {PAGES}").ok
    counters = worker(vm)["counters"]
    if counters["failed-bytes"]:
        assert re.search("does not take the guest's pages", vm.error_text())
    else:
        assert before - path.stat().st_blocks * 512 >= PAGES * 4096 - MIB
    assert vm.guest(f"balloon.deflate {AT} {PAGES}").ok

"""Linux's own balloon driver: memory that it gives, takes back, reports as free, and tells of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import images
from tests.lab.small_kernel import small_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.lab

MIB = 1 << 20
SIZE, TARGET = 256 * MIB, 136 * MIB
GIVEN = (SIZE - TARGET) // 1024  # KiB
# Blocks (512 bytes) of the host that guest memory takes, in all processes together.
BLOCKS = ("stat -Lc %b $(find /proc/[0-9]*/fd -lname '*guest-ram*' 2>/dev/null | head -n 1)")
TOTAL = "total() { awk '/^MemTotal/ {print $2}' /proc/meminfo; }; before=$(total)\n"
USE = "dd if=/dev/zero of=/file bs=1M count=110 2>/dev/null && rm /file && echo used $((1+1))\n"


def plan(device: str, steps: list[list[Any]]) -> dict[str, Any]:
    return {"arguments": ["-machine", "microvm", "-m", str(SIZE // MIB), "-kernel",
                          str(small_kernel()["vmlinux"]), "-initrd", str(images.plain_initramfs()),
                          "-device", device],
            "append": images.COMMAND_LINE,
            "steps": [["output", "L2 shell", 60], *steps, ["qmp", "quit"], ["exit", 60]]}


def waiting(condition: str, word: str) -> str:
    """The guest says `word` 42 when the condition holds."""
    return f"until [ {condition} ]; do sleep 0.2; done; echo {word} $((40+2))\n"


def test_balloon(play: Play) -> None:
    report = play(plan("virtio-balloon-device", [
        ["send", USE], ["output", "used 2", 60], ["send", TOTAL], ["run", BLOCKS],
        ["qmp", "query-balloon"], ["qmp", "balloon", {"value": TARGET}],
        ["event", "BALLOON_CHANGED", 60],
        ["send", waiting(f"$(total) -le $((before-{GIVEN}))", "given")], ["output", "given 42", 60],
        ["until", "query-balloon", {"actual": TARGET}, 60], ["run", BLOCKS],
        ["event", "BALLOON_CHANGED", 60], ["qmp", "query-balloon-stats"],
        ["run", "pkill -KILL sv-balloon"], ["event", "WORKER_RESTARTED", 60],
        ["qmp", "balloon", {"value": SIZE}],
        ["send", waiting("$(total) -ge $before", "taken")], ["output", "taken 42", 60],
        ["until", "query-balloon", {"actual": SIZE}, 60], ["qmp", "query-balloon-stats"],
        ["send", USE], ["output", "used 2", 60]]))
    before, at_boot, _, first, _, after, later, told = report["replies"][2:10]
    told_again = report["replies"][14]
    assert at_boot == {"actual": SIZE} and first["data"] == {"actual": SIZE}
    assert TARGET <= later["data"]["actual"] < SIZE
    assert (int(before) - int(after)) * 512 > 80 * MIB
    assert told["actual"] == told["target"] == TARGET
    assert 0 < told["stats"]["free-memory"] < told["stats"]["total-memory"] < TARGET
    assert told_again["actual"] == SIZE
    assert told_again["stats"]["total-memory"] >= told["stats"]["total-memory"] + GIVEN * 1024
    assert report["exit"] == 0 and report["left"] == []


def test_free_page_reporting(play: Play) -> None:
    """Memory that is freed goes back without anybody's word."""
    report = play(plan("virtio-balloon-device,free-page-reporting=true", [
        ["send", USE.replace("rm /file", "sleep 1")], ["output", "used 2", 60],
        ["run", f"{BLOCKS} | tee /tmp/before"], ["send", "rm /file\n"],
        ["run", f"for i in $(seq 300); do now=$({BLOCKS}); "
                "[ $now -lt $(($(cat /tmp/before) - 163840)) ] && break; sleep 0.2; done; "
                "echo $now"],
        ["qmp", "query-workers"], ["qmp", "query-balloon"]]))
    before, after, workers, actual = report["replies"][2:6]
    assert (int(before) - int(after)) * 512 > 80 * MIB
    counters = workers[0]["counters"]
    assert counters["reported-pages"] * 4096 > 80 * MIB
    assert counters["refused-pages"] == counters["failed-bytes"] == counters["broken"] == 0
    assert actual == {"actual": SIZE}
    assert report["exit"] == 0

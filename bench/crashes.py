"""What the benchmarks of crash recovery share: a VM under verified load, kills, what each cost."""

from __future__ import annotations

import os
import random
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.report import BenchError
from tests.guest.build import guest
from tests.support.killer import children, kill
from tests.support.load import Load
from tests.support.slow_disk import SlowDisk, missing
from tests.support.test_vm import TestVm

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE_BYTES = 16 << 20
# Who kills five in a row before they served sees the device given up, as it should be: one in so
# many is left alone until it has served for a while (seconds).
PATIENCE, LONG_ENOUGH = 4, 0.1
SERVING = re.compile(r"\(pid (\d+)\) took over after (\d+) us, (\d+) us of them for the last one's "
                     r"I/O; (\d+) requests are done again")


class Kill(NamedTuple):
    """One death, in milliseconds."""

    gap: float    # from the kill until the next worker's rings run
    waited: float  # of it, for the I/O of the dead
    replayed: int  # requests that were done again


class Outcome:
    """What a run came to."""

    def __init__(self) -> None:
        self.kills: list[Kill] = []
        self.unmatched = 0     # killed again before it took over
        self.requests = 0      # verified by the guest
        self.seconds = 0.0

    def beyond(self) -> list[float]:
        """The part of each gap that is ours, in milliseconds."""
        return [kill.gap - kill.waited for kill in self.kills]


@contextmanager
def disk(folder: Path, kind: str, requests: int = 400) -> Iterator[tuple[str, SlowDisk | None]]:
    """What `file=` of a -drive says for a disk of a kind, and who makes it slow.

    :raises BenchError: this machine can't.
    """
    image = folder / "disk.img"
    image.write_bytes(os.urandom(IMAGE_BYTES))
    if kind != "slow disk":
        yield f"{image},direct={'on' if kind == 'direct' else 'off'}", None
        return
    if reason := missing():
        raise BenchError(f"no slow disk: {reason}")
    with SlowDisk(image, requests) as slow:
        yield f"{slow.path},direct=on", slow


@contextmanager
def machine(folder: Path, file: str, slow: SlowDisk | None, queues: int,
            group: str = "") -> Iterator[TestVm]:
    """A VM with that disk, whose log is `folder`/log.

    :param group: folder of the control group that its processes go into; "" for none.
    """
    with TestVm(folder, "-machine", "microvm", "-kernel", guest("guest.elf"), "-m", "128",
                "-smp", "2", "-D", folder / "log", "-drive", f"id=d,file={file}", "-device",
                f"virtio-blk-device,drive=d,id=blk0,num-queues={queues}") as vm:
        if not vm.guest("blk.overlap 0 0 1 1 1").ok:
            raise BenchError(f"the guest can't use its disk\n{vm.story()}")
        vm.qmp.command("query-status")
        if slow is not None:
            slow.hold_back([vm.process.pid, *children(vm.process.pid)])
        for pid in (vm.process.pid, *children(vm.process.pid)) if group else ():
            (Path(group) / "cgroup.procs").write_text(str(pid))
        yield vm


def run(folder: Path, vm: TestVm, load: Load, number: int, longest: float,
        chance: random.Random) -> Outcome:
    """Kill workers, each up to `longest` seconds after it began to serve, while `load` works.

    :raises BenchError: a worker did not come back.
    """
    outcome = Outcome()
    began = time.monotonic()
    killed: dict[int, float] = {}
    with load:
        while len(killed) < number and load.goes_on():
            if len(killed) % PATIENCE == PATIENCE - 1:
                _wait_served(vm, killed)
                time.sleep(LONG_ENOUGH)
            time.sleep(chance.uniform(0, longest))
            pid = _next_victim(vm, killed)
            killed[pid] = time.time()
            kill(pid)
        _next_victim(vm, killed)
    _wait_served(vm, killed)
    outcome.seconds = time.monotonic() - began
    outcome.requests = load.requests
    _match(outcome, vm, killed, (folder / "log").read_text())
    return outcome


def _next_victim(vm: TestVm, killed: dict[int, float]) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in children(vm.process.pid, "sv-blk"):
            if pid not in killed:
                return pid
        if vm.process.poll() is not None:
            break
        time.sleep(0.0005)
    raise BenchError(f"no worker came back\n{vm.story()}")


def _wait_served(vm: TestVm, killed: dict[int, float]) -> None:
    """Until a living worker serves, with all events read."""
    deadline = time.monotonic() + 60
    while True:
        workers = vm.qmp.command("query-workers")
        last = [e["data"]["pid"] for e in vm.qmp.events if e["event"] == "WORKER_RESTARTED"][-1:]
        # Before the first kill nobody has been restarted; a dead one shows until it is replaced.
        if not killed or (last and last[0] not in killed
                          and [worker["pid"] for worker in workers] == last):
            return
        if time.monotonic() > deadline:
            raise BenchError(f"the last worker does not serve\n{vm.story()}")
        time.sleep(0.01)


def _match(outcome: Outcome, vm: TestVm, killed: dict[int, float], log: str) -> None:
    """Put together what the killer, the events and the log know of each death."""
    served = {int(pid): (int(waited), int(again)) for pid, _, waited, again in
              SERVING.findall(log)}
    noticed: list[float] = []  # deaths since somebody served, when the core saw them
    when = 0.0
    for event in vm.qmp.events:
        data, stamp = event["data"], event["timestamp"]
        moment = stamp["seconds"] + stamp["microseconds"] / 1e6
        if event["event"] == "WORKER_GIVEN_UP":
            raise BenchError(f"given up: {data['reason']}")
        if event["event"] == "WORKER_CRASHED":
            if data["pid"] not in killed:
                raise BenchError(f"a worker died that nobody killed: {data['reason']}")
            if not noticed:
                when = killed[data["pid"]]
            noticed.append(moment)
        elif event["event"] == "WORKER_RESTARTED" and noticed:
            waited, again = served[data["pid"]]
            gap = noticed[0] - when + data["gap-us"] / 1e6
            outcome.kills.append(Kill(gap * 1000, waited / 1000, again))
            outcome.unmatched += len(noticed) - 1
            noticed = []

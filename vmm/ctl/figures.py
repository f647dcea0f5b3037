"""What VMs did in each interval: of samples, figures; of figures, their course."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from vmm.ctl.rates import Rates
from vmm.ctl.sample import Sample

if TYPE_CHECKING:
    from vmm.ctl.processes import Member
    from vmm.ctl.targets import Targets

_POINTS = 30


class Figures:
    """What one interval showed of one VM. cpu: of processes, 1.0 is a whole CPU."""

    __slots__ = ("cpu", "devices", "guest", "name", "own", "pid", "processes")

    def __init__(self, name: str, pid: int, before: Sample, now: Sample) -> None:
        used = now.usage[pid]
        seconds = max(now.when - before.when, 0.001)
        was = {(member.pid, member.started): member.cpu
               for member in before.usage[pid].members} if pid in before.usage else {}
        self.name = name
        self.pid = pid
        self.guest = used.guest
        self.own = used.own
        self.processes: list[tuple[Member, float]] = []
        for member in used.members:
            grown = member.cpu - was.get((member.pid, member.started), member.cpu)
            self.processes.append((member, max(grown, 0.0) / seconds))
        self.cpu = sum(cpu for _, cpu in self.processes)
        self.devices = [Rates(page, before.pages.get(key), seconds)
                        for key, page in sorted(now.pages.items()) if key[0] == pid]

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"name": self.name, "pid": self.pid, "cpu": round(self.cpu, 3),
                "guest-bytes": self.guest, "own-bytes": self.own,
                "processes": [{"pid": member.pid, "name": member.name, "cpu": round(cpu, 3),
                               "own-bytes": member.private} for member, cpu in self.processes],
                "devices": [device.as_json() for device in self.devices]}


class Watch:
    """Figures from one interval to the next.

    :raises CtlError: a VM that was named can't be reached.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self.names = targets.find()
        self.seen = sorted(set(self.names.values()))
        self._before = Sample(set(self.names), targets.everything)

    def take(self) -> list[Figures]:
        """Of the time since the last call."""
        self.names = self._targets.find()
        now = Sample(set(self.names), self._targets.everything)
        figures = [Figures(self._name(pid, now), pid, self._before, now) for pid in now.usage]
        self._before = now
        return figures

    def ended(self, vms: list[Figures]) -> bool:
        """Whether there is nothing to wait for: all VMs that were named have ended."""
        return not vms and self._targets.by_name

    def _name(self, pid: int, sample: Sample) -> str:
        told = next((page.vm for (core, _), page in sample.pages.items() if core == pid), "")
        return self.names.get(pid) or told or f"pid {pid}"


class History:
    """The course of some values, by VM and device; "" is the CPU time of a VM."""

    def __init__(self) -> None:
        self._past: dict[tuple[int, str], deque[float]] = {}

    def add(self, vms: list[Figures]) -> None:
        """One more interval; what has gone is forgotten."""
        values = {(vm.pid, ""): vm.cpu for vm in vms}
        values |= {(vm.pid, device.device): device.moved for vm in vms for device in vm.devices}
        self._past = {key: self._past.get(key, deque(maxlen=_POINTS)) for key in values}
        for key, value in values.items():
            self._past[key].append(value)

    def of(self, pid: int, device: str) -> deque[float]:
        """The last values, the newest at the end."""
        return self._past.get((pid, device), deque())

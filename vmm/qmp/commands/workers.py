"""The worker processes that serve this VM's devices: a command of our own."""

from __future__ import annotations

from vmm.qmp.registry import DEFERRED, Argument, Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.qmp.connection import Request
    from vmm.worker.process import WorkerProcess


_LARGEST = (1 << 63) - 1  # the counters come from memory that nobody trusts


def totals(worker: WorkerProcess) -> dict[str, int]:
    """Return the worker's counters, over all queues."""
    sums: dict[str, int] = {}
    for queue in worker.counters:
        for name, value in queue.items():
            sums[name] = min(sums.get(name, 0) + value, _LARGEST)
    return sums


def _describe(worker: WorkerProcess) -> dict[str, object]:
    counters = {name.replace("_", "-"): value for name, value in totals(worker).items()}
    described = {"counters": counters, "device": worker.device, "engine": worker.engine,
                 "kind": worker.kind, "pid": worker.pid, "restarts": worker.restarts,
                 "sandbox": list(worker.stages), "state": worker.state}
    if worker.reason:
        described["reason"] = worker.reason
    return described


def _query_workers(request: Request) -> object:
    return [_describe(worker) for worker in request.vm.workers()]


def _worker_restart(request: Request) -> object:
    """Live upgrade: answered when the new worker serves."""
    request.vm.supervisor.restart(request.arguments["device"], request.done)
    return DEFERRED


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "WorkerState": ("starting", "running", "dead"),
    "WorkerInfo": {"counters": "any", "device": "str", "kind": "str", "pid": "int",
                   "engine": "str", "reason?": "str", "restarts": "int", "sandbox": "[str]",
                   "state": "WorkerState"},
}

COMMANDS = (
    Command("query-workers", _query_workers, returns="[WorkerInfo]"),
    Command("worker-restart", _worker_restart, Argument("device", "str", high=255)),
)

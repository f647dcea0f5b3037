"""What the VM is: state, processors, name, version, host."""

from __future__ import annotations

import os

from vmm import cli
from vmm.qmp.registry import Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import CpuConfig
    from vmm.qmp.connection import Request

# Members in the manual's order. Its major 4 is too old for Kata and libvirt
# (docs/compatibility.md).
VERSION: dict[str, object] = {"qemu": {"micro": 1, "minor": 0, "major": 5},
                              "package": f"stratovmm-{cli.VERSION}"}

NO_UUID = "00000000-0000-0000-0000-000000000000"
MAX_CPUS = 254
STATES = ("prelaunch", "running", "paused", "shutdown", "internal-error", "inmigrate")


def _query_status(request: Request) -> object:
    state = request.vm.run_state
    return {"running": state == "running", "singlestep": False, "status": state}


def _properties(cpu: CpuConfig, index: int) -> dict[str, int]:
    """Where CPU `index` sits; dies and clusters are named only if there are any."""
    rest, thread = divmod(index, cpu.threads)
    rest, core = divmod(rest, cpu.cores)
    rest, cluster = divmod(rest, cpu.clusters)
    socket, die = divmod(rest, cpu.dies)
    properties = {"core-id": core}
    if cpu.clusters > 1:
        properties["cluster-id"] = cluster
    if cpu.dies > 1:
        properties["die-id"] = die
    properties["socket-id"] = socket
    properties["thread-id"] = thread
    return properties


def _path(index: int) -> str:
    return f"/machine/unattached/device[{index}]"


def _query_cpus(request: Request) -> object:
    cpu = request.vm.config.cpu
    return [{"CPU": vcpu.index, "arch": "x86", "current": True, "halted": False,
             "props": _properties(cpu, vcpu.index), "qom_path": _path(vcpu.index),
             "thread_id": vcpu.thread_id} for vcpu in request.vm.vcpus]


def _query_cpus_fast(request: Request) -> object:
    cpu = request.vm.config.cpu
    return [{"cpu-index": vcpu.index, "props": _properties(cpu, vcpu.index),
             "qom-path": _path(vcpu.index), "target": "x86_64", "thread-id": vcpu.thread_id}
            for vcpu in request.vm.vcpus]


def _query_hotpluggable_cpus(request: Request) -> object:
    cpu = request.vm.config.cpu
    online = {vcpu.index for vcpu in request.vm.vcpus}
    slots: list[dict[str, object]] = []
    for index in range(cpu.max_cpus if online else 0):
        slot: dict[str, object] = {"props": _properties(cpu, index)}
        if index in online:
            slot["qom-path"] = _path(index)
        slot["type"] = "host-x86-cpu"
        slot["vcpus-count"] = 1
        slots.append(slot)
    return slots


def _query_version(request: Request) -> object:
    return VERSION


def _query_name(request: Request) -> object:
    name = request.vm.config.name
    return {"name": name} if name else {}


def _query_uuid(request: Request) -> object:
    return {"UUID": request.vm.config.uuid or NO_UUID}


def _query_kvm(request: Request) -> object:
    if request.vm.vcpus:
        return {"enabled": True, "present": True}
    present = os.path.exists("/dev/kvm")  # -machine none: what the host offers
    return {"enabled": present and os.access("/dev/kvm", os.R_OK | os.W_OK), "present": present}


def _query_memory_size(request: Request) -> object:
    return {"base-memory": request.vm.config.memory.size if request.vm.vcpus else 0}


def _query_target(request: Request) -> object:
    return {"arch": "x86_64"}


def _query_machines(request: Request) -> object:
    return [{"cpu-max": cpus, "deprecated": False, "hotpluggable-cpus": False, "name": name,
             "numa-mem-supported": False} for name, cpus in (("none", 1), ("microvm", MAX_CPUS))]


def _query_iothreads(request: Request) -> object:
    """Always empty: the threads that serve disks belong to the workers (query-workers)."""
    return []


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "StatusInfo": {"running": "bool", "singlestep": "bool", "status": "RunState"},
    "RunState": STATES,
    "CpuInstanceProperties": {"core-id?": "int", "cluster-id?": "int", "die-id?": "int",
                              "socket-id?": "int", "thread-id?": "int"},
    "CpuInfo": {"CPU": "int", "arch": "str", "current": "bool", "halted": "bool",
                "props": "CpuInstanceProperties", "qom_path": "str", "thread_id": "int"},
    "CpuInfoFast": {"cpu-index": "int", "props?": "CpuInstanceProperties", "qom-path": "str",
                    "target": "str", "thread-id": "int"},
    "HotpluggableCPU": {"props": "CpuInstanceProperties", "qom-path?": "str", "type": "str",
                        "vcpus-count": "int"},
    "VersionTriple": {"micro": "int", "minor": "int", "major": "int"},
    "VersionInfo": {"qemu": "VersionTriple", "package": "str"},
    "NameInfo": {"name?": "str"},
    "UuidInfo": {"UUID": "str"},
    "KvmInfo": {"enabled": "bool", "present": "bool"},
    "TargetInfo": {"arch": "str"},
    "MemoryInfo": {"base-memory": "int"},
    "MachineInfo": {"cpu-max": "int", "deprecated": "bool", "hotpluggable-cpus": "bool",
                    "name": "str", "numa-mem-supported": "bool"},
    "IOThreadInfo": {"id": "str", "poll-grow": "int", "poll-max-ns": "int", "poll-shrink": "int",
                     "thread-id": "int"},
}

COMMANDS = (
    Command("query-status", _query_status, returns="StatusInfo"),
    Command("query-cpus", _query_cpus, returns="[CpuInfo]"),
    Command("query-cpus-fast", _query_cpus_fast, returns="[CpuInfoFast]"),
    Command("query-hotpluggable-cpus", _query_hotpluggable_cpus, returns="[HotpluggableCPU]"),
    Command("query-version", _query_version, returns="VersionInfo"),
    Command("query-name", _query_name, returns="NameInfo"),
    Command("query-uuid", _query_uuid, returns="UuidInfo"),
    Command("query-kvm", _query_kvm, returns="KvmInfo"),
    Command("query-memory-size-summary", _query_memory_size, returns="MemoryInfo"),
    Command("query-target", _query_target, returns="TargetInfo"),
    Command("query-machines", _query_machines, returns="[MachineInfo]"),
    Command("query-iothreads", _query_iothreads, returns="[IOThreadInfo]"),
)

"""Block back ends and their counters."""

from __future__ import annotations

import os

from shared.errors import SharedError
from shared.throttling import BURST
from vmm.errors import StateError
from vmm.qmp.commands.workers import totals
from vmm.qmp.errors import DeviceNotFound, QmpError
from vmm.qmp.registry import DEFERRED, Argument, Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.block.family import BlockNode
    from vmm.qmp.connection import Request
    from vmm.vm import Vm

_SECTOR = 512
_RESIZE_LIMIT = 5.0  # seconds for the worker to answer
# QMP's name of a counter, and the worker's.
_COUNTERS = {
    "rd_bytes": "read_bytes", "wr_bytes": "written_bytes", "rd_operations": "reads",
    "wr_operations": "writes", "flush_operations": "flushes", "unmap_operations": "unmaps",
    "unmap_bytes": "unmapped_bytes",
    "rd_total_time_ns": "read_ns", "wr_total_time_ns": "write_ns",
    "flush_total_time_ns": "flush_ns", "unmap_total_time_ns": "unmap_ns",
    "failed_rd_operations": "failed_read", "failed_wr_operations": "failed_write",
    "failed_flush_operations": "failed_flush", "failed_unmap_operations": "failed_unmap",
    "invalid_rd_operations": "invalid_read", "invalid_wr_operations": "invalid_write",
    "invalid_flush_operations": "invalid_flush", "invalid_unmap_operations": "invalid_unmap",
}
# QMP's name of a limit, and the command line's.
_LIMITS = {"bps": "bps-total", "bps_rd": "bps-read", "bps_wr": "bps-write",
           "iops": "iops-total", "iops_rd": "iops-read", "iops_wr": "iops-write"}
# What QEMU counts and we don't: its clients want the members all the same.
_UNCOUNTED = ("wr_highest_offset", "rd_merged", "wr_merged", "unmap_merged")


def _inserted(name: str, node: BlockNode) -> dict[str, object]:
    drive, image = node.config, node.image
    driver = "host_device" if image.is_block_device else "file"
    limits = {name: drive.throttling.get(option, 0) for name, option in _LIMITS.items()}
    # QEMU leaves out what is not set.
    limits.update({f"{name}_max": drive.throttling[option + BURST]
                   for name, option in _LIMITS.items() if option + BURST in drive.throttling})
    return {
        "file": drive.file, "node-name": name, "ro": drive.readonly, "drv": drive.format,
        "backing_file_depth": 0, "encrypted": False, "detect_zeroes": drive.detect_zeroes,
        **limits,
        "image": {"filename": drive.file, "format": drive.format, "virtual-size": image.size,
                  "actual-size": _allocated(image.fd), "children": []},
        "cache": {"writeback": True, "direct": drive.direct, "no-flush": False},
        "write_threshold": 0, "driver": driver,
    }


def _allocated(fd: int) -> int:
    try:
        return os.fstat(fd).st_blocks * 512
    except OSError:
        return 0


def _query_block(request: Request) -> object:
    return [{"device": "", "qdev": node.device_id or "", "type": "unknown", "removable": False,
             "locked": False, "io-status": "ok", "inserted": _inserted(name, node)}
            for name, node in request.vm.blocks.items()]


def _query_named_block_nodes(request: Request) -> object:
    return [_inserted(name, node) for name, node in request.vm.blocks.items()]


def _statistics(vm: Vm, node: BlockNode) -> dict[str, object]:
    device = vm.devices.get(node.device_id) if node.device_id is not None else None
    worker = device.worker if device is not None else None
    counters = totals(worker) if worker is not None else {}
    # A WRITE_ZEROES is an unmapping that says what is read afterwards.
    counters["unmaps"] = counters.get("discards", 0) + counters.get("write_zeroes", 0)
    statistics: dict[str, object] = dict.fromkeys(_UNCOUNTED, 0)
    for name, counter in _COUNTERS.items():
        statistics[name] = counters.get(counter, 0)
    statistics.update({"account_invalid": False, "account_failed": True, "timed_stats": []})
    return statistics


def _query_blockstats(request: Request) -> object:
    """With `query-nodes` QEMU names nodes, else devices; we name both always."""
    vm = request.vm
    return [{"device": "", "node-name": name, "qdev": node.device_id or "",
             "stats": _statistics(vm, node)} for name, node in vm.blocks.items()]


def _find_node(request: Request) -> BlockNode:
    """By `node-name`, or by `device`: a back end's id or that of the device that uses it."""
    name, device = request.arguments.get("node-name"), request.arguments.get("device")
    if (name is None) == (device is None):
        raise QmpError("The command needs either 'device' or 'node-name'", "give one of them")
    blocks = request.vm.blocks
    if name is not None:
        node = blocks.get(name)
    else:
        node = blocks.get(str(device)) or next((node for node in blocks.values()
                                           if node.device_id == device), None)
    if node is None:
        raise DeviceNotFound(f"There is no block device '{device or name}'",
                             "query-block lists those that there are")
    return node


def _block_resize(request: Request) -> object:
    """Answered when the worker serves the new size; what the guest does with it is its affair."""
    node, size = _find_node(request), request.arguments["size"]
    if size % _SECTOR:
        raise QmpError(f"The argument 'size' must be a multiple of {_SECTOR}", f"{size} is not")
    device = request.vm.devices.get(node.device_id) if node.device_id is not None else None
    if device is None and node.device_id is not None:
        # Its worker may have measured the image already, and can't be told yet.
        raise StateError(f"The device '{node.device_id}' is just being plugged",
                         "try again when device_add is answered")
    node.image.grow(size)
    worker = device.worker if device is not None else None
    if worker is None or worker.state == "dead":
        return {}  # whoever serves it next measures it
    # One that is just starting may have measured it already.

    def finish(problem: str) -> None:
        timer.cancel()
        request.done(QmpError(f"The image has {size} bytes now, but {problem}",
                              "the guest keeps its old size") if problem else None)

    timer = request.vm.loop.call_later(_RESIZE_LIMIT, lambda: finish("the worker doesn't answer"))
    try:
        worker.orders.send("resize", finish)
    except SharedError as error:
        finish(f"the worker can't be told: {error}")
    return DEFERRED


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "BlockInfo": {"device": "str", "qdev?": "str", "type": "str", "removable": "bool",
                  "locked": "bool", "io-status?": "BlockDeviceIoStatus",
                  "inserted?": "BlockDeviceInfo"},
    "BlockDeviceIoStatus": ("ok", "failed", "nospace"),
    "BlockDeviceInfo": {
        "file": "str", "node-name?": "str", "ro": "bool", "drv": "str",
        "backing_file_depth": "int", "encrypted": "bool",
        "detect_zeroes": "BlockdevDetectZeroesOptions", "bps": "int", "bps_rd": "int",
        "bps_wr": "int", "iops": "int", "iops_rd": "int", "iops_wr": "int",
        **{f"{name}_max?": "int" for name in _LIMITS}, "image": "ImageInfo",
        "cache": "BlockdevCacheInfo", "write_threshold": "int", "driver?": "str"},
    "BlockdevDetectZeroesOptions": ("off", "on", "unmap"),
    "ImageInfo": {"filename": "str", "format": "str", "virtual-size": "int",
                  "actual-size?": "int", "children": "[any]"},
    "BlockdevCacheInfo": {"writeback": "bool", "direct": "bool", "no-flush": "bool"},
    "BlockStats": {"device?": "str", "node-name?": "str", "qdev?": "str",
                   "stats": "BlockDeviceStats"},
    "BlockDeviceStats": {**dict.fromkeys((*_COUNTERS, *_UNCOUNTED), "int"),
                         "account_invalid": "bool", "account_failed": "bool",
                         "timed_stats": "[any]"},
    "BlockJobInfo": {"device": "str", "type": "str"},
}


def _nothing(request: Request) -> object:
    """There are no block jobs."""
    return []


COMMANDS = (
    Command("query-block", _query_block, returns="[BlockInfo]"),
    Command("query-named-block-nodes", _query_named_block_nodes,
            Argument("flat", "bool", optional=True), returns="[BlockDeviceInfo]"),
    Command("query-blockstats", _query_blockstats,
            Argument("query-nodes", "bool", optional=True), returns="[BlockStats]"),
    Command("block_resize", _block_resize,
            Argument("device", "str", optional=True), Argument("node-name", "str", optional=True),
            Argument("size", "int", low=0, high=(1 << 62) - 1)),
    Command("query-block-jobs", _nothing, returns="[BlockJobInfo]"),
)

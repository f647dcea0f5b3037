"""The process that the user starts: it is the VMM, from the first instruction to the exit code.

Order matters (ARCHITECTURE.md, "Start-up"): parse, daemonize, start the nursery while this
process holds nothing yet, build the machine, listen for QMP, run the vCPUs, serve the loop.
Modules that come only with some options are imported where they are needed.
"""

from __future__ import annotations

import os
import sys
from _signal import SIGHUP, SIGINT, SIGTERM, signal  # type: ignore[import-not-found]

from shared import log
from shared.errors import StratovirtError
from vmm import cli
from vmm.cleanup import Cleanup
from vmm.event_loop import EventLoop

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import VmConfig
    from vmm.machine.machine import Machine
    from vmm.vm import Vm
    from vmm.worker.nursery import Nursery

# Seconds after which a thread that wants the GIL gets it: a vCPU whose exit Python serves
# competes with the main thread (ARCHITECTURE.md, "Exits").
SWITCH_INTERVAL = 0.0002


def main(arguments: list[str] | None = None) -> int:
    """Run one VM to its end; the return value is the exit status (0 orderly, 1 refused)."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        config = cli.parse(sys.argv[1:] if arguments is None else arguments)
    except cli.Answer as answer:  # -help, -version, -sandbox help
        sys.stdout.write(answer.text)
        return 0
    except StratovirtError as error:
        return _refuse(error)
    ready = None
    if config.daemonize:
        from vmm.daemonize import daemonize

        ready = daemonize()  # returns in the child; the parent waits for `ready`
    cleanup = Cleanup()
    try:
        vm = _start(config, cleanup)
        if ready is not None:
            ready.report(None)
        vm.loop.run()
        return vm.exit_code
    except StratovirtError as error:
        if ready is not None:
            ready.report(str(error))
        return _refuse(error)
    finally:
        cleanup.run()


def _refuse(error: StratovirtError) -> int:
    log.error(str(error))
    sys.stderr.write(f"stratovirt: {error}\n")
    return 1


def _start(config: VmConfig, cleanup: Cleanup) -> Vm:
    """Everything up to the moment at which the guest runs and QMP is answered."""
    loop = EventLoop()
    nursery = _start_nursery(config, loop, cleanup)
    log.open_log(config.log)
    for warning in config.warnings:
        log.warning(warning)
    from vmm.qmp.events import Events
    from vmm.qmp.server import QmpServer
    from vmm.vm import Vm

    events = Events()
    vm = Vm(config, loop, events, cleanup)
    if nursery is not None:
        nursery.on_io_error = vm.io_error
    machine = _build_machine(vm, nursery, cleanup) if config.machine.kind != "none" else None
    server = QmpServer(vm)
    cleanup.push(server.close)
    server.listen(config.monitors)
    if config.pidfile is not None:
        from vmm.daemonize import write_pidfile

        cleanup.push(write_pidfile(config.pidfile))
    for number in (SIGTERM, SIGINT, SIGHUP):
        signal(number, lambda number, frame: loop.call_soon(lambda: vm.host_signal(number)))
    vm.start(machine)
    return vm


def _start_nursery(config: VmConfig, loop: EventLoop, cleanup: Cleanup) -> Nursery | None:
    """The nursery comes before anything is opened, so that it can inherit nothing."""
    from vmm.machine.microvm import needs_workers

    if not needs_workers(config):
        return None
    from vmm.worker.nursery import Nursery

    nursery = Nursery(loop, config.sandbox.off_stages)
    cleanup.push(nursery.close)
    nursery.start()
    return nursery


def _build_machine(vm: Vm, nursery: Nursery | None, cleanup: Cleanup) -> Machine:
    from vmm.hypervisor.kvm import KvmHypervisor
    from vmm.machine.microvm import MicroVmBuilder

    hypervisor = KvmHypervisor()
    cleanup.push(hypervisor.close)
    builder = MicroVmBuilder(vm.config, hypervisor, nursery, vm.loop, cleanup, vm.vcpu_ended)
    return builder.build()


def run() -> None:
    """For the launcher: `main`, then an exit that doesn't wait for daemon threads."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()

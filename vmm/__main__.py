"""The process that the user starts: it is the VMM, from the first instruction to the exit code.

Order matters (ARCHITECTURE.md, "Start-up"): parse, daemonize, start the nursery (or the launcher
has), lay the groundwork, build the machine, listen for QMP, run the vCPUs, serve the loop.
Modules that come only with some options are imported where they are needed.
"""

from __future__ import annotations

import gc
import posix as os
import sys
from _signal import SIG_DFL, SIGHUP, SIGINT, SIGKILL, SIGTERM, signal  # type: ignore[import-not-found]

from shared import log, paths
from shared.errors import StratovirtError
from vmm import cli
from vmm.cleanup import Cleanup
from vmm.config.checks import check_handed_over
from vmm.event_loop import EventLoop

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import VmConfig
    from vmm.machine.groundwork import Groundwork
    from vmm.vm import Vm
    from vmm.worker.nursery import Nursery

# Seconds after which a thread that wants the GIL gets it: a vCPU whose exit Python serves
# competes with the main thread (ARCHITECTURE.md, "Exits").
SWITCH_INTERVAL = 0.0002
# Seconds after the guest's start at which this thread confines itself, which takes some
# milliseconds: until then there is more urgent work.
CONFINE_DELAY = 0.05
# Seconds that -daemonize waits for workers before it reports success; they need some tenths.
START_LIMIT = 10.0


class Early:
    """The nursery that the launcher has started (native/launcher/stratovirt.c), if any.

    :param text: "DESCRIPTOR:PID:GATE", or empty.
    """

    __slots__ = ("channel", "gate", "pid")

    def __init__(self, text: str) -> None:
        self.channel, self.pid, self.gate = map(int, (text or "-1:0:-1").split(":"))

    def take(self) -> tuple[int, int]:
        """Its pid and our end of its channel, the caller's from now on."""
        taken = self.pid, self.channel
        self.channel, self.pid = -1, 0
        return taken

    def go_on(self) -> None:
        """It need not wait any longer, if it did: the guest runs."""
        gate, self.gate = self.gate, -1
        if gate >= 0:
            os.close(gate)

    def end(self) -> None:
        """End it, if nobody took it: it holds nothing yet."""
        self.go_on()
        pid, channel = self.take()
        if pid:
            os.close(channel)
            os.kill(pid, SIGKILL)
            os.waitpid(pid, 0)


def main(arguments: list[str] | None = None, early: Early | None = None) -> int:
    """Run one VM to its end; the return value is the exit status (0 orderly, 1 refused).

    :param early: the nursery that the launcher has started; taken over or ended.
    """
    try:
        return _main(sys.argv[1:] if arguments is None else arguments, early or Early(""))
    finally:
        if early is not None:
            early.end()


def _main(arguments: list[str], early: Early) -> int:
    sys.setswitchinterval(SWITCH_INTERVAL)
    signal(SIGINT, SIG_DFL)  # until the VM is there it just ends us, without a trace
    _own_descriptors()
    try:
        config = cli.parse(arguments)
        check_handed_over(config, (early.channel, early.gate))
    except cli.Answer as answer:  # -help, -version, -sandbox help
        return _answer(answer.text)
    except Exception as error:
        return _refuse(error)
    ready = None
    if config.daemonize:
        from vmm.daemonize import daemonize

        ready = daemonize()  # returns in the child; the parent waits for `ready`
    cleanup = Cleanup()
    try:
        vm = _start(config, cleanup, early)
        if ready is not None:
            vm.wait_for_workers(START_LIMIT)
            ready.report(None)
        # The launcher turned it off. What is there now stays to the end: it need not be searched.
        gc.freeze()
        gc.enable()
        vm.loop.run()
        if vm.failure is not None:
            raise vm.failure
        return vm.exit_code
    except Exception as error:
        cleanup.run()  # before anybody hears of it: nothing is left behind then
        if ready is None:
            return _refuse(error)
        ready.report(_describe(error))
        return 1
    finally:
        cleanup.run()


def _own_descriptors() -> None:
    """Nothing that we open becomes standard input, output or error; nothing that whoever
    started us left open reaches the processes that we start."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # gets this number, the lowest that is free
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass  # the one that listed them


def _answer(text: str) -> int:
    data = text.encode()
    try:
        while data:
            data = data[os.write(1, data):]
    except OSError:
        return 1
    return 0


def _refuse(error: Exception) -> int:
    text = _describe(error)
    if not log.on_standard_error():  # or it would be there twice
        log.error(text)
    log.print_error(text)
    return 1


def _describe(error: Exception) -> str:
    if isinstance(error, StratovirtError):
        return str(error)
    log.exception("internal error", error)  # a defect of ours
    return f"internal error: {error!r}; this is a defect, please report it"


def _start(config: VmConfig, cleanup: Cleanup, early: Early) -> Vm:
    """Everything up to the moment at which the guest has its devices and QMP is answered."""
    from shared import unix_socket

    def take_nursery() -> Nursery | None:
        early.go_on()
        found = nursery if nursery is not None else _start_nursery(config, loop, cleanup, early)
        if found is not None:
            found.on_io_error = vm.io_error
            unix_socket.on_name = found.remember
            for name in names:
                found.remember(name)
        return found

    names: list[str] = []  # that must not outlive us
    loop = EventLoop()
    loop.on_exception = lambda error: log.exception("in the event loop", error)
    nursery = None
    if not early.pid:  # before anything is opened, so that it can inherit nothing
        nursery = _start_nursery(config, loop, cleanup, early)
    log.open_log(config.log)
    for warning in config.warnings:
        log.warning(warning)
    # Before anything has a name: a signal that comes now is served when the loop runs.
    for number in (SIGTERM, SIGINT, SIGHUP):
        signal(number, lambda number, frame: loop.call_soon(lambda: vm.host_signal(number)))
    groundwork = _lay_groundwork(config, cleanup)
    from vmm.qmp.events import Events
    from vmm.vm import Vm

    events = Events()
    vm = Vm(config, loop, events, cleanup)
    unix_socket.on_name = names.append
    machine = None
    if groundwork is not None:
        from vmm.machine.microvm import MicroVmBuilder

        machine = MicroVmBuilder(config, groundwork, loop, cleanup, vm.vcpu_ended,
                                 take_nursery).build()
        nursery = machine.nursery
    from vmm.qmp.server import QmpServer

    server = QmpServer(vm)
    cleanup.push(server.close)
    server.listen(config.monitors)  # whoever finds it finds a whole VM
    if config.pidfile is not None:
        from vmm.daemonize import write_pidfile

        cleanup.push(write_pidfile(config.pidfile))
        if nursery is not None:
            nursery.remember(paths.absolute(config.pidfile))
    vm.start(machine)
    loop.call_later(CONFINE_DELAY, lambda: _confine(config, nursery))
    return vm


def _confine(config: VmConfig, nursery: Nursery | None) -> None:
    from vmm.confinement import confine_main

    confine_main(config.sandbox, nursery)


def _start_nursery(config: VmConfig, loop: EventLoop, cleanup: Cleanup,
                   early: Early) -> Nursery | None:
    if config.machine.kind != "microvm":
        return None
    from vmm.worker.nursery import Nursery

    nursery = Nursery(loop, config.sandbox.off_stages, config.name)
    cleanup.push(nursery.close)
    if early.pid:
        nursery.adopt(*early.take())
    else:
        nursery.start()
    return nursery


def _lay_groundwork(config: VmConfig, cleanup: Cleanup) -> Groundwork | None:
    """It gets on while this thread loads the modules that it needs next."""
    if config.machine.kind == "none":
        return None
    from vmm.machine.groundwork import Groundwork

    return Groundwork(config, cleanup)


def run(nursery: str = "") -> None:
    """For the launcher: `main`, then an exit that doesn't wait for daemon threads.

    :param nursery: see `Early`.
    """
    status = main(early=Early(nursery))
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, AttributeError):
            pass  # closed, before us or by whoever read it
    os._exit(status)


if __name__ == "__main__":
    run()

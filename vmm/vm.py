"""The life of one VM: start, pause, resume, reset, the ways it ends; what QMP sees of it.

States (`run_state`) and what leads from one to the next:

    prelaunch ──start/cont──▶ running ◀──cont── paused
        │                        │ ──stop──▶      │
        └────────────┬───────────┴───────────────┘
                     ▼ quit, host signal, guest shutdown          internal-error: KVM failed;
                  shutdown (draining, then the loop ends)          only quit leads out of it

Everything here runs on the main thread. What has to wait (a vCPU that must leave the guest, a
back end that must drain) waits on a thread of its own and comes back through the event loop,
so that no device can block QMP, `stop` or `quit`.
"""

from __future__ import annotations

import _thread
import time

from shared import log
from vmm.errors import StateError, VmmError, WorkerSpawnError
from vmm.hypervisor.interface import EXIT_POWEROFF, EXIT_RESET, EXIT_SHUTDOWN

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmm.block.family import BlockNode
    from vmm.block.io_errors import IoErrors
    from vmm.chardev.base import Chardev
    from vmm.cleanup import Cleanup
    from vmm.config.model import VmConfig
    from vmm.event_loop import EventLoop
    from vmm.machine.family import Family
    from vmm.machine.hotplug import Hotplug
    from vmm.machine.machine import Device, Machine
    from vmm.machine.slots import Slot
    from vmm.net.node import NetNode
    from vmm.qmp.events import Events
    from vmm.vcpu import VcpuThread
    from vmm.worker.null import NullBackend
    from vmm.worker.nursery import Nursery
    from vmm.worker.process import WorkerProcess
    from vmm.worker.supervisor import Supervisor

    Done = Callable[[Exception | None], None]

# How long `stop` and the orderly ends wait for vCPUs and back ends before they say which one
# did not come to rest. A disk may rightly need seconds to flush; nobody else waits meanwhile.
PAUSE_LIMIT = 10.0
END_LIMIT = 5.0
# ... and the end for a `stop`, `cont` or `system_reset` that is under way.
CHANGE_LIMIT = 10.0
# Seconds from one look at how much memory a guest uses to the next: they grow.
FIRST_LOOK = 0.01
LAST_LOOK = 4.0

_GUEST_ENDS = {EXIT_SHUTDOWN: "triple fault", EXIT_RESET: "reset", EXIT_POWEROFF: "power-off"}


class Vm:
    """One virtual machine, from its configuration to its exit code."""

    def __init__(self, config: VmConfig, loop: EventLoop, events: Events,
                 cleanup: Cleanup) -> None:
        self.config = config
        self.loop = loop
        self.events = events
        self.cleanup = cleanup
        self.run_state = "prelaunch"
        self.exit_code = 0
        self.machine: Machine | None = None
        self._transition = ""  # "stop", "cont", "reset" while one is under way
        self._changing = _thread.allocate_lock()  # held by its thread
        self._clock: bytes | None = None
        self._io_errors: IoErrors | None = None
        self._supervisor: Supervisor | None = None
        self.failure: VmmError | None = None  # why the start failed after all
        self._null: NullBackend | None = None
        self._hotplug: Hotplug | None = None

    # ---- what QMP reads --------------------------------------------------------------------

    @property
    def vcpus(self) -> Sequence[VcpuThread]:
        """The vCPU threads, by index."""
        return self.machine.vcpus if self.machine else ()

    @property
    def blocks(self) -> dict[str, BlockNode]:
        """Block back ends by node name."""
        return self.machine.blocks if self.machine else {}

    @property
    def nets(self) -> dict[str, NetNode]:
        """Network back ends by id."""
        return self.machine.nets if self.machine else {}

    @property
    def devices(self) -> dict[str, Device]:
        """Devices by id (one that we made up where the user gave none)."""
        return self.machine.devices if self.machine else {}

    @property
    def chardevs(self) -> dict[str, Chardev]:
        """Character devices by id."""
        return self.machine.chardevs if self.machine else {}

    def slots(self) -> Sequence[Slot]:
        """The slots of the machine, by number."""
        return self.machine.slots if self.machine else ()

    def workers(self) -> list[WorkerProcess]:
        """The worker processes of this VM's devices, and the null worker if there is one."""
        workers = [d.worker for d in self.devices.values() if d.worker is not None]
        if self._null is not None and self._null.worker is not None:
            workers.append(self._null.worker)
        return workers

    # ---- start -----------------------------------------------------------------------------

    def start(self, machine: Machine | None) -> None:
        """Take over the finished machine and let the guest go on, unless `-S` was given."""
        self.machine = machine
        for device in self.devices.values():
            self._watch_worker(device)
            device.device.on_event = self.events.emit
        for slot in machine.slots if machine is not None else ():
            self._watch_slot(slot)
        if machine is None:
            return
        if not self.config.frozen:
            self.run_state = "running"
        machine.open()
        if not self.config.frozen:
            self._watch_memory(FIRST_LOOK)

    def _watch_memory(self, delay: float) -> None:
        """A guest that never uses much never has the thread that makes huge pages."""
        if not self._machine().watch_memory():
            self.loop.call_later(delay, lambda: self._watch_memory(min(2 * delay, LAST_LOOK)))

    # ---- stop and cont ---------------------------------------------------------------------

    def pause(self, done: Done) -> None:
        """`stop`: vCPUs leave the guest, back ends drain, flush and stop their rings.

        `done(error)` is called on the main loop when nothing can touch guest memory any more;
        STOP is emitted just before. If a back end doesn't come to rest in time the vCPUs are
        paused all the same, and the error names it.

        :raises StateError: at once, if the VM isn't running.
        """
        self._require("stop", ("running",))
        machine = self._machine()
        self._transition = "stop"

        def finish(error: Exception | None) -> None:
            self._transition = ""
            if self.run_state != "running":
                done(StateError(f"stop: the VM is now {self.run_state}", "query-status tells"))
                return
            self.run_state = "paused"
            self.events.emit("STOP", {})
            done(error)

        def work() -> None:
            deadline = time.monotonic() + PAUSE_LIMIT
            machine.pause_vcpus(deadline)
            self._clock = machine.vm.get_clock()
            machine.pause_devices(deadline)

        self._change(work, finish)

    def resume(self, done: Done) -> None:
        """`cont`: rings start where they stopped, then the vCPUs; RESUME just before `done`.

        :raises StateError: at once, if the VM isn't paused.
        """
        self._require("cont", ("paused", "prelaunch"))
        machine = self._machine()
        self._transition = "cont"
        first = self.run_state == "prelaunch"

        def finish(error: Exception | None) -> None:
            self._transition = ""
            if error is not None or self.run_state not in ("paused", "prelaunch"):
                done(error or StateError(f"cont: the VM is now {self.run_state}",
                                         "query-status tells"))
                return
            self.run_state = "running"
            if first:
                machine.start_vcpus()
                self._watch_memory(FIRST_LOOK)
            else:
                machine.resume_vcpus()
            self.events.emit("RESUME", {})
            done(None)

        def work() -> None:
            if first:
                return
            try:
                machine.resume_devices()
            except VmmError:
                # The VM stays paused: so must those that could start.
                machine.pause_devices(time.monotonic() + PAUSE_LIMIT)
                raise
            if self._clock is not None:
                machine.vm.set_clock(self._clock)  # the guest's clock stood still meanwhile

        self._change(work, finish)

    # ---- reset and power -------------------------------------------------------------------

    def reset(self, done: Done) -> None:
        """`system_reset`: the machine as at power-on, with the same RAM; RESET before `done`.

        A paused VM stays paused.

        :raises StateError: at once, if the VM is neither running nor paused.
        """
        self._require("system_reset", ("running", "paused"))
        machine = self._machine()
        self._transition = "reset"
        running = self.run_state == "running"

        def finish(error: Exception | None) -> None:
            self._transition = ""
            if self.run_state in ("running", "paused"):
                if error is not None and running:
                    # Half reset, and the vCPUs stand still: another system_reset, or quit.
                    self.run_state = "paused"
                    self.events.emit("STOP", {})
                elif error is None:
                    if running:
                        machine.resume_vcpus()
                    self.events.emit("RESET", {"guest": False})
            done(error)

        def work() -> None:
            deadline = time.monotonic() + PAUSE_LIMIT
            machine.pause_vcpus(deadline)
            machine.reset()

        self._change(work, finish)

    def powerdown(self) -> None:
        """`system_powerdown`: press the ACPI power button; what the guest does is its affair.

        :raises StateError: the VM isn't running.
        """
        self._require("system_powerdown", ("running",))
        self._machine().press_power_button()
        self.events.emit("POWERDOWN", {})

    # ---- ends ------------------------------------------------------------------------------

    def quit(self) -> None:
        """`quit`: SHUTDOWN, drain and flush within a limit, end the loop with exit code 0."""
        self._end("host-qmp-quit", guest=False)

    def host_signal(self, number: int) -> None:
        """SIGTERM, SIGINT or SIGHUP: the same orderly end."""
        log.info(f"Received signal {number}, ending the VM")
        self._end("host-signal", guest=False)

    def vcpu_ended(self, kind: int, vcpu: VcpuThread) -> None:
        """Called on a vCPU's thread: the guest ended itself, or KVM can't go on."""
        report = vcpu.report
        if kind == EXIT_SHUTDOWN:
            report = vcpu.vcpu.error_report()  # the vCPU is parked, its registers are whole
        self.loop.call_soon(lambda: self._guest_ended(kind, report))

    def _guest_ended(self, kind: int, report: str) -> None:
        """On a microvm reset and power-off both end the VM (compat-decisions, "ends")."""
        if kind in _GUEST_ENDS:
            log.info(f"The guest ended the VM: {_GUEST_ENDS[kind]}")
            for line in report.splitlines():
                log.info(line)
            self._end("guest-shutdown", guest=True)
        else:
            self._internal_error(report)

    def _internal_error(self, report: str) -> None:
        """KVM can't go on: all vCPUs stop, STOP is emitted, the report goes to the log."""
        if self.run_state in ("shutdown", "internal-error"):
            return
        for line in report.splitlines():
            log.error(line)
        self.run_state = "internal-error"
        machine = self._machine()
        self.off_loop(lambda: machine.pause_vcpus(time.monotonic() + PAUSE_LIMIT),
                       lambda error: None)
        self.events.emit("STOP", {})

    def _end(self, reason: str, guest: bool) -> None:
        if self.run_state == "shutdown":
            return
        self.run_state = "shutdown"
        self.events.emit("SHUTDOWN", {"guest": guest, "reason": reason})
        machine = self.machine
        if machine is None:
            self.loop.stop()
            return

        def finish(error: Exception | None) -> None:
            if error is not None:
                log.warning(f"At the end: {error}")
            self.loop.stop()

        def work() -> None:
            machine.end(time.monotonic() + END_LIMIT)
            # What a reset loads the kernel into is unmapped next.
            if self._changing.acquire(True, CHANGE_LIMIT):
                self._changing.release()  # who comes later sees the state

        self.off_loop(work, finish)

    # ---- workers ---------------------------------------------------------------------------

    @property
    def supervisor(self) -> Supervisor:
        """Who looks after the workers; made when the first one needs it."""
        if self._supervisor is None:
            from vmm.worker.supervisor import Supervisor  # costs time at the start

            self._supervisor = Supervisor(self)
            for device in self.devices.values():
                if device.kind is not None:
                    self._supervisor.watch(device)
        return self._supervisor

    def _watch_worker(self, device: Device) -> None:
        """The supervisor's eyes, until there is one."""
        if device.worker is None or device.kind is None:
            return
        device.worker.on_end = lambda reason: self._call_supervisor()
        device.vhost.on_lost = lambda text: self.loop.call_soon(
            lambda: self.supervisor.lost(device, text))
        if device.worker.state == "dead":
            self.loop.call_soon(self._call_supervisor)

    def wait_for_workers(self, limit: float) -> None:
        """Until the workers that the VM starts with serve. Before the loop runs.

        :raises WorkerSpawnError: the host lacks what their sandbox needs.
        """
        deadline = time.monotonic() + limit
        for worker in self.workers():
            worker.wait_started(deadline)
        self.check_sandboxes()
        if self.failure is not None:
            raise self.failure

    def check_sandboxes(self) -> None:
        """A host that lacks a stage can't run this VM: its start fails, though it has begun."""
        for worker in self.workers():
            if worker.lacks and not worker.restarts and self.failure is None:
                self.failure = WorkerSpawnError(
                    f"Worker {worker.kind} '{worker.device}' can't start: {worker.reason}")
                self.run_state = "shutdown"
                self.loop.stop()

    def _call_supervisor(self) -> None:
        if self._supervisor is None:
            self.check_sandboxes()
        if self.run_state != "shutdown":
            self.supervisor  # noqa: B018  # it looks at every worker when it is made

    def _watch_slot(self, slot: Slot) -> None:
        """A slot's device always gets a back end again, unless it is somebody else's."""
        worker = slot.occupant is not None and slot.occupant.kind is not None
        if not slot.replaceable and not (worker and slot.device.has_null):
            return
        device = slot.answered
        if device.on_lost is None:
            device.on_lost = _nothing_lost
        device.on_needed = lambda: self.loop.call_soon(lambda: self.hotplug.needed(slot))

    @property
    def null(self) -> NullBackend:
        """Who answers where there is no device; made when the first one is asked."""
        if self._null is None:
            from vmm.worker.null import NullBackend  # not needed before the guest runs

            self._null = NullBackend(self)
        return self._null

    @property
    def hotplug(self) -> Hotplug:
        """Plugging and unplugging."""
        if self._hotplug is None:
            from vmm.machine.hotplug import Hotplug  # not needed before the guest runs

            self._hotplug = Hotplug(self, self._machine(), self.null)
        return self._hotplug

    def family(self, name: str) -> Family:
        """What comes and goes in the slots of this machine, "block" or "net".

        :raises VmmError: this VM has no such slots.
        """
        return self._machine().family(name)

    def nursery(self) -> Nursery:
        """Where workers come from.

        :raises StateError: this VM has none.
        """
        nursery = self._machine().nursery
        if nursery is None:
            raise StateError("This VM has no workers", "start it with -machine microvm")
        return nursery

    def retire_nursery(self) -> None:
        """The next worker comes from a fresh nursery, with the code as it is on disk by then."""
        self.nursery().retire()

    def serve_errors(self, device: Device) -> None:
        """No worker serves the device any more: the null back end answers with I/O errors."""
        def attached(error: Exception | None) -> None:
            if error is not None:
                device.vhost.on_lost = None  # nobody waits for another back end: `stop` goes on
                device.device.on_failure(f"The device {device.id} is given up, and nobody answers "
                                         f"for it: {error}")

        self.hotplug.take_turn(lambda done: self.hotplug.give_up(device, done), attached)

    def io_error(self, worker: WorkerProcess, message: Mapping[str, object]) -> None:
        """A worker reports that the host failed a request: BLOCK_IO_ERROR, the VM goes on."""
        if self._io_errors is None:
            from vmm.block.io_errors import IoErrors  # seldom needed

            self._io_errors = IoErrors(self.events, self.blocks)
        self._io_errors.report(worker, message)

    # ---- helpers ---------------------------------------------------------------------------

    def _machine(self) -> Machine:
        if self.machine is None:
            raise StateError("This VM has no machine (-machine none)",
                             "start it with -machine microvm")
        return self.machine

    def _require(self, command: str, states: tuple[str, ...]) -> None:
        if self._transition:
            raise StateError(f"{command}: a {self._transition} is under way", "try again soon")
        if self.run_state not in states:
            raise StateError(f"{command}: the VM is {self.run_state}",
                             f"it must be {' or '.join(states)}")

    def _change(self, work: Callable[[], None], finish: Done) -> None:
        """As `off_loop`, for what uses the whole machine: its end waits for it."""
        def alone() -> None:
            with self._changing:
                if self.run_state == "shutdown":
                    raise StateError("The VM is shutdown", "it can't be changed any more")
                work()

        self.off_loop(alone, finish)

    def off_loop(self, work: Callable[[], None], finish: Done) -> None:
        """Run `work` on a thread, then `finish(error)` on the main loop."""

        def run() -> None:
            error: Exception | None = None
            try:
                work()
            except VmmError as caught:
                error = caught
            except Exception as caught:  # a defect of ours: report it, don't lose the command
                log.exception("while the VM changed its state", caught)
                error = VmmError(f"internal error: {caught!r}", "see the log")
            self.loop.call_soon(lambda: finish(error))

        try:
            _thread.start_new_thread(run, ())
        except RuntimeError as caught:  # the limit on threads
            error = VmmError(f"Can't start a thread: {caught}", "raise the limit on threads")
            self.loop.call_soon(lambda: finish(error))


def _nothing_lost(text: str) -> None:
    """The null back end's own end is dealt with where it is known; the device waits."""

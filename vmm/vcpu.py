"""The thread of one vCPU: runs the guest, hands exits to devices, pauses and stops.

Phases, as others see them:

    GUEST    may be inside KVM_RUN
    HANDLER  out of the guest: in a device's handler, or between two exits
    PARKED   waits for `resume` or the end
    ENDED

A vCPU is paused as soon as a pause was requested and its phase isn't GUEST: it looks at the
request after it said GUEST and before it enters, so that one of the two sides always sees the
other (the GIL orders the accesses).  A handler that waits for a slow back end so holds up
nobody's `stop`.  The access of the last exit is finished, without running the guest, before
the thread parks: registers read while PARKED are whole.
"""

from __future__ import annotations

import _thread
import time

from shared import log
from shared.errors import StratovirtError
from vmm.hypervisor.interface import (
    EXIT_INTERNAL_ERROR,
    EXIT_IO_READ,
    EXIT_IO_WRITE,
    EXIT_KICKED,
    EXIT_MMIO_READ,
    EXIT_MMIO_WRITE,
    EXIT_POWEROFF,
    EXIT_RESET,
    EXIT_UNKNOWN,
)

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.bus.address_space import Access
    from vmm.hypervisor.interface import Exit, Vcpu

PARKED = 0
HANDLER = 1
GUEST = 2
ENDED = 3


class VcpuThread:
    """One vCPU and its thread.

    :param mmio: answers MMIO exits; `ports` answers port exits.
    :param on_exit: called on this thread as `on_exit(kind, vcpu)` when the guest ended or
        failed (EXIT_SHUTDOWN, RESET, POWEROFF, INTERNAL_ERROR, UNKNOWN); `vcpu.report` then
        tells more about the last two.  The thread parks; `resume` makes it run again.
    :param confine: called on the thread before it runs the guest (vmm/confinement.py).
    """

    def __init__(self, vcpu: Vcpu, mmio: Access, ports: Access,
                 on_exit: Callable[[int, VcpuThread], None],
                 confine: Callable[[], None] | None = None) -> None:
        self.vcpu = vcpu
        self._confine = confine
        self.index = vcpu.index
        self.report = ""
        self._mmio = mmio
        self._ports = ports
        self._on_exit = on_exit
        self._phase = PARKED
        self._lock = _thread.allocate_lock()  # what follows
        self._attention = True  # a pause or the end is requested: go to the gate
        self._pausing = True  # until `start`
        self._stopping = False
        self._wake: _thread.LockType | None = None  # held while the thread is parked
        self._waiters: list[_thread.LockType] = []
        self._spawned = False
        self._ready = _thread.allocate_lock()  # held until the thread is set up
        self._tid = 0

    # ---- other threads ----------------------------------------------------------------------

    @property
    def thread_id(self) -> int:
        """The host's id of the thread, which is created now if it wasn't yet; 0 once ended."""
        self.spawn()
        with self._ready:
            return self._tid

    def spawn(self) -> None:
        """Create the thread and return at once; it gets ready and parks until `start`."""
        with self._lock:
            if not self._spawned:
                self._spawned = True
                self._ready.acquire()
                _thread.start_new_thread(self._main, ())

    def start(self) -> None:
        """Let the vCPU enter the guest for the first time."""
        self.spawn()
        with self._ready:
            self.resume()

    def request_pause(self) -> None:
        """Get out of the guest and stay out until `resume`. Returns at once."""
        with self._lock:
            self._pausing = True
            self._attention = True
        self.vcpu.kick()

    def request_stop(self) -> None:
        """Get out of the guest and end the thread. Returns at once."""
        with self._lock:
            self._stopping = True
            self._attention = True
            self._open_gate()
        self.vcpu.kick()

    def resume(self) -> None:
        """Let the vCPU enter the guest again."""
        with self._lock:
            self._pausing = False
            self._attention = self._stopping
            self._open_gate()

    def _open_gate(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.release()

    def wait_paused(self, deadline: float) -> bool:
        """Whether the vCPU is out of the guest, after a pause or stop request.

        Waits until `deadline` (monotonic seconds) at most.  See the module's text for what
        counts; `wait_parked` is stricter.
        """
        return self._wait(lambda: self._phase != GUEST, deadline)

    def wait_parked(self, deadline: float) -> bool:
        """As `wait_paused`, and no handler is at work either: registers are whole."""
        return self._wait(lambda: self._phase in (PARKED, ENDED), deadline)

    def join(self, deadline: float) -> bool:
        """Whether the thread has ended (or never was), by `deadline` at most."""
        if not self._spawned:
            return True
        with self._ready:  # before that nobody sees that it uses the vCPU
            pass
        return self._wait(lambda: self._phase == ENDED, deadline)

    def _wait(self, reached: Callable[[], bool], deadline: float) -> bool:
        while not reached():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            waiter = _thread.allocate_lock()
            waiter.acquire()
            with self._lock:
                self._waiters.append(waiter)
            if reached():  # changed before it could see the waiter
                return True
            if not waiter.acquire(True, remaining):
                return reached()
        return True

    # ---- this thread ------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._tid = _thread.get_native_id()
            try:
                self.vcpu.bind_thread()
            finally:
                self._ready.release()
            if self._confine is not None:
                self._confine()
            self._serve()
        except BaseException as error:
            self._fail(error)
        finally:
            self.vcpu.unbind_thread()
            self._tid = 0
            self._set_phase(ENDED)

    def _serve(self) -> None:
        vcpu = self.vcpu
        while True:
            self._phase = GUEST
            if self._attention:
                self._phase = HANDLER
                if not self._pass_gate():
                    return
                continue
            exit = vcpu.run()
            self._phase = HANDLER
            if self._waiters:
                self._notify()
            kind = exit.kind
            if kind <= EXIT_MMIO_WRITE:
                self._dispatch(exit)
                if self._attention:
                    self._finish_access()
            elif kind != EXIT_KICKED:
                self._guest_ended(kind)

    def _dispatch(self, exit: Exit) -> None:
        kind = exit.kind
        try:
            if kind == EXIT_MMIO_WRITE:
                self._mmio.write(exit.address, exit.size, exit.value)
            elif kind == EXIT_MMIO_READ:
                self.vcpu.complete_read(self._mmio.read(exit.address, exit.size))
            elif kind == EXIT_IO_WRITE:
                self._ports.write(exit.address, exit.size, exit.value)
            elif kind == EXIT_IO_READ:
                self.vcpu.complete_read(self._ports.read(exit.address, exit.size))
        except Exception as error:  # a defect of a device: the VM can't go on, the host can
            self._fail(error)

    def _finish_access(self) -> None:
        while True:
            exit = self.vcpu.finish()
            if exit.kind > EXIT_MMIO_WRITE:
                return
            self._dispatch(exit)

    def _guest_ended(self, kind: int) -> None:
        if kind in (EXIT_INTERNAL_ERROR, EXIT_UNKNOWN):
            self.report = self.vcpu.error_report()
        if kind in (EXIT_RESET, EXIT_POWEROFF):
            self._finish_access()  # a reset sets the registers, which a pending access would
        self._park_next()
        self._on_exit(kind, self)

    def _fail(self, error: BaseException) -> None:
        text = (str(error) if isinstance(error, StratovirtError)
                else "".join(log.trace(error)).rstrip())
        self.report = f"vCPU {self.index} can't go on: {text}"
        self._park_next()
        self._on_exit(EXIT_INTERNAL_ERROR, self)

    def _park_next(self) -> None:
        with self._lock:
            self._pausing = True
            self._attention = True

    def _pass_gate(self) -> bool:
        """Park while a pause is requested; False: end."""
        while True:
            with self._lock:
                if self._stopping:
                    return False
                if not self._pausing:
                    return True
                wake = self._wake = _thread.allocate_lock()
                wake.acquire()
            self._set_phase(PARKED)
            wake.acquire()
            self._phase = HANDLER

    def _set_phase(self, phase: int) -> None:
        self._phase = phase
        self._notify()

    def _notify(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.release()

"""One worker process as the core sees it: its descriptors, its state, its end.

The vhost-user connection exists before the worker does, so that messages can be written at
once.  A worker reports over its control channel (started, log, error) and counts in a page
that it alone writes and nobody trusts.
"""

from __future__ import annotations

import _thread
import posix as os
import select
import time
from _signal import SIGKILL, SIGSYS, pidfd_send_signal  # type: ignore[import-not-found]

from shared import log
from shared.control.channel import Channel, ChannelClosed
from shared.control.codec import CodecError
from shared.quota import LINES, LINES_RATE, Quota
from vmm.worker.orders import Orders

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.control.channel import Message
    from vmm.worker.nursery import Nursery

STARTING = "starting"
RUNNING = "running"
DEAD = "dead"

_WALL = 0x40000000  # linux/wait.h, __WALL: clones without an exit signal too
_TEXT_LIMIT = 2000
# Reports that nobody asked for: who sends more is put down (shared/quota.py). Honest workers keep
# to the quota of lines themselves and tell of I/O errors five times a second at most.
_REPORTS, _REPORTS_RATE = 400, 40.0


class WorkerProcess:
    """A worker, from the request to the nursery until it is reaped.

    kind and device name it; pid is 0 until the nursery answered; socket_fd is the core's end of
    the vhost-user connection (the device takes it over: `take_socket`); stages are the sandbox
    stages that the worker says are in force; reason says why it is dead.

    orders: what it can be asked for.
    on_end: called on the main loop when it has ended, with the reason; None: only logged.
    on_report: called there with each report that only its kind of worker makes; not checked.
    """

    __slots__ = ("_control", "_doomed", "_lines", "_nursery", "_reported", "_reports", "_silent",
                 "_started", "device", "engine", "kind", "lacks", "on_end", "on_report", "orders",
                 "pid", "pidfd", "reason", "restarts", "serial", "socket_fd", "stages", "state",
                 "stopping")

    def __init__(self, nursery: Nursery, serial: int, kind: str, device: str, socket_fd: int,
                 control_fd: int) -> None:
        self._nursery = nursery
        self.serial = serial
        self.kind = kind
        self.device = device
        self.socket_fd = socket_fd
        self.pid = 0
        self.pidfd = -1
        self.state = STARTING
        self.reason = ""
        self.lacks = ""
        self.engine = ""
        self.restarts = 0
        self.stages: list[str] = []
        self.stopping = False
        self.on_end: Callable[[str], None] | None = None
        self.on_report: Callable[[Message], None] = _ignore
        self._control = Channel(control_fd, blocking=False)
        self.orders = Orders(self._control)
        self._lines = Quota(LINES, LINES_RATE)
        self._reports = Quota(_REPORTS, _REPORTS_RATE)
        self._silent = False
        self._reported = False
        self._doomed = False  # `kill` came before the nursery's answer
        # Held until the worker has started or is dead: waiters take and release it.
        self._started = _thread.allocate_lock()
        self._started.acquire()
        nursery.loop.add(self._control.fileno(), select.EPOLLIN, self._on_control)

    # ---- what happens, on the main loop ----------------------------------------------------

    def cloned(self, pid: int, pidfd: int) -> None:
        """The nursery made it."""
        self.pid = pid
        self.pidfd = pidfd
        self._nursery.loop.add(pidfd, select.EPOLLIN, self._on_end)
        if self._doomed:
            self.kill()
        self._check_running()

    def _check_running(self) -> None:
        # The worker's report and the nursery's answer come by different ways, in any order.
        if self.state == STARTING and self._reported and self.pid:
            self.state = RUNNING
            self._started.release()

    def failed(self, reason: str, lacks: str = "") -> None:
        """The nursery could not make it, for lack of a sandbox's stage or for another reason."""
        self._drain_control()
        self.lacks = lacks
        self._ended(reason)

    def _on_control(self, events: int) -> None:
        if not self._receive():
            self._nursery.loop.remove(self._control.fileno())
            self._silent = True

    def _drain_control(self) -> None:
        while self._receive():
            pass

    def _receive(self) -> bool:
        """Handle one report; False: there is none, or there will be none any more."""
        try:
            message, fds = self._control.recv()
        except CodecError as error:
            self._log(str(error))
            return self._may_go_on()
        except (ChannelClosed, BlockingIOError):
            return False
        for fd in fds:
            os.close(fd)
        if self._handle(message):
            self._reports.refund()  # a balloon's statistics come before the answer
            return True
        return self._may_go_on()

    def _may_go_on(self) -> bool:
        """One more report that nobody asked for: whether that can be borne."""
        if self._reports.take():
            return True
        if self._reports.dropped == 1:
            self.put_down("it sends more reports than it may")
        return False

    def _log(self, text: str) -> None:
        """A line for the log that the worker is the cause of."""
        line = self._lines.line(_one_line(text))
        if line:
            log.warning(f"Worker {self.kind} '{self.device}': {line}")

    def _handle(self, message: Message) -> bool:
        """True: it is the answer to an order."""
        kind, text = message.get("type"), str(message.get("text", ""))[:_TEXT_LIMIT]
        if kind == "started" and self.state == STARTING:
            stages = message.get("stages")
            if isinstance(stages, list):
                self.stages = [str(stage)[:64] for stage in stages[:32]]
            self.engine = str(message.get("engine", ""))[:32]
            self._reported = True
            self._check_running()
        elif kind == "log":
            self._log(text)
        elif kind == "error":
            self.reason = _one_line(text)
            # What the host lacks is known before the worker reads what a guest can choose; from
            # then on its word could end the VM.
            if not self._reported:
                self.lacks = str(message.get("stage", ""))[:64]
        elif kind in ("done", "failed"):
            return self.orders.answered(message)
        elif kind == "io-error":
            self._nursery.on_io_error(self, message)
        elif kind == "died":
            self.reason = describe_death(message)
        else:
            self.on_report(message)
        return False

    def _on_end(self, events: int) -> None:
        self._drain_control()
        how = self._reap()
        self._ended(f"{how}: {self.reason}" if self.reason else how)

    def _reap(self) -> str:
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | _WALL)
        except OSError as error:
            return f"ended ({error.strerror})"
        if result is None:
            return "ended"
        if result.si_code == os.CLD_EXITED:
            return f"exit code {result.si_status}"
        return f"killed by signal {result.si_status}"

    def _ended(self, reason: str) -> None:
        if self.state == DEAD:
            return
        starting = self.state == STARTING
        self.state = DEAD
        self.reason = reason
        loop = self._nursery.loop
        if self.pidfd >= 0:
            loop.remove(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        loop.remove(self._control.fileno())
        self._control.close()
        if starting:
            self._started.release()
        self._nursery.forget(self)
        if not self.stopping:
            log.error(f"Worker {self.kind} '{self.device}' (pid {self.pid}) ended: {reason}")
        self.orders.abandon("the worker ended")
        if self.on_end is not None:
            self.on_end(reason)

    # ---- what the core asks ----------------------------------------------------------------

    def wait_started(self, deadline: float) -> bool:
        """Wait until it runs; False: it is dead (`reason`), or it isn't there by `deadline`.

        On the main thread the nursery's and the worker's messages are served meanwhile.
        """
        if _thread.get_ident() == self._nursery.main_thread:
            while self.state == STARTING and time.monotonic() < deadline:
                handlers: dict[int, Callable[[int], None]] = {}
                if not self._silent:
                    handlers[self._control.fileno()] = self._on_control
                if self.pidfd >= 0:
                    handlers[self.pidfd] = self._on_end
                self._nursery.pump(handlers, deadline)
        elif self._started.acquire(True, max(0.0, deadline - time.monotonic())):
            self._started.release()
        return self.state == RUNNING

    def take_socket(self) -> int:
        """The vhost-user socket, whose owner is the caller from now on; -1 if taken."""
        fd, self.socket_fd = self.socket_fd, -1
        return fd

    @property
    def counters(self) -> list[dict[str, int]]:
        """The counters of each of the device's queues, as its workers wrote them: believe none
        blindly."""
        page = self._nursery.pages.read(self.device)
        return page.counters if page is not None else []

    def kill(self) -> None:
        """End it now, if it lives. Its end is noticed by the loop as any other."""
        self.stopping = self._doomed = True
        if self.pidfd >= 0:
            try:
                pidfd_send_signal(self.pidfd, SIGKILL)
            except OSError:
                pass  # it has ended, the loop will see

    @property
    def is_doomed(self) -> bool:
        """`kill` was called: it ends, or has ended."""
        return self._doomed

    def discard(self) -> None:
        """It never served: end it, close the connection if nobody took it."""
        self.kill()
        socket_fd = self.take_socket()
        if socket_fd >= 0:
            os.close(socket_fd)

    def put_down(self, reason: str) -> None:
        """End it because it is faulty: that counts as a crash."""
        if self.state != DEAD and not self.reason:
            self.reason = _one_line(reason)[:_TEXT_LIMIT]
        stopping = self.stopping
        self.kill()
        self.stopping = stopping

    def close(self, limit: float = 1.0) -> None:
        """For the core's end: kill it and wait for it, loop or no loop."""
        self.kill()
        if self.pidfd >= 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if poll.poll(limit * 1000):
                self._on_end(0)
        if self.socket_fd >= 0:
            os.close(self.take_socket())


def describe_death(message: Message) -> str:
    """What a worker's signal handler told in its last moment (native/sandbox/report.c)."""
    number, call, address = (value if isinstance(value, int) else 0 for value in
                             (message.get(name) for name in ("signal", "call", "address")))
    if number == SIGSYS:
        from shared.sandbox.policy import call_name

        return f"its sandbox refused system call {call} ({call_name(call)})"
    where = f" at address {address:#x}" if address else ""
    return f"signal {number}{where}"


def _ignore(message: Message) -> None:
    pass


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)

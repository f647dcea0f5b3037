"""One QMP client: its commands in order, its replies and events in as few writes as they need.

Nothing here waits.  A client that sends too fast is read later (`_Bucket`), one whose command
isn't done yet has its next ones waiting, one that doesn't read has them waiting too, and is
dropped when events pile up for it.
"""

from __future__ import annotations

import _socket
import errno
import time
from collections import deque

from shared import log
from shared.errors import StratovirtError
from shared.fds import close_all
from vmm.event_loop import READ, WRITE
from vmm.qmp import message
from vmm.qmp.errors import OperationThrottled, QmpError
from vmm.qmp.registry import DEFERRED

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from typing import Any

    from vmm.event_loop import Timer
    from vmm.qmp.server import QmpServer
    from vmm.vm import Vm

RATE = 100.0                  # commands a second, once the burst is used up
BURST = 1000.0                # libvirt asks 400 at once when it starts
BACKLOG = 1024                # commands read but not yet carried out; more are refused
READ_SIZE = 64 * 1024
MAX_OUTPUT = 4 * 1024 * 1024  # bytes for a client that doesn't read; then it is dropped
BUSY_OUTPUT = 256 * 1024      # bytes above which its next commands wait
ROUND = 32                    # commands of one client before others have their turn
EVENT_DELAY = 0.1             # seconds: see `_held`
MAX_FDS = 16                  # descriptors with commands in progress; more are closed
_FD_SPACE = _socket.CMSG_SPACE(253 * 4)  # the kernel's most for one message (SCM_MAX_FD)
_HANG_UP = ~(READ | WRITE)


class _Bucket:
    """How many commands a client may send now: RATE a second, BURST at once."""

    __slots__ = ("_filled", "_level")

    def __init__(self) -> None:
        self._level = BURST
        self._filled = time.monotonic()

    def take(self) -> float:
        """Take one; 0 if there was one, else the seconds until there is (none is taken)."""
        if self.level() < 1:
            return (1.0 - self._level) / RATE
        self._level -= 1.0
        return 0.0

    def level(self) -> int:
        """Return how many may be taken at once now."""
        now = time.monotonic()
        self._level = min(BURST, self._level + (now - self._filled) * RATE)
        self._filled = now
        return int(self._level)


class Request:
    """One command in progress. Answered exactly once; a later answer is ignored."""

    __slots__ = ("_connection", "answered", "arguments", "identity", "server", "vm")

    def __init__(self, connection: Connection, vm: Vm, server: QmpServer,
                 identity: dict[str, Any]) -> None:
        self._connection = connection
        self.vm = vm
        self.server = server
        self.identity = identity
        self.arguments: dict[str, Any] = {}
        self.answered = False

    def reply(self, value: object) -> None:
        """Answer with success."""
        self._answer(message.reply(value, self.identity))

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        self._answer(message.error_reply(error, self.identity))

    def done(self, error: Exception | None) -> None:
        """Answer a command that returns nothing: the callback that `Vm` asks for."""
        if error is None:
            self.reply({})
        else:
            self.fail(error)

    def take_fd(self) -> int | None:
        """Return the descriptor that came with this command; the caller owns it. Once."""
        return self._connection.take_fd()

    def _answer(self, text: bytes) -> None:
        if not self.answered:
            self.answered = True
            self._connection.finish(self, text)


class Connection:
    """A client's socket and what waits on either side of it."""

    def __init__(self, server: QmpServer, vm: Vm, socket: _socket.socket) -> None:
        self._server = server
        self._vm = vm
        self._socket = socket
        self._fd = socket.fileno()
        self._framer = message.Framer()
        self._pending: deque[bytes | QmpError] = deque()
        self._refused = 0                     # how many of the last of `_pending` are too many
        self._active: Request | None = None
        self._fds: list[int] = []
        self._output = bytearray()
        # Events of the time until the first command: the stock client `qemu.qmp` breaks on an
        # event between the greeting and the reply to its `qmp_capabilities`.
        self._held: list[bytes] | None = []
        self._bucket = _Bucket()
        self._timer: Timer | None = None
        self._in_handler = False
        self._pump_scheduled = False
        self._ended = False                   # the client sends no more
        self._deaf = False                    # the client reads no more
        self._events = 0                      # what the loop waits for; -1: out of the loop
        self.closed = False

    def start(self) -> None:
        """Greet the client and begin to listen to it."""
        from vmm.qmp.commands.query import VERSION

        self._socket.setblocking(False)
        if self._socket.family in (_socket.AF_INET, _socket.AF_INET6):
            self._socket.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        self._events = READ
        self._vm.loop.add(self._fd, READ, self._on_ready)
        self._output += message.greeting(VERSION)
        self._vm.loop.call_later(EVENT_DELAY, self.send_all)
        self.flush()

    def close(self) -> None:
        """Forget the client. A command of it that is still in progress goes on unheard."""
        if self.closed:
            return
        self.closed = True
        self._leave_loop()
        if self._timer is not None:
            self._timer.cancel()
        close_all(self._fds)
        self._fds.clear()
        self._pending.clear()
        self._output.clear()
        self._socket.close()
        self._server.forget(self)

    # ---- reading ---------------------------------------------------------------------------

    def _on_ready(self, events: int) -> None:
        if events & _HANG_UP:
            # Level triggered and not to be masked: leave the loop, read what is left directly.
            self._leave_loop()
            self._deaf = True
            self._output.clear()
        else:
            if events & WRITE:
                self.flush()
            if events & READ and not self.closed:
                self._receive()
        if not self.closed:
            self._pump()

    def _receive(self) -> None:
        """Take one read from the socket and cut it into commands."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(READ_SIZE, _FD_SPACE,
                                                         _socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                self._ended = self._deaf = True
            elif self._events < 0:
                self._ended = True  # hung up, and nothing more to read
            return
        self._keep_fds(ancillary)
        if not data:
            self._ended = True
            return
        for frame in self._framer.feed(data):
            self._pending.append(frame)
        self._refused = max(0, len(self._pending) - BACKLOG - self._bucket.level())

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                whole = len(data) // 4 * 4
                fds = memoryview(data)[:whole].cast("i").tolist()
                room = MAX_FDS - len(self._fds)
                self._fds += fds[:room]
                close_all(fds[room:])

    def take_fd(self) -> int | None:
        """See `Request.take_fd`."""
        return self._fds.pop(0) if self._fds else None

    # ---- carrying out ----------------------------------------------------------------------

    def _pump(self) -> None:
        """Carry out what may be carried out now; then wait for what is needed to go on."""
        for _ in range(ROUND):
            if self.closed or not self._ready_for_next():
                break
            self._run(self._pending.popleft())
        else:
            self._schedule_pump()
        if not self.closed:
            self._settle()

    def _ready_for_next(self) -> bool:
        if self._active is not None or len(self._output) > BUSY_OUTPUT or self._timer is not None:
            return False
        if not self._pending and self._events < 0 and not self._ended:
            self._receive()
        if not self._pending:
            return False
        if len(self._pending) <= self._refused:
            return True  # only an error will come of it
        delay = self._bucket.take()
        if delay > 0.0:
            self._timer = self._vm.loop.call_later(delay, self._on_timer)
        return delay == 0.0

    def _settle(self) -> None:
        """Nothing can be done at once: close what is over, or wait."""
        idle = not self._pending and self._active is None
        if idle and self._framer.idle and self._fds:
            close_all(self._fds)  # nobody took what came with the commands that are done
            self._fds.clear()
        if idle and self._ended and not self._output:
            self.close()
            return
        if self._events < 0:
            if idle and not self._ended:
                self._schedule_pump()
            return
        wanted = 0
        if idle and not self._ended and len(self._output) <= BUSY_OUTPUT:
            wanted |= READ
        if self._output:
            wanted |= WRITE
        if wanted != self._events:
            self._events = wanted
            self._vm.loop.modify(self._fd, wanted)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _schedule_pump(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._vm.loop.call_soon(self._on_scheduled)

    def _on_scheduled(self) -> None:
        self._pump_scheduled = False
        if not self.closed:
            self._pump()

    def _run(self, frame: bytes | QmpError) -> None:
        """Carry out one command; its reply and events leave together."""
        refused = len(self._pending) < self._refused
        request = Request(self, self._vm, self._server, {})
        self._active = request
        self._in_handler = True
        try:
            self._execute(request, frame, refused)
        except Exception as error:
            self._report(request, error)
        finally:
            self._in_handler = False
        self._release_events()
        self.flush()

    def _execute(self, request: Request, frame: bytes | QmpError, refused: bool) -> None:
        if isinstance(frame, QmpError):
            raise frame
        members = message.parse(frame)
        if "id" in members:
            request.identity["id"] = members.pop("id")
        if refused:
            raise OperationThrottled(f"More than {BACKLOG} commands are waiting",
                                     f"send at most {RATE:.0f} a second")
        registry = self._server.registry
        assert registry is not None
        name = members.pop("execute", None)
        arguments = members.pop("arguments", {})
        for unknown in members:
            raise QmpError(f"The member '{unknown[:100]}' is not known",
                           "a command has execute, arguments and id")
        if not isinstance(name, str):
            raise QmpError("The member 'execute' must be there and be a string",
                           'send {"execute":"COMMAND"}')
        command = registry.find(name)
        if not isinstance(arguments, dict):
            raise QmpError("The member 'arguments' must be an object")
        if name != "qmp_capabilities":
            self._release_events()
        command.check(arguments)
        request.arguments = arguments
        value = command.handler(request)
        if value is not DEFERRED:
            request.reply(value)

    def _report(self, request: Request, error: Exception) -> None:
        if request.answered or not isinstance(error, StratovirtError):
            log.exception("while a QMP command was carried out", error)
        request.fail(error)

    def finish(self, request: Request, text: bytes) -> None:
        """Take the answer of `request`; go on with the next command."""
        if self.closed or request is not self._active:
            return
        self._active = None
        self._output += text
        if not self._in_handler:
            self.flush()
            self._pump()

    # ---- writing ---------------------------------------------------------------------------

    def add_event(self, text: bytes) -> None:
        """Queue an event; `flush` sends it."""
        if self._held is not None:
            self._held.append(text)
        elif not self._deaf:
            self._output += text

    def _release_events(self) -> None:
        held, self._held = self._held, None
        if held and not self._deaf:
            self._output += b"".join(held)

    def send_all(self) -> None:
        """Send held events too: they have waited long enough, or this is the end."""
        if not self.closed:
            self._release_events()
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes now, in one write."""
        if self.closed or not self._output:
            return
        if self._deaf:
            self._output.clear()
            return
        try:
            sent = self._socket.send(self._output, _socket.MSG_NOSIGNAL)
            del self._output[:sent]
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                self._deaf = True
                self._output.clear()
        if len(self._output) > MAX_OUTPUT:
            log.warning(f"A QMP client does not read: dropped it with {len(self._output)} bytes "
                        "waiting")
            self.close()
            return
        self._settle_output()

    def _settle_output(self) -> None:
        if self._events >= 0 and bool(self._output) != bool(self._events & WRITE):
            self._events ^= WRITE
            self._vm.loop.modify(self._fd, self._events)

    def _leave_loop(self) -> None:
        if self._events >= 0:
            self._events = -1
            self._vm.loop.remove(self._fd)

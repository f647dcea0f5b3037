"""The core's side of the nursery: starts it, asks it for workers, notices its end.

`start` returns at once: the nursery imports its modules while the core builds the machine, and
requests wait in the channel's buffer.  A nursery that died is started again with the next
request; its workers live on.
"""

from __future__ import annotations

import _socket
import _thread
import os
import select
import sys
import time

from shared import log
from shared.control.channel import Channel, ChannelClosed, pair
from shared.control.codec import CodecError
from shared.fds import close_all
from shared.sandbox import OFF_VARIABLE
from shared.statistics import FOLDER
from vmm.errors import WorkerSpawnError
from vmm.worker.pages import Pages
from vmm.worker.process import WorkerProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shared.control.channel import Message
    from vmm.event_loop import EventLoop

# What the nursery executes. Should the import fail, the channel is all there is to say so: the
# bytes before the text are CBOR for a map of one entry, "error".
_CODE = """
import sys
sys.path[:] = sys.argv[1:]
try:
    from workers.nursery import main
except BaseException as error:
    import os
    text = repr(error).encode()[:500]
    os.write(3, b"\\xa1\\x65error\\x79" + len(text).to_bytes(2, "big") + text)
    os._exit(1)
main()
"""
_CHANNEL_FD = 3
_MAX_QUEUES = 32


class Nursery:
    """One nursery process at a time, and the workers that came from it.

    :param loop: main thread's; all callbacks run on it.
    :param sandbox_off: stages of the workers' sandbox that the user gave up.
    :param vm_name: for the names of statistics pages.
    """

    def __init__(self, loop: EventLoop, sandbox_off: Sequence[str] = (),
                 vm_name: str = "") -> None:
        self.loop = loop
        self.pages = Pages(vm_name)
        self.pages.announce = self._announce_pages
        self._sandbox_off = ",".join(sandbox_off)
        self.main_thread = _thread.get_ident()
        self.pid = 0
        self._pidfd = -1
        self._channel: Channel | None = None
        self._serial = 0
        self._failure = ""  # what the nursery said of itself
        self._waiting: dict[int, WorkerProcess] = {}  # asked for, not answered
        self.workers: list[WorkerProcess] = []        # alive, or hoped to be
        # Called for each failed request that a worker reports; the message is not checked.
        self.on_io_error: Callable[[WorkerProcess, Message], None] = _ignore

    # ---- the process -----------------------------------------------------------------------

    def start(self) -> None:
        """Execute the nursery. Main thread only: its end is told to that thread's children.

        :raises WorkerSpawnError: the process can't be started.
        """
        ours, theirs = pair()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        # posix_spawn runs these in order, in the child; each copy loses close-on-exec, and the
        # originals keep it. The channel moves out of the way of 0 to 3 first.
        high = 64 + max(theirs, null)
        actions = [(os.POSIX_SPAWN_DUP2, theirs, high),
                   *((os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)),
                   (os.POSIX_SPAWN_DUP2, high, _CHANNEL_FD), (os.POSIX_SPAWN_CLOSE, high)]
        argv = [sys.executable, "-I", "-S", "-c", _CODE, *(p for p in sys.path if p)]
        try:
            # Its own session: a terminal's signals are for the core alone.
            environment = {"LC_ALL": "C.UTF-8", OFF_VARIABLE: self._sandbox_off}
            self.pid = os.posix_spawn(sys.executable, argv, environment,
                                      file_actions=actions, setsid=True)
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            close_all((ours,))
            raise WorkerSpawnError(f"Can't start the nursery of workers: {error.strerror}",
                                   "check the limits on processes and descriptors") from error
        finally:
            close_all((theirs, null))
        self._channel = Channel(ours, blocking=False)
        self.loop.add(ours, select.EPOLLIN, self._on_channel)
        try:
            folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # then no page has a name
        try:
            self._announce_pages(self.pages.names(), [folder])
        finally:
            os.close(folder)

    def _announce_pages(self, names: list[str], folder: Sequence[int] = ()) -> None:
        """Tell the nursery what it has to remove should the core be killed, and where."""
        try:
            if self._channel is not None:
                self._channel.send({"type": "pages", "names": names}, list(folder))
        except (ChannelClosed, CodecError) as error:
            log.warning(f"Can't tell the nursery of statistics pages: {error}")

    def _on_channel(self, events: int) -> None:
        assert self._channel is not None
        try:
            message, fds = self._channel.recv()
        except BlockingIOError:
            return
        except (ChannelClosed, CodecError) as error:
            self._lost(str(error))
            return
        serial, pid = message.get("serial"), message.get("pid")
        if serial is None:
            self._failure = str(message.get("error", ""))[:500]
        worker = self._waiting.pop(serial, None) if isinstance(serial, int) else None
        if worker is not None and isinstance(pid, int) and len(fds) == 1:
            worker.cloned(pid, fds.pop())
        elif worker is not None:
            worker.failed(f"the nursery says: {str(message.get('error', ''))[:500]}")
        close_all(fds)

    def _lost(self, why: str) -> None:
        """The nursery is gone; who it had not answered for will never come."""
        why, self._failure = self._failure or why, ""
        log.error(f"The nursery of workers (pid {self.pid}) ended: {why}")
        self._drop()
        for worker in list(self._waiting.values()):
            worker.failed(f"the nursery ended before it answered: {why}")
        self._waiting.clear()

    def _drop(self) -> None:
        if self._channel is not None:
            self.loop.remove(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if poll.poll(1000):
                try:
                    os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:
                    pass
            os.close(self._pidfd)
            self._pidfd = -1

    # ---- workers ---------------------------------------------------------------------------

    def spawn(self, kind: str, device: str, fds: dict[str, int],
              options: dict[str, object]) -> WorkerProcess:
        """Ask for a worker and return at once; messages can be written to it before it lives.

        :param device: the device's name, for logs and `query-workers`.
        :param fds: descriptors by name ("image"…); duplicated, they stay the caller's, who may
            close them as soon as this returns.
        :param options: what the kind of worker understands; plain values.
        :raises WorkerSpawnError: no nursery, or no descriptors.
        """
        if self._channel is None:
            self.start()
        assert self._channel is not None
        queues = options.get("num-queues", 1)
        if not isinstance(queues, int) or not 0 < queues <= _MAX_QUEUES:
            raise WorkerSpawnError(f"A worker for '{device}' with {queues!r} queues",
                                   f"1 to {_MAX_QUEUES} are possible")
        self._serial += 1
        theirs: list[int] = []
        try:
            page = self.pages.take(kind, device, queues)
            if page >= 0:
                fds = {"statistics": page, **fds}
            vhost, control = _make_fds(theirs)
            names = ["vhost", "control", *fds]
            worker = WorkerProcess(self, self._serial, kind, device, vhost, control)
            self._channel.send({"type": "spawn", "serial": self._serial, "kind": kind,
                                "device": device, "fds": names, "options": options},
                               [*theirs, *fds.values()])
        except (OSError, ChannelClosed, CodecError) as error:
            raise WorkerSpawnError(f"Can't ask for a {kind} worker for '{device}': {error}",
                                   "try again") from error
        finally:
            close_all(theirs)
        self._waiting[self._serial] = worker
        self.workers.append(worker)
        return worker

    def forget(self, worker: WorkerProcess) -> None:
        """A worker has ended."""
        self._waiting.pop(worker.serial, None)
        if worker in self.workers:
            self.workers.remove(worker)

    def pump(self, handlers: dict[int, Callable[[int], None]], deadline: float) -> None:
        """Serve the channel and these descriptors until something came or `deadline`.

        For waits on the main thread before its loop runs.
        """
        if self._channel is not None:
            handlers = {self._channel.fileno(): self._on_channel, **handlers}
        poll = select.poll()
        for fd in handlers:
            poll.register(fd, select.POLLIN)
        for fd, events in poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            handlers[fd](events)

    def retire(self) -> None:
        """Let the nursery end and leave its workers alone; the next request starts a new one."""
        if self._channel is not None:
            self._channel.send({"type": "retire"})
            self._drop()

    def close(self) -> None:
        """End every worker and the nursery."""
        for worker in list(self.workers):
            worker.close()
        self.pages.close()
        self._drop()


def _ignore(worker: WorkerProcess, message: Message) -> None:
    pass


def _make_fds(theirs: list[int]) -> tuple[int, int]:
    """vhost-user pair and control pair: our ends; the worker's in `theirs`."""
    a, b = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    vhost = a.detach()
    theirs.append(b.detach())
    control, other = pair()
    theirs.append(other)
    return vhost, control

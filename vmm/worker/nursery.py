"""The core's side of the nursery: starts it, asks it for workers, notices its end.

`start` returns at once: the nursery imports its modules while the core builds the machine, and
requests wait in the channel's buffer.  A nursery that died is started again with the next
request; its workers live on.
"""

from __future__ import annotations

import _socket
import _thread
import posix as os
import select
import sys
import time

import native
from shared import log, paths
from shared.control.channel import Channel, ChannelClosed, pair
from shared.control.codec import CodecError
from shared.fds import close_all
from shared.sandbox import OFF_VARIABLE
from shared.statistics import FOLDER
from vmm.errors import WorkerSpawnError
from vmm.worker.keeper import Keeper, spawn
from vmm.worker.pages import Pages
from vmm.worker.process import WorkerProcess, describe_death

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shared.control.channel import Message
    from vmm.event_loop import EventLoop

_SCRIPT = f"{paths.folder(next(iter(native.__path__)))}/workers/begin.py"
_MAX_QUEUES = 64  # a console of 31 ports and its control queues


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
        self._keeper: Keeper | None = None
        self._channel: Channel | None = None
        self._serial = 0
        self._names: list[str] = []  # files that must not outlive us
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
        try:
            ours, theirs = pair()
        except OSError as error:
            raise WorkerSpawnError(f"Can't reach a nursery of workers: {error.strerror}",
                                   "check the limit on descriptors") from error
        try:
            if self._keeper is not None:
                pid = self._keeper.spawn(theirs)
            else:
                pid = spawn(sys.executable, *self._command(), theirs)
        except OSError as error:
            close_all((ours,))
            raise WorkerSpawnError(f"Can't start the nursery of workers: {error.strerror}",
                                   "check the limits on processes and descriptors") from error
        finally:
            close_all((theirs,))
        self.adopt(pid, ours)

    def adopt(self, pid: int, channel: int) -> None:
        """Take over a nursery that runs, a child of this process, and our end of its channel.

        :raises WorkerSpawnError: there is no descriptor left for it; the channel is closed.
        """
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            close_all((channel,))
            raise WorkerSpawnError(f"Can't watch the nursery of workers: {error.strerror}",
                                   "check the limit on descriptors") from error
        self.pid = pid
        self._channel = Channel(channel, blocking=False)
        self.loop.add(channel, select.EPOLLIN, self._on_channel)
        for path in self._names:
            self.remember(path)
        try:
            folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # then no page has a name
        try:
            self._announce_pages(self.pages.names(), [folder])
        finally:
            os.close(folder)

    def _command(self) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of a nursery."""
        argv = [sys.executable, "-I", "-S", _SCRIPT, *(p for p in sys.path if p)]
        # As the launcher does (native/launcher/stratovirt.c).
        return argv, {"LC_ALL": "C", OFF_VARIABLE: self._sandbox_off}

    def use_keeper(self) -> None:
        """From now on a keeper starts nurseries: this process is about to lose the right.

        :raises WorkerSpawnError: it can't be started.
        """
        self._keeper = Keeper(*self._command())

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
        self._take(message, fds, self._waiting)

    def _take(self, message: Message, fds: list[int],
              waiting: dict[int, WorkerProcess]) -> None:
        serial, pid = message.get("serial"), message.get("pid")
        if message.get("type") == "died":
            self._failure = describe_death(message)
        elif serial is None:
            self._failure = str(message.get("error", ""))[:500]
        worker = waiting.pop(serial, None) if isinstance(serial, int) else None
        if worker is not None and isinstance(pid, int) and len(fds) == 1:
            worker.cloned(pid, fds.pop())
        elif worker is not None:
            worker.failed(f"the nursery says: {str(message.get('error', ''))[:500]}",
                          str(message.get("stage", ""))[:64])
        close_all(fds)

    def _lost(self, why: str) -> None:
        """The nursery is gone; who it had not answered for will never come."""
        why, self._failure = self._failure or why, ""
        log.error(f"The nursery of workers (pid {self.pid}) ended: {why}")
        self._drop()
        waiting, self._waiting = self._waiting, {}  # who hears of it may ask for another one
        _fail(waiting, why)

    def _drop(self) -> None:
        if self._channel is not None:
            self.loop.remove(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if poll.poll(1000):
                _reap(self.pid)
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
        serial = self._serial
        theirs: list[int] = []
        worker: WorkerProcess | None = None
        try:
            page = self.pages.take(kind, device, queues)
            if page >= 0:
                fds = {"statistics": page, **fds}
            vhost, control = _make_fds(theirs)
            names = ["vhost", "control", *fds]
            worker = WorkerProcess(self, serial, kind, device, vhost, control)
            self._ask({"type": "spawn", "serial": serial, "kind": kind, "device": device,
                       "fds": names, "options": options}, [*theirs, *fds.values()])
        except (OSError, ChannelClosed, CodecError, WorkerSpawnError) as error:
            if worker is not None:
                worker.discard()  # the rest goes when it is seen that nobody has the other end
            raise WorkerSpawnError(f"Can't ask for a {kind} worker for '{device}': {error}",
                                   "try again") from error
        finally:
            close_all(theirs)
        self._waiting[serial] = worker
        self.workers.append(worker)
        return worker

    def _ask(self, message: Message, fds: list[int]) -> None:
        """Send a request, to another nursery if this one has died and nobody has seen it yet."""
        assert self._channel is not None
        try:
            self._channel.send(message, fds)
        except ChannelClosed as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise  # it lives, and hangs
            self._lost(str(error))
            if self._channel is None:  # else somebody who heard of it has started one
                self.start()
            self._channel.send(message, fds)

    def remember(self, path: str) -> None:
        """Have this file removed when the core is gone, however it goes.

        What is there by now is meant; if nothing is, what will be. Harmless if it can't be done.
        """
        if path not in self._names:
            self._names.append(path)
        if self._channel is None:
            return
        message: Message = {"type": "remember", "name": paths.name(path)}
        try:
            folder = os.open(paths.folder(path) or ".",
                             os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            status = os.lstat(path)
            # Numbers of inodes are used again: the time tells.
            message["identity"] = [status.st_dev, status.st_ino, status.st_ctime_ns]
        except OSError:
            pass
        try:
            self._channel.send(message, [folder])
        except (ChannelClosed, CodecError) as error:
            log.warning(f"Nobody will remove {path} if this process is killed: {error}")
        finally:
            os.close(folder)

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
        """Let the nursery end and leave its workers alone; the next request starts a new one.

        Those that it was asked for and has not answered for yet come from it all the same.
        Nothing waits for its end.
        """
        if self._channel is None:
            return
        try:
            self._channel.send({"type": "retire"})
        except (ChannelClosed, CodecError) as error:
            self._lost(str(error))
        else:
            self._let_finish()

    def _let_finish(self) -> None:
        """The nursery answers what it was asked before it reads that it is to end."""
        channel, pidfd, pid = self._channel, self._pidfd, self.pid
        waiting, self._waiting = self._waiting, {}
        assert channel is not None
        self._channel, self._pidfd = None, -1

        def on_answer(events: int) -> None:
            try:
                message, fds = channel.recv()
            except BlockingIOError:
                return
            except (ChannelClosed, CodecError) as error:
                self.loop.remove(channel.fileno())
                channel.close()
                _fail(waiting, str(error))
                return
            self._take(message, fds, waiting)

        def on_end(events: int) -> None:
            self.loop.remove(pidfd)
            os.close(pidfd)
            _reap(pid)

        self.loop.remove(channel.fileno())
        self.loop.add(channel.fileno(), select.EPOLLIN, on_answer)
        self.loop.add(pidfd, select.EPOLLIN, on_end)

    def close(self) -> None:
        """End every worker and the nursery."""
        for worker in list(self.workers):
            worker.close()
        self.pages.close()
        self._drop()
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


def _fail(waiting: dict[int, WorkerProcess], why: str) -> None:
    """Who was asked for of a nursery that is gone will never come."""
    for worker in waiting.values():
        worker.failed(f"the nursery ended before it answered: {why}")


def _ignore(worker: WorkerProcess, message: Message) -> None:
    pass


def _make_fds(theirs: list[int]) -> tuple[int, int]:
    """vhost-user pair and control pair: our ends; the worker's in `theirs`."""
    a, b = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    theirs.append(b.detach())
    control, other = pair()
    theirs.append(other)
    return a.detach(), control

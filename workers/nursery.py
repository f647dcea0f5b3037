"""The nursery: a process with the worker modules imported, that clones a worker on request.

The core executes it (an address space layout of its own) before it opens anything; it holds
one descriptor, the channel to the core.  A clone's parent is the core (CLONE_PARENT): the
nursery's death leaves the workers alive, the core's death ends them twice over, by the
kernel's parent-death signal and by the nursery, which kills them when its channel closes, and
removes the files that the core has told it of.

A request is a map: serial, kind, device, fds (names, in the order of the descriptors that come
with it), options.  The answer: serial and pid with the worker's pidfd, or serial and error.
"""

from __future__ import annotations

import gc
import posix as os
import select
import sys
from _signal import SIGKILL, pidfd_send_signal  # type: ignore[import-not-found]

from native import _sandbox
from shared import paths
from shared.control.channel import Channel, ChannelClosed, close_quietly
from shared.control.codec import CodecError
from shared.errors import SandboxError, SharedError, StratovirtError, check, places
from shared.quota import LINES, LINES_RATE, Quota
from shared.sandbox import OFF_VARIABLE, stages
from workers import startup
from workers.errors import UsageError
from workers.pages import PageNames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shared.control.channel import Message

    Entry = Callable[[str, dict[str, int], dict[str, object], "Reporter"], None]

CHANNEL_FD = 3
MAX_NAMES = 4096
IDLE_MS = 1000  # without a request: then there is time for what isn't urgent
CONTROL = "control"  # the name of the descriptor that every worker gets for its reports


class Reporter:
    """A worker's way to tell the core something; what can't be told is lost, nothing waits."""

    def __init__(self, fd: int) -> None:
        self._channel = Channel(fd, blocking=False)
        self._lines = Quota(LINES, LINES_RATE)

    def tell(self, kind: str, **fields: object) -> None:
        """Send one report."""
        try:
            self._channel.send({"type": kind, **fields})
        except SharedError:
            pass

    def fileno(self) -> int:
        """Readable when `receive` has something."""
        return self._channel.fileno()

    def receive(self) -> Message | None:
        """The core's next order, an empty map if what came is not one; None: the core is gone."""
        order = self.receive_order()
        if order is None:
            return None
        for fd in order[1]:
            close_quietly(fd)
        return order[0]

    def receive_order(self) -> tuple[Message, list[int]] | None:
        """The same with the descriptors that came with it; the caller's."""
        try:
            return self._channel.recv()
        except ChannelClosed:
            return None
        except (BlockingIOError, CodecError):
            return {}, []

    def close(self) -> None:
        """For workers that are not processes: tests."""
        self._channel.close()

    def log(self, text: str) -> None:
        """A line for the core's log; guests can cause many, which are left out."""
        line = self._lines.line(text[:1900])
        if line:
            self.tell("log", text=line)


KINDS = ("balloon", "blk", "console", "net", "null", "rng")
COMMON = ("blk",)  # a VM without a disk is rare


def entry(kind: str) -> Entry:
    """What a kind of worker runs: `run` of its worker.py. Imported here, clones share it."""
    run: Entry = __import__(f"workers.{kind}.worker", None, None, ["run"]).run
    return run


class Nursery:
    """Serves the channel until the core closes it.

    :param off: the stages of the sandbox that were given up.
    """

    def __init__(self, channel: Channel, off: frozenset[str] = frozenset()) -> None:
        self._channel = channel
        self._off = off
        self._entries: dict[str, Entry] = {}
        self._workers: dict[int, int] = {}  # pidfds of the living, and their slots
        self._inherited: list[str] = []     # stages that hold for every clone
        self._filters: dict[str, bytes] = {}
        self._identity: stages.Identity | None = None
        self._refusal: StratovirtError | None = None  # why there will be no workers
        # What has a name and must not outlive the core: by folder, the folder's descriptor
        # and names with the identity of what they named (None: whatever it is).
        self._folders: dict[tuple[int, int], int] = {}
        self._names: dict[tuple[int, str], list[object] | None] = {}
        self._pages = PageNames()

    def prepare(self) -> None:
        """What can be done for all workers at once. A failure is told to who wants a worker."""
        try:
            startup.load_late_parts(self._load)
            self._identity = stages.Identity(self._off)
            self._inherited = stages.execute(
                stages.nursery_stages(self._identity, self._off),
                stages.ordinary_namespaces(self._identity, self._off))
            self._inherited += stages.clone_stages(self._off)
        except StratovirtError as error:
            self._refusal = error

    def _load(self) -> None:
        """What is in files, as long as this process has any."""
        keep = getattr(__spec__.loader, "keep", None)  # native/bundle_loader.py
        for kind in COMMON if keep is not None and keep() else KINDS:
            self._entry(kind)
        if "seccomp" not in self._off:
            self._filters = startup.filters(KINDS)

    def _entry(self, kind: str) -> Entry:
        if kind not in self._entries:
            self._entries[kind] = entry(kind)
            # What is there by now is to be shared with clones for as long as they live: their
            # garbage collectors leave it alone. To look for garbage would take 0.5 ms, and
            # imports make next to none.
            gc.freeze()
        return self._entries[kind]

    def _confine(self) -> None:
        """The nursery itself, for good."""
        check(_sandbox.lib.sv_no_new_privs(), "no_new_privs")
        startup.report_deaths(CHANNEL_FD)
        if self._filters:
            startup.install_filter(self._filters[""])

    def serve(self) -> None:
        """Returns in the nursery when the core is gone, never in a worker."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        confined = False  # while the VM starts there are better things to do
        while True:
            ready = poll.poll(None if confined else IDLE_MS)
            if not ready:
                if self._pages.wait_limit() is not None:
                    self._pages.sweep()
                self._confine()
                confined = True
            for fd, _ in ready:
                if fd != self._channel.fileno():
                    poll.unregister(fd)
                    del self._workers[fd]
                    os.close(fd)
                    continue
                try:
                    message, fds = self._channel.recv()
                except ChannelClosed:
                    self._end_workers()
                    self._pages.remove()
                    self._remove_names()
                    return
                if message.get("type") == "retire":
                    return  # another nursery takes over; the workers stay
                if message.get("type") == "remember":
                    self._remember(message, fds)
                    continue
                if message.get("type") == "pages":
                    self._pages.learn(message.get("names"), fds)
                    continue
                pidfd = self._handle(message, fds)
                if pidfd >= 0:
                    poll.register(pidfd, select.POLLIN)

    def _handle(self, message: Message, fds: list[int]) -> int:
        serial = message.get("serial")
        slot = self._free_slot()
        try:
            pid, pidfd = self._clone(message, fds, slot)
        except StratovirtError as error:
            self._answer({"serial": serial, "error": str(error), "stage": stage_of(error)})
            return -1
        finally:
            for fd in fds:
                close_quietly(fd)
        self._answer({"serial": serial, "pid": pid}, [pidfd])
        self._workers[pidfd] = slot
        return pidfd

    def _answer(self, message: Message, fds: Sequence[int] = ()) -> None:
        try:
            self._channel.send(message, list(fds))
        except ChannelClosed:
            pass  # the core is gone: what it sent before says what has to be removed

    def _free_slot(self) -> int:
        used = set(self._workers.values())
        return next(slot for slot in range(len(used) + 1) if slot not in used)

    def _clone(self, message: Message, fds: list[int], slot: int) -> tuple[int, int]:
        kind, device = message.get("kind"), message.get("device")
        names, options = message.get("fds"), message.get("options")
        if not isinstance(kind, str) or kind not in KINDS or not isinstance(device, str):
            raise UsageError(f"There is no worker of kind {kind!r}")
        if (not isinstance(names, list) or not isinstance(options, dict)
                or len(names) != len(fds) or CONTROL not in names):
            raise UsageError("A request for a worker with wrong descriptors or options")
        if self._refusal is not None or self._identity is None:
            raise self._refusal or StratovirtError("The nursery isn't prepared")
        entry = self._entry(kind)
        pidfd = _sandbox.ffi.new("int *", -1)
        pid = startup.clone(_sandbox.lib.CLONE_PARENT, pidfd, self._identity, self._off)
        if pid == 0:
            named = dict(zip(names, fds, strict=True))
            startup.current = startup.Sandbox(self._identity, slot, self._off, self._inherited,
                                              self._filters.get(kind, b""), named[CONTROL])
            _become_worker(entry, device, named, options)
        return pid, int(pidfd[0])

    def _remember(self, message: Message, fds: list[int]) -> None:
        """A name in the folder of the descriptor, to be removed when the core is gone."""
        name, identity = message.get("name"), message.get("identity")
        if not isinstance(name, str) or len(fds) != 1 or len(self._names) >= MAX_NAMES:
            for fd in fds:
                close_quietly(fd)
            return
        status = os.fstat(fds[0])
        folder = self._folders.setdefault((status.st_dev, status.st_ino), fds[0])
        if folder != fds[0]:
            close_quietly(fds[0])
        self._names[folder, name] = identity if isinstance(identity, list) else None

    def _remove_names(self) -> None:
        for (folder, name), identity in self._names.items():
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                # Somebody else may have made their own there meanwhile.
                if identity in (None, [status.st_dev, status.st_ino, status.st_ctime_ns]):
                    os.unlink(name, dir_fd=folder)
            except OSError:
                pass  # the core has removed it

    def _end_workers(self) -> None:
        for pidfd in self._workers:
            try:
                pidfd_send_signal(pidfd, SIGKILL)
            except OSError:
                pass  # it has ended


def _become_worker(entry: Entry, device: str, fds: dict[str, int],
                   options: dict[str, object]) -> None:
    """Never returns: the clone's whole life. The exit code is 0, or 1 after an error report."""
    status = 1
    reporter = Reporter(fds.pop(CONTROL))
    try:
        startup.report_deaths(reporter.fileno())
        startup.die_with_parent(reporter.fileno())
        startup.keep_only([*fds.values(), reporter.fileno()])
        gc.enable()
        entry(device, fds, options, reporter)
        status = 0
    except StratovirtError as error:
        reporter.tell("error", text=str(error), stage=stage_of(error))
    except BaseException as error:
        # A defect of ours: say where. The traceback module would open source files.
        reporter.tell("error", text=f"{type(error).__name__}: {error} ({_where(error)})")
    finally:
        os._exit(status)


def stage_of(error: StratovirtError) -> str:
    """The stage of the sandbox that can't be had; empty: it failed for another reason."""
    return error.stage if isinstance(error, SandboxError) else ""


def _where(error: BaseException) -> str:
    return " < ".join(paths.name(place) for place in reversed(places(error)[-6:]))


def main() -> None:
    """The process's life, with the channel as descriptor 3 (workers/begin.py)."""
    check(_sandbox.lib.sv_close_range(CHANNEL_FD + 1, 0xFFFFFFFF), "Can't close descriptors")
    _sandbox.lib.sv_set_name(b"sv-nursery")
    os.chdir("/")
    os.umask(0o077)
    off = stages.parse_off(os.environ.get(OFF_VARIABLE.encode(), b"").decode())
    nursery = Nursery(Channel(CHANNEL_FD), off)
    nursery.prepare()
    nursery.serve()
    sys.stdout = sys.stderr = None
    os._exit(0)

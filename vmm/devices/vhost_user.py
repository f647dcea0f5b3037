"""A virtio device whose queues a vhost-user back end serves: a worker of ours, or a foreign one.

Nothing here trusts the back end: every request has a time limit and `abort` ends every wait.
A back end that refuses or is slow keeps its connection; one that vanishes, lies or says nothing
at all loses it.  What follows depends on who looks after the device:

- nobody (a foreign back end): it stays broken, the guest sees DEVICE_NEEDS_RESET, the VM goes on;
- somebody (`on_lost` is set): he brings another back end with `replace_backend`, which goes on
  with the rings where the last one stood.  Whoever needs the device meanwhile waits, within his
  limit; the guest sees nothing but a pause.

States: NEW (nothing said yet) → IDLE (features known) ⇄ RUNNING ⇄ PAUSED; any → BROKEN, CLOSED.
`_goal` is what the guest and the core want, whatever state the back end is in: IDLE, RUNNING or
PAUSED.  PAUSED with a pending stop means that the back end was told to stop its rings, or to
start them, and has not confirmed it: what comes next stops them first.
`_lock` is held over every exchange.  Callbacks on the main loop never take it.
"""

from __future__ import annotations

import _thread
import posix as os
import select
import time

from shared import log
from shared.vhost_user.errors import ConnectionLostError
from shared.vhost_user.frontend import WANTED_PROTOCOL
from vmm.devices.vhost_guard import Guarded, Held
from vmm.devices.vhost_session import Session
from vmm.devices.virtio_device import QueueConfig, VirtioDevice, nothing, shown
from vmm.errors import BackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from vmm.config.model import ChardevConfig
    from vmm.devices.vhost_session import Inflight
    from vmm.event_loop import EventLoop
    from vmm.memory import GuestMemory

    T = TypeVar("T")

NEW, IDLE, RUNNING, PAUSED, BROKEN, CLOSED = range(6)

# Seconds for ordinary requests; a worker that is just being started needs some of it.
REQUEST_LIMIT = 5.0
# Seconds for a reset: requests in flight have to end first, and a disk may be slow.
RESET_LIMIT = 10.0
RECOVERY_POLL = 0.001


class VhostUserDevice(VirtioDevice):
    """Base of the devices behind vhost-user; a subclass knows features and config space.

    :param socket_fd: connected to the back end, which need not run yet; owned from now on.
        -1: there is none yet; `on_needed` is called when the guest starts the device.
    :param queue_sizes: largest size of each queue that the guest sees.
    :param feature_mask: virtio features that this core and this device type can carry.
    :param foreign: not a worker of ours: GET_VRING_BASE may not wait for requests in flight.

    `on_lost(text)`, if set, makes the device wait for `replace_backend` when its back end is
    gone; `on_needed()` asks for the first one.  Both are called on any thread, must not wait.
    """

    core_features = 0  # what the core itself offers and serves: bits of the config space
    wanted_protocol = WANTED_PROTOCOL  # protocol features to take
    queues_option = "num-queues"  # says how many queues there are
    _session: Session | None = shown()
    has_requests = True  # who stops a foreign back end must see them end; frames are none

    def __init__(self, id: str, socket_fd: int, memory: GuestMemory, loop: EventLoop,
                 queue_sizes: Sequence[int], feature_mask: int, foreign: bool) -> None:
        self.id = id
        self.queue_sizes = tuple(queue_sizes)
        self.on_config_change = nothing
        self.on_failure = _nothing_with_text
        self.on_lost: Callable[[str], None] | None = None
        self.on_needed = nothing
        self.state = NEW
        self._peer = f"back end of {id}"
        self._memory = memory
        self._loop = loop
        self._feature_mask = feature_mask
        self._abort_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = _thread.allocate_lock()
        self._goal = IDLE
        self._trouble = ""               # why the state is BROKEN
        self._features = 0               # negotiated with the driver
        self._queues: list[QueueConfig] = []
        self._bases: dict[int, int] = {}  # next available index of each stopped ring
        self._inflight: Inflight | None = None
        self.undone = 0  # requests that the last back end left to the present one
        self._session = None
        if socket_fd >= 0:
            self._session = self._connect(socket_fd, foreign)
        else:
            self.state = BROKEN
            self._trouble = "there is none yet"
        loop.add(self._error_fd, select.EPOLLIN, self._ring_error)

    def _connect(self, fd: int, foreign: bool) -> Session:
        session: Session

        def hung_up() -> None:
            if self._session is session:
                self._hung_up()

        session = Session(fd, self._peer, self._memory, self._loop, self._abort_fd,
                          self._error_fd, foreign and self.has_requests, REQUEST_LIMIT,
                          self._config_went_stale, hung_up)
        return session

    # ---- VirtioDevice ----------------------------------------------------------------------

    def features(self) -> int:
        """The back end's features that this core can carry. Waits for its first answer.

        :raises BackendError: it doesn't come, or the back end is of no use.
        """
        return self._exchange(REQUEST_LIMIT, lambda session: session.features
                              & self._feature_mask) | self.core_features

    def activate(self, features: int, queues: Sequence[QueueConfig]) -> None:
        """See `VirtioDevice.activate`.

        :raises BackendError: the back end refused, failed or is too slow.
        """
        with Held(self, REQUEST_LIMIT):
            if self._goal != IDLE or self.state == CLOSED:
                raise BackendError(f"The {self._peer} is already started", "reset the device")
            self._goal = RUNNING
            self._features = features & ~self.core_features
            self._queues = [queue for queue in queues if queue.ready]
            self._bases = {queue.index: 0 for queue in self._queues}
            if self.state == BROKEN and self._is_kept():
                self.on_needed()  # the next back end starts the rings
                return
            try:
                self._start(self._ready())
            except BackendError:
                if not self._is_recovering():
                    raise  # the driver has to reset the device

    def reset(self) -> None:
        """See `VirtioDevice.reset`.

        :raises BackendError: rings could not be stopped; guest memory may still be touched.
        """
        def action(deadline: float) -> None:
            if self.state in (RUNNING, PAUSED):
                session = self._current()
                try:
                    self._stop(session, deadline)
                    with Guarded(self):
                        session.reset(deadline)
                    self.state = IDLE
                except BackendError as error:
                    if self._is_kept() or not isinstance(error.__cause__, ConnectionLostError):
                        raise
            # A dead back end touches nothing; one that hangs was cut off, as far as we can.
            self._goal = IDLE
            self._drop_inflight()

        if self._goal == IDLE:
            return
        self._retried(time.monotonic() + RESET_LIMIT, action)

    def pause(self, deadline: float) -> None:
        """See `VirtioDevice.pause`."""
        def action(deadline: float) -> None:
            if self.state in (RUNNING, PAUSED):
                self._stop(self._current(), deadline)
            if self._goal == RUNNING:
                self._goal = PAUSED

        if self._goal == IDLE:
            return
        try:
            self._retried(deadline, action)
        except BackendError as error:
            # The VM is paused all the same: nobody must start the rings before `resume`.
            if self._goal == RUNNING:
                self._goal = PAUSED
            if not isinstance(error.__cause__, ConnectionLostError):
                raise
            # Who is gone for good can't be drained, and holds up nobody.
            log.warning(str(error))

    def resume(self) -> None:
        """See `VirtioDevice.resume`. A device that is broken for good holds nobody up: the
        guest sees that it needs a reset.

        :raises BackendError: the back end failed now.
        """
        with Held(self, REQUEST_LIMIT):
            if self._goal != PAUSED:
                return
            self._goal = RUNNING
            if self.state == BROKEN:
                if self._is_kept():
                    self.on_needed()
                else:
                    log.warning(str(self._broken_error()))
                return
            session = self._current()
            if self.state == RUNNING:
                return  # `pause` gave up, somebody brought another back end
            try:
                if session.stop_pending:
                    self._stop(session, time.monotonic() + REQUEST_LIMIT)
                self._start(session)
            except BackendError:
                if not self._is_recovering():
                    self._goal = PAUSED
                    raise

    def abort(self) -> None:
        """End every wait for the back end, now and in future. Any thread; never waits."""
        if self.state != CLOSED:
            os.eventfd_write(self._abort_fd, 1)

    def close(self) -> None:
        """Cut the connection; harmless when closed. Rings should have been stopped before."""
        if self.state == CLOSED:
            return
        self.abort()
        self._loop.remove(self._error_fd)
        with self._lock:
            self.state = CLOSED
            self._drop_session()
            self._drop_inflight()
            os.close(self._abort_fd)
            os.close(self._error_fd)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignored: subclasses forward what is writable."""

    # ---- another back end ------------------------------------------------------------------

    def replace_backend(self, socket_fd: int, deadline: float, drain: bool,
                        harmless: bool = False) -> None:
        """Go on with another back end, where the last one stands.

        RUNNING goes on running, PAUSED stays paused; the driver notices nothing.  The caller
        has made sure that the last one's I/O has ended, if `drain` is False.

        :param socket_fd: connected to the new one; owned from now on, whatever happens.
        :param deadline: monotonic seconds.
        :param drain: the last one lives: it finishes what it has taken first.  An error, if it
            has died with requests in flight: nobody has waited for its I/O.
        :param harmless: the last one does no I/O that could outlive it: its death is no error.
        :raises BackendError: the last one could not be drained (it stays), or the new one is of
            no use (the device is broken then).
        """
        try:
            with Held(self, deadline - time.monotonic()):
                if self.state == CLOSED:
                    raise self._broken_error()
                if drain and self.state == BROKEN and self._goal != IDLE and not harmless:
                    raise self._broken_error()
                if drain and self.state in (RUNNING, PAUSED):
                    self._drain(deadline, harmless)
                elif self.state != PAUSED or (self._session and self._session.stop_pending):
                    # It died on the way: what it has given back counts, the record of requests
                    # in flight tells the rest.
                    self._restore_bases()
                self._drop_session()
                self._session = self._connect(socket_fd, foreign=False)
                socket_fd = -1
                self.state = NEW
                self._trouble = ""
                if self._goal != IDLE:
                    self._take_over(self._ready())
        finally:
            if socket_fd >= 0:
                os.close(socket_fd)

    def _drain(self, deadline: float, harmless: bool) -> None:
        try:
            self._stop(self._current(), deadline)
        except BackendError:
            if not harmless or self.state != BROKEN:
                raise
            self._restore_bases()

    def _restore_bases(self) -> None:
        from vmm.devices.in_flight import undone_requests  # not needed to start

        for queue in self._queues if self._goal != IDLE else ():
            self._bases[queue.index] = int.from_bytes(self._memory.read(queue.used + 2, 2),
                                                      "little")
        self.undone = undone_requests(self._inflight, self._bases)

    def _take_over(self, session: Session) -> None:
        missing = self._features & ~session.features
        if missing:
            error = BackendError(f"The new {self._peer} lacks the features {missing:#x}, which "
                                 "the driver uses", "give it what the last one had")
            self._break(error)
            raise error
        if self._goal == RUNNING:
            self._start(session)
        else:
            self.state = PAUSED

    def detach(self, deadline: float, forsaken: bool = False) -> None:
        """Let go of the back end while no driver uses the device; `on_needed` asks for another.
        `forsaken`: though one does. Nobody serves it until it is started again, nothing waits.

        :raises BackendError: a driver uses it.
        """
        with Held(self, deadline - time.monotonic()):
            if self._goal != IDLE and not forsaken:
                raise BackendError(f"The {self._peer} is in use", "drain it first")
            if self.state != CLOSED:
                self._drop_session()
                self.state, self._trouble = BROKEN, "there is none"

    def is_in_use(self) -> bool:
        """A driver has started the device."""
        return self._goal != IDLE

    def is_without_backend(self) -> bool:
        """There is none, or it is of no use any more."""
        return self.state == BROKEN

    def has_lost_backend(self) -> bool:
        """There is none, or it has closed the connection. Main loop; never waits."""
        session = self._session
        return self.state == BROKEN or (session is not None and session.hung_up)

    def rename(self, id: str) -> None:
        """Another device is what the slot shows from now on."""
        self.id = id
        self._peer = f"back end of {id}"

    def lost(self, trouble: str) -> None:
        """The back end's process is gone, or of no use: don't wait for it any more."""
        with self._lock:
            if self.state not in (BROKEN, CLOSED):
                self._break(BackendError(trouble))

    # ---- for subclasses --------------------------------------------------------------------

    def _fetch_config(self, offset: int, size: int) -> bytes:
        """GET_CONFIG; the back end is asked every time."""
        def action(session: Session) -> bytes:
            if not session.has_config:
                raise BackendError(f"The {self._peer} has no config space",
                                   "this device needs one with protocol feature CONFIG")
            with Guarded(self):
                return session.get_config(offset, size)

        return self._exchange(REQUEST_LIMIT, action)

    def _forward_config(self, offset: int, data: bytes) -> None:
        """SET_CONFIG."""
        def action(session: Session) -> int:
            if session.has_config:
                with Guarded(self):
                    session.set_config(offset, data)
            return 0

        self._exchange(REQUEST_LIMIT, action)

    def _written_config(self) -> tuple[int, bytes] | None:
        """What the driver wrote, and where: a start tells a back end, which may be another."""
        return None

    def _config_went_stale(self) -> None:
        """The back end says that its config space changed (main loop; must not wait)."""
        self.on_config_change()

    # ---- waiting for who looks after the device --------------------------------------------

    def _is_kept(self) -> bool:
        """Somebody brings another back end."""
        return self.on_lost is not None

    def _is_recovering(self) -> bool:
        return self.state == BROKEN and self._is_kept()

    def _wait_recovered(self, deadline: float) -> None:
        """Wait, without the lock, until there is a back end again.

        :raises BackendError: there is none by `deadline`.
        """
        while self.state == BROKEN:
            if time.monotonic() > deadline:
                raise self._broken_error()
            time.sleep(RECOVERY_POLL)

    def _retried(self, deadline: float, action: Callable[[float], None]) -> None:
        """`action(deadline)` under the lock; again, if the back end ended meanwhile and
        another one took over."""
        while True:
            if self._is_recovering() and self._session is not None:
                self._wait_recovered(deadline)
            with Held(self, deadline - time.monotonic()):
                try:
                    action(deadline)
                    return
                except BackendError:
                    if not self._is_recovering():
                        raise

    def _exchange(self, limit: float, action: Callable[[Session], T]) -> T:
        """`action(session)` under the lock with a greeted back end; again as `_retried`."""
        deadline = time.monotonic() + limit
        while True:
            if self._is_recovering():
                self._wait_recovered(deadline)
            with Held(self, limit):
                try:
                    return action(self._ready())
                except BackendError:
                    if not self._is_recovering():
                        raise

    # ---- inside: all under the lock --------------------------------------------------------

    def _current(self) -> Session:
        assert self._session is not None
        return self._session

    def _ready(self) -> Session:
        """Handshake, once, by whoever comes first."""
        if self.state in (BROKEN, CLOSED):
            raise self._broken_error()
        session = self._current()
        if self.state == NEW:
            with Guarded(self):
                session.greet(self._announced_queues(), self.wanted_protocol, self.queues_option)
            self.state = IDLE
        return session

    def _announced_queues(self) -> int:
        """The number of queues that the back end must announce."""
        return len(self.queue_sizes)

    def _start(self, session: Session) -> None:
        """Set everything up, start the rings, kick and call each once."""
        self.state = PAUSED
        with Guarded(self):
            self._inflight = session.start(self._features, self._queues, self._bases,
                                           self._inflight, len(self.queue_sizes),
                                           self._written_config())
        self.state = RUNNING

    def _stop(self, session: Session, deadline: float) -> None:
        """Stop every ring and wait until nothing is in flight; RUNNING becomes PAUSED."""
        try:
            if self.state == RUNNING:
                session.quiesce(self._queues, deadline)
            if self.state == RUNNING or session.stop_pending:
                self.state = PAUSED
                with Guarded(self):
                    session.stop(self._queues, self._bases, deadline)
            session.drain(self._queues, self._bases, deadline)
        except ConnectionLostError as error:  # a foreign one, with requests in flight
            self._break(error)
            raise BackendError(f"Device {self.id}: {error}") from error

    def _drop_inflight(self) -> None:
        # A buffer belongs to one life of the driver: after a reset a new one is asked for.
        if self._inflight is not None:
            os.close(self._inflight[1])
            self._inflight = None

    def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _break(self, error: Exception) -> None:
        """Close the connection; the device needs another back end, or to be made anew."""
        self.state = BROKEN
        self._trouble = str(error)
        if self._session is not None:
            self._session.cut()
        if self.on_lost is not None:
            self.on_lost(self._trouble)

    def _broken_error(self) -> BackendError:
        if self.state == CLOSED:
            return BackendError(f"The {self._peer} is closed", "the device is gone")
        return BackendError(f"The {self._peer} failed before: {self._trouble}",
                            "look at the back end's log")

    # ---- callbacks on the main loop: no lock, no wait --------------------------------------

    def _hung_up(self) -> None:
        """The back end closed the socket, or died."""
        text = f"The {self._peer} is gone; look at its log"
        if self.on_lost is not None:
            self.on_lost(text)
        elif self.state in (RUNNING, PAUSED):
            self.on_failure(text)

    def _ring_error(self, events: int) -> None:
        try:
            os.eventfd_read(self._error_fd)
        except BlockingIOError:
            return
        self.on_failure(f"The {self._peer} can't serve a queue any more; look at its log")


def connect_backend(config: ChardevConfig, server_too: bool = False) -> int:
    """See vmm/devices/vhost_socket.py, which only VMs with a foreign back end load."""
    from vmm.devices.vhost_socket import connect_backend as connect

    return connect(config, server_too)


def _nothing_with_text(text: str) -> None:
    pass

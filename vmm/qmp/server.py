"""Where QMP clients arrive: the listening sockets, and the list of who is connected.

This loads before the first guest instruction; what speaks JSON is imported when the first
client connects.
"""

from __future__ import annotations

import _socket
import errno
import posix as os

from shared import unix_socket
from vmm.errors import ConfigError
from vmm.event_loop import READ

TYPE_CHECKING = False  # importing typing for it would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmm.config.model import MonitorConfig
    from vmm.qmp.connection import Connection
    from vmm.qmp.fd_store import FdStore
    from vmm.qmp.registry import Registry
    from vmm.vm import Vm

MAX_CLIENTS = 32      # over all listeners; the next ones wait in the backlog
ACCEPT_PAUSE = 0.5    # seconds without accepting after the host ran out of descriptors
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class QmpServer:
    """The QMP side of one VM. Everything happens on the main thread."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.registry: Registry | None = None
        self._fds: FdStore | None = None
        self._listeners: list[_Listener] = []
        self._clients: list[Connection] = []
        self._listening = False
        self._flush_scheduled = False
        vm.events.subscribe(self._on_event)

    @property
    def fds(self) -> FdStore:
        """The descriptors that clients handed in with `getfd`, by name."""
        if self._fds is None:
            from vmm.qmp.fd_store import FdStore

            self._fds = FdStore()
        return self._fds

    def listen(self, monitors: Sequence[MonitorConfig]) -> None:
        """Listen wherever the command line says; clients are served once the loop runs.

        :raises StratovirtError: an address can't be had; names it.
        """
        for monitor in monitors:
            self._listeners.append(_Listener(monitor))
        self._set_listening(True)

    def close(self) -> None:
        """Send what is still to be sent as far as clients take it at once; close everything."""
        self._set_listening(False)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for client in self._clients[:]:
            client.send_all()
            client.close()
        if self._fds is not None:
            self._fds.close()
        self.vm.events.subscribe(None)

    def forget(self, client: Connection) -> None:
        """Called by a connection that has closed."""
        self._clients.remove(client)
        self._set_listening(True)

    # ---- clients arrive --------------------------------------------------------------------

    def _set_listening(self, on: bool) -> None:
        if on == self._listening:
            return
        self._listening = on
        for listener in self._listeners:
            if on:
                self.vm.loop.add(listener.socket.fileno(), READ, self._acceptor(listener))
            else:
                self.vm.loop.remove(listener.socket.fileno())

    def _acceptor(self, listener: _Listener) -> Callable[[int], None]:
        return lambda events: self._accept(listener)

    def _accept(self, listener: _Listener) -> None:
        try:
            fd = listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                # The listener stays readable: without a pause the loop would spin on it.
                self._set_listening(False)
                self.vm.loop.call_later(ACCEPT_PAUSE, self._accept_again)
            return
        self.adopt(fd)

    def adopt(self, fd: int) -> None:
        """Serve the connected socket `fd`, which is the server's from now on."""
        from vmm.qmp import connection, registry

        if self.registry is None:
            self.registry = registry.load()
        client = connection.Connection(self, self.vm, _socket.socket(fileno=fd))
        self._clients.append(client)
        if len(self._clients) >= MAX_CLIENTS:
            self._set_listening(False)
        client.start()

    def _accept_again(self) -> None:
        if self._listeners and len(self._clients) < MAX_CLIENTS:
            self._set_listening(True)

    # ---- events ----------------------------------------------------------------------------

    def _on_event(self, name: str, data: Mapping[str, object], time_ns: int) -> None:
        if not self._clients:
            return
        from vmm.qmp import message

        text = message.event(name, data, time_ns)
        for client in self._clients[:]:
            client.add_event(text)
        if not self._flush_scheduled:
            # Not at once: the reply that the event belongs to shall leave in the same write.
            self._flush_scheduled = True
            self.vm.loop.call_soon(self._flush_all)

    def _flush_all(self) -> None:
        self._flush_scheduled = False
        for client in self._clients[:]:
            client.flush()


class _Listener:
    """One listening socket."""

    __slots__ = ("_unix", "socket")

    def __init__(self, monitor: MonitorConfig) -> None:
        self._unix: unix_socket.UnixListener | None = None
        try:
            if monitor.kind == "unix":
                self._unix = unix_socket.listen_unix(monitor.path)
                self.socket = self._unix.socket
            elif monitor.kind == "tcp":
                self.socket = unix_socket.listen_tcp(monitor.host, monitor.port)
            else:
                self.socket = _inherited(monitor)
        except unix_socket.AddressError as error:
            raise ConfigError(f"{monitor.option}: {error.what}", error.hint) from None
        self.socket.setblocking(False)

    def accept(self) -> int:
        """Return the next client's descriptor: accept4 with SOCK_CLOEXEC."""
        fd, _ = self.socket._accept()  # type: ignore[attr-defined]  # not in the type stubs
        return int(fd)

    def close(self) -> None:
        if self._unix is not None:
            self._unix.close()
        self.socket.close()


def _inherited(monitor: MonitorConfig) -> _socket.socket:
    """Take the descriptor that a chardev of the command line names: libvirt listens for us."""
    what = f"{monitor.option}: descriptor {monitor.fd}"
    try:
        listener = _socket.socket(fileno=monitor.fd)
    except OSError as error:
        raise ConfigError(f"{what} can't be used: {error.strerror}",
                          "hand in a listening socket") from None
    if not listener.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN):
        listener.detach()
        raise ConfigError(f"{what} is not a listening socket",
                          "call listen() on it before you start the VMM")
    os.set_inheritable(monitor.fd, False)
    return listener

"""Character devices on sockets: a server with one client at a time, or a client."""

from __future__ import annotations

import _socket
import posix as os

from shared.unix_socket import AddressError, UnixListener, listen_tcp, listen_unix
from vmm.chardev.base import Chardev
from vmm.errors import ConfigError
from vmm.event_loop import READ

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import ChardevConfig
    from vmm.event_loop import EventLoop

CONNECT_LIMIT = 2.0  # seconds for who listens at the other side
ACCEPT_PAUSE = 0.5   # seconds without accepting after that failed


class SocketChardev(Chardev):
    """See the module. While a client is connected the next one waits in the backlog."""

    def __init__(self, config: ChardevConfig, loop: EventLoop) -> None:
        super().__init__(config.id, config.kind, loop)
        self.config = config
        self._listener: _socket.socket | None = None
        self._unix: UnixListener | None = None
        self._peer: _socket.socket | None = None
        if config.server:
            self._listen()
        else:
            self._serve(self._inherited(False) if config.fd >= 0 else self._connect())

    def _listen(self) -> None:
        config = self.config
        try:
            if config.fd >= 0:
                self._listener = self._inherited(True)
            elif config.path:
                self._unix = listen_unix(config.path)
                self._listener = self._unix.socket
            else:
                self._listener = listen_tcp(config.host, config.port)
        except AddressError as error:
            raise ConfigError(f"{config.option}: {error.what}", error.hint) from None
        self.loop.add(self._listener.fileno(), READ, self._accept)

    def _inherited(self, listening: bool) -> _socket.socket:
        """Take over the socket that whoever started us opened; it must be of the kind we need."""
        fd = self.config.fd
        what = f"{self.config.option},fd={fd}"
        kind = "listening" if listening else "connected"
        try:
            sock = _socket.socket(fileno=fd)
        except OSError as error:
            raise ConfigError(f"{what}: descriptor {fd} can't be used: {error.strerror}",
                              f"hand in a {kind} socket") from None
        if bool(sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)) != listening:
            sock.detach()
            raise ConfigError(f"{what}: descriptor {fd} is not a {kind} socket",
                              f"hand in a {kind} socket; server=on listens")
        os.set_inheritable(fd, False)
        sock.setblocking(False)
        return sock

    def _connect(self) -> _socket.socket:
        config = self.config
        sock = _socket.socket(_socket.AF_UNIX if config.path else _socket.AF_INET,
                              _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(CONNECT_LIMIT)
            sock.connect(config.path or (config.host, config.port))
        except (OSError, ValueError, TypeError) as error:  # the latter: no name can be like that
            sock.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{config.option}: can't connect to {self._address()}: {reason}",
                              "start the other side first, or add server,nowait") from None
        return sock

    def _accept(self, events: int) -> None:
        assert self._listener is not None
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            # It went away again; or we have no descriptors, and the loop must not spin on it.
            self.loop.remove(self._listener.fileno())
            self.loop.call_later(ACCEPT_PAUSE, self._accept_again)
            return
        self.loop.remove(self._listener.fileno())
        self._serve(_socket.socket(self._listener.family, _socket.SOCK_STREAM, 0, fd))

    def _serve(self, sock: _socket.socket) -> None:
        sock.setblocking(False)
        self._peer = sock
        self._attach(sock.fileno(), sock.fileno())

    def _hung_up(self) -> None:
        self._detach()
        if self._peer is not None:
            self._peer.close()
            self._peer = None
        self._accept_again()

    def _accept_again(self) -> None:
        if self._listener is not None and self._peer is None:
            self.loop.add(self._listener.fileno(), READ, self._accept)

    def _address(self) -> str:
        config = self.config
        if config.fd >= 0:
            return f"fd={config.fd}"
        return config.path or f"{config.host}:{config.port}"

    def filename(self) -> str:
        """See `Chardev.filename`."""
        kind = "unix" if self.config.path or self.config.fd >= 0 else "tcp"
        server = ",server=on" if self.config.server else ""
        state = "" if self.connected else "disconnected:"
        return f"{state}{kind}:{self._address()}{server}"

    def close(self) -> None:
        """Close; the socket that was created is removed."""
        self._detach()
        if self._peer is not None:
            self._peer.close()
            self._peer = None
        if self._listener is not None:
            self.loop.remove(self._listener.fileno())
            if self._unix is not None:
                self._unix.close()
            self._listener.close()
            self._listener = None

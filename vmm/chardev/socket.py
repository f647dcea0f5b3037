"""Character devices on sockets: a server with one client at a time, or a client."""

from __future__ import annotations

import _socket
import os

from shared.unix_socket import listen_tcp, listen_unix
from vmm.chardev.base import Chardev
from vmm.errors import ConfigError
from vmm.event_loop import READ

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import ChardevConfig
    from vmm.event_loop import EventLoop


class SocketChardev(Chardev):
    """See the module. While a client is connected the next one waits in the backlog."""

    def __init__(self, config: ChardevConfig, loop: EventLoop) -> None:
        super().__init__(config.id, config.kind, loop)
        self.config = config
        self._listener: _socket.socket | None = None
        self._peer: _socket.socket | None = None
        self._unlink = ""
        if config.server:
            self._listen()
        else:
            self._connect()

    def _listen(self) -> None:
        config = self.config
        if config.fd >= 0:
            self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, config.fd)
            self._listener.setblocking(False)
        elif config.path:
            self._listener = listen_unix(config.path)
            self._unlink = config.path
        else:
            self._listener = listen_tcp(config.host, config.port)
        self.loop.add(self._listener.fileno(), READ, self._accept)

    def _connect(self) -> None:
        config = self.config
        sock = _socket.socket(_socket.AF_UNIX if config.path else _socket.AF_INET,
                              _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(2.0)
            sock.connect(config.path or (config.host, config.port))
        except OSError as error:
            sock.close()
            raise ConfigError(f"-chardev socket,id={config.id}: can't connect to "
                              f"{self._address()}: {error.strerror or error}",
                              "start the other side first, or add server,nowait") from None
        self._serve(sock)

    def _accept(self, events: int) -> None:
        assert self._listener is not None
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
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
        if self._listener is not None:
            self.loop.add(self._listener.fileno(), READ, self._accept)

    def _address(self) -> str:
        return self.config.path or f"{self.config.host}:{self.config.port}"

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
            self._listener.close()
            self._listener = None
        if self._unlink:
            try:
                os.unlink(self._unlink)
            except OSError:
                pass
            self._unlink = ""

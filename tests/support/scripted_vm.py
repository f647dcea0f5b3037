"""A QMP server that says what a test wants it to say: right, wrong, late, or too much."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GREETING = {"QMP": {"version": {}, "capabilities": []}}


class Refusal:
    """An error in place of a result."""

    def __init__(self, desc: object, error_class: object = "GenericError") -> None:
        self.error = {"class": error_class, "desc": desc}


class Raw:
    """Bytes in place of a reply; `close`: hang up behind them."""

    def __init__(self, data: bytes, close: bool = False) -> None:
        self.data = data
        self.close = close


class ScriptedVm:
    """Listens at `path` and answers each client in a thread.

    answers: by command, a result, a Refusal, Raw, or a function of the arguments that returns one;
    what isn't there is answered with {}. commands: what was asked, with its arguments. greeting:
    what a client gets first, an object or Raw.
    """

    def __init__(self, path: Path | str, answers: dict[str, Any] | None = None,
                 greeting: object = None) -> None:
        self.path = str(path)
        self.answers: dict[str, Any] = answers or {}
        self.greeting = GREETING if greeting is None else greeting
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.descriptors = 0
        self._clients: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if not self._send(client, self.greeting):
                return
            buffer = b""
            while True:
                data, fds, _, _ = socket.recv_fds(client, 65536, 16)
                self.descriptors += len(fds)
                for fd in fds:
                    os.close(fd)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    if not self._answer(client, json.loads(line)):
                        return
        except OSError:
            pass
        finally:
            client.close()

    def _answer(self, client: socket.socket, message: dict[str, Any]) -> bool:
        name, arguments = message["execute"], message.get("arguments", {})
        self.commands.append((name, arguments))
        answer = self.answers.get(name, {})
        if callable(answer):
            answer = answer(arguments)
        if isinstance(answer, Raw):
            return self._send(client, answer)
        key, value = (("error", answer.error) if isinstance(answer, Refusal)
                      else ("return", answer))
        return self._send(client, {key: value, "id": message.get("id")})

    @staticmethod
    def _send(client: socket.socket, what: object) -> bool:
        if isinstance(what, Raw):
            client.sendall(what.data)
            return not what.close
        client.sendall(json.dumps(what).encode() + b"\r\n")
        return True

    def emit(self, event: object) -> None:
        """Send something to every client that is there."""
        for client in self._clients:
            self._send(client, event)

    def asked(self, name: str) -> list[dict[str, Any]]:
        """The arguments of each time that a command came."""
        return [arguments for command, arguments in self.commands if command == name]

    def close(self) -> None:
        """Hang up. Harmless when closed."""
        for sock in (self._listener, *self._clients):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has gone
        self._listener.close()


def after_other_events(count: int, name: str, data: dict[str, Any]) -> Callable[[object], Raw]:
    """An answer function: so many events of no interest, the one that is waited for, then the
    reply (without an id, as StratoVirt's)."""
    noise = json.dumps({"event": "RESUME", "data": {}}).encode() + b"\n"
    event = json.dumps({"event": name, "data": data}).encode() + b"\n"
    return lambda _: Raw(noise * count + event + noise + b'{"return": {}}\n')

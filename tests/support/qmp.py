"""A QMP client over a raw socket, for tests: no greeting or reply goes unseen.

Independent of the product's own parser on purpose, and of `qemu.qmp`, which has a test of its own.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any


class QmpError(RuntimeError):
    """The server answered with an error; `.error` is its object."""

    def __init__(self, command: str, error: dict[str, Any]) -> None:
        super().__init__(f"{command}: {error}")
        self.error = error


class QmpClient:
    """One connection; replies and events are read as they come, in order (`log`)."""

    def __init__(self, address: str | tuple[str, int] | socket.socket,
                 timeout: float = 10) -> None:
        self.timeout = timeout
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.socket = address if isinstance(address, socket.socket) else connect(address, timeout)
        self.greeting = self.receive()

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next object from the server.

        :raises TimeoutError: none came in time. :raises EOFError: the server closed.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while b"\n" not in self.buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"no line from QMP, only {self.buffer!r}")
            self.socket.settimeout(remaining)
            data = self.socket.recv(65536)
            if not data:
                raise EOFError(f"QMP was closed after {self.buffer!r}")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        result = json.loads(line)
        assert isinstance(result, dict)
        self.log.append(result)
        if "event" in result:
            self.events.append(result)
        return result

    def raw(self, text: str, timeout: float | None = None) -> dict[str, Any]:
        """Send `text`, return the next reply (events are kept)."""
        self.socket.sendall(text.encode())
        while True:
            answer = self.receive(timeout)
            if "event" not in answer:
                return answer

    def command(self, name: str, /, timeout: float | None = None, **arguments: Any) -> Any:
        """Run a command, return its result; `_` in argument names stands for `-`.

        :raises QmpError: the server refused it.
        """
        message: dict[str, Any] = {"execute": name}
        if arguments:
            message["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        answer = self.raw(json.dumps(message) + "\n", timeout)
        if "error" in answer:
            raise QmpError(name, answer["error"])
        return answer["return"]

    def wait_event(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        """The first event `name` not returned before; it is taken out of `events`."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            self.receive(max(deadline - time.monotonic(), 0.001))

    def send_fds(self, text: str, fds: list[int]) -> None:
        """Send `text` with descriptors (`getfd`); the reply is left to `receive`."""
        socket.send_fds(self.socket, [text.encode()], fds)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: str | tuple[str, int], timeout: float) -> socket.socket:
    """Connect to a unix path or (host, port), again until somebody listens."""
    deadline = time.monotonic() + timeout
    while True:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A unix path may be longer than sun_path: go by the folder's descriptor.
            if isinstance(address, str) and len(os.fsencode(address)) > 100:
                folder = os.open(os.path.dirname(address), os.O_PATH)
                try:
                    client.connect(f"/proc/self/fd/{folder}/{os.path.basename(address)}")
                finally:
                    os.close(folder)
            else:
                client.connect(address)
            return client
        except OSError as error:
            client.close()
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody listens on {address}: {error}") from None
            time.sleep(0.005)

"""What guests stream to and from: TCP servers that run beside the VM, in L1.

    python -m tests.lab.streams FILE LOG

Port 5001 takes a stream and writes its length and MD5 to LOG, a line each; port 5002 gives FILE.
"""

from __future__ import annotations

import hashlib
import socket
import sys
import threading
from pathlib import Path


def take(peer: socket.socket, log: Path) -> None:
    """One stream."""
    digest, length = hashlib.md5(), 0
    with peer:
        while part := peer.recv(1 << 16):
            digest.update(part)
            length += len(part)
    with log.open("a") as file:
        file.write(f"{length} {digest.hexdigest()}\n")


def give(peer: socket.socket, content: bytes) -> None:
    """The other way."""
    with peer:
        peer.sendall(content)


def serve(content: bytes, log: Path) -> None:
    """Until killed."""
    def listen(port: int) -> None:
        with socket.create_server(("0.0.0.0", port)) as server:
            while True:
                peer, _ = server.accept()
                action, what = (take, log) if port == 5001 else (give, content)
                threading.Thread(target=action, args=(peer, what), daemon=True).start()

    threads = [threading.Thread(target=listen, args=(port,)) for port in (5001, 5002)]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    serve(Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]))

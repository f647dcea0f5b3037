"""The lab by hand.

python -m tests.lab prepare          fetch kernels, boot L1, keep its snapshot
python -m tests.lab run COMMAND …    run a shell command in a fresh L1
python -m tests.lab shell            an interactive shell in a fresh L1 (end it with ctrl-])
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from typing import TYPE_CHECKING

from tests.lab.lab import Lab, LabError, obtain_snapshot

if TYPE_CHECKING:
    import socket

ESCAPE = b"\x1d"
# The port can be opened once, and is no terminal.
SHELL = ("exec python3 -c 'import pty; pty.spawn([\"sh\", \"-i\"])' "
         "<>/dev/vport0p2 >&0 2>&1")


def bridge(port: socket.socket, done: socket.socket | None = None) -> None:
    """Join the terminal with `port` until ctrl-], or until `done` is readable."""
    saved = termios.tcgetattr(0) if os.isatty(0) else None
    if saved:
        tty.setraw(0)
    try:
        watched: list[int | socket.socket] = [0, port, *([done] if done else [])]
        while True:
            ready, _, _ = select.select(watched, [], [])
            if port in ready:
                data = port.recv(4096)
                if not data:
                    return
                os.write(1, data)
            if 0 in ready:
                data = os.read(0, 4096)
                if not data or ESCAPE in data:
                    return
                port.sendall(data)
            if done in ready:
                return
    finally:
        if saved:
            termios.tcsetattr(0, termios.TCSADRAIN, saved)


def main(arguments: list[str]) -> int:
    """Run one of the commands above; the exit status."""
    began = time.monotonic()
    if arguments[:1] == ["prepare"]:
        print(f"lab: {obtain_snapshot()} ({time.monotonic() - began:.1f} s)")
        return 0
    if arguments[:1] not in (["run"], ["shell"]):
        print(__doc__)
        return 2
    with Lab.acquire() as lab:
        print(f"lab: ready after {time.monotonic() - began:.1f} s", file=sys.stderr)
        if arguments[0] == "run":
            result = lab.run(" ".join(arguments[1:]), timeout=600)
            sys.stdout.write(result.output)
            return result.code
        port = lab.connect_port("tty")
        lab.start(SHELL, timeout=36000)
        bridge(port, lab.agent)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as error:
        sys.exit(f"lab: {error}")

"""`stratoctl` under test: in a process of its own, on a terminal if need be."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.support.test_vm import LIMIT, ROOT, VmFailure

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = [sys.executable, "-m", "vmm.ctl"]


def environment(**more: str) -> dict[str, str]:
    """Without what the machine's own run directory would be."""
    kept = {name: value for name, value in os.environ.items()
            if name not in ("STRATOVIRT_RUN_DIR", "XDG_RUNTIME_DIR")}
    return {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm", **more}


def ctl(*arguments: str | Path, status: int = 0, limit: float = LIMIT, typed: str = "",
        **more: str) -> str:
    """Run it; its output, or the complaint where `status` isn't 0."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], input=typed, capture_output=True,
                          text=True, timeout=limit, env=environment(**more), check=False)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    if status:
        assert "Traceback" not in done.stderr
        return done.stderr
    return done.stdout


def ctl_json(*arguments: str | Path, **more: Any) -> Any:
    """Run it with --json; what it prints, one value."""
    return json.loads(ctl("--json", *arguments, **more))


class Terminal:
    """It runs on a pseudo terminal: `output` grows, `type` types."""

    def __init__(self, *arguments: str | Path, **more: str) -> None:
        self.output = b""
        self._taken = 0
        self.master, follower = pty.openpty()
        self.follower = follower
        self.process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdin=follower,
                                        stdout=follower, stderr=follower,
                                        env=environment(**more),
                                        start_new_session=True)

    def type(self, data: bytes) -> None:
        """As if these keys were pressed."""
        os.write(self.master, data)

    def shows(self, text: bytes) -> bool:
        """Whether `text` came, now or ever; waits for 0.1 s."""
        if select.select([self.master], [], [], 0.1)[0]:
            self.output += os.read(self.master, 65536)
        return text in self.output

    def wait_for(self, text: bytes, limit: float = LIMIT) -> None:
        """Until `text` came, behind what was waited for before."""
        deadline = time.monotonic() + limit
        while (at := self.output.find(text, self._taken)) < 0:
            ready, _, _ = select.select([self.master], [], [], 0.1)
            if ready:
                self.output += os.read(self.master, 65536)
            elif time.monotonic() > deadline or self.process.poll() is not None:
                raise VmFailure(f"no {text!r} on the terminal: …{self.output[-2000:]!r}")
        self._taken = at + len(text)

    def wait(self, limit: float = LIMIT) -> int:
        """Its exit status."""
        deadline = time.monotonic() + limit
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.02)[0]:
                self.output += os.read(self.master, 65536)
        return self.process.wait(0.1)

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.follower)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""One VM under test: the product's own command, started natively, with its console and QMP.

    with TestVm(tmp_path, "-kernel", guest(), "-m", "128", append="script=mem") as vm:
        assert vm.guest("echo").ok
        vm.qmp.command("stop")

Every wait has a deadline; what fails shows the console and standard error.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.support.qmp import QmpClient

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
MARK = "STRATOVMM_TEST"
LIMIT = 30.0
STRETCH = 3  # how much longer than its limit a wait may take while there is progress
# Starts the product as the installed command does (-I -S, its own path), from the source tree.
LAUNCH = ("import sys; sys.path[:0] = sys.argv.pop(1).split(':'); "
          "from vmm.__main__ import run; run()")


class VmFailure(AssertionError):
    """Something that the VM should have done didn't happen in time."""


class Answer(NamedTuple):
    """What the bare-metal guest answered to a command: `ok`/`fail`, text, notes before it."""

    ok: bool
    text: str
    notes: list[str]

    def value(self, name: str) -> int:
        """The number after `name=`."""
        match = re.search(rf"\b{re.escape(name)}=(0x[0-9a-f]+|\d+)", self.text)
        if match is None:
            raise VmFailure(f"the guest's answer has no {name}: {self.text!r}")
        return int(match[1], 0)


def product_command() -> list[str]:
    """The command that starts the product: $STRATOVIRT, else this source tree."""
    given = os.environ.get("STRATOVIRT")
    if given:
        return given.split()
    site = next((path for path in sys.path if path.endswith("site-packages")), "")
    return [os.path.realpath(sys.executable), "-I", "-S", "-c", LAUNCH, f"{ROOT}:{site}"]


def wait_until(condition: Callable[[], object], what: str, timeout: float = LIMIT) -> None:
    """Poll until `condition()` is true. :raises VmFailure: it didn't become true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise VmFailure(f"{what}: not within {timeout:.1f} s")
        time.sleep(0.002)


class Patience:
    """A limit for a wait that goes on as long as there is progress, but not for ever.

    :param timeout: seconds without progress.
    :param progress: a value that changes with it.
    """

    def __init__(self, timeout: float, progress: Callable[[], object]) -> None:
        self._timeout = timeout
        self._progress = progress
        self._seen = progress()
        self._began = self._moved = time.monotonic()

    def spent(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def exhausted(self) -> bool:
        """Whether the wait is over."""
        now = time.monotonic()
        if now - self._moved <= self._timeout:
            return False
        seen, self._seen = self._seen, self._progress()
        if seen == self._seen or now - self._began > STRETCH * self._timeout:
            return True
        self._moved = now
        return False


class TestVm:
    """Starts the VM at once. Serial port and standard output are the same stream (`output`)."""

    __test__ = False  # not a class of tests

    def __init__(self, folder: Path, *arguments: str | Path, append: str = "",
                 qmp: bool = True, serial: bool = True, command: list[str] | None = None,
                 environment: dict[str, str] | None = None,
                 pass_fds: tuple[int, ...] = ()) -> None:
        self.folder = folder
        self.qmp_path = folder / f"qmp-{uuid.uuid4().hex[:6]}.sock"
        self.mark = uuid.uuid4().hex
        self.output = b""
        self.taken = 0
        self._qmp: QmpClient | None = None
        self._changed = threading.Condition()
        line = [*(command or product_command()), *map(str, arguments)]
        if qmp:
            line += ["-qmp", f"unix:{self.qmp_path},server,nowait"]
        if serial:
            line += ["-serial", "stdio"]
        if append:
            line += ["-append", append]
        self.arguments = line
        self.errors = folder / f"stderr-{self.mark[:6]}"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env={**(os.environ if environment is None else environment), MARK: self.mark},
                start_new_session=True, pass_fds=pass_fds)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    # ---- console ------------------------------------------------------------------------------

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            with self._changed:
                self.output += data
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_output(self, pattern: str, timeout: float = LIMIT) -> str:
        """The next text that matches `pattern`, from where the last wait ended.

        :param timeout: seconds without progress: output, or CPU time spent by the VM as on a
            machine that is slow. A VM that only spins has STRETCH times as long.
        """
        expression = re.compile(pattern.encode(), re.MULTILINE)
        patience = Patience(timeout, self._progress)
        with self._changed:
            while True:
                match = expression.search(self.output, self.taken)
                if match:
                    self.taken = match.end()
                    return match[0].decode(errors="replace")
                if not self._reader.is_alive():
                    self.process.wait(5)
                    raise VmFailure(f"no {pattern!r} on the console, which has closed after "
                                    f"{patience.spent():.1f} s\n{self.story()}")
                if patience.exhausted():
                    raise VmFailure(f"no {pattern!r} on the console within "
                                    f"{patience.spent():.1f} s\n{self.story()}")
                self._changed.wait(0.2)

    def _progress(self) -> tuple[int, int]:
        """Grows while the VM does something: bytes of output, half seconds of CPU time."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
        except OSError:
            ticks = 0
        return len(self.output), 2 * ticks // os.sysconf("SC_CLK_TCK")

    def has_output(self, pattern: str) -> bool:
        """Whether `pattern` is anywhere in what came so far."""
        with self._changed:
            return re.search(pattern.encode(), self.output) is not None

    def send(self, text: str) -> None:
        """Type on the console."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def guest(self, command: str, timeout: float = LIMIT) -> Answer:
        """Have the bare-metal guest run a command, once it is `ready`."""
        if not self.has_output(r"(?m)^ready"):
            self.wait_output(r"^ready\r?\n", timeout)
        begin = self.taken
        self.send(command + "\n")
        return self._answer(begin, timeout)

    def script_answer(self, timeout: float = LIMIT) -> Answer:
        """The next answer of a guest that runs its `script=`."""
        return self._answer(self.taken, timeout)

    def _answer(self, begin: int, timeout: float) -> Answer:
        line = self.wait_output(r"^(ok|fail) [^\r\n]*\r?\n", timeout)
        notes = [note.decode() for note in
                 re.findall(rb"(?m)^note ([^\r\n]*)", self.output[begin : self.taken])]
        return Answer(line.startswith("ok"), line.strip().partition(" ")[2], notes)

    # ---- QMP and the end ------------------------------------------------------------------------

    @property
    def qmp(self) -> QmpClient:
        """The QMP connection, made when first used."""
        if self._qmp is None:
            try:
                self._qmp = QmpClient(str(self.qmp_path), LIMIT)
            except (TimeoutError, EOFError) as error:
                raise VmFailure(f"QMP: {error}\n{self.story()}") from None
        return self._qmp

    def wait(self, timeout: float = LIMIT) -> int:
        """The exit status of the process, once it ends by itself."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise VmFailure(f"the VM didn't end within {timeout:.1f} s\n{self.story()}") from None
        self._reader.join(5)
        return status

    def error_text(self) -> str:
        """What came on standard error."""
        return self.errors.read_text(errors="replace")

    def story(self) -> str:
        """All that a failure report needs."""
        return (f"command: {' '.join(self.arguments)}\nexit status: {self.process.poll()}\n"
                f"console: {self.output[-3000:].decode(errors='replace')}\n"
                f"standard error: {self.error_text()[-3000:]}")

    def processes(self) -> dict[int, str]:
        """Living processes of this VM, the VMM itself included: name by pid."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environ = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ours = self.mark.encode() in environ or int(state[3]) == self.process.pid
            if ours and state[0] != "Z":
                with contextlib.suppress(OSError):
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
        return found

    def close(self) -> None:
        """Kill what is left of the VM."""
        if self._qmp is not None:
            self._qmp.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(VmFailure):
            wait_until(lambda: not self.processes(), "end of the VM's processes", 2)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> TestVm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

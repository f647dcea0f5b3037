"""CPU time of the net worker a frame, beside bare system calls on the same tap, and DPDK's.

Goal: at most 1.5 times the bare read() or write(), for frames of 64 and 1514 bytes and GSO frames
of 64 KiB, each way. Traps: docs/performance.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import backends, urgent
from bench.report import ROOT, BenchError, Goal, Report, parse, parser, ratios, show

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECONDS = 0.4
LIMIT = 60.0
GOAL = 1.5
TAP, DPDK_TAP = "tap0", "dtap0"
# A window of frames is in the tap before the guest has buffers: as when it can't keep up.
FULL = "receive, tap full"
WAYS = {"transmit": (), FULL: ("--receive", "--burst"), "receive, as it comes": ("--receive",)}
FRAMES = {"64 B": ("--length", "64"), "1514 B": ("--length", "1514"),
          # As Linux's TCP makes them: 45 segments of 1448 bytes behind one header.
          "64 KiB GSO": ("--length", "65214", "--gso", "--buffer", "4096")}


class Case(NamedTuple):
    """One line of the table."""

    way: str
    frame: str
    options: tuple[str, ...]
    dpdk: bool  # that it can do it

    def text(self) -> str:
        """For the reader."""
        return f"{self.way}: {self.frame}"


def cases() -> list[Case]:
    """All of the table, in its order."""
    found = []
    for way, options in WAYS.items():
        for frame, more in FRAMES.items():
            large = frame == "64 KiB GSO"  # few: they take the room of a processor's caches
            window = "64" if large else "512" if options else "256"
            # DPDK's tap has no offloads, and its vhost drops what finds no buffers, so that
            # nothing can pile up before it.
            found.append(Case(way, frame, (*options, *more, "--window", window),
                              not large and way != FULL))
    return found


class Stage:
    """A network namespace with a tap, and rivals that take turns at it."""

    def __init__(self, group: str = "") -> None:
        from tests.support.net_namespace import NetNamespace

        self._netgen = backends.program("netgen")
        self._before = ["sh", "-c", 'echo 0 > "$0/cgroup.procs"; exec "$@"', group] if group else []
        cpus = sorted(os.sched_getaffinity(0))
        self._cpus = (cpus[0], cpus[-1])
        self.namespace = NetNamespace()
        self._taps = self.namespace.tap(TAP)

    def run(self, rival: str, case: Case, seconds: float) -> dict[str, Any]:
        """What the generator measured: `floor`, `worker` or `dpdk`.

        :raises BenchError: the run failed, or frames came out wrong.
        """
        self.flush()
        line = [*self._before, str(self._netgen), *case.options, "--seconds", str(seconds),
                "--pin", str(self._cpus[0]),
                "--interface", DPDK_TAP if rival == "dpdk" else TAP]
        if rival == "floor":
            return self._generate(rival, [*line, "--floor-pin", str(self._cpus[1]), "--floor",
                                          str(self._taps[0])])
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            socket = Path(folder) / "vhost"
            with self._backend(rival, socket) as pid:
                return self._generate(rival, [*line, "--socket", str(socket), "--pid", str(pid)])

    def flush(self) -> None:
        """Frames that a rival left in the tap are not the next one's."""
        os.set_blocking(self._taps[0], False)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._taps[0], 1 << 17):
                pass

    @contextlib.contextmanager
    def _backend(self, rival: str, socket: Path) -> Iterator[int]:
        line = worker(socket, self._taps[0]) if rival == "worker" else dpdk(socket, self._cpus[1])
        line = [*self._before, *backends.on(self._cpus[1]), *line]
        # DPDK's program forwards until there is something on its standard input.
        backend = self.namespace.run(lambda: subprocess.Popen(
            line, cwd=ROOT, pass_fds=self._taps, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        try:
            backends.wait_socket(socket, backend)
            if rival == "dpdk":
                self._wait_up(backend)
            yield backend.pid
        except BenchError as error:
            said = backends.end(backend).strip()
            raise BenchError(f"{error} {said}".strip()) from error
        finally:
            if backend.returncode is None:
                backends.end(backend)

    def _wait_up(self, backend: subprocess.Popen[bytes]) -> None:
        """DPDK makes its tap itself, and sets it up when it begins to forward."""
        deadline = time.monotonic() + 20
        while not self.namespace.is_up(DPDK_TAP):
            if backend.poll() is not None or time.monotonic() > deadline:
                raise BenchError("dpdk-testpmd made no tap")
            time.sleep(0.01)

    def _generate(self, rival: str, line: list[str]) -> dict[str, Any]:
        done = self.namespace.run(lambda: subprocess.run(
            line, pass_fds=self._taps, capture_output=True, text=True, timeout=LIMIT, check=False))
        if done.returncode:
            raise BenchError(f"{rival}: {done.stderr.strip()}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def close(self) -> None:
        """Let go of the namespace, and of the tap with it."""
        for tap in self._taps:
            os.close(tap)
        self.namespace.close()


def worker(socket: Path, tap: int) -> list[str]:
    """Our worker's command line, alone, in its sandbox."""
    return [sys.executable, "-m", "workers.net", f"--socket-path={socket}", f"--tap-fds={tap}"]


def dpdk(socket: Path, cpu: int) -> list[str]:
    """DPDK's test program between a vhost-user port and a tap, polling on one CPU."""
    return ["dpdk-testpmd", "--no-huge", "--no-shconf", "-m", "256", "--no-pci", "--no-telemetry",
            "--lcores", f"0@{cpu},1@{cpu}", "--vdev", f"net_vhost0,iface={socket},queues=1",
            "--vdev", f"net_tap0,iface={DPDK_TAP}", "--", "--forward-mode=io", "--auto-start",
            "--total-num-mbufs=16384"]


def rivals(case: Case) -> list[str]:
    """Who can be measured here."""
    return ["floor", "worker",
            *(["dpdk"] if case.dpdk and shutil.which("dpdk-testpmd") is not None else [])]


def measure(stage: Stage, case: Case, rounds: int, seconds: float = SECONDS
            ) -> dict[str, list[dict[str, Any]]]:
    """Rounds of a case, all rivals in each, the first one in turn."""
    names = rivals(case)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(stage.run(name, case, seconds))
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here, or frames came out wrong."""
    command = parser(__doc__ or "", 7, 3)
    command.add_argument("--seconds", type=float, default=SECONDS, help=f"a run ({SECONDS})")
    command.add_argument("--only", default="", help="cases whose text holds this, e.g. 'full: 64'")
    command.add_argument("--urgent", action="store_true",
                         help="in a control group whose processes go before all else (root)")
    line = parse(command, arguments)
    report = Report("net", "Net back ends: CPU-seconds per million frames", [
        "way", "frame", "bare loop", "our worker", "DPDK", "ours, per GB", "lost", "ratio", "goal",
        ""])
    try:
        with urgent.group() if line.urgent else contextlib.nullcontext("") as group, \
                contextlib.closing(Stage(group)) as stage:
            for case in cases():
                if line.only in case.text():
                    _add(report, case, measure(stage, case, line.rounds, line.seconds))
    except (BenchError, OSError) as error:
        print(f"bench net: {error}", file=sys.stderr)
        return 1
    report.note("bare loop: read() or write() on the same tap. lost: frames that the worker (DPDK) "
                "dropped in all rounds. Generator on one CPU, back end on another.")
    if shutil.which("dpdk-testpmd") is None:
        report.note("no DPDK: dpdk-testpmd is not installed")
    return report.finish(line.json)


def _add(report: Report, case: Case, found: dict[str, list[dict[str, Any]]]) -> None:
    costs = {name: [run["per_million"] for run in runs] for name, runs in found.items()}
    lost = {name: sum(run["lost"] for run in runs) for name, runs in found.items()}
    report.add([case.way, case.frame, show(costs["floor"], 2), show(costs["worker"], 2),
                show(costs["dpdk"], 2) if "dpdk" in costs else "-",
                show([run["per_gb"] for run in found["worker"]], 2),
                f"{lost['worker']}" + (f" ({lost['dpdk']})" if "dpdk" in lost else "")],
               {"case": case.text(), **costs, "lost": lost, "runs": found},
               ratios(costs["worker"], costs["floor"]), Goal(GOAL))

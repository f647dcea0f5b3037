"""Looks for inputs that the kept corpus doesn't have, guided by coverage (atheris, libFuzzer).

    python -m tests.fuzz.guided [TARGET...] [--seconds N] [--keep]

All targets at once, each in a process of its own, niced.  With `--keep` what was found becomes
the corpus of the repository.
"""

from __future__ import annotations

import subprocess
import sys

from tests.fuzz.guided import corpus
from tests.fuzz.guided.targets import MAX_LENGTH, TARGETS

WORK = corpus.ROOT / "build/fuzz"


def search(name: str, libfuzzer: list[str]) -> None:
    """Never returns: libFuzzer's loop over one target, in this process."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    target = TARGETS[name]
    target.run(bytes(range(16)))  # imports what is imported when it is used
    for module in [module for module in sys.modules
                   if module.startswith(target.packages)]:
        loaded = sys.modules[module]
        for value in vars(loaded).values():
            if callable(value) and getattr(value, "__module__", "") == module:
                _instrument(atheris, value)
    atheris.Setup([name, *libfuzzer], lambda data: target.run(bytes(data)))
    atheris.Fuzz()


def _instrument(atheris: object, value: object) -> None:
    functions = vars(value).values() if isinstance(value, type) else (value,)
    for function in functions:
        if hasattr(function, "__code__"):
            atheris.instrument_func(function)  # type: ignore[attr-defined]


def _command(name: str, *libfuzzer: str) -> list[str]:
    return ["nice", "-n", "19", sys.executable, "-m", "tests.fuzz.guided", "--in-process", name,
            f"-max_len={MAX_LENGTH}", "-timeout=10", *libfuzzer]


def main(arguments: list[str]) -> int:
    """Exit code: how many targets found something."""
    if arguments[:1] == ["--in-process"]:
        search(arguments[1], arguments[2:])
        return 0
    seconds, keeping = 60, "--keep" in arguments
    if "--seconds" in arguments:
        at = arguments.index("--seconds")
        seconds = int(arguments[at + 1])
        del arguments[at:at + 2]
    names = [name for name in arguments if not name.startswith("--")] or list(TARGETS)
    running = {}
    for name in names:
        found = WORK / name
        found.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(corpus.kept(name)):
            (found / f"seed-{number}").write_bytes(data)
        log = (WORK / f"{name}.log").open("wb")
        running[name] = subprocess.Popen(
            _command(name, f"-max_total_time={seconds}", f"-artifact_prefix={WORK}/{name}-",
                     "-print_final_stats=1", str(found)),
            cwd=corpus.ROOT, stdout=log, stderr=subprocess.STDOUT)
    failed = 0
    for name, process in running.items():
        status = process.wait()
        corpus.report(name, status, WORK / f"{name}.log")
        failed += status != 0
        if keeping and not status:
            # libFuzzer keeps what adds coverage, shorter for longer.
            corpus.keep(name, [path.read_bytes() for path in (WORK / name).iterdir()])
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

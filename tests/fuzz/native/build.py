"""Builds the fuzz targets in C (targets.py) and runs them.

    python -m tests.fuzz.native.build [TARGET...] [--seconds N] [--keep]

With clang: coverage-guided (libFuzzer) with ASAN and UBSAN, from the kept corpus and the honest
inputs, all targets at once, niced; with `--keep` what was found is reduced to what adds coverage
and becomes the corpus of the repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fuzz.guided import corpus
from tests.fuzz.native.targets import HERE, NATIVE, TARGETS

WORK = corpus.ROOT / "build/fuzz"
SANITIZE = ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
         "-Wno-missing-field-initializers", f"-I{HERE}", f"-I{NATIVE}"]
MAX_LENGTH = 4096
MOST_BYTES = 65_000  # of a target's inputs, compressed
# Longer than any input takes on a machine that others use, too.
TIMEOUT = 25
# Freed blocks are kept for the sanitizer to find late uses of them: an input's, not all.
ENVIRONMENT = {**os.environ, "LD_PRELOAD": "",
               "ASAN_OPTIONS": "abort_on_error=1:quarantine_size_mb=8"}


def build(name: str, folder: Path, guided: bool) -> Path:
    """The program: libFuzzer's (clang), or one that runs the files that it is given (gcc).

    :raises subprocess.CalledProcessError: it does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = TARGETS[name]
    program = folder / f"{name}-{'fuzzer' if guided else 'runner'}"
    objects = folder / f"{name}-objects"
    shutil.rmtree(objects, ignore_errors=True)
    compiler = ["clang" if guided else "gcc", *FLAGS, *SANITIZE, *target.defines]
    sanitizers = "address,undefined"
    # Coverage of the harness leads nowhere.
    counted = ["-fsanitize=fuzzer-no-link"] if guided else []
    main = [] if guided else [HERE / "main.c"]
    for sources, options in (
            (target.led, ["-include", "harness/intercept.h", *counted]),
            (target.plain, counted), ([*target.harness, *main], [])):
        # A folder each: files of two may have the same name.
        for place in sorted({source.parent for source in sources}):
            made = objects / "-".join(place.relative_to(corpus.ROOT).parts)
            made.mkdir(parents=True, exist_ok=True)
            subprocess.run([*compiler, f"-fsanitize={sanitizers}", *options, "-c",
                            *(str(source) for source in sources if source.parent == place)],
                           cwd=made, check=True)
    subprocess.run([compiler[0], f"-fsanitize={'fuzzer,' if guided else ''}{sanitizers}",
                    *map(str, objects.glob("*/*.o")), "-o", str(program), "-lpthread"],
                   check=True)
    return program


def inputs(name: str) -> list[bytes]:
    """Where a search begins: the honest inputs and the kept corpus."""
    return TARGETS[name].seeds() + corpus.kept(name)


def start(name: str, seconds: int) -> subprocess.Popen[bytes]:
    """A search, with its log in `build/fuzz`."""
    program = build(name, WORK, guided=True)
    found = WORK / name
    found.mkdir(exist_ok=True)
    for number, data in enumerate(inputs(name)):
        (found / f"seed-{number}").write_bytes(data)
    with (WORK / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            ["nice", "-n", "19", str(program), f"-max_total_time={seconds}",
             f"-max_len={MAX_LENGTH}", f"-timeout={TIMEOUT}", "-print_final_stats=1",
             f"-artifact_prefix={WORK}/{name}-", str(found)],
            stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)


def keep(name: str) -> None:
    """What adds coverage, shorter for longer, becomes the corpus of the repository."""
    reduced = WORK / f"{name}-reduced"
    shutil.rmtree(reduced, ignore_errors=True)
    reduced.mkdir()
    subprocess.run([str(WORK / f"{name}-fuzzer"), "-merge=1", f"-max_len={MAX_LENGTH}",
                    str(reduced), str(WORK / name)], check=True, capture_output=True,
                   env=ENVIRONMENT)
    corpus.keep(name, [path.read_bytes() for path in reduced.iterdir()],
                compressed=MOST_BYTES)


def main(arguments: list[str]) -> int:
    """Exit code: how many targets found something."""
    seconds, keeping = 60, "--keep" in arguments
    if "--seconds" in arguments:
        at = arguments.index("--seconds")
        seconds = int(arguments[at + 1])
        del arguments[at:at + 2]
    names = [name for name in arguments if not name.startswith("--")] or list(TARGETS)
    running = {name: start(name, seconds) for name in names}
    failed = 0
    for name, process in running.items():
        status = process.wait()
        corpus.report(name, status, WORK / f"{name}.log")
        failed += status != 0
        if keeping and not status:
            keep(name)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""./dev: what the project's developers and its CI do, by name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import install
from install import ROOT, DevError, say

HELP = """\
usage: ./dev COMMAND [ARGUMENT]...

  demo [--shell]     boot Debian's kernel in a microVM, its disk from a worker, QMP beside it;
                     with --shell its console is the terminal
  test [PYTEST...]   build, lint and run every test; with arguments: those tests alone
  lint               ruff, mypy --strict, the house rules (tests/style)
  bench [NAME...]    the benchmarks of bench/, each beside a peer in the same run
  fuzz [SECONDS]     look for more than the kept corpus knows, coverage-guided (600 s); what is
                     found is added to it
  lab COMMAND        the nested lab by hand: prepare, run 'COMMAND', shell
  which              build the command if needed and print its path
  help               this text

Each installs what it needs. Without root it prints the line to run instead.
"""


def which(arguments: list[str]) -> int:
    """Print the path of the built command."""
    print(install.command())
    return 0


def demo(arguments: list[str]) -> int:
    """The demo (tests/lab/demo.py)."""
    install.packages("lab", "test")
    command = install.command()
    return module("tests.lab.demo", arguments, {"STRATOVIRT": str(command)})


def lab(arguments: list[str]) -> int:
    """The lab by hand."""
    install.packages("lab")
    install.command()
    return module("tests.lab", arguments)


def bench(arguments: list[str]) -> int:
    """The benchmarks."""
    install.packages("lab", "test")
    command = install.command()
    return module("bench", arguments, {"STRATOVIRT": str(command)})


def fuzz(arguments: list[str]) -> int:
    """The fuzz targets: those in C with clang, then those in Python with atheris."""
    install.packages("fuzz")
    install.fuzzer()
    options = ["--keep", "--seconds", *(arguments or ["600"])]
    return module("tests.fuzz.native.build", options) | module("tests.fuzz.guided", options)


def lint(arguments: list[str]) -> int:
    """ruff, mypy and the house rules."""
    install.packages()
    bin = install.python().parent
    failed = 0
    for command in ([f"{bin}/ruff", "check", "."], [f"{bin}/mypy"],
                    [f"{bin}/python", "-m", "pytest", "-q", "tests/style"]):
        say(" ".join(command).replace(f"{bin}/", ""))
        failed |= subprocess.run(command, cwd=ROOT, check=False).returncode
    return 1 if failed else 0


def test(arguments: list[str]) -> int:
    """Everything, or what the arguments name."""
    install.packages("lab", "test", "small-kernel")
    command = install.command()
    install.native(sanitize=True)
    if arguments:
        return module("pytest", arguments, {"STRATOVIRT": str(command)})
    began = time.monotonic()
    if lint([]):
        say("lint failed")
        return 1
    say("native tests under ASAN and UBSAN")
    if sanitized():
        say("native tests under ASAN and UBSAN failed")
        return 1
    status = module("pytest", ["-q"], {"STRATOVIRT": str(command)})
    say(f"tests took {time.monotonic() - began:.0f} s")
    return status


def sanitized() -> int:
    """The native tests with modules built with ASAN and UBSAN."""
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True,
                             text=True, check=True).stdout.strip()
    return module("pytest", ["-q", "tests/native", "-p", "no:cacheprovider"], {
        "LD_PRELOAD": runtime, "SV_NATIVE": str(install.BUILD / "asan/native"),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1"})


def module(name: str, arguments: list[str], extra: dict[str, str] | None = None) -> int:
    """Run a module of the project in its environment."""
    environment = {**os.environ, **(extra or {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run([str(install.python()), "-m", name, *arguments], cwd=ROOT,
                          env=environment, check=False).returncode


COMMANDS = {"demo": demo, "test": test, "lint": lint, "bench": bench, "fuzz": fuzz,
            "lab": lab, "which": which}


def main() -> int:
    """Run the named command."""
    if len(sys.argv) < 2 or sys.argv[1] in ("help", "-h", "--help"):
        print(HELP, end="")
        return 0
    command = COMMANDS.get(sys.argv[1])
    if command is None:
        print(f"dev: there is no '{sys.argv[1]}'; ./dev help lists the commands", file=sys.stderr)
        return 2
    try:
        return command(sys.argv[2:])
    except DevError as error:
        print(f"dev: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

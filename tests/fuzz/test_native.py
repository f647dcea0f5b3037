"""The fuzz targets in C: the kept corpus and the honest inputs on every run, and with clang a few
seconds of looking for more (`FUZZ_SECONDS`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fuzz.guided import corpus
from tests.fuzz.native import build
from tests.fuzz.native.targets import TARGETS
from tests.support.capabilities import require

pytestmark = [pytest.mark.fuzz, pytest.mark.native]

def write_inputs(name: str, folder: Path) -> list[str]:
    folder.mkdir()
    for number, data in enumerate(build.inputs(name)):
        (folder / f"{number:05}").write_bytes(data)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_corpus(tmp_path: Path, name: str) -> None:
    require("asan")
    assert corpus.kept(name), "the corpus is missing: ./dev fuzz"
    program = build.build(name, tmp_path, guided=False)
    files = write_inputs(name, tmp_path / "inputs")
    done = subprocess.run([str(program), *files], capture_output=True, text=True, check=False,
                          env=build.ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{len(files)} inputs"


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_search(tmp_path: Path, name: str) -> None:
    require("clang")
    program = build.build(name, tmp_path, guided=True)
    write_inputs(name, tmp_path / "inputs")
    seconds = os.environ.get("FUZZ_SECONDS", "3")
    done = subprocess.run(
        [str(program), f"-max_total_time={seconds}", f"-max_len={build.MAX_LENGTH}",
         f"-timeout={build.TIMEOUT}", f"-artifact_prefix={tmp_path}/", str(tmp_path / "inputs")],
        capture_output=True, text=True, check=False, env=build.ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]

"""The fuzz targets in C: the kept corpus and the honest inputs on every run, and with clang a few
seconds of looking for more (`FUZZ_SECONDS`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fuzz.native import build
from tests.support.capabilities import require

pytestmark = [pytest.mark.fuzz, pytest.mark.native]

ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "abort_on_error=1", "LD_PRELOAD": ""}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    for number, data in enumerate(build.seeds() + build.kept()):
        (folder / f"{number:05}").write_bytes(data)
    return [str(path) for path in sorted(folder.iterdir())]


def test_the_kept_corpus(tmp_path: Path, inputs: list[str]) -> None:
    require("asan")
    assert build.kept(), "the corpus is missing"
    program = build.build(tmp_path, guided=False)
    done = subprocess.run([str(program), *inputs], capture_output=True, text=True, check=False,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{len(inputs)} inputs"


def test_a_short_search(tmp_path: Path, inputs: list[str]) -> None:
    require("clang")
    program = build.build(tmp_path, guided=True)
    seconds = os.environ.get("FUZZ_SECONDS", "3")
    done = subprocess.run(
        [str(program), f"-max_total_time={seconds}", f"-max_len={build.MAX_LENGTH}", "-timeout=10",
         f"-artifact_prefix={tmp_path}/", str(Path(inputs[0]).parent)],
        capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]

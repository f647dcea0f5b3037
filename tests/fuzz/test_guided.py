"""The fuzz targets in Python: the kept corpus on every run (`./dev fuzz` looks for more)."""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz.guided import corpus
from tests.fuzz.guided.targets import TARGETS

pytestmark = pytest.mark.fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_corpus(name: str) -> None:
    inputs = corpus.kept(name)
    assert inputs, "the corpus is missing: ./dev fuzz"
    TARGETS[name].run(inputs[0])  # what is made once
    before = len(os.listdir("/proc/self/fd"))
    for data in inputs:
        TARGETS[name].run(data)
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor leaked"


@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs(name: str) -> None:
    source = random.Random(name)
    for _ in range(100):
        TARGETS[name].run(source.randbytes(source.randrange(200)))

"""A session with our back end, fresh or with a ring that runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.backend_session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    before = len(os.listdir("/proc/self/fd"))
    result = Session()
    result.negotiate()
    yield result
    result.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


@pytest.fixture
def running(session: Session) -> Session:
    session.start()
    session.device.calls.clear()
    return session

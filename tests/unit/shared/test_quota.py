"""Quotas: so much at once, so much a second, and what is left out is counted."""

from __future__ import annotations

import pytest

from shared import quota as module
from shared.quota import Quota


def test_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    quota = Quota(3, 0.5)
    assert [quota.line(str(number)) for number in range(5)] == ["0", "1", "2", "", ""]
    now[0] += 2.0
    assert quota.line("5") == "5 (2 lines before it were left out)"
    assert quota.line("6") == ""
    now[0] += 1000.0
    quota.refund()  # never more than at first
    assert [bool(quota.line("x")) for _ in range(4)] == [True, True, True, False]
    quota.refund()
    assert quota.take() and not quota.take()

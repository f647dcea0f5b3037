"""What devices did between two pages, however much the pages lie."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.statistics import BUCKETS, KINDS, RECORDS, Page, bucket_range
from tests.support.patience import PATIENT
from tests.support.stat_pages import add_kind, page
from vmm.ctl import rates as rates_module
from vmm.ctl.rates import Rates, quantile

if TYPE_CHECKING:
    from vmm.ctl.rates import Flow

_HUGE = (1 << 64) - 1
_NUMBERS = st.one_of(st.integers(0, 1000), st.integers(0, _HUGE),
                     st.sampled_from([1 << 63, (1 << 63) - 1, _HUGE]))


def flow(what: Flow | None) -> tuple[float, float, int, float]:
    assert what is not None
    return what.count, what.bytes, what.dropped, what.dropping


def test_a_disk() -> None:
    before = page("blk", {"reads": 10, "read_bytes": 4096, "errors": 1}, {"writes": 5})
    now = page("blk", {"reads": 30, "read_bytes": 8192, "errors": 2},
               {"writes": 9, "written_bytes": 512, "flushes": 2, "discards": 1, "others": 1},
               starts=3)
    rates = Rates(now, before, 2.0)
    assert flow(rates.incoming) == (10.0, 2048.0, 0, 0.0)
    assert flow(rates.outgoing) == (2.0, 256.0, 0, 0.0)
    assert (rates.others, rates.errors, rates.failing, rates.restarts) == (2.0, 2, True, 2)
    assert rates.moved == 2304.0
    assert rates.totals["reads"] == 30
    assert rates.latency50 is None


def test_a_nic_by_direction() -> None:
    """Even queues receive, odd ones send, the last one commands."""
    def nic(n: int) -> Page:
        return page("net", {"packets": 10 * n, "bytes": 1000 * n, "dropped": n},
                    {"packets": n, "bytes": 64 * n, "dropped": 2 * n},
                    {"packets": 5 * n, "bytes": 500 * n}, {"packets": n, "errors": n},
                    {"commands": 7 * n, "packets": 99 * n, "bytes": 99 * n, "dropped": n})

    rates = Rates(nic(3), nic(1), 2.0)
    assert flow(rates.incoming) == (15.0, 1500.0, 3, 1.0)
    assert flow(rates.outgoing) == (2.0, 64.0, 6, 2.0)
    assert (rates.errors, rates.failing) == (3, True)
    told = rates.as_json()
    assert told["in-dropped"] == 3 and told["out-dropped-per-second"] == 2.0
    assert told["counters"]["commands"] == 21  # type: ignore[index]
    assert "latency-50-ns" not in told


@pytest.mark.parametrize("queues", [0, 1, 2, 3])
def test_a_nic_of_any_shape(queues: int) -> None:
    counted = page("net", *[{"packets": 4}] * queues)
    rates = Rates(counted, page("net", *[{"packets": 2}] * queues), 1.0)
    pairs = queues // 2
    assert flow(rates.incoming)[0] == flow(rates.outgoing)[0] == 2.0 * pairs


def test_the_first_sight_is_no_news() -> None:
    """What was counted before we came didn't happen in this interval."""
    for before in (None, page("net", {"packets": 5})):
        rates = Rates(page("blk", {"reads": 1000, "errors": 7}), before, 1.0)
        assert flow(rates.incoming)[0] == 0 and not rates.failing
        assert rates.errors == 7


@pytest.mark.parametrize(("now", "before"), [(5, 10), (1 << 63, 0), (_HUGE, _HUGE - 1)])
def test_numbers_that_no_device_has_counted(now: int, before: int) -> None:
    rates = Rates(page("blk", {"reads": now, "errors": now}),
                  page("blk", {"reads": before, "errors": before}), 1.0)
    assert flow(rates.incoming)[0] == 0
    assert 0 <= rates.errors < 1 << 63


def test_starts_that_lie() -> None:
    assert Rates(page("blk", starts=0), None, 1.0).restarts == 0
    assert Rates(page("blk", starts=_HUGE), None, 1.0).restarts < 1 << 63


# ---- kinds without columns of their own ----------------------------------------------------


def test_a_kind_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    add_kind(monkeypatch, "toaster", "slices", "burnt_bytes", "errors", "crumbs")
    now = page("toaster", {"slices": 3000, "burnt_bytes": 4096, "errors": 1}, {"slices": 1000})
    rates = Rates(now, page("toaster", {}, {}), 2.0)
    assert rates.activity() == "slices 2.0k/s  burnt-bytes 2.0 KiB/s"  # no crumbs ever
    assert rates.incoming is None and rates.moved == 2048.0
    told = rates.as_json()
    assert told["per-second"] == {"slices": 2000.0, "burnt-bytes": 2048.0, "errors": 0.5,
                                  "crumbs": 0.0}
    assert told["errors"] == 1 and "in-per-second" not in told


def test_a_console() -> None:
    """Two ports, and between them the queues for control."""
    def console(n: int) -> Page:
        return page("console", *({"chains": k * n, "bytes": 100 * k * n, "unheard": n}
                                 for k in (1, 2, 40, 50, 3, 4)))

    rates = Rates(console(2), console(1), 1.0)
    assert flow(rates.incoming) == (4.0, 400.0, 0, 0.0)
    assert flow(rates.outgoing) == (6.0, 600.0, 0, 0.0)
    assert rates.activity() == "typed 400 B/s  shown 600 B/s  unheard 6 B/s"
    assert rates.as_json()["out-bytes-per-second"] == 600.0


def test_a_balloon_and_a_source_of_random_bytes() -> None:
    given = {"inflated_pages": 512, "removed_bytes": 2 << 20, "failed_bytes": 4096}
    rates = Rates(page("balloon", given), page("balloon", {}), 1.0)
    assert rates.activity() == ("taken 2.0 MiB/s  freed on the host 2.0 MiB/s  "
                                "not freed 4.0 KiB/s")
    rates = Rates(page("balloon", given), page("balloon", given), 1.0)
    assert rates.activity() == "taken 0 B/s  freed on the host 0 B/s  not freed 0 B/s"
    assert Rates(page("balloon", {}), None, 1.0).activity() == "taken 0 B/s"
    rates = Rates(page("rng", {"bytes": 100, "chains": 2}), page("rng", {}), 1.0)
    assert rates.activity() == "random 100 B/s  requests 2/s"


def test_what_is_shown_is_what_is_counted() -> None:
    """The records of shared/statistics.py have the counters that `top` looks for."""
    for kind, shown in rates_module._ACTIVITIES.items():
        assert {name for _, name, _ in shown} <= set(RECORDS[kind].counters)
    assert {"reads", "writes", "read_bytes", "written_bytes", "flushes", "discards",
            "write_zeroes", "others", "errors"} <= set(RECORDS["blk"].counters)
    assert {"chains", "bytes", "unheard"} <= set(RECORDS["console"].counters)
    assert {"packets", "bytes", "dropped", "errors"} <= set(RECORDS["net"].counters)


# ---- latencies -----------------------------------------------------------------------------


def test_latencies_of_all_queues() -> None:
    before, now = page("blk", {}, {}), page("blk", {}, {})
    before.histograms[0]["read"][3] = 5
    now.histograms[0]["read"][3] = 55
    now.histograms[1]["write"][10] = 50
    now.histograms[1]["flush"][0] = 1 << 63  # nobody has counted that far
    rates = Rates(now, before, 1.0)
    assert rates.latency50 == bucket_range(3)[1]
    assert bucket_range(10)[0] < (rates.latency99 or 0) < bucket_range(10)[1]


def test_quantiles() -> None:
    empty = [0] * BUCKETS
    assert quantile(empty, 0.5) is None
    last = [*empty[:-1], 7]
    assert quantile(last, 0.99) == bucket_range(BUCKETS - 1)[0]  # it has no end
    first = [4, *empty[1:]]
    assert quantile(first, 0.5) == bucket_range(0)[1] / 2


@PATIENT
@given(st.lists(st.integers(0, 1 << 63), min_size=BUCKETS, max_size=BUCKETS))
def test_any_buckets_have_quantiles(buckets: list[int]) -> None:
    median, high = quantile(buckets, 0.5), quantile(buckets, 0.99)
    if not any(buckets):
        assert median is None and high is None
    else:
        assert median is not None and high is not None
        assert 0 <= median <= high <= 1 << 63


# ---- anything ------------------------------------------------------------------------------


@st.composite
def any_page(draw: Any, kind: str) -> Page:
    made = Page(kind, 1, draw(st.text()), draw(st.text()), draw(_NUMBERS))
    for _ in range(draw(st.integers(0, 4))):
        made.counters.append({name: draw(_NUMBERS) for name in RECORDS[kind].counters})
        made.histograms.append({name: draw(st.lists(_NUMBERS, min_size=BUCKETS, max_size=BUCKETS))
                                for name in RECORDS[kind].histograms})
    return made


@pytest.mark.parametrize("kind", list(KINDS))
@PATIENT
@given(data=st.data())
def test_any_two_pages(kind: str, data: st.DataObject) -> None:
    before = data.draw(st.none() | any_page(kind))
    rates = Rates(data.draw(any_page(kind)), before, data.draw(st.floats(0, 1e6)))
    for what in (rates.incoming, rates.outgoing):
        if what is not None:
            assert min(flow(what)) >= 0
    assert min([0, *rates.totals.values()]) >= 0
    assert max([0, *rates.totals.values()]) < 1 << 63
    assert rates.moved >= 0 and rates.others >= 0
    assert rates.activity().isprintable()
    json.dumps(rates.as_json(), allow_nan=False)

"""`balloon`, `query-balloon`, `query-balloon-stats`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from vmm.devices.virtio_balloon import GuestStatistics
from vmm.qmp.commands import balloon

if TYPE_CHECKING:
    from tests.support.qmp import QmpClient
    from tests.unit.vmm.qmp.conftest import Harness

INACTIVE = {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}
GIB = 1 << 30


def send(client: QmpClient, command: str, **arguments: Any) -> None:
    client.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())


def error(client: QmpClient, command: str, **arguments: Any) -> Any:
    send(client, command, **arguments)
    return client.receive()["error"]


@pytest.mark.parametrize(("value", "actual"), [
    (2 * GIB, 2 * GIB), (2 * GIB + 4095, 2 * GIB), (5 * GIB, 4 * GIB), (0, 0),
    ((1 << 64) - 1, 4 * GIB)])
def test_the_event_follows_the_reply_in_one_write(client: QmpClient, value: int,
                                                  actual: int) -> None:
    send(client, "balloon", value=value)
    assert client.receive() == {"return": {}}
    event = client.receive(0.0)
    assert (event["event"], event["data"]) == ("BALLOON_CHANGED", {"actual": actual})
    assert client.command("query-balloon") == {"actual": actual}


@pytest.mark.parametrize("value", [-1, 1 << 64, "1G", 1.5, None, True])
def test_what_is_no_size_is_refused(harness: Harness, client: QmpClient, value: object) -> None:
    failed = error(client, "balloon", value=value)
    assert failed["class"] == "GenericError" and "'value'" in failed["desc"]
    assert harness.vm.balloon.target == 4 * GIB


def test_without_a_device(harness: Harness, client: QmpClient) -> None:
    del harness.vm.devices["balloon0"]
    assert error(client, "balloon", value=GIB) == INACTIVE
    assert error(client, "query-balloon") == INACTIVE
    assert error(client, "query-balloon-stats") == INACTIVE


def test_without_a_driver(harness: Harness, client: QmpClient) -> None:
    harness.vm.balloon.active = False
    assert error(client, "balloon", value=GIB) == INACTIVE
    assert error(client, "query-balloon-stats") == INACTIVE
    assert client.command("query-balloon") == {"actual": 4 * GIB}


# ---- statistics --------------------------------------------------------------------------------


def test_statistics_are_fresh(client: QmpClient) -> None:
    for number in (1, 2):
        told = client.command("query-balloon-stats")
        assert told.pop("age-ms") < 1000
        assert told == {"actual": 4 * GIB, "target": 4 * GIB,
                        "stats": {"free-memory": 1000 + number, "total-memory": 4096}}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon, "STATISTICS_LIMIT", 0.2)
    monkeypatch.setattr(balloon, "RETRY", 0.01)


@pytest.mark.usefixtures("soon")
def test_a_silent_guest_costs_the_limit_and_gives_the_last_ones(harness: Harness,
                                                                client: QmpClient) -> None:
    client.command("query-balloon-stats")
    orders = harness.vm.balloon.worker.orders
    orders.silent = True
    began = time.monotonic()
    told = client.command("query-balloon-stats")
    assert time.monotonic() - began >= 0.2
    assert told["age-ms"] >= 200 and told["stats"]["free-memory"] == 1001
    assert orders.forgotten == [2]


@pytest.mark.usefixtures("soon")
def test_nobody_else_waits_meanwhile(harness: Harness, client: QmpClient) -> None:
    harness.vm.balloon.worker.orders.silent = True
    send(client, "query-balloon-stats")
    other = harness.connect()
    assert other.command("query-balloon") == {"actual": 4 * GIB}
    failed = client.receive()["error"]
    assert failed["class"] == "GenericError"
    assert failed["desc"].startswith("The guest has told no statistics: the guest's driver")


@pytest.mark.usefixtures("soon")
def test_a_worker_that_is_replaced_is_asked_again(harness: Harness, client: QmpClient) -> None:
    orders = harness.vm.balloon.worker.orders
    orders.problem = "the worker ended"
    send(client, "query-balloon-stats")
    harness.wait_for(lambda: orders.asked > 2)
    orders.problem = ""
    assert client.receive()["return"]["stats"]["total-memory"] == 4096


@pytest.mark.usefixtures("soon")
def test_a_worker_that_stays_away(harness: Harness, client: QmpClient) -> None:
    harness.vm.balloon.worker.state = "dead"
    assert "its worker is being replaced" in error(client, "query-balloon-stats")["desc"]
    harness.vm.balloon.worker = None
    assert "its worker is being replaced" in error(client, "query-balloon-stats")["desc"]


@pytest.mark.usefixtures("soon")
def test_a_client_that_goes_meanwhile(harness: Harness, client: QmpClient) -> None:
    orders = harness.vm.balloon.worker.orders
    orders.silent = True
    send(client, "query-balloon-stats")
    harness.wait_for(lambda: orders.asked == 1)
    client.socket.close()
    harness.wait_for(lambda: orders.forgotten == [1])


@pytest.mark.parametrize(("message", "values"), [
    ({"type": "stats", "values": []}, {}),
    ({"type": "stats", "values": [0, 1, 15, 2]}, {"swap-in": 1, "direct-reclaims": 2}),
    ({"type": "stats", "values": [16, 1, -1, 2, "4", 3, None, 4, 4, 5]}, {"free-memory": 5}),
    ({"type": "stats", "values": [4, -1, 5, 1 << 64, 6, "7", 7, None]}, {}),
    ({"type": "stats", "values": [4, (1 << 64) - 1, 5]}, {"free-memory": (1 << 64) - 1}),
    ({"type": "stats"}, None), ({"type": "stats", "values": {"a": 1}}, None),
    ({"type": "other", "values": [4, 1]}, None), ({}, None)])
def test_a_worker_that_lies(message: dict[str, object], values: dict[str, int] | None) -> None:
    statistics = GuestStatistics()
    statistics.receive(message)
    assert bool(statistics.told) == (values is not None)
    assert statistics.values == (values or {})
    statistics.forget()
    assert statistics.told == 0 and statistics.values == {}

"""Every exchange of the manual, against the server; differences only as documented."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import manual
from vmm.qmp import registry

GIVEN = manual.ROOT.parent / "shared" / "reference" / manual.COPY.name
EXCHANGES = manual.exchanges(manual.COPY.read_text(encoding="utf-8"))
ROWS = manual.rows()
# Names in StratoVirt's order (its QMP schema).
_NAMES = """
qmp_capabilities quit stop cont system_powerdown system_reset device_add device_del chardev-add
chardev-remove netdev_add netdev_del netdev_replace netlink_set cameradev_add cameradev_del
query-hotpluggable-cpus query-cpus query-status getfd blockdev-add blockdev-del balloon set-viomem
get-viomem query-mem query-mem-gpa query-balloon query-vnc query-display-image switch-audio-record
migrate query-migrate migrate_cancel query-version query-commands query-target query-kvm
query-machines query-events qom-list-types device-list-properties block-commit query-tpm-models
query-tpm-types query-command-line-options query-migrate-capabilities query-qmp-schema
query-sev-capabilities query-chardev qom-list qom-get query-block query-named-block-nodes
query-blockstats query-block-jobs query-gic-capabilities query-iothreads update_region input_event
human-monitor-command blockdev-snapshot-internal-sync blockdev-snapshot-delete-internal-sync
query-vcpu-reg trace-get-state trace-set-state query-ohui-status query-workloads
detect-silent-audio
"""
STRATOVIRT = _NAMES.split()


def same(expected: Any, got: Any, where: str = "") -> None:
    """The same members in the same order; times and threads are the VM's own."""
    assert type(expected) is type(got), where
    if isinstance(expected, dict):
        assert list(expected) == list(got), where
        for key, value in expected.items():
            if key in ("seconds", "microseconds", "thread_id"):
                assert isinstance(got[key], int), where
            else:
                same(value, got[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(got), where
        for index, (left, right) in enumerate(zip(expected, got, strict=True)):
            same(left, right, f"{where}[{index}]")
    else:
        assert expected == got, where


def test_the_copy_is_the_manual():
    if GIVEN.exists():
        assert manual.COPY.read_bytes() == GIVEN.read_bytes()


def test_all_exchanges_are_found():
    text = manual.COPY.read_text(encoding="utf-8")
    commands = [exchange for exchange in EXCHANGES if exchange.command is not None]
    assert len(commands) == sum(line.count('<- {') + line.count('<-{') for line in
                                text.splitlines())
    assert len(commands) == 32
    assert len(EXCHANGES) - len(commands) == text.count('"QMP":')
    # One is printed with a bracket too few; every other has an answer that is JSON.
    assert [e.number for e in EXCHANGES if e.answers is None] == ["1"]
    assert all(e.answers != [] for e in EXCHANGES)


def test_rows_name_exchanges():
    by_number = {exchange.number: exchange.name for exchange in EXCHANGES}
    for row in ROWS.values():
        assert by_number[row.number] == row.name
        assert row.state in ("not yet", "deviation")
        assert bool(row.answers) == (row.state == "deviation")
        assert row.why


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda e: f"{e.number}-{e.name}")
def test_exchange(harness, exchange):
    row = ROWS.get(exchange.number)
    expected = row.answers if row is not None and row.answers else exchange.answers
    client = harness.connect()
    if exchange.command is None:
        same(expected, [client.greeting])
        return
    if exchange.name == "cont" or (expected and '"status": "paused"' in json.dumps(expected)):
        harness.vm.run_state = "paused"
    if exchange.name == "query-balloon":
        harness.vm.balloon.set_target(2 << 30)  # the exchange before
    client.socket.sendall(json.dumps(exchange.command).encode())
    if row is not None and row.state == "not yet":
        # Disks can be plugged: devices of other kinds are refused by name.
        refusals = ("GenericError",) if exchange.name.startswith("device_") else (
            "CommandNotFound",)
        assert client.receive().get("error", {}).get("class") in refusals, \
            f"{exchange.name} is there now: take row {row.number} out of docs/compatibility.md"
        return
    assert expected is not None
    same(expected, [client.receive() for _ in expected])
    if exchange.name == "balloon":
        # The manual prints no event; StratoVirt sends it, too.
        assert client.receive()["event"] == "BALLOON_CHANGED"
    with pytest.raises(TimeoutError):
        client.receive(0.02)
    if row is not None and exchange.answers is not None:
        assert row.answers != exchange.answers, "the row says what the manual says"


def test_each_command_of_stratovirt_works_or_is_listed():
    assert len(STRATOVIRT) == len(set(STRATOVIRT)) == 69
    assert manual.missing_commands() == set(STRATOVIRT) - set(registry.load().commands)

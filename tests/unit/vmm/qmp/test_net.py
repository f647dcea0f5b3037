"""`netdev_add`, `netdev_replace`, `set_link` over QMP: names of descriptors, and their way back."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from vmm.config.model import NetdevConfig
from vmm.errors import ConfigError, DeviceError, StateError
from vmm.net import change

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.qmp import QmpClient
    from tests.unit.vmm.qmp.conftest import Harness

    Done = Callable[[Exception | None], None]


@pytest.fixture
def added(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> list[NetdevConfig]:
    """What `netdev_add` and `netdev_replace` were asked for; `harness.vm.error` fails them."""
    found: list[NetdevConfig] = []

    def take(config: NetdevConfig, done: Done) -> None:
        found.append(config)
        if harness.vm.error is None:
            for fd in config.fds:
                os.close(fd)  # the back end's own from now on
        done(harness.vm.error)

    monkeypatch.setattr(harness.vm.hotplug, "add_node",
                        lambda family, config, done: take(config, done))
    monkeypatch.setattr(change, "find_nic",
                        lambda vm, name: SimpleNamespace(id=name) if name == "nic" else None)
    monkeypatch.setattr(change, "replace_tap",
                        lambda vm, device, config, done: take(config, done))
    return found


def getfd(client: QmpClient, *names: str) -> list[int]:
    """Hand in the write ends of pipes; the read ends, which end when nobody has the others."""
    readers = []
    for name in names:
        read, write = os.pipe()
        client.send_fds(json.dumps({"execute": "getfd", "arguments": {"fdname": name}}), [write])
        assert client.receive() == {"return": {}}
        os.close(write)
        readers.append(read)
    return readers


def ask(client: QmpClient, command: str, **arguments: Any) -> str:
    """"" or the error."""
    reply = client.raw(json.dumps({"execute": command, "arguments": arguments}))
    return str(reply["error"]["desc"]) if "error" in reply else ""


def names(harness: Harness) -> set[str]:
    found: set[str] = harness.on_loop(lambda: set(harness.server.fds._fds))
    return found


def is_closed(reader: int) -> bool:
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1) == b""
    except BlockingIOError:
        return False
    finally:
        os.close(reader)


def test_each_argument(client: QmpClient, added: list[NetdevConfig]) -> None:
    assert ask(client, "netdev_add", id="n", ifname="tap0", type="tap", vhost=True, queues=4,
               script="no", downscript="no", dnssearch="x", vhostfd="a", vhostfds="b",
               **{"rx-packets": 1, "rx-bytes": 2, "tx-packets": 0, "tx-bytes": 4}) == ""
    config = added[0]
    assert (config.id, config.kind, config.ifname, config.queues) == ("n", "tap", "tap0", 4)
    assert config.limits == {"rx-packets": 1, "rx-bytes": 2, "tx-bytes": 4}


@pytest.mark.parametrize(("command", "more"), [
    ("netdev_add", {"id": "n"}), ("netdev_replace", {"id": "nic"})])
@pytest.mark.parametrize("fails", [False, True])
def test_descriptors_by_name(harness: Harness, client: QmpClient, added: list[NetdevConfig],
                             command: str, more: dict[str, str], fails: bool) -> None:
    readers = getfd(client, "a", "b")
    harness.vm.error = ConfigError("no tap") if fails else None
    assert bool(ask(client, command, fds="a:b", **more)) is fails
    assert len(added[0].fds) == 2 and added[0].queues == 2
    assert names(harness) == ({"a", "b"} if fails else set())
    if fails:  # the next command may have them
        harness.vm.error = None
        assert ask(client, command, fd="b", **more) == ""
        assert names(harness) == {"a"}
        client.command("closefd", fdname="a")
    assert [is_closed(reader) for reader in readers] == [True, True]


@pytest.mark.parametrize(("arguments", "text"), [
    ({"fds": "a:b:c"}, "'c'"), ({"fds": "a:a"}, "given twice"),
    ({"fd": "a", "fds": "b"}, "conflict"),
    ({"fds": "a:b", "queues": 3}, "queues=3"), ({"fds": "a", "ifname": "tap0"}, "conflict"),
    ({"fd": "a", "type": "vhost-user"}, "'type'"), ({"fds": "a:5"}, "no name of a descriptor"),
    ({"fd": "a", "rx-packets": 1 << 51}, "rx-packets"), ({"fd": "a", "chardev": "c"}, "chardev"),
])
def test_what_is_refused_gives_all_of_them_back(harness: Harness, client: QmpClient,
                                                added: list[NetdevConfig],
                                                arguments: dict[str, Any], text: str) -> None:
    readers = getfd(client, "a", "b")
    assert text in ask(client, "netdev_add", id="n", **arguments)
    assert names(harness) == {"a", "b"} and not added
    for name in ("a", "b"):
        client.command("closefd", fdname=name)
    assert [is_closed(reader) for reader in readers] == [True, True]


def test_numbers_are_no_names(client: QmpClient, added: list[NetdevConfig]) -> None:
    """One could be any descriptor of the VMM's."""
    for text in ("0", "5", "33", "5:6", "0x5"):
        assert "no name of a descriptor" in ask(client, "netdev_add", id="n", fds=text)
    assert not added


@pytest.mark.parametrize("what", ["family", "hotplug"])
def test_a_vm_without_slots(harness: Harness, client: QmpClient, added: list[NetdevConfig],
                            monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Nothing is taken for a command that can't be carried out."""
    readers = getfd(client, "a")

    def fails(*_: object) -> object:
        raise StateError("This VM has no machine")

    if what == "family":
        monkeypatch.setattr(harness.vm, "family", fails)
    else:
        monkeypatch.setattr(type(harness.vm), "hotplug", property(fails), raising=False)
    assert "no machine" in ask(client, "netdev_add", id="n", fd="a")
    assert names(harness) == {"a"}
    client.command("closefd", fdname="a")
    assert is_closed(readers[0])


def test_a_replacement_that_fails_at_once(harness: Harness, client: QmpClient,
                                          added: list[NetdevConfig],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    readers = getfd(client, "a")
    assert "no net dev x" in ask(client, "netdev_replace", id="x", fd="a")
    assert names(harness) == {"a"}

    def fails(vm: object, device: object, config: object, done: Done) -> None:
        done(DeviceError("it has no tap"))

    monkeypatch.setattr(change, "replace_tap", fails)
    assert "it has no tap" in ask(client, "netdev_replace", id="nic", fd="a")
    assert names(harness) == {"a"}
    client.command("closefd", fdname="a")
    assert is_closed(readers[0])


@pytest.mark.parametrize(("command", "argument"), [("set_link", "name"), ("netlink_set", "id")])
def test_links(harness: Harness, client: QmpClient, monkeypatch: pytest.MonkeyPatch,
               added: list[NetdevConfig], command: str, argument: str) -> None:
    told: list[bool] = []

    def set_link(vm: object, device: Any, up: bool, done: Done) -> None:
        told.append(up)
        done(None if up else StateError("the worker does not answer"))

    monkeypatch.setattr(change, "set_link", set_link)
    assert ask(client, command, **{argument: "nic"}, up=True) == ""
    assert "does not answer" in ask(client, command, **{argument: "nic"}, up=False)
    assert told == [True, False]
    assert "no net dev x" in ask(client, command, **{argument: "x"}, up=True)


def test_netdev_del(harness: Harness, client: QmpClient) -> None:
    assert ask(client, "netdev_del", id="n") == ""
    assert "id" in ask(client, "netdev_del")

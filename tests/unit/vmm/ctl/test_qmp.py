"""The client against VMs that answer wrong, late, too much, or not at all."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.patience import PATIENT
from tests.support.scripted_vm import GREETING, Raw, Refusal, ScriptedVm, after_other_events
from tests.support.test_vm import wait_until
from vmm.ctl import qmp
from vmm.ctl.errors import CtlError, GoneError, NoAnswerError, QmpRefused
from vmm.ctl.qmp import QmpClient, connect_unix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Script = Callable[..., ScriptedVm]

SHORT = 0.2


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def client(vm: ScriptedVm, timeout: float = 10.0) -> QmpClient:
    return QmpClient(vm.path, "web", timeout)


def test_commands_and_their_arguments(script: Script) -> None:
    vm = script({"query-status": {"status": "running"}})
    with client(vm) as web:
        assert web.command("query-status") == {"status": "running"}
        assert web.command("stop", {"now": True}) == {}
        assert web.pid == os.getpid() and web.uid == os.getuid()
    assert vm.commands == [("qmp_capabilities", {}), ("query-status", {}), ("stop", {"now": True})]


def test_descriptors_go_along(script: Script) -> None:
    vm = script()
    with client(vm) as web, open(os.devnull) as file:
        web.command("getfd", {"fdname": "x"}, fds=(file.fileno(), file.fileno()))
    assert vm.descriptors == 2


@pytest.mark.parametrize(("refusal", "error_class", "text"), [
    (Refusal("no", "DeviceNotActive"), "DeviceNotActive", "web: no"),
    (Refusal("a\x1b[2J\nb"), "GenericError", "web: a?[2J?b"),
    (Refusal("x" * 5000), "GenericError", "web: " + "x" * 999 + "…"),
    (Refusal(None, 5), "5", "web: None"),
    (Refusal([[1]], {"a": 1}), "{'a': 1}", "web: [[1]]")])
def test_refusals(script: Script, refusal: Refusal, error_class: str, text: str) -> None:
    with client(script({"stop": refusal})) as web:
        with pytest.raises(QmpRefused) as caught:
            web.command("stop")
        assert caught.value.error_class == error_class
        assert str(caught.value) == text
        assert web.command("cont") == {}  # it goes on


@pytest.mark.parametrize("error", ["text", 5, None, [], {}])
def test_an_error_that_is_no_object(script: Script, error: object) -> None:
    with client(script({"stop": Raw(line({"error": error}))})) as web, pytest.raises(QmpRefused):
        web.command("stop")


@pytest.mark.parametrize("data", [
    b"hello\n", b"[]\n", b"5\n", b"null\n", b"\n", b"{\n", b'{"return": NaN}\n',
    b'{"return": Infinity}\n', b'{"return": -Infinity}\n', b"\xff\xfe\n",
    b'{"return": ' + b"1" * 5000 + b"}\n", b'{"return": ' + b"[" * 101 + b"]" * 101 + b"}\n",
    b'{"a":' * 100_000 + b"\n"])
def test_what_is_not_qmp(script: Script, data: bytes) -> None:
    with client(script({"stop": Raw(data)})) as web, pytest.raises(
            CtlError, match="answers with what is not QMP"):
        web.command("stop")


def test_nesting_that_is_taken(script: Script) -> None:
    deep = Raw(b'{"return": ' + b"[" * 98 + b"]" * 98 + b"}\n")
    with client(script({"stop": deep})) as web:
        assert json.dumps(web.command("stop")) == "[" * 98 + "]" * 98


def test_an_answer_without_an_end(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "LINE_LIMIT", 1 << 16)
    with client(script({"stop": Raw(b"x" * (1 << 18))})) as web, pytest.raises(
            CtlError, match="an answer of more than"):
        web.command("stop")


@pytest.mark.parametrize("greeting", [
    {"hello": 1}, {"return": {}}, {"event": "STOP", "QMP": {}}, Raw(b"SSH-2.0\n"), Raw(b"x")])
def test_who_is_no_qmp_server(script: Script, greeting: object) -> None:
    with pytest.raises(CtlError):
        client(script(greeting=greeting), SHORT)


def test_who_only_sends_events_is_left_in_time(script: Script) -> None:
    """Each of them used to begin the wait for the greeting anew."""
    vm = script(greeting=Raw(line({"event": "STOP"})))
    stop = threading.Event()

    def flood() -> None:
        while not stop.wait(0.01):
            try:
                vm.emit({"event": "STOP"})
            except OSError:
                return

    flooder = threading.Thread(target=flood)
    flooder.start()
    began = time.monotonic()
    try:
        with pytest.raises(NoAnswerError):
            client(vm, SHORT)
    finally:
        stop.set()
        flooder.join()
    assert SHORT <= time.monotonic() - began < 5


def test_events_before_the_greeting(script: Script) -> None:
    with client(script(greeting=Raw(line({"event": "STOP"}) + line(GREETING)))) as web:
        assert web.command("cont") == {}


def test_a_vm_that_hangs(script: Script) -> None:
    with client(script({"stop": Raw(b"")})) as web, pytest.raises(
            NoAnswerError, match="web: no answer in time; the VM is busy or hangs"):
        web.command("stop", timeout=SHORT)


def test_a_late_answer_is_not_taken_for_the_next_one(script: Script) -> None:
    late = Raw(line({"return": "late", "id": 2}) + line({"return": "mine", "id": 3}))
    with client(script({"stop": Raw(b""), "query-status": late})) as web:
        with pytest.raises(NoAnswerError):
            web.command("stop", timeout=SHORT)
        assert web.command("query-status") == "mine"


def test_a_server_that_repeats_no_id(script: Script) -> None:
    with client(script({"query-status": Raw(b'{"return": 5}\n')})) as web:
        assert web.command("query-status") == 5


def test_the_whole_conversation_has_a_limit(script: Script) -> None:
    vm = script({"stop": Raw(b"")})
    with QmpClient(vm.path, "web", 60.0, SHORT) as web, pytest.raises(NoAnswerError):
        web.command("stop", timeout=60.0)


@pytest.mark.parametrize("answer", [Raw(b"", close=True), Raw(b'{"ret', close=True)])
def test_a_vm_that_ends_meanwhile(script: Script, answer: Raw) -> None:
    with client(script({"stop": answer})) as web:
        with pytest.raises(GoneError, match="web: the VM closed the connection"):
            web.command("stop")
        with pytest.raises(GoneError):
            web.command("cont")


def test_a_vm_that_reads_nothing(tmp_path: Path) -> None:
    """Our command doesn't even get away."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qmp.sock"))
    listener.listen(1)
    peers: list[socket.socket] = []

    def greet() -> None:
        peers.append(listener.accept()[0])
        peers[0].sendall(line(GREETING) + line({"return": {}}))

    greeter = threading.Thread(target=greet)
    greeter.start()
    web = QmpClient(str(tmp_path / "qmp.sock"), "web", 5.0)
    greeter.join()
    web._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with pytest.raises(NoAnswerError):
        web.command("stop", {"x": "y" * (1 << 20)}, timeout=SHORT)
    for sock in (web, *peers, listener):
        sock.close()


# ---- events --------------------------------------------------------------------------------


def test_an_event_among_many(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest are kept: the one that is waited for came last."""
    monkeypatch.setattr(qmp, "EVENT_LIMIT", 10)
    data = {"device": "disk0", "path": "disk0"}
    with client(script({"device_del": after_other_events(50, "DEVICE_DELETED", data)})) as web:
        web.command("device_del")
        assert len(web.events) == 10
        assert web.wait_event("DEVICE_DELETED", {"device": "disk0"}, SHORT)
        assert not web.wait_event("DEVICE_DELETED", {"device": "disk0"}, 0.05)


@pytest.mark.parametrize("data", [
    None, 5, [], "disk0", {}, {"device": "disk1"}, {"device": ["disk0"]}, {"device": None}])
def test_events_that_are_not_the_one(script: Script, data: object) -> None:
    vm = script()
    with client(vm) as web:
        vm.emit({"event": "DEVICE_DELETED", "data": data})
        assert not web.wait_event("DEVICE_DELETED", {"device": "disk0"}, 0.05)
        vm.emit({"event": "DEVICE_DELETED", "data": {"device": "disk0", "more": []}})
        assert web.wait_event("DEVICE_DELETED", {"device": "disk0"}, 10)


def test_the_end(script: Script) -> None:
    vm = script()
    with client(vm) as web:
        assert not web.wait_end(0.05)
        vm.emit({"event": "SHUTDOWN"})
        vm.close()
        assert web.wait_end(10)
    events = [event["event"] for event in web.each_event()]
    assert events == []


def test_each_event_ends_with_the_vm(script: Script) -> None:
    vm = script({"quit": Raw(line({"event": "A"}) + line({"return": {}}) + line({"event": "B"}),
                             close=True)})
    with client(vm) as web:
        web.command("quit")
        assert [event["event"] for event in web.each_event()] == ["A", "B"]


def test_events_from_what_is_no_vm_any_more(script: Script) -> None:
    """It isn't taken for the end of the VM."""
    with client(script({"stop": Raw(b'{"return": {}}\nrubbish\n')})) as web:
        web.command("stop")
        with pytest.raises(CtlError, match="is not QMP"):
            list(web.each_event())


# ---- anything ------------------------------------------------------------------------------


_PIECES = st.binary(max_size=40) | st.sampled_from([
    b"\n", b"\r\n", b"{", b"}", b"[", b"]", b'"', b"\\u0000", b"{}\n", b'{"event": "X"}\n',
    b'{"return": 1, "id": 2}\n', b'{"return": 1}\n', b'{"id": 1, "return": 5}\n',
    b'{"error": {}}\n', b'{"event": "X", "data": {"a": [1]}}\n', b'{"return": -0.0e999}\n',
    b'{"a": "\\ud800"}\n', b'{"event": {}, "timestamp": []}\n', b"\xff"])


@PATIENT
@given(st.lists(_PIECES, max_size=12), st.booleans())
def test_any_stream(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes],
                    greeted: bool) -> None:
    """It ends in an answer or in an error of ours, and says nothing that a terminal would obey."""
    data = Raw(b"".join(pieces), close=True)
    vm = ScriptedVm(tmp_path_factory.mktemp("vm", numbered=True) / "qmp.sock", {"stop": data},
                    None if greeted else data)
    try:
        with client(vm) as web:
            web.command("stop")
            web.wait_event("X", {"a": [1]}, 1.0)
            list(web.each_event())
    except CtlError as error:
        assert str(error).isprintable()
    finally:
        vm.close()


# ---- connecting ----------------------------------------------------------------------------


def test_paths_of_any_length(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 200)
    folder.mkdir()
    here = os.open(folder, os.O_PATH)
    vm = ScriptedVm(f"/proc/self/fd/{here}/qmp.sock")
    try:
        with QmpClient(str(folder / "qmp.sock")) as web:
            assert web.command("stop") == {}
    finally:
        vm.close()
        os.close(here)


@pytest.mark.parametrize(("path", "text"), [
    ("missing", "No such file or directory; is the VM running"),
    ("file", "Connection refused; nobody listens"),
    ("dead", "Connection refused; nobody listens"),
    ("a\0b", "Can't connect to .*a.b: "),
    ("x" * 250, "Can't connect to "),
    ("\udcff", "No such file or directory"),
    ("a\nb\x1b[2J", r"Can't connect to .*/a\?b\?\[2J: No such")])
def test_where_nobody_is(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CtlError, match=text) as caught:
        QmpClient(f"{tmp_path}/{path}")
    assert str(caught.value).isprintable()
    # Threads of earlier tests may be closing theirs.
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """A unix socket says EAGAIN at once where others would make us wait."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "qmp.sock"))
    listener.listen(0)
    waiting = [connect_unix(listener.getsockname(), 1)]
    with pytest.raises(CtlError, match="the VM hangs: it takes no connection"):
        connect_unix(listener.getsockname(), SHORT)
    found: list[socket.socket] = []
    waiter = threading.Thread(target=lambda: found.append(
        connect_unix(listener.getsockname(), 10)))
    waiter.start()
    waiting.append(listener.accept()[0])
    waiter.join()
    assert len(found) == 1
    for sock in (*waiting, *found, listener):
        sock.close()


def test_interrupted_connections_are_closed(script: Script) -> None:
    vm = script(greeting={"hello": 1})
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CtlError, match="is not a QMP socket"):
        client(vm)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "closed")

"""The server over a real socket: order, several clients, hostile clients."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.support.fake_vm import FakeVm
from tests.support.qmp import QmpClient
from vmm.errors import VmmError
from vmm.qmp import connection
from vmm.qmp.server import MAX_CLIENTS, QmpServer


def error_of(client: QmpClient, text: str) -> dict[str, str]:
    error = client.raw(text)["error"]
    assert list(error) == ["class", "desc"]
    assert error["desc"].strip()
    return error


def kinds(messages: list[dict]) -> list[str]:
    return [message.get("event", "return" if "return" in message else "error")
            for message in messages]


# ---- greeting, replies, events -------------------------------------------------------------


def test_greeting_as_it_is_on_the_wire(harness):
    with harness.raw() as client:
        assert client.recv(4096) == (
            b'{"QMP":{"version":{"qemu":{"micro":1,"minor":0,"major":5},'
            b'"package":"stratovmm-0.1.0"},"capabilities":[]}}\r\n')


def test_capabilities_at_any_time_and_never_required(client):
    assert client.command("query-status")["status"] == "running"
    assert client.command("qmp_capabilities") == {}
    assert client.command("qmp_capabilities", enable=[]) == {}


@pytest.mark.parametrize("identity", [
    "1", '"a"', "null", "true", "-1.5", "[1,{}]", '{"a":[null]}', "123456789012345678901234567890",
    '"\\ud800"',
])
def test_any_id_is_echoed_last(client, identity):
    for text in ('{"id":%s,"execute":"query-name"}', '{"execute":"nothing","id":%s}',
                 '{"execute":"query-name","arguments":{"x":1},"id":%s}', '{"id":%s}'):
        reply = client.raw(text % identity)
        assert list(reply)[-1] == "id"
        assert json.dumps(reply["id"]) == json.dumps(json.loads(identity))


def test_no_id_no_echo(client):
    assert "id" not in client.raw('{"execute":"query-name"}')


@pytest.mark.parametrize(("command", "state", "expected"), [
    ("stop", "running", [b'{"event":"STOP","data":{},"timestamp":', b'{"return":{}}']),
    ("cont", "paused", [b'{"event":"RESUME","data":{},"timestamp":', b'{"return":{}}']),
    ("system_reset", "running", [b'{"event":"RESET","data":{"guest":false},', b'{"return":{}}']),
    ("quit", "running", [b'{"return":{}}', b'{"event":"SHUTDOWN","data":{"guest":false,"reason":'
                         b'"host-qmp-quit"},"timestamp":']),
])
def test_reply_and_event_leave_in_one_write(tmp_path, command, state, expected):
    """A SOCK_SEQPACKET pair keeps the server's writes apart."""
    vm = FakeVm()
    vm.run_state = state
    server = QmpServer(vm)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.adopt(theirs.detach())
    ours.settimeout(10)
    ours.recv(65536)
    ours.send(b'{"execute":"%s"}' % command.encode())
    deadline = time.monotonic() + 10
    ours.setblocking(False)
    got = b""
    while not got and time.monotonic() < deadline:
        vm.loop.run_once(0.01)
        try:
            got = ours.recv(65536)
        except BlockingIOError:
            continue
    lines = got.split(b"\r\n")
    assert lines.pop() == b""
    assert len(lines) == 2
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
    server.close()
    ours.close()
    vm.loop.close()


def test_pipelined_commands_keep_their_order(client):
    client.socket.sendall(b'{"execute":"stop","id":1}{"execute":"query-status","id":2}\n'
                          b'{"execute":"cont","id":3} {"execute":"query-status","id":4}'
                          b'{"execute":"quit","id":5}')
    got = [client.receive() for _ in range(8)]
    assert kinds(got) == ["STOP", "return", "return", "RESUME", "return", "return", "return",
                          "SHUTDOWN"]
    assert [m["id"] for m in got if "id" in m] == [1, 2, 3, 4, 5]
    assert got[2]["return"]["status"] == "paused"
    assert got[2]["return"]["running"] is False
    assert got[5]["return"]["status"] == "running"


def test_command_split_over_reads(client):
    for byte in b'{"execute":"query-name","id":7}':
        client.socket.send(bytes([byte]))
    assert client.receive() == {"return": {"name": "fake"}, "id": 7}


def test_events_go_to_all_clients(harness):
    clients = [harness.connect() for _ in range(4)]
    for client in clients:
        assert client.greeting["QMP"]["capabilities"] == []
    clients[0].command("stop")
    for client in clients:
        event = client.wait_event("STOP")
        assert list(event) == ["event", "data", "timestamp"]
        assert list(event["timestamp"]) == ["seconds", "microseconds"]
        assert abs(event["timestamp"]["seconds"] - time.time()) < 60
        assert 0 <= event["timestamp"]["microseconds"] < 1_000_000


def test_replies_go_to_their_client_only(harness):
    first, second = harness.connect(), harness.connect()
    first.command("query-name")
    second.command("query-uuid")
    with pytest.raises(TimeoutError):
        first.receive(0.05)


def test_events_without_a_client_are_forgotten(harness):
    harness.emit("STOP", {})
    client = harness.connect()
    client.command("query-status")
    assert client.events == []


def test_event_before_the_first_command_comes_after_its_reply(harness, monkeypatch):
    monkeypatch.setattr(connection, "EVENT_DELAY", 30)
    client = harness.connect()
    harness.emit("STOP", {})
    assert client.command("qmp_capabilities") == {}
    assert client.events == []
    client.wait_event("STOP")


def test_client_that_only_listens_gets_events(harness, client):
    harness.emit("RESUME", {})
    client.wait_event("RESUME")


def test_second_connection_after_the_first_closed(harness):
    for _ in range(5):
        with QmpClient(harness.path) as client:
            assert client.command("query-name") == {"name": "fake"}
    harness.wait_for(lambda: harness.client_count() == 0)


# ---- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "name", "words"), [
    ('{"execute":"foo"}', "CommandNotFound", "foo"),
    ('{"execute":""}', "CommandNotFound", "has not been found"),
    ('{"execute":1}', "GenericError", "'execute'"),
    ('{"execute":null}', "GenericError", "'execute'"),
    ('{"arguments":{}}', "GenericError", "'execute'"),
    ("{}", "GenericError", "'execute'"),
    ('{"execute":"stop","args":{}}', "GenericError", "'args'"),
    ('{"exec-oob":"stop"}', "GenericError", "'exec-oob'"),
    ('{"execute":"stop","arguments":[]}', "GenericError", "'arguments'"),
    ('{"execute":"stop","arguments":null}', "GenericError", "'arguments'"),
    ('{"execute":"stop","arguments":{"now":true}}', "GenericError", "'now'"),
    ('{"execute":"getfd"}', "GenericError", "'fdname'"),
    ('{"execute":"getfd","arguments":{"fdname":1}}', "GenericError", "'fdname' must be a string"),
    ('{"execute":"getfd","arguments":{"fdname":""}}', "GenericError", "'fdname'"),
    ('{"execute":"getfd","arguments":{"fdname":"1a"}}', "GenericError", "'fdname'"),
    ('{"execute":"getfd","arguments":{"fdname":"a\\u0000"}}', "GenericError", "NUL"),
    ('{"execute":"getfd","arguments":{"fdname":"%s"}}' % ("a" * 256), "GenericError", "255"),
    ('{"execute":"getfd","arguments":{"fdname":"a"}}', "GenericError", "SCM_RIGHTS"),
    ('{"execute":"closefd","arguments":{"fdname":"a"}}', "DeviceNotFound", "'a'"),
    ('{"execute":"query-named-block-nodes","arguments":{"flat":1}}', "GenericError", "'flat'"),
    ('{"execute":"qmp_capabilities","arguments":{"enable":{}}}', "GenericError", "'enable'"),
    ('{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}', "GenericError", "'enable'"),
    ('{"execute":"cont"}', "GenericError", "running"),
    ("stop", "GenericError", "begins with '{'"),
    ("[1]", "GenericError", "object"),
    ('{"execute":"stop",}', "GenericError", "at character"),
])
def test_errors_have_class_and_description(client, text, name, words):
    error = error_of(client, text + "\n")
    assert error["class"] == name
    assert words in error["desc"]
    assert client.command("query-status")["status"] == "running"


def test_stop_when_paused_is_an_error_without_event(harness, client):
    client.command("stop")
    client.events.clear()
    assert "paused" in error_of(client, '{"execute":"stop"}')["desc"]
    client.command("query-status")
    assert client.events == []


def test_command_that_fails_later(harness, client):
    harness.vm.error = VmmError("device disk0 did not stop", "query-workers tells")
    assert "disk0" in error_of(client, '{"execute":"stop","id":3}')["desc"]


def test_defect_in_a_command_is_answered_and_survived(harness, client, monkeypatch):
    monkeypatch.setattr(harness.vm, "workers", lambda: [object()])
    error = error_of(client, '{"execute":"query-workers"}')
    assert error["class"] == "GenericError"
    assert "Internal error" in error["desc"]
    client.command("query-name")


def test_too_long_a_command_keeps_the_connection(client):
    client.socket.sendall(b'{"execute":"' + b"x" * 200_000 + b'"}{"execute":"query-name"}')
    assert "longer than" in client.receive()["error"]["desc"]
    assert client.receive() == {"return": {"name": "fake"}}


# ---- waiting -------------------------------------------------------------------------------


def test_slow_command_lets_others_go_on(harness):
    first, second = harness.connect(), harness.connect()
    harness.vm.slow = True
    first.socket.sendall(b'{"execute":"stop","id":1}{"execute":"query-status","id":2}')
    assert second.command("query-status")["status"] == "running"
    with pytest.raises(TimeoutError):
        first.receive(0.05)
    harness.vm.release()
    got = [first.receive() for _ in range(3)]
    assert kinds(got) == ["STOP", "return", "return"]
    assert got[2] == {"return": {"running": False, "singlestep": False, "status": "paused"},
                      "id": 2}


def test_client_that_leaves_during_its_command(harness):
    first, second = harness.connect(), harness.connect()
    harness.vm.slow = True
    first.socket.sendall(b'{"execute":"stop"}{"execute":"system_powerdown"}')
    harness.wait_for(lambda: bool(harness.vm._waiting))
    first.socket.close()
    harness.vm.release()
    second.wait_event("STOP")
    second.wait_event("POWERDOWN")  # what was sent is still carried out
    harness.wait_for(lambda: harness.client_count() == 1)


def test_half_closed_client_gets_its_replies(harness):
    client = harness.connect()
    harness.vm.slow = True
    client.socket.sendall(b'{"execute":"stop"}{"execute":"query-status"}{"exec')
    client.socket.shutdown(socket.SHUT_WR)
    harness.wait_for(lambda: bool(harness.vm._waiting))
    harness.vm.release()
    assert kinds([client.receive() for _ in range(3)]) == ["STOP", "return", "return"]
    with pytest.raises(EOFError):
        client.receive()


def test_fire_and_forget(harness):
    """A client that sends and closes at once: the command counts."""
    watcher = harness.connect()
    with harness.raw() as client:
        client.sendall(b'{"execute":"stop"}')
    watcher.wait_event("STOP")


def test_last_words_are_sent_when_the_loop_has_ended(harness, client):
    assert client.command("quit") == {}
    client.wait_event("SHUTDOWN")


# ---- too much ------------------------------------------------------------------------------


def test_rate_is_held_by_reading_later(harness, monkeypatch):
    monkeypatch.setattr(connection, "BURST", 20.0)
    monkeypatch.setattr(connection, "RATE", 200.0)
    client, other = harness.connect(), harness.connect()
    start = time.monotonic()
    client.socket.sendall(b'{"execute":"query-name"}' * 60)
    assert other.command("query-name") == {"name": "fake"}
    for _ in range(60):
        assert "return" in client.receive()
    assert time.monotonic() - start >= 40 / 200.0 - 0.01


def test_burst_of_a_manager_is_not_slowed(client):
    start = time.monotonic()
    client.socket.sendall(b'{"execute":"query-name"}' * 400)
    for _ in range(400):
        client.receive()
    assert time.monotonic() - start < 3


def test_past_the_backlog_commands_are_refused_in_order(harness, monkeypatch):
    monkeypatch.setattr(connection, "BURST", 10.0)
    monkeypatch.setattr(connection, "RATE", 500.0)
    monkeypatch.setattr(connection, "BACKLOG", 20)
    client = harness.connect()
    client.socket.sendall(b"".join(b'{"execute":"query-name","id":%d}' % i for i in range(100)))
    got = [client.receive() for _ in range(100)]
    assert [m["id"] for m in got] == list(range(100))
    refused = [m["id"] for m in got if "error" in m]
    assert got[-1]["error"]["class"] == "OperationThrottled"
    assert refused == list(range(refused[0], 100))
    assert 30 <= refused[0] < 60
    assert client.command("query-name") == {"name": "fake"}


def test_default_limits_are_the_decided_ones():
    assert (connection.RATE, connection.BURST) == (100.0, 1000.0)


def test_client_that_does_not_read_is_dropped(harness, monkeypatch):
    monkeypatch.setattr(connection, "MAX_OUTPUT", 300_000)
    deaf, other = harness.connect(), harness.connect()
    text = "x" * 10_000
    for _ in range(200):
        harness.emit("STOP", {"text": text})
        other.wait_event("STOP")
        if harness.on_loop(harness.client_count) == 1:
            break
    assert harness.on_loop(harness.client_count) == 1
    assert other.command("query-name") == {"name": "fake"}
    deaf.socket.close()


def test_commands_of_a_client_that_does_not_read_wait(harness, monkeypatch):
    monkeypatch.setattr(connection, "BURST", 100_000.0)
    client, other = harness.connect(), harness.connect()
    client.socket.settimeout(0.2)
    sent = 0
    try:
        while sent < 3000:
            client.socket.sendall(b'{"execute":"query-qmp-schema"}' * 10)
            sent += 10
    except TimeoutError:
        pass
    assert sent < 3000  # it was stopped
    assert other.command("query-name") == {"name": "fake"}
    waiting = harness.on_loop(lambda: max(len(c._output) for c in harness.server._clients))
    assert connection.BUSY_OUTPUT < waiting < connection.MAX_OUTPUT
    client.timeout = 10
    client.socket.settimeout(10)
    assert "return" in client.receive()


def test_clients_beyond_the_limit_wait_in_the_backlog(harness):
    clients = [harness.connect() for _ in range(MAX_CLIENTS)]
    waiting = harness.raw()
    waiting.settimeout(0.05)
    with pytest.raises(TimeoutError):
        waiting.recv(1)
    clients[0].socket.close()
    waiting.settimeout(10)
    assert waiting.recv(4096).startswith(b'{"QMP"')
    waiting.close()


def test_out_of_descriptors(harness, monkeypatch):
    """No free descriptor: the listener rests instead of spinning, then goes on."""
    import resource

    monkeypatch.setattr("vmm.qmp.server.ACCEPT_PAUSE", 0.05)
    client = harness.connect()
    waiting = socket.socket(socket.AF_UNIX)
    waiting.settimeout(10)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (waiting.fileno() + 1, hard))
    try:
        waiting.connect(harness.path)
        harness.wait_for(lambda: not harness.server._listening)
        assert client.command("query-name") == {"name": "fake"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert waiting.recv(4096).startswith(b'{"QMP"')
    waiting.close()

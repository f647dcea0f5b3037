from __future__ import annotations

import json


def test_greeting(client):
    assert client.greeting == {"QMP": {"version": {
        "qemu": {"micro": 1, "minor": 0, "major": 5}, "package": "stratovmm-0.1.0"},
        "capabilities": []}}


def test_stop_cont_quit_order(harness, client):
    client.socket.sendall(b'{"execute":"stop","id":[1,{"a":null}]}{"execute":"query-status"}'
                          b'{"execute":"cont"}{"execute":"quit"}')
    got = [client.receive() for _ in range(7)]
    assert [g.get("event", "return") for g in got] == [
        "STOP", "return", "return", "RESUME", "return", "return", "SHUTDOWN"]
    print(json.dumps(got))

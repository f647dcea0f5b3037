"""Random bytes, JSON and descriptors: the server lives on, nothing leaks."""

from __future__ import annotations

import json
import os
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import log
from vmm.qmp import registry

REGISTRY = registry.load()
NAMES = [name for name in REGISTRY.commands if name != "quit"]
WORDS = ("", "a", "disk0", "rootfs", "serial0", "virtio-net-mmio", "virtio-blk-mmio", "tap", "tap0",
         "vhost-user", "52:54:00:12:34:56", "01:00:5e:00:00:01", "0x1", "0", "99", "a:b", ":",
         "unmap", "on", "native", "/x", "fd0", "a,type=vhost-user", "{}", "\ud800", "\u00b2", "#a")

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20)
    | st.floats(allow_nan=True, allow_infinity=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3), max_leaves=8)


def argument_values(argument):
    """Mostly what the command's table says, and what is just beside it."""
    low, high = argument.low, argument.high
    of_type = {
        "str": st.sampled_from(WORDS) | st.text(max_size=20),
        "int": st.integers(-2, 40) | st.sampled_from([low - 1, low, high, high + 1, 0, 1]),
        "bool": st.booleans(), "number": st.integers() | st.floats(allow_nan=False)}
    members = REGISTRY.types.get(argument.type)
    if isinstance(members, dict):
        of_type[argument.type] = st.fixed_dictionaries({}, optional={
            name.rstrip("?"): of_type.get(kind, values) | values for name, kind in members.items()})
    return st.integers(0, 9).flatmap(
        lambda luck: values if luck == 0 else of_type.get(argument.type, values))


@st.composite
def known_commands(draw):
    """A command with arguments that it has."""
    command = REGISTRY.commands[draw(st.sampled_from(NAMES))]
    known = command.arguments.values()
    return {"execute": command.name, "arguments": draw(st.fixed_dictionaries(
        {a.name: argument_values(a) for a in known if not a.optional},
        optional={a.name: argument_values(a) for a in known if a.optional}))}


commands = st.fixed_dictionaries({}, optional={
    "execute": st.sampled_from(NAMES) | values,
    "arguments": st.dictionaries(st.sampled_from(["fdname", "typename", "flat", "enable", "x"]),
                                 values, max_size=2) | values,
    "id": values, "x": values})
as_json = st.builds(lambda value: json.dumps(value).encode(),
                    known_commands() | known_commands() | commands | values)
pieces = st.lists(
    st.binary(max_size=60) | as_json | st.sampled_from([b"\n", b"\xff", b"{", b'"', b"[" * 70])
    | st.builds(lambda text, cut: text[:cut], as_json, st.integers(0, 60)), min_size=1,
    max_size=10)


@pytest.mark.fuzz
@settings(max_examples=250, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces, st.lists(st.integers(0, 20), max_size=10), st.booleans())
def test_server_survives(harness, monkeypatch, pieces, descriptors, reads):
    defects = []
    monkeypatch.setattr(log, "exception", lambda text, error: defects.append(error))
    client = harness.raw()
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        for index, piece in enumerate(pieces):
            fds = [null] * (descriptors[index] if index < len(descriptors) else 0)
            if fds and piece:
                socket.send_fds(client, [piece], fds)
            else:
                client.sendall(piece)
        if reads:
            # Whatever came before, the next command is answered: that is what 0xFF is for.
            client.sendall(b'\xff{"execute":"query-name","id":"last one"}')
            stream = client.makefile("rb")
            while True:
                line = stream.readline()
                assert line.endswith(b"\r\n")
                reply = json.loads(line)
                assert set(reply) & {"return", "error", "event", "QMP"}
                if "error" in reply:
                    assert reply["error"]["desc"]
                if reply.get("id") == "last one":
                    assert reply["return"] == {"name": "fake"}
                    break
            stream.close()
    finally:
        os.close(null)
        client.close()
    harness.wait_for(lambda: harness.client_count() == 0)
    harness.on_loop(harness.server.fds.close)
    assert harness.failures == [] and defects == []

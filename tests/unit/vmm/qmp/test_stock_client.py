"""The client that QEMU publishes, unmodified, against our server."""

from __future__ import annotations

import asyncio

import pytest
from qemu.qmp import ExecuteError, QMPClient


async def life_of_a_vm(path: str) -> list[str]:
    client = QMPClient("test")
    events = []
    await client.connect(path)
    assert client.greeting is not None
    assert client.greeting.QMP.version["qemu"]["major"] == 5
    status = await client.execute("query-status")
    assert status == {"running": True, "singlestep": False, "status": "running"}
    with client.listener() as listener:
        await client.execute("stop")
        events.append((await asyncio.wait_for(listener.get(), 10))["event"])
        with pytest.raises(ExecuteError, match="paused") as refused:
            await client.execute("stop")
        assert refused.value.error_class == "GenericError"
        with pytest.raises(ExecuteError) as unknown:
            await client.execute("no-such-command")
        assert unknown.value.error_class == "CommandNotFound"
        await client.execute("cont")
        events.append((await asyncio.wait_for(listener.get(), 10))["event"])
        assert len(await client.execute("query-qmp-schema")) > 50
        await client.execute("quit")
        events.append((await asyncio.wait_for(listener.get(), 10))["event"])
    await client.disconnect()
    return events


def test_life_of_a_vm(harness):
    assert asyncio.run(life_of_a_vm(harness.path)) == ["STOP", "RESUME", "SHUTDOWN"]


async def parallel(path: str) -> None:
    clients = [QMPClient(f"client{index}") for index in range(3)]
    for client in clients:
        await client.connect(path)
    results = await asyncio.gather(*(client.execute("query-cpus") for client in clients * 5))
    assert all(result == results[0] for result in results)
    for client in clients:
        await client.disconnect()


def test_several_at_once(harness):
    asyncio.run(parallel(harness.path))


async def connect_amid_events(path: str) -> None:
    client = QMPClient("test")
    await client.connect(path)
    assert await client.execute("query-name") == {"name": "fake"}
    await client.disconnect()


def test_connecting_while_events_come(harness):
    """It breaks on an event before the reply to its qmp_capabilities: it must see none."""
    going = True

    def emit() -> None:
        harness.vm.events.emit("RESUME", {})
        if going:
            harness.vm.loop.call_later(0.0005, emit)

    harness.vm.loop.call_soon(emit)
    for _ in range(20):
        asyncio.run(connect_amid_events(harness.path))
    going = False

"""Random bytes, consoles and serial ports of a bare-metal guest, and what happens around them."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.killer import children, kill
from tests.support.test_vm import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.test_vm import TestVm

    Start = Callable[..., TestVm]

pytestmark = pytest.mark.vm

READY, CONSOLE, OPEN, NAME = 3, 4, 6, 7
RNG = ("-object", "rng-random,id=r,filename=/dev/urandom", "-device")


def events(vm: TestVm, name: str) -> list[dict[str, Any]]:
    vm.qmp.command("query-status")
    return [event["data"] for event in vm.qmp.events if event["event"] == name]


def worker(vm: TestVm, kind: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [w for w in vm.qmp.command("query-workers")
                                   if w["kind"] == kind]
    assert len(found) == 1
    return found[0]


def kill_worker(vm: TestVm, kind: str) -> None:
    """Kill it and wait until another one serves."""
    before = len(events(vm, "WORKER_RESTARTED"))
    kill(worker(vm, kind)["pid"])
    wait_until(lambda: len(events(vm, "WORKER_RESTARTED")) > before, "another worker")


def give_up(vm: TestVm, kind: str) -> None:
    """Kill its workers until no other one comes."""
    while not events(vm, "WORKER_GIVEN_UP"):
        for pid in children(vm.process.pid, f"sv-{kind[:3]}"):
            kill(pid)


# ---- random bytes ----------------------------------------------------------------------------

def test_random_bytes(start_vm: Start) -> None:
    vm = start_vm(*RNG, "virtio-rng-device,rng=r,id=rng0")
    assert vm.guest("rng.init").ok
    answer = vm.guest("rng.read 65536 20", 60)
    assert answer.value("total") == 20 * 65536
    assert answer.value("different") == 256
    other = vm.guest("rng.read 65536 1")
    assert other.value("crc") != answer.value("crc")
    counters = worker(vm, "rng")["counters"]
    assert counters["bytes"] == 21 * 65536
    assert counters["errors"] == 0


def test_a_limit(start_vm: Start) -> None:
    vm = start_vm(*RNG, "virtio-rng-device,rng=r,max-bytes=1000,period=100")  # 10,000 a second
    assert vm.guest("rng.init").ok
    answer = vm.guest("rng.read 500 16")
    assert answer.value("total") == 8000
    assert answer.value("us") >= 1e6 * (8000 - 1500) / 10_000
    assert worker(vm, "rng")["counters"]["throttled"] > 0


def test_kills_of_the_worker(start_vm: Start) -> None:
    vm = start_vm(*RNG, "virtio-rng-device,rng=r,id=rng0")
    assert not events(vm, "WORKER_CRASHED")
    assert vm.guest("rng.init").ok
    for _ in range(3):
        kill_worker(vm, "rng")
        assert vm.guest("rng.read 1000 10").value("total") == 10_000
    vm.qmp.command("worker-restart", device="rng0")
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    assert vm.guest("rng.read 1000 10").value("total") == 10_000
    assert worker(vm, "rng")["counters"]["bytes"] == 40_000


def test_a_request_that_waits_while_its_worker_dies(start_vm: Start) -> None:
    vm = start_vm(*RNG, "virtio-rng-device,rng=r,max-bytes=64,period=1000")
    assert not events(vm, "WORKER_CRASHED")
    assert vm.guest("rng.init").ok
    vm.send("rng.read 64 4\n")  # seconds
    wait_until(lambda: worker(vm, "rng")["counters"]["throttled"], "a request that waits")
    kill_worker(vm, "rng")
    assert vm.script_answer().value("total") == 256


@pytest.mark.parametrize("path", ["/etc/passwd", "/", "/dev/nothing"])
def test_sources_that_are_refused(start_vm: Start, path: str) -> None:
    vm = start_vm("-object", f"rng-random,id=r,filename={path}", "-device",
                  "virtio-rng-device,rng=r")
    assert vm.wait() == 1
    error, = vm.error_text().splitlines()
    assert f"filename={path}" in error
    wait_until(lambda: not vm.processes(), "the end of all processes")


# ---- consoles and ports ----------------------------------------------------------------------

class Consoles:
    """A VM with a console (port 0, chardev `con`) and a serial port (2, `ser`) on sockets."""

    def __init__(self, start_vm: Start, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.clients: dict[str, socket.socket] = {}
        self.vm = start_vm(
            "-device", "virtio-serial-device,id=serial,max_ports=4",
            "-device", "virtconsole,chardev=con,id=console",
            "-device", "virtserialport,chardev=ser,nr=2,name=agent.0",
            *(word for name in ("con", "ser") for word in
              ("-chardev", f"socket,id={name},path={folder}/{name}.sock,server,nowait")),
            *arguments)

    def set_up(self) -> None:
        """As Linux does it."""
        vm = self.vm
        assert not events(vm, "WORKER_CRASHED")
        assert vm.guest("con.init").value("ports") == 4
        self.tell(0, 0, 1)
        assert self.messages(2) == [(0, 1, 1), (2, 1, 1)]
        for nr in (0, 2):
            self.tell(nr, READY, 1)
            self.tell(nr, OPEN, 1)

    def tell(self, nr: int, event: int, value: int) -> None:
        assert self.vm.guest(f"con.tell {nr} {event} {value}").ok

    def messages(self, count: int) -> list[tuple[int, int, int]]:
        answer = self.vm.guest(f"con.messages {count}")
        assert answer.ok, answer
        return [tuple(int(word) for word in re.findall(r"=(\d+)", note)[:3])  # type: ignore[misc]
                for note in answer.notes]

    def connect(self, name: str) -> socket.socket:
        client = self.clients[name] = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(f"{self.folder}/{name}.sock")
        return client

    def close(self) -> None:
        for client in self.clients.values():
            client.close()


@pytest.fixture
def consoles(start_vm: Start, tmp_path: Path) -> Any:
    made = Consoles(start_vm, tmp_path)
    yield made
    made.close()


def read(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = client.recv(size - len(data))
        assert part, "the VM closed the connection"
        data += part
    return data


def lines(client: socket.socket, count: int, length: int = 64) -> list[int]:
    """The numbers of the next lines of con.flood."""
    data = read(client, count * length)
    return [int(data[at:at + 8]) for at in range(0, len(data), length)]


def test_both_ways(consoles: Consoles) -> None:
    vm = consoles.vm
    consoles.set_up()
    assert consoles.messages(3) == [(0, CONSOLE, 1), (0, OPEN, 1), (2, NAME, 1)]
    console, serial = consoles.connect("con"), consoles.connect("ser")
    assert consoles.messages(1) == [(2, OPEN, 1)]
    for nr, client in ((0, console), (2, serial)):
        assert vm.guest(f"con.write {nr} from-the-guest").ok
        assert read(client, 14) == b"from-the-guest"
        client.send(b"to the guest")
        assert vm.guest(f"con.read {nr} 12").text.endswith("text=to the guest")
    data = os.urandom(100_000)
    serial.sendall(data)
    assert vm.guest("con.read 2 100000").value("crc") == zlib.crc32(data)


def test_a_client_comes_and_leaves(consoles: Consoles) -> None:
    vm = consoles.vm
    consoles.set_up()
    consoles.messages(3)
    assert vm.guest("con.write 2 nobody-hears").ok
    for _ in range(3):
        serial = consoles.connect("ser")
        assert consoles.messages(1) == [(2, OPEN, 1)]
        assert vm.guest("con.write 2 hello").ok
        assert read(serial, 5) == b"hello"
        serial.close()
        assert consoles.messages(1) == [(2, OPEN, 0)]


def test_a_client_that_does_not_read(consoles: Consoles) -> None:
    """Its port waits, the other one goes on; then it gets everything, in order."""
    vm = consoles.vm
    consoles.set_up()
    consoles.messages(3)
    serial, console = consoles.connect("ser"), consoles.connect("con")
    serial.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    consoles.messages(1)
    vm.send("con.flood 0 200\n")
    assert lines(console, 200) == list(range(200))
    assert vm.script_answer().ok
    vm.send("con.flood 2 1000 4096\n")
    wait_until(lambda: worker(vm, "console")["counters"]["waits"], "a port that waits")
    assert vm.qmp.command("query-status")["status"] == "running"
    assert lines(serial, 1000, 4096) == list(range(1000))
    assert vm.script_answer().ok


def test_kills_in_the_middle_of_a_stream(consoles: Consoles) -> None:
    """Nothing is lost; what was under way at a kill may come twice."""
    vm = consoles.vm
    consoles.set_up()
    consoles.messages(3)
    serial = consoles.connect("ser")
    consoles.messages(1)
    vm.send("con.flood 2 5000\n")
    seen: list[int] = []
    kills = 0
    while not seen or seen[-1] != 4999:
        seen += lines(serial, 1)
        if len(seen) % 1000 == 0 and kills < 4:
            kill(worker(vm, "console")["pid"])
            kills += 1
    assert vm.script_answer(60).ok
    assert sorted(set(seen)) == list(range(5000))
    assert seen == sorted(seen)
    assert len(seen) <= 5000 + kills
    assert kills == 4
    assert not events(vm, "WORKER_GIVEN_UP")


def test_the_guest_opens_nothing_again(consoles: Consoles) -> None:
    """What it has opened outlives the worker, and what was typed meanwhile arrives."""
    vm = consoles.vm
    consoles.set_up()
    consoles.messages(3)
    serial = consoles.connect("ser")
    consoles.messages(1)
    vm.qmp.command("stop")
    serial.send(b"typed")
    kill_worker(vm, "console")
    vm.qmp.command("cont")
    assert vm.guest("con.read 2 5").text.endswith("text=typed")
    serial.close()
    assert consoles.messages(1) == [(2, OPEN, 0)]  # and nothing was told twice
    vm.qmp.command("worker-restart", device="serial")
    assert vm.guest("con.write 0 fine").ok


def test_a_driver_that_begins_again(consoles: Consoles) -> None:
    consoles.set_up()
    consoles.messages(3)
    consoles.set_up()
    assert consoles.messages(3) == [(0, CONSOLE, 1), (0, OPEN, 1), (2, NAME, 1)]
    kill_worker(consoles.vm, "console")
    serial = consoles.connect("ser")
    assert consoles.messages(1) == [(2, OPEN, 1)]
    serial.send(b"x")
    assert consoles.vm.guest("con.read 2 1").ok


def test_a_driver_that_knows_of_one_port(consoles: Consoles) -> None:
    vm = consoles.vm
    assert vm.guest("con.init 0x100000000").ok
    console = consoles.connect("con")
    assert vm.guest("con.write 0 early").ok
    assert read(console, 5) == b"early"
    console.send(b"typed")
    assert vm.guest("con.read 0 5").text.endswith("text=typed")


def test_a_console_that_is_given_up(consoles: Consoles) -> None:
    """What is written is dropped, at once: nothing of the guest hangs."""
    vm = consoles.vm
    consoles.set_up()
    consoles.messages(3)
    serial = consoles.connect("ser")
    consoles.messages(1)
    give_up(vm, "console")
    assert vm.guest("con.flood 2 200").ok
    assert vm.guest("con.flood 0 200").ok
    # As a driver that begins again: it has no ports, but goes on.
    assert vm.guest("con.init").ok
    consoles.tell(0, 0, 1)
    assert vm.guest("con.write 0 lost").ok
    serial.settimeout(0)
    with pytest.raises(BlockingIOError):
        serial.recv(1)


def test_random_bytes_that_are_given_up(start_vm: Start) -> None:
    """Nobody can answer for them: the guest sees that the device has failed. The VM goes on."""
    vm = start_vm(*RNG, "virtio-rng-device,rng=r,id=rng0")
    assert not events(vm, "WORKER_CRASHED")
    assert vm.guest("rng.init").ok
    give_up(vm, "rng")
    wait_until(lambda: "nobody answers for it" in vm.error_text(), "the last word")
    assert vm.guest("echo").ok
    vm.qmp.command("stop")
    vm.qmp.command("cont")
    vm.qmp.command("quit")
    assert vm.wait() == 0


def test_a_hang_ends_with_the_worker(consoles: Consoles) -> None:
    """A worker that hangs holds up neither QMP nor the end."""
    vm = consoles.vm
    consoles.set_up()
    pid = worker(vm, "console")["pid"]
    kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert vm.qmp.command("query-status")["status"] == "running"
    assert time.monotonic() - began < 2
    vm.qmp.command("quit")
    assert vm.wait(30) == 0
    wait_until(lambda: pid not in children(1) and not vm.processes(), "the end of all")


def test_last_words_reach_a_file(start_vm: Start, tmp_path: Path) -> None:
    """The guest writes and powers off at once."""
    output = tmp_path / "console.txt"
    vm = start_vm("-device", "virtio-serial-device", "-device", "virtconsole,chardev=c",
                  "-chardev", f"file,id=c,path={output}",
                  append="script=con.init;con.write,0,last-words;poweroff")
    assert vm.wait() == 0
    assert output.read_bytes() == b"last-words"


def test_a_console_on_standard_output_and_one_in_the_log(start_vm: Start, tmp_path: Path) -> None:
    log = tmp_path / "log"
    vm = start_vm("-device", "virtio-serial-device", "-device", "virtconsole,chardev=c",
                  "-chardev", "redirect-to-log,id=c", "-D", log)
    assert vm.guest("con.init").ok
    vm.guest("con.flood 0 1")
    wait_until(lambda: "console c: 00000000" in log.read_text(), "a line of the log")


def test_every_device_has_its_place(start_vm: Start, tmp_path: Path) -> None:
    """Beside the slots of disks and NICs; the ninth of them is one too many."""
    several = [word for number in range(6) for word in
               ("-device", f"virtio-rng-device,rng=r,id=rng{number}")]
    vm = start_vm(*RNG[:2], *several, "-device", "virtio-serial-device")
    assert vm.guest("rng.init").ok
    assert vm.guest("con.init").ok
    assert len(vm.qmp.command("query-workers")) == 7
    full = [word for number in range(11) for word in
            ("-device", f"virtio-rng-device,rng=r,id=rng{number}")]
    vm = start_vm(*RNG[:2], *full)
    assert vm.wait() == 1
    assert "there is no place" in vm.error_text()

"""TCP through a whole guest's NIC, beside QEMU's virtio-net: bytes a second, each way.

Debian's cloud kernel, one vCPU, 256 MiB, a tap of the host that runs the VMM; the other end is a
process there.  On hardware KVM, else in the nested lab.  Goal: ratio ≥ 1.0.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import vmms
from bench.lab import in_lab, inside
from bench.report import ROOT, BenchError, Goal, Report, parse, parser, ratios, show

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
LIMIT = 90.0  # seconds for one guest
HOST, GUEST = "10.9.0.1", "10.9.0.2"
TO_HOST, TO_GUEST = 5001, 5002  # ports
WAYS = ("guest to host", "host to guest")


def settings(size: int) -> dict[str, Any]:
    """Kernel, initramfs, disk and command line for streams of `size` bytes; made if need be."""
    from tests.lab import images, kernels

    append = images.command_line(
        f"ip addr add {GUEST}/24 dev eth0", "ip link set eth0 up",
        f"stream send {HOST} {TO_HOST} {size}", f"stream take {TO_GUEST}", "poweroff -f")
    return {"kernel": str(kernels.debian_kernel().vmlinux), "append": append, "size": size,
            "initrd": str(_initramfs()), "disk": str(images.root_disk())}


def _initramfs() -> Path:
    """For Debian's cloud kernel, with the program of stream.c."""
    from tests.lab import cache, images, initramfs, kernels

    kernel, source = kernels.debian_kernel(), HERE / "stream/stream.c"
    key = cache.key_of(images.INIT, " ".join(images.MODULES), kernel.release, source)

    def make(folder: Path) -> None:
        program = folder / "stream"
        subprocess.run(["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror",
                        "-static", "-s", "-o", program, source], check=True)
        files = initramfs.tree(images.INIT, kernels.module_files(kernel, images.MODULES),
                               {"bin/stream": program})
        (folder / "initramfs").write_bytes(initramfs.cpio(files))

    return cache.obtain("stream-initramfs", key, make) / "initramfs"


def command(rival: str, folder: Path, setting: dict[str, Any]) -> list[str]:
    """A rival's command line."""
    more = ["-initrd", setting["initrd"], "-append", setting["append"]]
    kernel, disk = Path(setting["kernel"]), folder / "disk"
    disk.write_bytes(Path(setting["disk"]).read_bytes())
    if rival == "ours":
        line = vmms.ours(folder, kernel, disk, *more)
        line[line.index("-drive") + 1] += ",direct=off"
        return [*line, "-netdev", "tap,id=net,ifname=tap0", "-device",
                "virtio-net-device,netdev=net,id=nic"]
    line = vmms.qemu(folder, kernel, disk, *more)
    line[line.index("microvm")] = "microvm,rtc=on"
    line[line.index("-append") + 1] = setting["append"]
    return [*line, "-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no", "-device",
            "virtio-net-device,netdev=net"]


def _server(port: int) -> socket.socket:
    server = socket.create_server(("0.0.0.0", port), reuse_port=True)
    server.settimeout(LIMIT)
    return server


def _address() -> None:
    """The host's side of the tap, once it is there."""
    deadline = time.monotonic() + LIMIT
    while not Path("/sys/class/net/tap0").exists():
        if time.monotonic() > deadline:
            raise BenchError("there is no tap0")
        time.sleep(0.01)
    for line in (f"ip addr add {HOST}/24 dev tap0", "ip link set tap0 up"):
        subprocess.run(["busybox", *line.split()], check=True)


def _drain(server: socket.socket, expected: int) -> float:
    """Bytes a second that came, from the first one on."""
    buffer = bytearray(1 << 20)
    peer, _ = server.accept()
    with peer:
        peer.settimeout(LIMIT)
        total = peer.recv_into(buffer)
        began = time.monotonic()
        while count := peer.recv_into(buffer):
            total += count
        took = time.monotonic() - began
    if total != expected:
        raise BenchError(f"{total} bytes came, {expected} were sent")
    return total / took


def _pour(size: int) -> float:
    """Bytes a second that the guest took; it tells how many there were."""
    data = bytes(1 << 20)
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            peer = socket.create_connection((GUEST, TO_GUEST), 5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise BenchError(f"the guest doesn't listen: {error}") from None
            time.sleep(0.05)
    with peer:
        peer.settimeout(LIMIT)
        began = time.monotonic()
        for _ in range(size // len(data)):
            peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        text = peer.recv(64)
        took = time.monotonic() - began
    if text.strip() != str(size).encode():
        raise BenchError(f"the guest counted {text!r} bytes, {size} were sent")
    return size / took


def one(rival: str, setting: dict[str, Any]) -> list[float]:
    """Bytes a second, each of WAYS."""
    size = setting["size"]
    with tempfile.TemporaryDirectory(prefix="bench-") as name, _server(TO_HOST) as data, \
            subprocess.Popen(command(rival, Path(name), setting), stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             cwd=name) as process:
        try:
            _address()
            return [_drain(data, size), _pour(size)]
        except (OSError, BenchError) as error:
            process.kill()
            said = process.stderr.read() if process.stderr is not None else b""
            raise BenchError(f"{rival}: {error}; {said[-300:]!r}") from None
        finally:
            process.kill()


def rounds(setting: dict[str, Any], count: int) -> dict[str, list[list[float]]]:
    """Figures by rival, round by round."""
    found: dict[str, list[list[float]]] = {name: [] for name in vmms.RIVALS}
    for number in range(count):
        for rival in vmms.order(number):
            found[rival].append(one(rival, setting))
    return found


def rounds_in_lab(setting: dict[str, Any], count: int) -> dict[str, list[list[float]]]:
    """`rounds` in a fresh lab."""
    found: dict[str, list[list[float]]] = in_lab("guestnet", [setting, count], count * 2 * LIMIT)
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit code 1: it can't be measured here."""
    line = parse(parser(__doc__ or "", 5, 2), arguments)
    hardware = vmms.has_hardware() and os.access("/dev/kvm", os.R_OK | os.W_OK)
    report = Report("guestnet", "TCP through a guest's NIC, MB/s", [
        "", "ours", "QEMU microvm", "ratio", "goal", ""])
    try:
        setting = settings((1024 if hardware else 128) << 20)
        if hardware and os.geteuid() == 0 and "BENCH_NETNS" not in os.environ:
            return subprocess.run(["unshare", "-n", sys.executable, "-m", "bench", "guestnet",
                                   *arguments], check=False, cwd=ROOT,
                                  env={**os.environ, "BENCH_NETNS": "1"}).returncode
        found = (rounds if hardware else rounds_in_lab)(setting, line.rounds)
    except (BenchError, OSError, RuntimeError) as error:
        print(f"bench guestnet: {error}", file=sys.stderr)
        return 1
    for column, way in enumerate(WAYS):
        ours, qemu = ([took[column] / 1e6 for took in found[name]] for name in vmms.RIVALS)
        report.add([way, show(ours), show(qemu)], {"way": way, "ours": ours, "qemu": qemu},
                   ratios(ours, qemu), Goal(1.0, at_most=False))
    report.note("on /dev/kvm" if hardware else "in the nested lab (QEMU emulates the processor)")
    return report.finish(line.json)


if __name__ == "__main__":  # inside the lab
    inside(rounds)

"""Unmodified Linux with virtio consoles, serial ports and random bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import images, kernels
from tests.lab.small_kernel import small_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.lab

END: list[list[Any]] = [["event", "SHUTDOWN", 150], ["exit", 60]]
RNG = ("-object", "rng-random,id=objrng0,filename=/dev/urandom",
       "-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0")
QUIET = "quiet panic=1 mitigations=off no_timer_check tsc=reliable lpj=4000000"
# A client of a serial port: says a line, waits for one, says another one.
CLIENT = """python3 -c '
import socket
client = socket.socket(socket.AF_UNIX)
client.settimeout(60)
client.connect("agent.sock")
stream = client.makefile("rw")
for text in ("first", "second"):
    print(text, file=stream, flush=True)
    print(stream.readline(), end="")
'"""


def test_katas_command_line_with_a_console(play: Play) -> None:
    """No ACPI: the devices are on the kernel's command line. Everything goes to hvc0."""
    report = play({
        "arguments": ["-name", "sandbox-1", "-smp", "1", "-m", "512",
                      "-kernel", str(small_kernel()["vmlinux"]),
                      "-initrd", str(images.plain_initramfs()),
                      "-append", f"reboot=k panic=1 net.ifnames=0 pci=off iommu=off acpi=off "
                                 f"console=hvc0 {QUIET} lab.run="
                                 "cat,/sys/class/misc/hw_random/rng_current;"
                                 "dd,if=/dev/hwrng,bs=512,count=20,of=/r;wc,-c,/r;"
                                 "gzip,-c,/r|wc,-c;cat,/sys/class/tty/console/active;reboot,-f",
                      "-D", "-disable-seccomp", "-machine", "type=microvm,dump-guest-core=off",
                      *RNG, "-device", "virtio-serial-device,id=virtio-serial0",
                      "-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0",
                      "-chardev", "file,id=charconsole0,path=hvc0"],
        "steps": [["qmp", "query-workers"], *END, ["run", "cat hvc0"]]})
    console = report["replies"][-1]
    assert {worker["kind"] for worker in report["replies"][0]} == {"rng", "console"}
    assert "L2 ready" in console, console
    assert "virtio_rng.0" in console, console
    assert "10240 /r" in console, console
    sizes = [int(word) for word in console.split() if word.isdigit()]
    assert any(10200 < size < 10400 and size != 10240 for size in sizes), console
    assert "hvc0" in console
    assert "L2" not in report["console"]  # nothing on the serial port
    assert report["exit"] == 0 and report["left"] == []


def test_a_serial_port_whose_worker_dies(play: Play) -> None:
    """Programs of the guest talk to one of the host, and notice nothing."""
    # While nobody is at the other end a read says end of file.
    answer = "read line <&3 && echo answer to $line >&3 || sleep 0.1"
    report = play({
        "arguments": ["-m", "256", "-kernel", str(kernels.debian_kernel().vmlinux),
                      "-initrd", str(images.debian_initramfs()),
                      "-device", "virtio-serial-device",
                      "-chardev", "file,id=con,path=hvc0", "-device", "virtconsole,chardev=con",
                      "-chardev", "socket,id=ser,path=agent.sock,server,nowait",
                      "-device", "virtserialport,chardev=ser,name=agent.0", *RNG],
        "append": images.command_line(),
        "steps": [["output", "L2 shell", 60],
                  ["send", "cat /sys/class/virtio-ports/*p1/name\n"],
                  ["output", "agent.0", 30],
                  ["send", "exec 3<>$(ls /dev/vport*p1)\n"],
                  ["send", f"while :; do {answer}; done &\n"],
                  ["run", CLIENT],
                  ["run", "kill -9 $(pgrep sv-con) $(pgrep sv-rng)"],
                  ["event", "WORKER_RESTARTED", 30], ["event", "WORKER_RESTARTED", 30],
                  ["run", CLIENT],
                  ["send", "dd if=/dev/hwrng bs=512 count=8 of=/r; wc -c /r\n"],
                  ["output", "4096 /r", 30],
                  ["send", "echo said $((40+2)) >/dev/hvc0; poweroff -f\n"], *END,
                  ["run", "cat hvc0"]]})
    replies = [reply for reply in report["replies"] if isinstance(reply, str)]
    said = "answer to first\nanswer to second\n"
    assert [reply for reply in replies if "answer" in reply] == [said, said]
    assert "said 42" in replies[-1]
    assert report["exit"] == 0 and report["left"] == []

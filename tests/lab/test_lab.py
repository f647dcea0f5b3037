"""The lab itself: fresh each time, time limits, files both ways."""

from __future__ import annotations

import re

import pytest

from tests.lab import images, kernels
from tests.lab.__main__ import SHELL
from tests.lab.kernels import lz4_legacy
from tests.lab.lab import Lab, LabHang, retrying

pytestmark = pytest.mark.lab


def test_scripts_run_and_kvm_is_real(lab: Lab) -> None:
    assert "svm" in lab.check("cat /proc/cpuinfo")
    assert lab.check("ls -l /dev/kvm").startswith("crw")
    (lab.share / "input").write_text("from the host")
    assert lab.check("cat /mnt/input; echo inside > /mnt/output") == "from the host"
    assert (lab.share / "output").read_text() == "inside\n"
    assert lab.run("exit 3").code == 3


def test_a_script_over_its_time_is_killed(lab: Lab) -> None:
    assert lab.run("sleep 1000", timeout=1).code == 137
    assert lab.check("echo still here") == "still here\n"


def test_a_shell_in_the_lab(lab: Lab) -> None:
    with lab.connect_port("tty") as port:
        lab.start(SHELL)
        port.settimeout(60)
        port.sendall(b"tty; echo $((40 + 2))\n")
        said = b""
        while b"\n42" not in said:
            said += port.recv(4096)
        assert b"/dev/pts/" in said
        port.sendall(b"exit\n")
        assert lab.finish(60).code == 0


def test_a_deaf_processor_is_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that QEMU's emulation left in the guest with its interrupts off."""
    monkeypatch.setattr("tests.lab.lab.BEAT_LIMIT", 12.0)
    with pytest.raises(LabHang, match="processor 1 shows no sign of life"):
        lab.run("echo -1 >/proc/sys/kernel/sched_rt_runtime_us; "
                "exec taskset -c 1 chrt -f 99 sh -c 'while :; do :; done'", timeout=60)


def test_a_triple_fault_is_noticed(prepared_lab: None) -> None:
    """A boot sector without an interrupt table, which QEMU ends when it resets."""
    def fault() -> str:
        with Lab.acquire() as lab:
            (lab.share / "disk").write_bytes(
                b"\x0f\x01\x1e\x06\x7c\xcc" + bytes(504) + b"\x55\xaa")
            lab.require_health()
            lab.check("exec timeout 50 qemu-system-x86_64 -accel kvm -nodefaults -no-reboot "
                      "-display none -drive file=/mnt/disk,format=raw", timeout=60)
            try:
                lab.require_health()
            except LabHang as noticed:
                if "triple fault" in str(noticed):
                    return str(noticed)
                raise  # the emulator hung
            return "nothing"

    assert re.search(r"reason shutdown rip 0x7c05 .* t __svm_vcpu_run", retrying(fault))


def test_a_debian_kernel_boots_under_qemu_in_the_lab(prepared_lab: None) -> None:
    """If this fails, the lab is at fault and not the product."""
    def boot() -> str:
        with Lab.acquire() as lab:
            (lab.share / "disk").write_bytes(images.root_disk().read_bytes())
            result = lab.run(line, timeout=160)
            if result.code:
                lab.require_health()
            return result.output

    line = (
        "exec timeout 150 qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m 256 "
        "-nodefaults -no-reboot -display none -serial stdio "
        "-global virtio-mmio.force-legacy=false "
        f"-kernel {kernels.debian_kernel().vmlinux} -initrd {images.debian_initramfs()} "
        "-drive id=d,file=/mnt/disk,format=raw,if=none -device virtio-blk-device,drive=d "
        f"-append '{images.command_line('md5sum /dev/vda', 'poweroff -f')}'")
    assert images.md5(images.root_disk()) in retrying(boot)


def test_lz4_copies_that_overlap() -> None:
    block = bytes([0x1F, 0x61, 1, 0, 5]) + bytes([0x30]) + b"xyz"
    data = b"\x02\x21\x4c\x18" + len(block).to_bytes(4, "little") + block
    assert lz4_legacy(data) == b"a" * 25 + b"xyz"

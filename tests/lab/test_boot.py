"""Unmodified Linux in our microVM: kernels, discovery, disks, ends, QMP beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab import images, kernels
from tests.lab.small_kernel import small_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    Play = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.lab

CONTENT = ("md5sum /dev/vda", "mount -o ro /dev/vda /mnt", "cat /mnt/message", "umount /mnt")
DISK = ["-drive", "id=rootfs,file=/mnt/disk,direct=off", "-device",
        "virtio-blk-device,drive=rootfs"]
END: list[list[Any]] = [["event", "SHUTDOWN", 150], ["exit", 60]]
GUEST_END = {"guest": True, "reason": "guest-shutdown"}
CLOCK = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
MANUAL = "console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda"
KATA = ("reboot=k panic=1 net.ifnames=0 pci=off iommu=off acpi=off console=ttyS0 quiet "
        "root=/dev/vda rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4")


def plan(kernel: Path, *arguments: str | Path, initrd: Path | None = None, append: str,
         steps: list[list[Any]], **more: Any) -> dict[str, Any]:
    """A scenario on a microvm with the test's disk (its size is too small for `direct`)."""
    boot = ["-kernel", str(kernel), *(["-initrd", str(initrd)] if initrd else [])]
    return {"arguments": ["-machine", "microvm", "-m", "256", *boot, *map(str, arguments)],
            "append": append, "steps": steps, **more}


@pytest.mark.parametrize("form", ["vmlinuz", "vmlinux"])
def test_debian_boots_and_reads_its_disk(play: Play, form: str) -> None:
    kernel = getattr(kernels.debian_kernel(), form)
    report = play(plan(kernel, *DISK, "-smp", "2", initrd=images.debian_initramfs(),
                       append=images.command_line(*CONTENT, "poweroff -f"),
                       steps=[["qmp", "query-status"], ["output", r"L2 ready.*\n", 60], *END]),
                  files={"disk": images.root_disk()})
    assert report["replies"][0]["status"] == "running"
    assert "cpus=2" in report["replies"][1]
    assert images.md5(images.root_disk()) in report["console"]
    assert images.MESSAGE.strip() in report["console"]
    assert report["replies"][-1]["data"] == GUEST_END
    assert report["exit"] == 0 and report["left"] == []


@pytest.mark.parametrize("form", ["vmlinux", "bzImage", "raw"])
def test_the_manuals_own_command_line(play: Play, form: str) -> None:
    report = play({
        "arguments": ["-machine", "microvm", "-kernel", str(small_kernel()[form]),
                      "-smp", "1", "-m", "1024",
                      "-append", f"{MANUAL} lab.run=cat,/message;reboot,-f",
                      "-drive", "file=/mnt/disk,id=rootfs,readonly=off,direct=off",
                      "-device", "virtio-blk-device,drive=rootfs"],
        "steps": [["qmp", "query-status"], *END]}, files={"disk": images.root_disk()})
    assert images.MESSAGE.strip() in report["console"]
    assert report["replies"][-1]["data"] == GUEST_END
    assert report["exit"] == 0 and report["left"] == []


def test_vmlinux_without_a_pvh_note_boots_by_the_64_bit_protocol(play: Play,
                                                                 tmp_path: Path) -> None:
    image = small_kernel()["vmlinux"].read_bytes()
    note = re.compile(rb"\x04\0\0\0.\0\0\0\x12\0\0\0Xen\0", re.DOTALL)  # PHYS32_ENTRY
    assert len(note.findall(image)) == 1
    plain = tmp_path / "kernel"
    plain.write_bytes(note.sub(lambda found: found[0].replace(b"Xen", b"Xyz"), image))
    report = play(plan(Path("/mnt/kernel"), initrd=images.plain_initramfs(),
                       append=images.command_line("poweroff -f"), steps=END),
                  files={"kernel": plain})
    assert "L2 ready" in report["console"] and report["exit"] == 0


@pytest.mark.parametrize(("way", "said"), [
    ("reboot -f", "Restarting system"), ("echo c > /proc/sysrq-trigger", "Kernel panic")])
def test_a_reboot_and_a_panic_end_a_microvm(play: Play, way: str, said: str) -> None:
    """By ACPI's reset register: images.COMMAND_LINE has no reboot=k, but panic=1."""
    report = play(plan(kernels.debian_kernel().vmlinux, initrd=images.debian_initramfs(),
                       append=images.command_line(CLOCK, way), steps=END))
    assert said in report["console"]
    assert "kvm-clock" in report["console"]
    assert report["replies"][-1]["data"] == GUEST_END
    assert report["exit"] == 0 and report["left"] == []


def test_katas_command_line_without_acpi(play: Play) -> None:
    report = play({
        "arguments": ["-name", "sandbox-1", "-uuid", "8f3d1c52-6a4e-4b6f-9a3f-0d9c5f1b2a3c",
                      "-smp", "1", "-m", "512", "-kernel", str(small_kernel()["vmlinux"]),
                      "-append", f"{KATA} lab.run=cat,/message;reboot,-f",
                      "-D", "-disable-seccomp",
                      "-machine", "type=microvm,dump-guest-core=off,mem-share=on",
                      "-drive", "id=rootfs,file=/mnt/disk,readonly=on,direct=off",
                      "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0"],
        "steps": [["qmp", "query-cpus"], *END]}, files={"disk": images.root_disk()})
    assert report["replies"][0][0]["thread_id"] > 0
    assert images.MESSAGE.strip() in report["console"]
    assert report["replies"][-1]["data"] == GUEST_END
    assert report["exit"] == 0


def test_power_button_powers_debian_off(play: Play) -> None:
    report = play(plan(kernels.debian_kernel().vmlinux, initrd=images.debian_initramfs(),
                       append=images.command_line(),
                       steps=[["output", "L2 shell", 60], ["qmp", "system_powerdown"],
                              ["event", "POWERDOWN", 60], *END]))
    assert "L2 power button" in report["console"]
    assert report["replies"][-1]["data"] == GUEST_END and report["exit"] == 0


def test_stop_and_cont_under_linux(play: Play) -> None:
    report = play(plan(small_kernel()["vmlinux"], *DISK,
                       append=f"{images.COMMAND_LINE} root=/dev/vda",
                       steps=[["output", "L2 shell", 60], ["qmp", "stop"],
                              ["qmp", "query-status"], ["send", "echo awake $((40+2))\n"],
                              ["run", "sleep 1"], ["qmp", "query-status"], ["qmp", "cont"],
                              ["output", "awake 42", 60], ["send", "poweroff -f\n"], *END]),
                  files={"disk": images.root_disk()})
    assert [event["event"] for event in report["events"]] == ["STOP", "RESUME", "SHUTDOWN"]
    assert report["replies"][2]["status"] == "paused"


def test_what_the_guest_writes_reaches_the_image(play: Play, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.write_bytes(bytes(1 << 20))
    report = play(plan(kernels.debian_kernel().vmlinux, *DISK, "-drive",
                       "id=second,file=/mnt/second,direct=off",
                       "-device", "virtio-blk-device,drive=second,serial=SECOND",
                       initrd=images.debian_initramfs(),
                       append=images.command_line(
                           "cat /sys/block/vdb/serial", "dd if=/dev/vda of=/dev/vdb bs=64k count=8",
                           "sync", "md5sum /dev/vdb", "poweroff -f"), steps=END),
                  files={"disk": images.root_disk(), "second": second})
    assert "SECOND" in report["console"]
    expected = images.root_disk().read_bytes()[: 512 << 10]
    assert report["files"]["second"] == expected + bytes(512 << 10)


def test_several_processors(play: Play) -> None:
    """Many of them: tests/vm, where no emulator is in the way."""
    topology = "/sys/devices/system/cpu/cpu3/topology"
    report = play(plan(small_kernel()["vmlinux"], "-smp", "4,sockets=2,cores=2",
                       initrd=images.plain_initramfs(),
                       append=images.command_line(
                           f"echo core=$(cat {topology}/core_id)"
                           f" package=$(cat {topology}/physical_package_id)"
                           f" with=$(cat {topology}/package_cpus_list)", "poweroff -f"),
                       steps=[["output", r"L2 ready.*\n", 60], *END]), tries=3)
    assert "cpus=4" in report["replies"][0]
    assert "core=1 package=1 with=2-3" in report["console"]


# Where a Debian kernel waits if it believes in them: seconds that it may take to find out.
ABSENT = {"cmos_init": 0.5, "i8042_init": 0.3, "serial8250_init": 1.0}


def test_nothing_waits_for_absent_hardware(play: Play) -> None:
    """With none of the options that would hide it (images.COMMAND_LINE has them)."""
    report = play(plan(
        kernels.debian_kernel().vmlinux, initrd=images.debian_initramfs(),
        append=f"{MANUAL} initcall_debug log_buf_len=4M lab.run=" + ";".join(
            f"dmesg|grep,{words}" for words in (
                "-i,-e,calibrat,-e,rtc,-e,i8042,-e,hpet",
                ",".join(f"-e,initcall.{name}+" for name in ABSENT))) + ";poweroff,-f",
        steps=END))
    text = report["console"]
    assert "Calibrating delay loop (skipped)" in text, text
    for complaint in ("broken or not accessible", "Probing ports directly", "Can't read CTR",
                      "Fast TSC calibration", "using PIT calibration", "using HPET"):
        assert complaint not in text, text
    taken = {name: int(microseconds) / 1e6 for name, microseconds in re.findall(
        r"initcall (\w+)\+.* after (\d+) usecs", text)}
    for name, limit in ABSENT.items():
        assert taken[name] < limit, f"{name}: {taken[name]} s\n{text}"


def test_disk_of_a_foreign_back_end(play: Play) -> None:
    """qemu-storage-daemon over vhost-user: our front end against somebody else's back end."""
    report = play(plan(
        kernels.debian_kernel().vmlinux, "-chardev", "socket,id=back,path=/tmp/back.sock",
        "-device", "vhost-user-blk-device,chardev=back,id=blk0",
        initrd=images.debian_initramfs(),
        append=images.command_line(*CONTENT, "poweroff -f"),
        before=["exec qemu-storage-daemon --blockdev file,node-name=f,filename=/mnt/disk "
                "--export vhost-user-blk,id=e,node-name=f,writable=on,"
                "addr.type=unix,addr.path=/tmp/back.sock"],
        steps=END), files={"disk": images.root_disk()})
    assert images.md5(images.root_disk()) in report["console"]
    assert images.MESSAGE.strip() in report["console"]

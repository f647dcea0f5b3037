"""The demo: an unmodified Debian kernel in our microVM, its disk from a worker, QMP beside it.

    python -m tests.lab.demo [--shell]

Runs on /dev/kvm where the processor has VMX or SVM, else in the nested lab, and says which. It
ends by itself; with --shell the guest's console is the terminal until the guest powers off.
"""

from __future__ import annotations

import compileall
import json
import os
import pty
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.lab import images, kernels
from tests.lab.lab import ROOT, Lab, LabError, LabHang, obtain_snapshot
from tests.support.test_vm import TestVm, VmFailure, product_command

LIMIT = 110.0
KILLED = 137  # by `timeout -s KILL`
PARTS = ("vmm", "workers", "shared", "native", "tests/support", "tests/lab")
ME = "tests.lab.demo"


def say(text: str) -> None:
    """One line of the demo's own."""
    print(f"demo: {text}", flush=True)


def has_hardware_kvm() -> bool:
    """Whether an unmodified Linux can run on this machine's /dev/kvm."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return ("vmx" in flags or "svm" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def run(shell: bool = False) -> int:
    """The demo; its exit status. Kernels and the lab's snapshot are made first if need be."""
    say("preparing: Debian's kernel, a small user space, a disk")
    kernel, initrd = kernels.debian_kernel(), images.debian_initramfs()
    setting = {"kernel": str(kernel.vmlinux), "initrd": str(initrd), "release": kernel.release,
               "md5": images.md5(images.root_disk())}
    if has_hardware_kvm():
        say("this processor has VMX or SVM: the guest runs on /dev/kvm")
        disk = Path(tempfile.mkdtemp(prefix="demo-")) / "disk"
        shutil.copy(images.root_disk(), disk)
        try:
            return inside({**setting, "disk": str(disk)}, shell)
        finally:
            shutil.rmtree(disk.parent)
    say("this processor has no VMX or SVM to give: the guest runs in the nested lab "
        "(QEMU emulates a processor with SVM; about 20 times slower)")
    obtain_snapshot()
    for part in PARTS:
        compileall.compile_dir(str(ROOT / part), quiet=2)
    try:
        return in_lab(setting, shell)
    except LabHang:
        say("the lab hung, which QEMU's emulation sometimes does: once more")
        return in_lab(setting, shell)


def in_lab(setting: dict[str, str], shell: bool) -> int:
    """The same in a fresh L1, its output passed on as it comes."""
    began = time.monotonic()
    with Lab.acquire() as lab:
        say(f"the lab is up after {time.monotonic() - began:.1f} s")
        shutil.copy(images.root_disk(), lab.share / "disk")
        (lab.share / "setting").write_text(json.dumps({**setting, "disk": "/mnt/disk"}))
        command = (f"cd {ROOT} && export HOME=/root PYTHONDONTWRITEBYTECODE=1 "
                   f"PATH={os.environ['PATH']} && exec {sys.executable} -u -m {ME} "
                   f"--inside /mnt/setting")
        if shell:
            from tests.lab.__main__ import bridge

            port = lab.connect_port("tty")
            lab.start(f"{command} --shell <>/dev/vport0p2 >&0 2>&1", 36000)
            say("ctrl-] leaves")
            bridge(port, lab.agent)
            return 0
        lab.start(command, LIMIT)
        return follow(lab)


def follow(lab: Lab) -> int:
    """Print what the script in L1 prints until it ends; its exit status."""
    codes: list[int] = []
    failure: list[LabHang] = []

    def wait() -> None:
        try:
            codes.append(lab.finish(LIMIT + 5).code)
        except LabHang as error:
            failure.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    shown = 0
    while True:
        ended = not waiter.is_alive()
        text = lab.output_so_far()
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
        if ended:
            break
        waiter.join(0.1)
    if failure:
        raise failure[0]
    if codes[0] == KILLED:
        say(f"not at its end after {LIMIT:.0f} s: this machine is too busy or too slow for it")
    return codes[0]


def arguments(setting: dict[str, str], *commands: str) -> list[str]:
    """The VM's command line but for -qmp and -serial."""
    return ["-machine", "microvm", "-name", "demo", "-smp", "2", "-m", "256",
            "-kernel", setting["kernel"], "-initrd", setting["initrd"],
            "-append", images.command_line(*commands),
            "-drive", f"id=disk,file={setting['disk']},direct=off",
            "-device", "virtio-blk-device,drive=disk,id=blk0"]


def inside(setting: dict[str, str], shell: bool) -> int:
    """The demo where KVM is real."""
    folder = Path(tempfile.mkdtemp(prefix="demo-vm-"))
    if shell:
        line = [*product_command(), *arguments(setting), "-serial", "stdio",
                "-qmp", f"unix:{folder}/qmp.sock,server,nowait"]
        if os.isatty(0):
            return os.spawnv(os.P_WAIT, line[0], line)
        return os.waitstatus_to_exitcode(pty.spawn(line))  # the lab's port is no terminal
    say("starting: stratovirt " + " ".join(arguments(setting)) + " -qmp … -serial stdio")
    try:
        return story(folder, setting)
    except (VmFailure, TimeoutError, EOFError) as error:
        say(f"FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def story(folder: Path, setting: dict[str, str]) -> int:
    """Boot, look at it over QMP, read the disk in the guest, power off."""
    commands = ("uname -a", "md5sum /dev/vda", "mount -o ro /dev/vda /mnt", "cat /mnt/message")
    began = time.monotonic()
    with TestVm(folder, *arguments(setting, *commands)) as vm:
        console = threading.Thread(target=show_console, args=(vm,))
        console.start()
        show(vm, "greeting", vm.qmp.greeting)
        for name in ("qmp_capabilities", "query-status", "query-cpus", "query-workers"):
            show(vm, name, vm.qmp.command(name))
        vm.wait_output("L2 shell", LIMIT)
        say(f"user space after {time.monotonic() - began:.1f} s; now stop, look, cont")
        for name in ("stop", "query-status", "cont"):
            show(vm, name, vm.qmp.command(name))
        vm.send("poweroff -f\n")
        show(vm, "event", vm.qmp.wait_event("SHUTDOWN", 30))
        status = vm.wait(20)
        console.join(5)
        text = vm.output.decode(errors="replace")
    right = setting["md5"] in text and images.MESSAGE.strip() in text
    say(f"the disk's MD5 on the host: {setting['md5']}; the guest read "
        f"{'the same' if right else 'SOMETHING ELSE'}")
    say(f"the VMM ended with status {status} after {time.monotonic() - began:.1f} s")
    return 0 if right and status == 0 else 1


def show(vm: TestVm, name: str, answer: Any) -> None:
    """One QMP exchange."""
    if name not in ("greeting", "event"):
        print(f'QMP <- {{"execute":"{name}"}}')
    print(f"QMP -> {json.dumps(answer)}", flush=True)


def show_console(vm: TestVm) -> None:
    """Print the guest's console line by line until the VM has ended."""
    shown = 0
    while True:
        ended = vm.process.poll() is not None
        end = vm.output.rfind(b"\n") + 1
        for line in vm.output[shown:end].splitlines():
            print(f"guest| {line.decode(errors='replace')}", flush=True)
        shown = max(end, shown)
        if ended:
            return
        time.sleep(0.05)


def main() -> int:
    """The command line above."""
    shell = "--shell" in sys.argv
    if "--inside" in sys.argv:
        setting = json.loads(Path(sys.argv[sys.argv.index("--inside") + 1]).read_text())
        return inside(setting, shell)
    try:
        return run(shell)
    except LabError as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""The nested lab: a machine with a real KVM (L1) where the host's processor has none to give.

L1 is QEMU with TCG, emulating an AMD processor with SVM, and runs Debian's kernel. Scripts run in
it on the host's own files (read-only), so that the product under test needs no copy. L1 is booted
once, then kept as a snapshot: `Lab.acquire()` gives a fresh one in about a second.

    with Lab.acquire() as lab:
        (lab.share / "input").write_text("…")          # is /mnt/input inside
        code, output = lab.run("cat /mnt/input", timeout=10)

Inside: / is the host's root, read-only; /tmp and /run are empty and writable; /mnt is the share.
QEMU's TCG has been seen to hang as a whole: every wait has a time limit on the host (LabHang), and
`retrying` tries once more.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from tests.lab import cache, initramfs, kernels
from tests.support.qmp import QmpClient

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MODULES = ["virtio_pci", "virtio_console", "9p", "9pnet_virtio", "virtio_blk", "kvm_amd", "tun",
           "tap", "bridge", "veth", "vhost_net", "vhost_vsock", "loop", "overlay", "fuse"]
COMMAND_LINE = ("console=ttyS0 panic=1 quiet mitigations=off nokaslr no_timer_check tsc=reliable "
                "cryptomgr.notests 8250.nr_uarts=1 nowatchdog random.trust_cpu=on")
QEMU = "qemu-system-x86_64"
MEMORY = 2048  # MiB
# Limits are for a machine that is broken, not for one that is slow.
BOOT_LIMIT = 300.0
START_LIMIT = 120.0
PROCESSORS = 2
BEAT_LIMIT = 45.0  # seconds without a sign of life of one of L1's processors; they come every 4
HEALTH_LIMIT = 20.0
HOST_MARGIN = 30.0  # seconds that an answer may come after the script's own limit


class LabError(RuntimeError):
    """The lab can't be had or broke; the text says where."""


class LabHang(LabError):
    """L1 doesn't answer any more: not the fault of what ran in it."""


class Result(NamedTuple):
    """What a script answered; `code` is 137 if it was killed for its time limit."""

    code: int
    output: str


class Lab:
    """One running L1."""

    def __init__(self, folder: Path, restore: Path | None) -> None:
        self.folder = folder
        self.share = folder / "share"
        self.share.mkdir()
        self.scripts = 0
        self.ready_seconds = 0.0
        self.buffer = b""
        self.beats: dict[int, float] = {}  # when each processor last said that it lives
        began = time.monotonic()
        self.console = folder / "console"
        self.process = subprocess.Popen(
            qemu_command(folder, restore), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=(folder / "qemu.log").open("wb"),
            start_new_session=True)
        try:
            self.agent = self._connect("agent")
            self.beat = self._connect("beat")
            self.qmp = QmpClient(str(folder / "qmp"), START_LIMIT)
            self.qmp.command("qmp_capabilities")
            if restore is None:
                self._expect("ready", BOOT_LIMIT)
            else:
                self._resume()
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.monotonic() - began

    @classmethod
    def acquire(cls) -> Lab:
        """A fresh L1; the first time (or after a change) its kernel and snapshot are made.

        :raises LabError: QEMU or a package is missing, or L1 doesn't boot.
        """
        if shutil.which(QEMU) is None:
            raise LabError(f"the lab needs {QEMU}: apt-get install qemu-system-x86")
        snapshot = obtain_snapshot() / "state"
        lab = retrying(lambda: cls(Path(tempfile.mkdtemp(prefix="lab-")), snapshot))
        try:
            lab._mount()
        except BaseException:
            lab.close()
            raise
        return lab

    def run(self, script: str, timeout: float = 60) -> Result:
        """Run a shell script in L1; its standard output and error come back as text.

        :param timeout: seconds until it is killed (code 137).
        :raises LabHang: L1 itself gave no answer.
        """
        self.start(script, timeout)
        return self.finish(timeout + HOST_MARGIN)

    def start(self, script: str, timeout: float = 60) -> None:
        """Start a script and don't wait; one at a time."""
        self.scripts += 1
        self.beats = dict.fromkeys(range(PROCESSORS), time.monotonic())
        (self.share / f"{self.scripts}.sh").write_text(script + "\n")
        self._send(f"{self.scripts} {max(int(timeout), 1)}\n")

    def finish(self, timeout: float) -> Result:
        """Wait for the script that `start` began."""
        answer = self._line(timeout)
        if not answer.startswith(f"{self.scripts} "):
            raise LabHang(f"the lab's agent answered {answer!r}, not {self.scripts}")
        return Result(int(answer.split()[1]), self.output_so_far())

    def output_so_far(self) -> str:
        """What the running (or last) script has printed."""
        path = self.share / f"{self.scripts}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def check(self, script: str, timeout: float = 60) -> str:
        """Like `run`; the output. :raises AssertionError: the script failed."""
        result = self.run(script, timeout)
        assert result.code == 0, f"in the lab: exit {result.code} of {script!r}:\n{result.output}"
        return result.output

    def require_health(self) -> None:
        """Every processor of L1 still runs what it is given, and no guest met a triple fault.

        QEMU's emulation of SVM now and then leaves a processor in the guest with its global
        interrupt flag clear: deaf for ever, while the others go on for a while. Or it takes a
        nested page fault when it is back in L1 already and saves L1's own state as the guest's,
        which then ends by a triple fault at an address of L1 (seen with all of KVM's tracepoints
        on: the instruction behind VMRUN, and the fault's address is L1's page table). L1's kernel
        and a guest's have the same addresses, so no triple fault here says anything about the
        product, unless it comes each time; tests/vm has them on a real KVM.

        :raises LabHang: one doesn't.
        """
        self.require_no_triple_fault()
        answer = self.run("for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu true; done",
                          HEALTH_LIMIT)
        if answer.code:
            raise LabHang(f"a processor of the lab runs nothing any more: {answer}; "
                          f"{self._last_words()}")

    def require_no_triple_fault(self) -> None:
        """:raises LabHang: a guest met one, which `require_health` explains."""
        answer = self.run("mountpoint -q /sys/kernel/tracing || "
                          "mount -t tracefs tracefs /sys/kernel/tracing; "
                          "cat /sys/kernel/tracing/trace; grep ' __svm_vcpu_run' /proc/kallsyms",
                          HEALTH_LIMIT)
        if faults := re.findall(r".* kvm_exit: .*reason shutdown rip .*", answer.output):
            loop = answer.output.rstrip().rpartition("\n")[2]
            raise LabHang(f"a guest ended by a triple fault: {faults[0].strip()}; L1 has {loop}")

    def close(self) -> None:
        """End L1 and remove its folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for name in ("agent", "beat", "qmp"):
            if hasattr(self, name):
                getattr(self, name).close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, path: Path) -> None:
        """Write the state of this L1, freshly booted, to `path`; it is stopped then."""
        self.qmp.command("stop")
        self.qmp.command("migrate-set-parameters", max_bandwidth=1 << 33)
        self.qmp.command("migrate", uri=f"exec:cat > {path}")
        deadline = time.monotonic() + START_LIMIT
        while (status := self.qmp.command("query-migrate").get("status")) != "completed":
            if status == "failed" or time.monotonic() > deadline:
                raise LabError(f"the lab's snapshot can't be saved: {status}")
            time.sleep(0.02)

    def connect_port(self, name: str) -> socket.socket:
        """The host's end of a virtio-serial port: `tty` is /dev/vport0p2 inside."""
        return self._connect(name)

    # ---- inside ------------------------------------------------------------------------------

    def _resume(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while self.qmp.command("query-status")["status"] == "inmigrate":
            if time.monotonic() > deadline:
                raise LabHang("the lab's snapshot doesn't load")
            time.sleep(0.01)
        self.qmp.command("cont")

    def _mount(self) -> None:
        visible = f"{ROOT} {cache.cache_dir()}"
        self._send(f"{int(time.time())} {visible}\n")
        self._expect("mounted", START_LIMIT)

    def _expect(self, wanted: str, limit: float) -> None:
        line = self._line(limit)
        if line != wanted:
            raise LabError(f"the lab's agent says {line!r}, not {wanted!r}")

    def _send(self, text: str) -> None:
        try:
            self.agent.sendall(text.encode())
        except OSError as error:
            raise LabHang(f"the lab's agent is gone: {error}; {self._last_words()}") from None

    def _line(self, limit: float) -> str:
        deadline = time.monotonic() + limit
        while b"\n" not in self.buffer:
            remaining = deadline - time.monotonic()
            ready, _, _ = select.select([self.agent, self.beat], [], [], min(max(remaining, 0), 2))
            try:
                data = self.agent.recv(4096) if self.agent in ready else None
                self._take_beats(self.beat.recv(4096) if self.beat in ready else b"")
            except OSError:
                data = b""
            if data == b"" or (data is None and remaining <= 0):
                raise LabHang(f"the lab gave no answer in {limit:.0f} s; {self._last_words()}")
            self.buffer += data or b""
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode()

    def _take_beats(self, data: bytes) -> None:
        now = time.monotonic()
        self.beats.update({int(number): now for number in data.split()})
        silent = [number for number, last in self.beats.items() if now - last > BEAT_LIMIT]
        if silent:
            raise LabHang(f"the lab's processor {silent[0]} shows no sign of life; "
                          f"{self._last_words()}")

    def _connect(self, name: str) -> socket.socket:
        deadline = time.monotonic() + START_LIMIT
        while True:
            client = socket.socket(socket.AF_UNIX)
            try:
                client.connect(str(self.folder / name))
                return client
            except OSError:
                client.close()
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise LabHang(f"the lab's QEMU didn't start; {self._last_words()}")
            time.sleep(0.01)

    def _last_words(self) -> str:
        texts = [path.read_text(errors="replace")[-500:].strip()
                 for path in (self.folder / "qemu.log", self.console) if path.exists()]
        return "; ".join(text for text in texts if text) or "no message"


def qemu_command(folder: Path, restore: Path | None) -> list[str]:
    """L1's command line; all of it matters for its speed and for the snapshot to fit."""
    kernel = kernels.debian_kernel(kernels.OUTER)
    share = folder / "share"
    command = [
        QEMU, "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt",
        "-m", str(MEMORY), "-smp", str(PROCESSORS), "-nodefaults", "-nic", "none",
        "-kernel", str(kernel.vmlinux), "-initrd", str(outer_initramfs()),
        "-append", COMMAND_LINE, "-display", "none", "-serial", f"file:{folder / 'console'}",
        "-monitor", "none", "-qmp", f"unix:{folder / 'qmp'},server=on,wait=off", "-no-reboot",
        "-device", "virtio-serial-pci"]
    for name in ("agent", "tty", "beat"):
        command += ["-chardev", f"socket,id={name},path={folder / name},server=on,wait=off",
                    "-device", f"virtserialport,chardev={name},name={name}"]
    command += [
        "-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=root,mount_tag=hostroot",
        "-fsdev", f"local,id=out,path={share},security_model=none",
        "-device", "virtio-9p-pci,fsdev=out,mount_tag=out"]
    if restore is not None:
        command += ["-incoming", f"exec:cat {restore}"]
    return command


def outer_initramfs() -> Path:
    """L1's initramfs, cached by what it is made of."""
    kernel = kernels.debian_kernel(kernels.OUTER)
    key = cache.key_of(HERE / "l1-init", " ".join(MODULES), kernel.release,
                       HERE / "initramfs.py")

    def make(folder: Path) -> None:
        modules = kernels.module_files(kernel, MODULES)
        files = initramfs.tree(HERE / "l1-init", modules)
        (folder / "initramfs").write_bytes(initramfs.cpio(files))

    return cache.obtain("outer-initramfs", key, make) / "initramfs"


def obtain_snapshot() -> Path:
    """The folder with L1's saved state, made if there is none for this QEMU and these files."""
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True,
                             check=True).stdout
    shape = " ".join(qemu_command(Path("/lab"), None))
    return cache.obtain("lab", cache.key_of(version, shape, "1"), _make_snapshot)


def _make_snapshot(folder: Path) -> None:
    def boot() -> None:
        with Lab(Path(tempfile.mkdtemp(prefix="lab-")), None) as lab:
            lab.save(folder / "state")

    retrying(boot)


def retrying(action: Callable[[], T]) -> T:
    """`action()`, and up to twice more if L1 hangs: the emulator's fault, not the product's."""
    for _ in range(2):
        try:
            return action()
        except LabHang as error:
            print(f"lab: {error}; once more", file=sys.stderr)
    return action()

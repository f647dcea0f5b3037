"""The core's own confinement, tried from inside: on its main thread, a helper, a vCPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from native._core import lib
from tests.support.blk_worker import ROOT
from tests.support.fake_vhost import VCPU_REQUESTS

pytestmark = pytest.mark.worker

# A core that confines itself, then tries system calls on each kind of thread; prints how each
# ended, and that a nursery can still be started.
CORE = """
import ctypes, _thread, json, os, sys, time
from tests.support.sandbox_probe import call
from vmm.config.model import SandboxConfig
from vmm.confinement import confine_main, vcpu_confinement
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery
calls, off, image = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
sandbox = SandboxConfig()
sandbox.off_stages = tuple(off)
results = {}

def attempts(kind, before):
    before()
    status = dict(line.split(":", 1) for line in open("/proc/thread-self/status"))
    facts = {name: status[name].strip() for name in ("CapEff", "CapPrm", "Seccomp", "NoNewPrivs")}
    results[kind] = [facts, [call(name, *arguments) for name, arguments in calls]]

def on_thread(kind, before):
    def run():
        try:
            attempts(kind, before)
        finally:
            done.release()
    done = _thread.allocate_lock()
    done.acquire()
    _thread.start_new_thread(run, ())
    assert done.acquire(True, 10)

call("getpid")
nursery = Nursery(EventLoop(), off)
nursery.start()
on_thread("vcpu", vcpu_confinement(sandbox))
attempts("main", lambda: confine_main(sandbox, nursery))
on_thread("helper", lambda: None)
nursery.retire()
worker = nursery.spawn("blk", "disk", {"image": os.open(image, os.O_RDWR)}, {})
fine = worker.wait_started(time.monotonic() + 10)
results["worker"] = [worker.stages, worker.reason]
nursery.close()
print(json.dumps(results))
"""

Calls = list[tuple[str, list[object]]]


def run(tmp_path: Path, calls: Calls, off: tuple[str, ...] = ()) -> dict[str, list[object]]:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    done = subprocess.run([sys.executable, "-c", CORE, json.dumps(calls), json.dumps(off),
                           str(image)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, list[object]] = json.loads(done.stdout)
    return result


NEWUSER, NEWNS = 0x10000000, 0x20000
EVERYWHERE: Calls = [
    ("execve", ["/bin/true", 0, 0]), ("execveat", [-100, "/bin/true", 0, 0, 0]), ("fork", []),
    ("vfork", []), ("clone", [17, 0, 0, 0, 0]), ("clone", [NEWUSER | 17, 0, 0, 0, 0]),
    ("ptrace", [16, os.getpid(), 0, 0]), ("process_vm_readv", [os.getpid(), 0, 0, 0, 0, 0]),
    ("process_vm_writev", [os.getpid(), 0, 0, 0, 0, 0]), ("pidfd_getfd", [0, 0, 0]),
    ("kill", [os.getpid(), 0]), ("tkill", [1, 0]), ("kcmp", [1, 1, 0, 0, 0]),
    ("mount", ["", "/", "", 0, 0]), ("umount2", ["/x", 2]), ("pivot_root", ["/", "/"]),
    ("chroot", ["/"]), ("open_tree", [-100, "/", 1]), ("move_mount", [0, "", 0, "", 0]),
    ("fsopen", ["tmpfs", 0]), ("mount_setattr", [-100, "/", 0, 0, 0]),
    ("setns", [0, 0]), ("unshare", [NEWUSER]), ("unshare", [NEWNS]),
    ("setuid", [0]), ("setresuid", [0, 0, 0]), ("setgroups", [0, 0]), ("bpf", [0, 0, 0]),
    ("perf_event_open", [0, 0, 0, 0, 0]), ("init_module", [0, 0, ""]), ("reboot", [0, 0, 0, 0]),
    ("kexec_load", [0, 0, 0, 0]), ("clock_settime", [0, 0]), ("sethostname", ["x", 1]),
    ("iopl", [3]), ("keyctl", [0, 0, 0, 0, 0]), ("io_uring_setup", [1, 0]),
    ("open_by_handle_at", [-100, 0, 0]), ("mknod", ["/x", 0x2000, 0]), ("personality", [0]),
]
# The vCPUs' list is one of what they may.
VCPU_ONLY: Calls = [
    ("openat", [-100, "/nowhere", 0o102, 0]), ("openat", [-100, "/nowhere", 1, 0]),
    ("open", ["/etc/passwd", 0, 0]), ("socket", [1, 1, 0]), ("connect", [0, 0, 0]),
    ("bind", [0, 0, 0]), ("unlink", ["/nowhere"]), ("unlinkat", [-100, "/nowhere", 0]),
    ("rename", ["/nowhere", "/x"]), ("mkdir", ["/proc/x", 0]), ("chmod", ["/nowhere", 0]),
    ("prctl", [4, 0, 0, 0, 0]), ("capset", [0, 0]), ("prlimit64", [0, 7, 0, 0]),
    ("seccomp", [0, 0, 0]), ("mmap", [0, 4096, 7, 0x22, -1, 0]), ("mprotect", [0, 4096, 7]),
    ("ioctl", [0, 0x5412, 0]), ("userfaultfd", [0]), ("memfd_secret", [0]),
    ("pidfd_send_signal", [0, 0, 0, 0]), ("shmget", [0, 4096, 0o1000]),
]


def test_what_no_thread_may(tmp_path: Path) -> None:
    results = run(tmp_path, EVERYWHERE)
    for kind in ("main", "helper", "vcpu"):
        facts, outcomes = results[kind]
        assert isinstance(facts, dict) and isinstance(outcomes, list)
        assert facts["Seccomp"] == "2" and facts["NoNewPrivs"] == "1"
        bad = {f"{name} {arguments}": outcome for (name, arguments), outcome
               in zip(EVERYWHERE, outcomes, strict=True) if outcome != "EPERM"}
        assert not bad, kind
        wanted = "0" * 16 if kind == "vcpu" or os.geteuid() else "0000000000005022"
        assert facts["CapEff"] == facts["CapPrm"] == wanted
    # The keeper has started another nursery, whose workers lack nothing.
    from shared.sandbox.stages import DESCRIPTIONS

    stages, reason = results["worker"]
    assert stages == [name for name in DESCRIPTIONS if name != "uid" or os.geteuid() == 0], reason


def test_what_a_vcpu_may_not_either(tmp_path: Path) -> None:
    _, outcomes = run(tmp_path, VCPU_ONLY)["vcpu"]
    assert isinstance(outcomes, list)
    bad = {f"{name} {arguments}": outcome for (name, arguments), outcome
           in zip(VCPU_ONLY, outcomes, strict=True) if outcome != "EPERM"}
    assert not bad


def test_what_a_vcpu_may_ask_of_vhost(tmp_path: Path) -> None:
    """Start and stop rings; not make a device of a descriptor that it opened itself."""
    requests = {name: getattr(lib, name) for name in dir(lib) if name.startswith("VHOST_")}
    assert {"VHOST_SET_OWNER", "VHOST_VSOCK_SET_GUEST_CID"} < requests.keys() - VCPU_REQUESTS
    other = {"VHOST_RESET_OWNER": 0xAF02, "VHOST_SET_LOG_BASE": 0x4008AF04,
             "VHOST_SET_LOG_FD": 0x4004AF07, "VHOST_NET_SET_BACKEND": 0x4008AF30}
    calls: Calls = [("ioctl", [0, number, 0]) for number in (*requests.values(), *other.values())]
    results = run(tmp_path, calls)
    wanted = {name: "ENOTTY" if name in VCPU_REQUESTS else "EPERM" for name in requests | other}
    assert dict(zip(wanted, results["vcpu"][1], strict=True)) == wanted  # type: ignore[call-overload]
    assert results["main"][1] == results["helper"][1] == ["ENOTTY"] * len(calls)


def test_clone3_makes_the_c_library_use_clone(tmp_path: Path) -> None:
    results = run(tmp_path, [("clone3", [0, 0])])
    assert [results[kind][1] for kind in ("main", "helper", "vcpu")] == [["ENOSYS"]] * 3


def test_stages_given_up_are_the_core_s_too(tmp_path: Path) -> None:
    results = run(tmp_path, [("getppid", [])], ("seccomp", "capabilities"))
    for kind in ("main", "helper", "vcpu"):
        facts = results[kind][0]
        assert isinstance(facts, dict)
        assert facts["Seccomp"] == "0" and facts["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            assert int(facts["CapEff"], 16) & ~0x5022

"""What somebody who has taken over a worker can reach: nothing. Tried from inside."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.sandbox import stages
from shared.sandbox.stages import ALWAYS, DESCRIPTIONS, NAMES
from tests.support.capabilities import require
from tests.support.sandbox import probe_nursery
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery

pytestmark = pytest.mark.worker

PROC_ATTACH = 16  # PTRACE_ATTACH


class Prober:
    """Starts probes with some stages off."""

    def __init__(self, tmp_path: Path) -> None:
        self.loop = EventLoop()
        self.nurseries: dict[tuple[str, ...], Nursery] = {}
        self.image = os.open(tmp_path / "disk.img", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.image, 1 << 20)

    def attempt(self, name: str, *arguments: object, off: tuple[str, ...] = ()) -> str:
        """How a probe ended: "result: …", "refused NAME", or else its whole reason."""
        if off not in self.nurseries:
            self.nurseries[off] = probe_nursery(self.loop, off)
        worker = self.nurseries[off].spawn("blk", "probe", {"image": self.image},
                                           {"attempt": name, "arguments": list(arguments)})
        deadline = time.monotonic() + 20
        while worker.state != "dead":
            assert time.monotonic() < deadline, "the probe didn't end"
            self.loop.run_once(0.05)
        worker.discard()  # nobody took its socket
        self.stages = worker.stages
        reason = worker.reason.partition(": ")[2] or worker.reason
        _, refused, call = reason.partition("its sandbox refused system call ")
        return "refused " + call.partition("(")[2].rstrip(")") if refused else reason

    def call(self, name: str, *arguments: object, off: tuple[str, ...] = ()) -> str:
        return self.attempt("call", name, *arguments, off=off)

    def close(self) -> None:
        for nursery in self.nurseries.values():
            nursery.close()
        self.loop.close()
        os.close(self.image)


@pytest.fixture(scope="module")
def prober(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prober]:
    require("userns")
    require("landlock")
    prober = Prober(tmp_path_factory.mktemp("sandbox"))
    yield prober
    prober.close()


def only(*stages: str) -> tuple[str, ...]:
    """All stages off but these."""
    return tuple(name for name in NAMES if name not in stages)


# ---- the filter, with everything in force ------------------------------------------------------

SHM = 0o1000  # IPC_CREAT
REFUSED: list[tuple[str, tuple[object, ...]]] = [
    ("openat", (-100, b"/etc/passwd", 0, 0)), ("open", (b"/dev/null", 0, 0)),
    ("openat2", (-100, b"/", 0, 0)), ("open_tree", (-100, b"/", 0)), ("creat", (b"/x", 0o600)),
    ("mkdir", (b"/x", 0o700)), ("unlink", (b"/x",)), ("rename", (b"/x", b"/y")),
    ("readlink", (b"/proc/self", 0, 0)), ("stat", (b"/", 0)), ("statx", (-100, b"/", 0, 0, 0)),
    ("access", (b"/", 0)), ("getdents64", (0, 0, 0)), ("name_to_handle_at", (-100, b"/", 0, 0, 0)),
    ("open_by_handle_at", (-100, 0, 0)), ("chdir", (b"/",)), ("fchdir", (0,)),
    ("chroot", (b"/",)), ("mount", (b"", b"/", b"", 0, 0)), ("umount2", (b"/", 2)),
    ("pivot_root", (b".", b".")), ("move_mount", (0, b"", 0, b"", 0)), ("fsopen", (b"tmpfs", 0)),
    ("fchmod", (0, 0)), ("fchown", (0, 0, 0)), ("ftruncate", (0, 0)), ("truncate", (b"/", 0)),
    ("socket", (2, 1, 0)), ("socketpair", (1, 1, 0, 0)), ("connect", (0, 0, 0)),
    ("bind", (0, 0, 0)), ("listen", (0, 0)), ("accept4", (0, 0, 0, 0)),
    ("setsockopt", (0, 0, 0, 0, 0)), ("shutdown", (0, 0)),
    ("kill", (1, 9)), ("kill", (-1, 9)), ("tkill", (1, 9)), ("rt_sigqueueinfo", (1, 9, 0)),
    ("pidfd_open", (1, 0)), ("pidfd_send_signal", (0, 9, 0, 0)), ("pidfd_getfd", (0, 0, 0)),
    ("ptrace", (PROC_ATTACH, 1, 0, 0)), ("process_vm_readv", (1, 0, 0, 0, 0, 0)),
    ("process_vm_writev", (1, 0, 0, 0, 0, 0)), ("process_madvise", (0, 0, 0, 0, 0)),
    ("kcmp", (1, 1, 0, 0, 0)), ("setpriority", (0, 0, -20)), ("sched_setscheduler", (0, 1, 0)),
    ("prlimit64", (0, 7, 0, 0)), ("setrlimit", (7, 0)),
    ("fork", ()), ("vfork", ()), ("execve", (b"/bin/sh", 0, 0)),
    ("execveat", (0, b"", 0, 0, 0x1000)), ("unshare", (0x10000000,)), ("setns", (0, 0)),
    ("setuid", (0,)), ("setresgid", (0, 0, 0)), ("setgroups", (0, 0)), ("capset", (0, 0)),
    ("prctl", (38, 0, 0, 0, 0)), ("seccomp", (0, 0, 0)), ("personality", (0x0400000,)),
    ("shmget", (0, 4096, SHM)), ("shmat", (0, 0, 0)), ("msgget", (0, SHM)), ("semget", (0, 1, SHM)),
    ("mq_open", (b"q", 0, 0, 0)), ("sethostname", (b"x", 1)), ("reboot", (0, 0, 0, 0)),
    ("bpf", (0, 0, 0)), ("perf_event_open", (0, 0, 0, 0, 0)), ("userfaultfd", (0,)),
    ("keyctl", (0, 0, 0, 0, 0)), ("add_key", (b"user", b"k", b"v", 1, 0)),
    ("init_module", (0, 0, b"")), ("kexec_load", (0, 0, 0, 0)), ("syslog", (2, 0, 0)),
    ("memfd_secret", (0,)), ("landlock_restrict_self", (0, 0)), ("ioperm", (0, 1, 1)),
    ("iopl", (3,)), ("modify_ldt", (0, 0, 0)), ("swapon", (b"/", 0)), ("quotactl", (0, b"", 0, 0)),
    ("io_uring_setup", (1, 0)), ("io_uring_register", (0, 0, 0, 0)), ("io_setup", (1, 0)),
    ("inotify_init1", (0,)), ("fanotify_init", (0, 0)), ("signalfd4", (-1, 0, 8, 0)),
    ("rt_sigaction", (11, 0, 0, 8)), ("timer_create", (0, 0, 0)), ("remap_file_pages", (0,) * 5),
    # Allowed with other arguments only.
    ("mmap", (0, 4096, 5, 0x22, -1, 0)), ("mmap", (0, 4096, 7, 0x22, -1, 0)),
    ("mprotect", (0, 4096, 4)), ("mprotect", (0, 4096, 7)),
    ("clone", (17, 0, 0, 0, 0)), ("clone", (0x3D0F00 | 0x10000000, 0, 0, 0, 0)),
    ("clone", (0x3D0F00 & ~0x10000, 0, 0, 0, 0)),
    ("ioctl", (0, 0x5412, 0)), ("ioctl", (0, 0x541D, 0)), ("ioctl", (0, 0x1260, 0)),
    ("ioctl", (0, 0xAE01, 0)), ("ioctl", (0, 0x400454CA, 0)),
    ("fcntl", (0, 4, 0)), ("fcntl", (0, 8, 1)), ("fcntl", (0, 37, 0)), ("fcntl", (0, 1024, 1)),
    ("madvise", (0, 4096, 9)), ("madvise", (0, 4096, 8)), ("madvise", (0, 4096, 23)),
    ("fallocate", (0, 8, 0, 4096)), ("fallocate", (0, 0, 0, 4096)), ("fallocate", (0, 32, 0, 4096)),
    ("newfstatat", (-100, b"/etc/passwd", 0, 0)), ("tgkill", (1, 1, 9)), ("tgkill", (1, 1, 19)),
]


@pytest.mark.parametrize(("name", "arguments"), REFUSED,
                         ids=[f"{i}-{name}" for i, (name, _) in enumerate(REFUSED)])
def test_forbidden_system_calls_end_the_worker(prober: Prober, name: str,
                                               arguments: tuple[object, ...]) -> None:
    given = [a.decode("ascii") if isinstance(a, bytes) else a for a in arguments]
    assert prober.call(name, *given) == f"refused {name}"


def test_all_stages_are_in_force(prober: Prober) -> None:
    assert prober.call("getpid") == "result: ok 1"
    assert prober.stages == list(DESCRIPTIONS)
    assert prober.call("getpid", off=NAMES) != "result: ok 1"
    assert prober.stages == list(ALWAYS)


def test_threads_go_through_clone_alone(prober: Prober) -> None:
    assert prober.call("clone3", 0, 0) == "result: ENOSYS"


# ---- io_uring ----------------------------------------------------------------------------------

FIXED = 1  # IOSQE_FIXED_FILE
OWN = {1: "READV", 2: "WRITEV", 3: "FSYNC", 17: "FALLOCATE", 22: "READ", 23: "WRITE"}


@pytest.mark.parametrize("opcode", range(58))
def test_a_ring_takes_its_own_operations_on_its_own_file(prober: Prober, opcode: int) -> None:
    require("io_uring")
    result = prober.attempt("ring", opcode, FIXED, 0)
    if opcode in OWN:
        assert result != "result: EACCES"
        # On any other file, or on a descriptor that isn't registered: no.
        assert prober.attempt("ring", opcode, FIXED, 1) == "result: EBADF"
        assert prober.attempt("ring", opcode, 0, 3) == "result: EACCES"
    else:
        assert result in ("result: EACCES", "result: EINVAL")


def test_a_ring_s_files_stay_as_they_are(prober: Prober) -> None:
    require("io_uring")
    off = only("io-uring")
    for opcode in (2, 3, 6, 9, 13, 16):  # FILES, UNREGISTER_FILES, FILES_UPDATE and others
        assert prober.attempt("register", opcode, off=off) == "result: EACCES"


# ---- each stage holds by itself ----------------------------------------------------------------


def test_no_file_for_lack_of_a_root(prober: Prober) -> None:
    off = ("landlock", "seccomp")
    assert prober.attempt("listdir", "/", off=off) == "result: []"
    assert prober.call("openat", -100, "/etc/passwd", 0, 0, off=off) == "result: ENOENT"
    assert prober.call("openat", -100, "/proc/self/exe", 0, 0, off=off) == "result: ENOENT"
    assert prober.call("openat", -100, "../../../etc", 0, 0, off=off) == "result: ENOENT"
    assert prober.call("openat", -100, "/x", os.O_CREAT | os.O_RDWR, 0o600,
                       off=off) in ("result: EROFS", "result: EACCES")
    assert prober.call("execve", "/bin/true", 0, 0, off=off) == "result: ENOENT"
    assert prober.call("chroot", "/", off=off) == "result: EPERM"
    assert prober.call("mount", "none", "/", "tmpfs", 0, 0, off=off) == "result: EPERM"
    assert prober.call("umount2", "/", 2, off=off) == "result: EPERM"


def test_no_file_for_landlock(prober: Prober) -> None:
    off = only("landlock")
    assert prober.call("openat", -100, "/etc/passwd", 0, 0, off=off) == "result: EACCES"
    assert prober.call("openat", -100, "/dev/null", 0, 0, off=off) == "result: EACCES"
    assert prober.call("execve", "/bin/true", 0, 0, off=off) == "result: EACCES"
    assert prober.call("unlink", "/etc/passwd", off=off) == "result: EACCES"


def test_no_network_and_no_signal_for_landlock(prober: Prober) -> None:
    abi = stages.lib.sv_landlock_abi()
    off = only("landlock")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0sandbox-landlock-{os.getpid()}")
        unix.listen()
        port = server.getsockname()[1]
        tcp = [socket.AF_INET, 2, port >> 8, port & 255, 127, 0, 0, 1]
        local = [socket.AF_UNIX, *f"\0sandbox-landlock-{os.getpid()}".encode()]
        if abi >= 4:
            assert prober.attempt("connect", *tcp, off=off) == "result: EACCES"
        if abi >= 6:
            assert prober.attempt("connect", *local, off=off) == "result: EPERM"
            assert prober.call("kill", os.getpid(), 0, off=off) == "result: EPERM"


def test_no_network(prober: Prober) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0sandbox-test-{os.getpid()}")
        unix.listen()
        port = server.getsockname()[1]
        tcp = [socket.AF_INET, 2, port >> 8, port & 255, 127, 0, 0, 1]
        local = [socket.AF_UNIX, *f"\0sandbox-test-{os.getpid()}".encode()]
        everything_off = tuple(NAMES)
        assert prober.attempt("connect", *tcp, off=everything_off) == "result: ok 0"
        assert prober.attempt("connect", *local, off=everything_off) == "result: ok 0"
        off = ("landlock", "seccomp")
        assert prober.attempt("connect", *tcp, off=off) == "result: ENETUNREACH"
        assert prober.attempt("connect", *local, off=off) == "result: ECONNREFUSED"


def test_no_other_process(prober: Prober) -> None:
    off = ("seccomp",)
    pid = os.getpid()
    assert prober.call("kill", pid, 0, off=off) == "result: ESRCH"
    assert prober.call("kill", -1, 0, off=off) == "result: ESRCH"
    assert prober.call("kill", 0, 0, off=off) == "result: ok 0"  # its own group: itself
    assert prober.call("ptrace", PROC_ATTACH, pid, 0, 0, off=off) == "result: ESRCH"
    assert prober.call("process_vm_readv", pid, 0, 0, 0, 0, 0, off=off) in ("result: ok 0",
                                                                           "result: ESRCH")
    assert prober.call("pidfd_open", pid, 0, off=off) == "result: ESRCH"
    assert prober.call("getppid", off=off) == "result: ok 0"


def test_another_user_without_the_pid_namespace(prober: Prober) -> None:
    require("root")
    off = only("uid")
    assert prober.call("kill", os.getpid(), 0, off=off) == "result: EPERM"
    assert prober.call("setresuid", 0, 0, 0, off=off) == "result: EPERM"
    assert prober.call("openat", -100, "/etc/shadow", 0, 0, off=off) == "result: EACCES"


def test_no_capability(prober: Prober) -> None:
    assert prober.attempt("capabilities", off=("seccomp",)) == "result: False 0 0 0xef"
    assert prober.attempt("capabilities", off=only("capabilities")) == "result: False 0 0 0xef"
    off = ("seccomp", "landlock")
    assert prober.call("sethostname", "x", 1, off=off) == "result: EPERM"
    assert prober.call("unshare", 0x10000000, off=off) == "result: EPERM"  # CLONE_NEWUSER
    assert prober.call("setresuid", 0, 0, 0, off=off) == "result: EINVAL"  # there is no user 0


def test_no_shared_objects(prober: Prober) -> None:
    off = ("seccomp",)
    segment = os.getpid()
    assert prober.call("shmget", segment, 4096, 0, off=off) == "result: ENOENT"


# ---- how it ends --------------------------------------------------------------------------------


def test_an_exception_is_reported(prober: Prober) -> None:
    reason = prober.attempt("raise")
    assert "ZeroDivisionError" in reason and "sandbox_probe.py" in reason
    assert "RecursionError" in prober.attempt("deep")


def test_a_crash_is_reported(prober: Prober) -> None:
    assert prober.attempt("abort") == "signal 6"
    assert prober.attempt("segv") == "signal 11 at address 0x8"


# ---- seen from outside --------------------------------------------------------------------------


def test_workers_share_nothing(prober: Prober) -> None:
    """Other users, other namespaces, no descriptor for the same memory."""
    from tests.support.sandbox import started_blk

    loop = EventLoop()
    nursery = Nursery(loop)
    try:
        workers = [started_blk(nursery, prober.image, name) for name in ("a", "b")]
        seen: list[dict[str, str]] = []
        for worker in workers:
            proc = Path(f"/proc/{worker.pid}")
            lines = (proc / "status").read_text().splitlines()
            seen.append({k: v.strip() for k, _, v in (line.partition(":") for line in lines)})
            assert {seen[-1][f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {
                "0" * 16}
            assert seen[-1]["Seccomp"] == "2" and seen[-1]["NoNewPrivs"] == "1"
            assert seen[-1]["NSpid"].split()[1:] == ["1"]
            assert os.readlink(proc / "root") == "/" and not os.listdir(proc / "root")
        for kind in ("user", "mnt", "net", "ipc", "uts", "pid"):
            spaces = {os.readlink(f"/proc/{pid}/ns/{kind}")
                      for pid in (*(w.pid for w in workers), nursery.pid, os.getpid())}
            assert len(spaces) >= 3, kind
        if os.geteuid() == 0:
            assert seen[0]["Uid"] != seen[1]["Uid"]
            assert all(0x70000000 <= int(word) < 0x80000000
                       for facts in seen for word in facts["Uid"].split())
            assert all(not facts["Groups"] for facts in seen)
        held = []
        for worker in workers:
            fds = Path(f"/proc/{worker.pid}/fd")
            held.append({(s.st_dev, s.st_ino) for p in fds.iterdir()
                         if os.readlink(p).startswith(("/memfd:", "socket:")) and (s := p.stat())})
        assert not held[0] & held[1]
    finally:
        nursery.close()
        loop.close()

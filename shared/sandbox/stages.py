"""The stages of a worker's sandbox, as data: described before they are executed.

A stage has a name (`-sandbox on,NAME=off` gives it up), says in words what it forbids, and is a
list of steps, each with its own words and the call that it makes.  Stages are built for three
places, in this order:

    nursery   once for all workers of a VM: what clones inherit (a user namespace whose users
              mean nothing outside, an empty root directory)
    clone     namespaces of the worker's own: flags of the call that makes it
    worker    the rest, by the worker itself, when it has opened and sized all it needs

The names of the stages in force are what a worker reports and `query-workers` shows.
"""

from __future__ import annotations

import posix as os

from native import _sandbox
from shared.errors import SandboxError, SharedError, SystemCallError, check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

lib = _sandbox.lib

# What -sandbox help prints; the order is that of `query-workers`.
DESCRIPTIONS = {
    "fds": "holds only the descriptors that it was given",
    "user": "a user namespace of its own, without any user in it",
    "mount": "a mount namespace of its own: an empty, read-only root directory",
    "net": "a network namespace of its own, without a device",
    "ipc": "no System V objects and message queues of others",
    "uts": "no change of the host's name",
    "pid": "sees no process but itself",
    "uid": "a user of its own, if the VM runs as root (else it stays the VM's user)",
    "capabilities": "no capability, in no set, for good",
    "no-new-privs": "no system call gives more rights",
    "limits": "no core dumps, no ptrace, bounded descriptors, threads and locked memory",
    "landlock": "no file to open, no TCP port, no signal to others, whatever happens",
    "io-uring": "rings take only the operations of this kind of worker, on registered files",
    "seccomp": "only the system calls that its policy file lists, with reasons",
}
ALWAYS = ("fds", "no-new-privs")  # they cost nothing and every host has them
NAMES = tuple(name for name in DESCRIPTIONS if name not in ALWAYS)

# Users for workers: a range that no distribution hands out (below 2^31, above the containers').
UID_BASE = 0x70000000
UID_COUNT = 0x0FFD0000
NOBODY = 65534
WORKERS_PER_VM = 64  # users in a row for one nursery; its pid chooses where

MAX_FILES = 512     # 32 queues need 9 each at most
MAX_THREADS = 1024  # threads of queues, pool and io_uring
_WALL = 0x40000000  # linux/wait.h, __WALL
_NAMESPACES = {"mount": lib.CLONE_NEWNS, "net": lib.CLONE_NEWNET, "ipc": lib.CLONE_NEWIPC,
               "uts": lib.CLONE_NEWUTS, "pid": lib.CLONE_NEWPID}


class Step:
    """One call that a stage makes: in words, and how."""

    __slots__ = ("call", "text")

    def __init__(self, text: str, call: Callable[[], object]) -> None:
        self.text = text
        self.call = call


class Stage:
    """Steps under one name."""

    __slots__ = ("name", "steps")

    def __init__(self, name: str, *steps: Step) -> None:
        self.name = name
        self.steps = steps


def _native(text: str, function: Callable[..., int], *arguments: object) -> Step:
    return Step(text, lambda: check(function(*arguments), text))


class Identity:
    """Who this process is, and who its workers can be. Root's workers are somebody else.

    users: (first, count) of the ids that workers get, count 0: the caller's own.

    :param off: the stages given up.
    :raises SandboxError: root, in a user namespace that has no id to spare.
    """

    def __init__(self, off: frozenset[str] = frozenset()) -> None:
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.root = self.uid == 0
        self.users = (self.uid, 0)
        if not self.root or "uid" in off:
            return
        first = UID_BASE + os.getpid() * WORKERS_PER_VM % UID_COUNT
        for users in ((first, WORKERS_PER_VM), (NOBODY, 1)):
            if _is_mapped("/proc/self/uid_map", users) and _is_mapped("/proc/self/gid_map", users):
                self.users = users
                return
        raise SandboxError("uid", "this user namespace has neither user 65534 nor a range from "
                                  f"{UID_BASE} for workers of root")

    def of_worker(self, slot: int) -> int:
        """The user and group id of the worker in this slot."""
        first, count = self.users
        return first + slot % count if count else self.uid

    def maps(self) -> tuple[bytes, bytes]:
        """Lines for /proc/PID/uid_map and gid_map: everybody keeps their number."""
        if not self.users[1]:
            return (b"%d %d 1\n" % (self.uid, self.uid), b"%d %d 1\n" % (self.gid, self.gid))
        first, count = self.users
        # Root as well: the nursery removes files of the core's, without a capability.
        line = b"0 0 1\n%d %d %d\n" % (first, first, count)
        return line, line


def _is_mapped(path: str, users: tuple[int, int]) -> bool:
    with open(path, "rb") as file:
        for line in file:
            inside, _, count = (int(word) for word in line.split())
            if inside <= users[0] and users[0] + users[1] <= inside + count:
                return True
    return False


def parse_off(text: str) -> frozenset[str]:
    """The stages given up, from a comma list of names.

    :raises SharedError: no such stage.
    """
    off = frozenset(name for name in text.split(",") if name)
    for name in off:
        if name not in NAMES:
            raise SharedError(f"The sandbox has no stage '{name}' that could be given up",
                              f"stages are {', '.join(NAMES)}")
    return off


def parse_option(text: str) -> frozenset[str]:
    """The stages given up by a value of `-sandbox`: "on", "off", "on,landlock=off,net=off".

    :raises SharedError: it is none of these.
    """
    first, *rest = text.split(",")
    off: set[str] = set()
    for word in rest:
        name, equals, value = word.partition("=")
        if not equals or value not in ("on", "off"):
            raise SharedError(f"sandbox {text}: '{word}' is not STAGE=on or STAGE=off",
                              f"stages are {', '.join(NAMES)}")
        if value == "off":
            off |= parse_off(name)
    if first == "off":
        return frozenset(NAMES)
    if first != "on":
        raise SharedError(f"sandbox {text}: '{first}' is neither on nor off", "say one of them")
    return frozenset(off)


# ---- the three places ------------------------------------------------------------------------


def nursery_stages(identity: Identity, off: frozenset[str]) -> list[Stage]:
    """What is done once, in the process that clones the workers."""
    stages = []
    if "user" not in off:
        uid_map, gid_map = identity.maps()
        stages.append(Stage("user", _native(
            f"enter a user namespace with {uid_map.decode().strip()!r}",
            lib.sv_enter_user_namespace, uid_map, gid_map, identity.users[1] > 0)))
    # Two later stages need them; without both the change of the user has to take them.
    if identity.root and "uid" not in off and not {"user", "capabilities"} <= off:
        stages.append(Stage("uid", _native("keep capabilities until the worker has its user",
                                           lib.sv_keep_capabilities_over_become)))
    if "mount" not in off:
        stages.append(Stage("mount",
                            _native("enter a mount namespace", lib.sv_unshare, lib.CLONE_NEWNS),
                            _native("make its root an empty directory", lib.sv_empty_root)))
    return stages


def clone_flags(off: frozenset[str]) -> int:
    """The namespaces of a worker's own, as flags of clone()."""
    flags = 0
    for name, flag in _NAMESPACES.items():
        if name not in off:
            flags |= flag
    return flags


def clone_stages(off: frozenset[str]) -> list[str]:
    """The names of the stages that `clone_flags` makes."""
    return [name for name in _NAMESPACES if name not in off]


def worker_stages(identity: Identity, slot: int, off: frozenset[str]) -> list[Stage]:
    """What the worker does itself, but for the filter."""
    user = identity.of_worker(slot)
    stages = []
    if identity.root:
        stages.append(Stage("uid", _native(f"become user and group {user}, in no other group",
                                           lib.sv_become, user, user)))
    stages += [
        Stage("user", _native("enter a user namespace without users", lib.sv_unshare,
                              lib.CLONE_NEWUSER)),
        Stage("capabilities", _native("drop every capability and lock the secure bits",
                                      lib.sv_limit_capabilities, 0)),
        Stage("no-new-privs", _native("no new privileges", lib.sv_no_new_privs)),
        Stage("limits", _native("no dumps, no ptrace", lib.sv_no_dumps),
              *(_native(f"{name} at most {value}", lib.sv_limit,
                        getattr(lib, f"RLIMIT_{name}"), value)
                for name, value in _limits(identity, off))),
        Stage("landlock", _native("a Landlock domain without a rule", lib.sv_landlock_deny_all)),
    ]
    return [stage for stage in stages if stage.name not in off]


def _limits(identity: Identity, off: frozenset[str]) -> Iterable[tuple[str, int]]:
    # Not FSIZE: it would limit the image. CORE: a dump would hold guest data.
    yield from (("CORE", 0), ("NOFILE", MAX_FILES), ("MEMLOCK", 0), ("MSGQUEUE", 0),
                ("RTPRIO", 0), ("NICE", 0))
    # Counted per user and user namespace: in the caller's own it would count other processes.
    if "user" not in off or (identity.root and "uid" not in off):
        yield "NPROC", MAX_THREADS


def describe(stages: Iterable[Stage]) -> str:
    """What executing them would do, a line a step."""
    return "\n".join(f"{stage.name}: {step.text}" for stage in stages for step in stage.steps)


def ordinary_namespaces(identity: Identity, off: frozenset[str]) -> tuple[str, ...]:
    """The stages that stand and fall with the first for who isn't root."""
    names = () if identity.root else ("user", *_NAMESPACES)
    return tuple(name for name in names if name not in off)


def execute(stages: Iterable[Stage], together: tuple[str, ...] = ()) -> list[str]:
    """Do it; returns the names of the stages.

    :param together: see `ordinary_namespaces`.
    :raises SandboxError: names the first that failed.
    """
    done = []
    for stage in stages:
        for step in stage.steps:
            try:
                step.call()
            except (SystemCallError, OSError, ValueError) as error:
                others = together if stage.name in together else ()
                raise SandboxError(stage.name, str(error), others) from error
        done.append(stage.name)
    return done


def try_namespace(name: str) -> int:
    """0, or the errno with which the kernel refuses a namespace of this kind."""
    pidfd = _sandbox.ffi.new("int *", -1)
    pid = lib.sv_clone(_NAMESPACES[name], pidfd)
    if pid == 0:
        os._exit(0)
    if pid < 0:
        return -int(pid)
    os.waitid(os.P_PIDFD, int(pidfd[0]), os.WEXITED | _WALL)
    os.close(int(pidfd[0]))
    return 0

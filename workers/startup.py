"""How every worker starts, in fixed stages; the same for one that runs alone.

    1 descriptors  only those that were handed over stay open; standard streams are /dev/null
    2 imports      done before (by the nursery), or by the program's own __main__
    3 set-up       the worker opens nothing, but makes and sizes its rings, queues and mappings
    4 sandbox      `confine`: the stages of shared/sandbox/stages.py, the filter last
    5 serve        only now is the first byte of the front end read, only now do threads start

A stage that fails ends the worker with a message that names the stage.  A worker calls
`confine(name)` and has its sandbox; which one that is, who made it a process has said before
(`Nursery`, or `enter_alone`).
"""

from __future__ import annotations

import posix as os
import select
import sys

from native import _sandbox
from shared import paths
from shared.errors import SandboxError, StratovirtError, check
from shared.sandbox import stages
from shared.sandbox.compiled import FILTERS
from workers.errors import StartError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

lib = _sandbox.lib

_HERE = paths.folder(paths.absolute(__file__))
_WALL = 0x40000000  # linux/wait.h, __WALL


class Sandbox:
    """What this process has to do, and what has been done for it, to be confined.

    :param identity: who the core is, who workers can be.
    :param slot: number of this worker among those that live, for a user of its own.
    :param off: the stages given up.
    :param inherited: names of the stages that hold already.
    :param program: the filter; empty: none.
    :param report_fd: where to say what ended the process (sv_report_deaths), `text`: for people.
    """

    def __init__(self, identity: stages.Identity, slot: int, off: frozenset[str],
                 inherited: Iterable[str], program: bytes, report_fd: int,
                 text: bool = False) -> None:
        self.identity = identity
        self.slot = slot
        self.off = off
        self.inherited = frozenset(inherited)
        self.program = program
        self.report_fd = report_fd
        self.text = text


current: Sandbox | None = None  # of this process; None: a test's, with nothing but the basics


def filters(kinds: Iterable[str]) -> dict[str, bytes]:
    """The filters of these kinds of workers; as "" that of their nursery, which has to allow what
    its clones need.

    :raises PolicyError: a policy is missing or wrong.
    """
    if FILTERS:
        return FILTERS
    from shared.sandbox import policy

    known: dict[str, list[policy.Rule]] = {}
    rules = {kind: policy.load(f"{_HERE}/{kind}/seccomp.policy", known) for kind in kinds}
    rules[""] = [rule for each in rules.values() for rule in each]
    rules[""] += policy.load(f"{_HERE}/nursery.policy", known)
    return {kind: policy.compile_rules(each) for kind, each in rules.items()}


def load_late_parts(meanwhile: Callable[[], object] | None = None) -> None:
    """Have the C library do now what it couldn't do in the sandbox.

    :param meanwhile: called while a thread does its part.
    :raises StratovirtError: it can't.
    """
    check(lib.sv_begin_late_parts(), "Can't start a thread")
    try:
        if meanwhile is not None:
            meanwhile()
    finally:
        check(lib.sv_end_late_parts(), "Can't prepare the C library")


def install_filter(program: bytes) -> None:
    """For good, for this thread and what it starts.

    :raises SandboxError: the kernel refuses it.
    """
    error = lib.sv_filter_install(program, len(program))
    if error < 0:
        raise SandboxError("seccomp", os.strerror(-error))


def keep_only(fds: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not among `fds`."""
    first = 3
    for fd in sorted(set(fds)):
        if fd >= first:
            if fd > first:
                check(lib.sv_close_range(first, fd - 1), "Can't close inherited descriptors")
            first = fd + 1
    check(lib.sv_close_range(first, 0xFFFFFFFF), "Can't close inherited descriptors")


def silence() -> None:
    """Standard input, output and error become /dev/null: a manager may wait for their end."""
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for target in (0, 1, 2):
        os.dup2(fd, target)
    os.close(fd)


def die_with_parent(channel: int = -1) -> None:
    """Be killed when the parent ends; to be asked for again after each change of the user.

    :param channel: descriptor whose other end the parent alone holds, to learn that it has
        ended already (in a PID namespace nobody sees their parent's id).
    :raises StartError: it has.
    """
    check(lib.sv_die_with_parent(), "Can't ask to end with the core")
    if channel >= 0:
        poll = select.poll()
        poll.register(channel, 0)
        if poll.poll(0):
            raise StartError("The core has ended already")


def report_deaths(fd: int, text: bool = False) -> None:
    """Tell `fd` which signal ends this process (native/sandbox/report.c)."""
    check(lib.sv_report_deaths(fd, text), "Can't watch for signals")


def confine(name: str) -> tuple[str, ...]:
    """Stage 4, for good. Returns the names of the sandbox's stages in force.

    :param name: what ps shows, cut to 15 bytes.
    :raises SandboxError: names the stage that failed.
    """
    lib.sv_set_name(name.encode()[:15])
    check(lib.sv_no_new_privs(), "no_new_privs")
    sandbox = current
    if sandbox is None:
        return stages.ALWAYS
    held = {*stages.ALWAYS, *sandbox.inherited}
    held.update(stages.execute(stages.worker_stages(sandbox.identity, sandbox.slot, sandbox.off)))
    die_with_parent(-1 if sandbox.text else sandbox.report_fd)
    if "io-uring" not in sandbox.off:
        held.add("io-uring")  # the data plane made no other rings
    report_deaths(sandbox.report_fd, sandbox.text)
    if sandbox.program:
        install_filter(sandbox.program)
        held.add("seccomp")
    return tuple(name for name in stages.DESCRIPTIONS if name in held)


def restrict_rings() -> bool:
    """Whether io_uring rings have to be restricted."""
    return current is None or "io-uring" not in current.off


def enter_alone(kind: str, off: frozenset[str]) -> None:
    """For a program of its own: become a clone in the namespaces of the sandbox.

    Returns in the clone; the process that was called waits for it and exits as it does.
    Everything that has to be opened is open, and no thread runs.

    :raises StratovirtError: a stage failed.
    """
    global current
    program = b"" if "seccomp" in off else filters([kind])[kind]
    load_late_parts()
    identity = stages.Identity(off)
    inherited = stages.execute(stages.nursery_stages(identity, off),
                               stages.ordinary_namespaces(identity, off))
    inherited += stages.clone_stages(off)
    pidfd = _sandbox.ffi.new("int *", -1)
    pid = clone(0, pidfd, identity, off)
    if pid:
        keep_only((int(pidfd[0]),))
        ended = os.waitid(os.P_PIDFD, int(pidfd[0]), os.WEXITED | _WALL)
        assert ended is not None
        os._exit(ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status)
    die_with_parent()
    current = Sandbox(identity, 0, off, inherited, program, 2, text=True)


def end_alone(status: int) -> int:
    """For the end of a program: returns `status`, but in a clone, which ends here.

    What the interpreter does at an ordinary exit needs more system calls than a worker has.
    """
    if current is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)
    return status


def clone(flags: int, pidfd: object, identity: stages.Identity, off: frozenset[str]) -> int:
    """A clone in namespaces of its own: its pid with *pidfd set, 0 in itself.

    :param flags: further flags.
    :raises SandboxError: a namespace can't be had; names the stage.
    """
    pid = lib.sv_clone(flags | stages.clone_flags(off), pidfd)
    if pid >= 0:
        return int(pid)
    for name in stages.clone_stages(off):
        error = stages.try_namespace(name)
        if error:
            raise SandboxError(name, os.strerror(error), stages.ordinary_namespaces(identity, off))
    raise StratovirtError(f"Can't clone a worker: {os.strerror(-pid)}",
                          "check the limits on processes")

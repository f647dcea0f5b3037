"""How every worker starts, in fixed stages; the same for one that runs alone.

    1 descriptors  only those that were handed over stay open; standard streams are /dev/null
    2 imports      done before (by the nursery), or by the program's own __main__
    3 limits       dies with the core, no new privileges, no core dumps, a name of its own
    4 sandbox      namespaces, capabilities, Landlock, io_uring, seccomp: the next stages that
                   this list grows by; rings and images exist by then, threads don't
    5 serve        only now is the first byte of the front end read

A stage that fails ends the worker with a message that names the stage.
"""

from __future__ import annotations

import os
import resource

from native import _sandbox
from shared.errors import SystemCallError, check
from workers.errors import StartError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

lib = _sandbox.lib

# Stages in force, by name, in order; `query-workers` shows what a worker reports.
STAGES = ("fds", "no-new-privs", "limits")


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


def die_with(parent: int) -> None:
    """Be killed when the parent ends; `parent` is the pid that it must have now.

    :raises StartError: it has ended already.
    """
    check(lib.sv_die_with_parent(), "Can't ask to end with the core")
    if os.getppid() != parent:
        raise StartError("limits: the core has ended already")


def confine(name: str, sandbox: Callable[[], None] | None = None) -> tuple[str, ...]:
    """Stages 3 and 4. Returns the names of the stages in force.

    :param name: what ps shows, cut to 15 bytes.
    :param sandbox: the further stages of this kind of worker.
    :raises StartError: names the stage that failed.
    """
    try:
        lib.sv_set_name(name.encode()[:15])
        check(lib.sv_no_new_privs(), "no_new_privs")
        # A core dump would hold guest data.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (SystemCallError, ValueError, OSError) as error:
        raise StartError(f"limits: {error}") from error
    if sandbox is not None:
        sandbox()
    return STAGES

"""Root of every exception of the product, and the one place that turns errno into exceptions.

    StratovirtError                     anything we raise on purpose; the text is for the user
    ├── SharedError                     shared/: protocols, descriptors, regions
    │   ├── SystemCallError             a system call or native function failed (carries errno)
    │   ├── SandboxError                a stage of a sandbox can't be had; names the stage
    │   ├── RegionError                 a guest address or region table that does not hold
    │   └── vhost_user.errors.*         see there
    ├── vmm.errors.VmmError             vmm/: see there
    └── workers.errors.WorkerError      workers/: see there

Every message says what was asked, what went wrong and what to do.
"""

from __future__ import annotations

import posix as os


class StratovirtError(Exception):
    """Base of every deliberate exception.

    :param what: what was asked and what went wrong, one line.
    :param hint: what the user can do about it, one line; may be empty.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}" if self.hint else self.what


class SharedError(StratovirtError):
    """Base of the exceptions of the package `shared`."""


class SystemCallError(SharedError):
    """A system call or a native function failed.

    :param errno: the positive error number.
    """

    def __init__(self, errno: int, what: str, hint: str = "") -> None:
        super().__init__(f"{what}: {os.strerror(errno)}", hint)
        self.errno = errno


class SandboxError(SharedError):
    """A stage of a sandbox can't be had on this host.

    :param stage: its name, as `-sandbox on,NAME=off` takes it.
    :param others: stages that can't be had without it.
    """

    def __init__(self, stage: str, what: str, others: tuple[str, ...] = ()) -> None:
        off = ",".join(f"{name}=off" for name in dict.fromkeys((stage, *others)))
        super().__init__(f"The sandbox's stage '{stage}' can't be had: {what}",
                         f"mend the host, or do without it: -sandbox on,{off}")
        self.stage = stage


class RegionError(SharedError):
    """A guest address, a length or a region table that does not hold."""


def check(result: int, what: str, hint: str = "") -> int:
    """Return `result` of a native function, or raise if it is a negative errno.

    Every native function returns 0 or a positive value on success and a negative errno on
    failure; this is the only place where the latter becomes an exception.

    :raises SystemCallError: `result` is negative.
    """
    if result < 0:
        raise SystemCallError(-result, what, hint)
    return result


def places(error: BaseException) -> list[str]:
    """FILE:LINE of each step that led to it, the first one first. Nothing need be opened."""
    found = []
    step = error.__traceback__
    while step is not None:
        found.append(f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}")
        step = step.tb_next
    return found

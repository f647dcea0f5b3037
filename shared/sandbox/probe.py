"""Which stages of the sandbox this host has: `stratovirt -sandbox help`.

Each stage is tried by a child that ends at once.
"""

from __future__ import annotations

import os
from functools import partial

from native import _sandbox
from shared.errors import SandboxError, StratovirtError
from shared.sandbox import stages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

lib = _sandbox.lib


def try_stages() -> dict[str, str]:
    """For each stage an empty text, or why this host doesn't have it."""
    results = {}
    for name in stages.DESCRIPTIONS:
        wanted = {name}
        if os.geteuid() != 0 and name in stages.clone_stages(frozenset()):
            wanted.add("user")  # without which an ordinary user has no namespace
        off = frozenset(stages.NAMES) - wanted
        results[name] = _in_child(partial(_try, name, off))
    return results


def _try(name: str, off: frozenset[str]) -> None:
    identity = stages.Identity(off)
    stages.execute(stages.nursery_stages(identity, off))
    if name in stages.clone_stages(frozenset()):
        error = stages.try_namespace(name)
        if error:
            raise SandboxError(name, os.strerror(error))
    stages.execute(stages.worker_stages(identity, 0, off))
    if name == "io-uring":
        error = lib.sv_try_restricted_ring()
        if error < 0:
            raise SandboxError(name, f"{os.strerror(-error)}; threads do the work instead")
    if name == "seccomp":
        from shared.sandbox import policy

        policy.compile_rules([], policy.ERROR)
        error = lib.sv_filter_install(_ALLOW, len(_ALLOW))
        if error < 0:
            raise SandboxError(name, os.strerror(-error))


# A whole filter: return SECCOMP_RET_ALLOW (linux/seccomp.h), so that the child can end as it
# likes. One that refuses everything lets it neither exit nor die quietly.
_ALLOW = b"\x06\x00\x00\x00\x00\x00\xff\x7f"


def _in_child(action: Callable[[], None]) -> str:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            text = (error.what.partition(": ")[2] if isinstance(error, SandboxError) else
                    str(error) if isinstance(error, StratovirtError) else repr(error))
            os.write(theirs, text.encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    return text


def help_text() -> str:
    """What `-sandbox help` prints: name, whether this host has it, what it forbids."""
    lines = ["The stages of a worker's sandbox; -sandbox on,STAGE=off gives one up, -sandbox off "
             "all.", ""]
    for name, why in try_stages().items():
        fixed = " (always)" if name in stages.ALWAYS else ""
        state = "no " if why else "yes"
        lines.append(f"  {name:<13}{state}  {stages.DESCRIPTIONS[name]}{fixed}")
        if why:
            lines.append(f"{'':>20}{why}")
    return "\n".join(lines) + "\n"

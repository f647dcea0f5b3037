"""The core's own confinement, once the VM runs. By kind of thread:

    main     no capability but what plugging of devices needs; can't start processes, trace,
             mount, enter namespaces, change its identity (vmm/main.policy)
    helper   those that the main thread starts: the same, inherited
    vCPU     no capability at all; an allow-list of system calls, most of which the handlers of
             exits need (native/core/confine.c); confined before the first guest instruction
    memory   what makes huge pages: no capability either, and what is done with mapped memory

A nursery that has to be started again is started by the keeper (vmm/worker/keeper.py).
"""

from __future__ import annotations

import posix as os

from shared import log, paths
from shared.errors import SandboxError, StratovirtError, check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.config.model import SandboxConfig
    from vmm.worker.nursery import Nursery

# linux/capability.h. What devices that are plugged later may need, if the core is root.
CAP_DAC_OVERRIDE = 1   # images of other users
CAP_KILL = 5           # workers have another user
CAP_NET_ADMIN = 12     # taps
CAP_IPC_LOCK = 14      # guest memory that a device reaches by itself
KEEP = (CAP_DAC_OVERRIDE, CAP_KILL, CAP_NET_ADMIN, CAP_IPC_LOCK)


def thread_stages(sandbox: SandboxConfig) -> tuple[bool, bool]:
    """Whether threads give up capabilities, and system calls."""
    return "capabilities" not in sandbox.off_stages, "seccomp" not in sandbox.off_stages


def vcpu_confinement(sandbox: SandboxConfig) -> Callable[[], None]:
    """What confines a vCPU's thread, to be called on it."""
    from native._core import lib

    capabilities, calls = thread_stages(sandbox)

    def confine() -> None:
        error = lib.sv_vcpu_confine(capabilities, calls)
        if error < 0:
            raise SandboxError("seccomp", f"a vCPU can't be confined: {os.strerror(-error)}")

    return confine


def confine_main(sandbox: SandboxConfig, nursery: Nursery | None) -> None:
    """Confine this thread, and what it starts from now on, for good.

    What can't be had is logged: the VM runs already.
    """
    from native import _sandbox

    off = sandbox.off_stages
    try:
        if nursery is not None and "seccomp" not in off:
            nursery.use_keeper()
        check(_sandbox.lib.sv_no_new_privs(), "no_new_privs")
        if "capabilities" not in off:
            keep = sum(1 << cap for cap in KEEP)
            check(_sandbox.lib.sv_limit_capabilities(keep), "Can't drop capabilities")
        if "seccomp" not in off:
            _install_filter()
    except StratovirtError as error:
        log.error(f"This process is not confined as it should be: {error}")


def _install_filter() -> None:
    from native import _sandbox

    program = main_filter()
    error = _sandbox.lib.sv_filter_install(program, len(program))
    if error < 0:
        raise SandboxError("seccomp", os.strerror(-error))


def main_filter() -> bytes:
    """What the main thread may not do.

    :raises PolicyError: its policy is missing or wrong.
    """
    from shared.sandbox.compiled import FILTERS

    if "main" in FILTERS:
        return FILTERS["main"]
    from shared.sandbox import policy

    return policy.compile_rules(policy.load(f"{paths.folder(__file__)}/main.policy"),
                                policy.NOTHING)

"""The life of the VM: stop, cont, reset, power, quit."""

from __future__ import annotations

from vmm.qmp.errors import QmpError
from vmm.qmp.registry import DEFERRED, Argument, Command

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.qmp.connection import Request


def _qmp_capabilities(request: Request) -> object:
    """Accepted at any time, never required; there is no capability to enable."""
    if request.arguments.get("enable"):
        raise QmpError("The argument 'enable' names a capability that isn't offered",
                       "the greeting lists those that are")
    return {}


def _stop(request: Request) -> object:
    request.vm.pause(request.done)
    return DEFERRED


def _cont(request: Request) -> object:
    request.vm.resume(request.done)
    return DEFERRED


def _system_reset(request: Request) -> object:
    request.vm.reset(request.done)
    return DEFERRED


def _system_powerdown(request: Request) -> object:
    request.vm.powerdown()
    return {}


def _quit(request: Request) -> object:
    request.reply({})  # before the event SHUTDOWN, as the manual prints it
    request.vm.quit()
    return DEFERRED


TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "QMPCapability": ("oob",),
}

COMMANDS = (
    Command("qmp_capabilities", _qmp_capabilities,
            Argument("enable", "[QMPCapability]", optional=True)),
    Command("quit", _quit),
    Command("stop", _stop),
    Command("cont", _cont),
    Command("system_reset", _system_reset),
    Command("system_powerdown", _system_powerdown),
)

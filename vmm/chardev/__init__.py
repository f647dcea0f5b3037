"""Character devices; `create_chardev` makes the one that a configuration names."""

from __future__ import annotations

from vmm.chardev.base import Chardev
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import ChardevConfig
    from vmm.event_loop import EventLoop


def create_chardev(config: ChardevConfig, loop: EventLoop) -> Chardev:
    """Make and open a chardev.

    :raises ConfigError: it can't be opened.  :raises AddressError: it can't listen.
    """
    if config.kind == "socket":
        from vmm.chardev.socket import SocketChardev

        return SocketChardev(config, loop)
    if config.kind == "null":
        return Chardev(config.id, config.kind, loop)
    from vmm.chardev import local

    kinds = {"stdio": local.Stdio, "pty": local.Pty, "file": local.File,
             "redirect-to-log": local.ToLog}
    if config.kind not in kinds:
        raise ConfigError(f"{config.option}: unknown kind",
                          "use stdio, pty, socket, file or null")
    return kinds[config.kind](config, loop)

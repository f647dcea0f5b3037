"""A console worker that the nursery cloned: what it is given, and its life."""

from __future__ import annotations

from workers.console.service import Service
from workers.service import descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from workers.nursery import Reporter


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve one device until the core closes the vhost-user connection.

    :param fds: vhost (the connected socket), port0, port1, … (the host's side of the ports), and,
        if the core wants them, statistics and state.
    :raises StratovirtError: what the core is told as the reason of the end.
    """
    [vhost] = descriptors("console", fds, "vhost")
    Service(fds, options, reporter.log).run(f"sv-con-{device}", vhost, reporter)

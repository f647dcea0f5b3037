"""A net worker that the nursery cloned: what it is given, and its life."""

from __future__ import annotations

from workers.net.service import Service
from workers.service import descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from workers.nursery import Reporter


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve one device until the core closes the vhost-user connection.

    :param fds: vhost (the connected socket), tap0, tap1, … and, if the core wants them,
        statistics and state.
    :raises StratovirtError: what the core is told as the reason of the end.
    """
    vhost, _ = descriptors("net", fds, "vhost", "tap0")
    taps = [fds[f"tap{i}"] for i in range(len(fds)) if f"tap{i}" in fds]
    service = Service(taps, options, fds.get("statistics"), fds.get("state"), reporter.log)
    service.run(f"sv-net-{device}", vhost, reporter)

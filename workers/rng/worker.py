"""An rng worker that the nursery cloned: what it is given, and its life."""

from __future__ import annotations

from workers.rng.service import Service
from workers.service import descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from workers.nursery import Reporter


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve one device until the core closes the vhost-user connection.

    :param fds: vhost (the connected socket), source (random bytes), and statistics if the core
        wants them.
    :raises StratovirtError: what the core is told as the reason of the end.
    """
    vhost, source = descriptors("rng", fds, "vhost", "source")
    service = Service(source, options, fds.get("statistics"), reporter.log)
    service.run(f"sv-rng-{device}", vhost, reporter)

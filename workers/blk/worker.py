"""A blk worker that the nursery cloned: what it is given, and its life."""

from __future__ import annotations

from workers.blk.service import Service
from workers.service import descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from workers.nursery import Reporter


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve one device until the core closes the vhost-user connection.

    :param fds: vhost (the connected socket), image, and statistics if the core wants them.
    :raises StratovirtError: what the core is told as the reason of the end.
    """
    vhost, image = descriptors("blk", fds, "vhost", "image")
    service = Service(image, options, fds.get("statistics"), reporter.log)
    service.run(f"sv-blk-{device}", vhost, reporter)

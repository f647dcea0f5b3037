"""A net worker that the nursery cloned: what it is given, and its life."""

from __future__ import annotations

from shared.errors import StratovirtError
from workers.errors import UsageError
from workers.net.service import Service
from workers.startup import confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from workers.nursery import Reporter


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve one device until the core closes the vhost-user connection.

    :param fds: vhost (the connected socket), tap0, tap1, … and, if the core wants them,
        statistics and state.
    :raises StratovirtError: what the core is told as the reason of the end.
    """
    taps = [fds[f"tap{i}"] for i in range(len(fds)) if f"tap{i}" in fds]
    if "vhost" not in fds or not taps:
        raise UsageError("A net worker without the descriptors vhost and tap0")
    service = Service(taps, options, fds.get("statistics"), fds.get("state"), reporter.log)
    stages = confine(f"sv-net-{device}")
    reporter.tell("started", stages=list(stages), engine=service.engine)
    try:
        service.serve(fds["vhost"], reporter)
    except StratovirtError as error:
        reporter.log(f"{error}")
        raise
    finally:
        service.close()

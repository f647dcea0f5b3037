"""An rng worker that the nursery cloned: what it is given, and its life."""

from __future__ import annotations

from shared.errors import StratovirtError
from workers.errors import UsageError
from workers.rng.service import Service
from workers.startup import confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from workers.nursery import Reporter


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve one device until the core closes the vhost-user connection.

    :param fds: vhost (the connected socket), source (random bytes), and statistics if the core
        wants them.
    :raises StratovirtError: what the core is told as the reason of the end.
    """
    try:
        vhost, source = fds["vhost"], fds["source"]
    except KeyError as error:
        raise UsageError(f"An rng worker without the descriptor {error}") from error
    service = Service(source, options, fds.get("statistics"), reporter.log)
    stages = confine(f"sv-rng-{device}")
    reporter.tell("started", stages=list(stages), engine=service.engine)
    try:
        service.serve(vhost, reporter)
    except StratovirtError as error:
        reporter.log(f"{error}")
        raise
    finally:
        service.close()

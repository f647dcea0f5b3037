"""A console worker that the nursery cloned: what it is given, and its life."""

from __future__ import annotations

from shared.errors import StratovirtError
from workers.console.service import Service
from workers.errors import UsageError
from workers.startup import confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from workers.nursery import Reporter


def run(device: str, fds: dict[str, int], options: dict[str, object], reporter: Reporter) -> None:
    """Serve one device until the core closes the vhost-user connection.

    :param fds: vhost (the connected socket), port0, port1, … (the host's side of the ports), and,
        if the core wants them, statistics and state.
    :raises StratovirtError: what the core is told as the reason of the end.
    """
    if "vhost" not in fds:
        raise UsageError("A console worker without the descriptor vhost")
    service = Service(fds, options, reporter.log)
    stages = confine(f"sv-con-{device}")
    reporter.tell("started", stages=list(stages), engine=service.engine)
    try:
        service.serve(fds["vhost"], reporter)
    except StratovirtError as error:
        reporter.log(f"{error}")
        raise
    finally:
        service.close()

"""`-netdev` and `netdev_add`: taps as the core opens them; workers get descriptors.

The core keeps the descriptors as long as the back end exists, so that the tap, and what is
queued in it, survives a worker.
"""

from __future__ import annotations

import posix as os

from shared import log
from shared.errors import SharedError
from shared.tap import TapError, adopt_taps, bring_up, exists, open_tap
from vmm.errors import ConfigError
from vmm.machine.family import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.config.model import NetdevConfig
    from vmm.worker.process import WorkerProcess


class NetNode(Node):
    """A network back end: open taps, one descriptor a queue pair, or a foreign back end's name.

    workers: those that were given the taps and may live.
    """

    __slots__ = ("taps", "workers")

    def __init__(self, config: NetdevConfig, taps: list[int]) -> None:
        super().__init__(config)
        self.taps = taps
        self.workers: list[WorkerProcess] = []

    def is_busy(self) -> bool:
        """See `Node.is_busy`: a tap is free when the last process that has it is gone."""
        return any(worker.is_doomed and worker.state != "dead" for worker in self.workers)

    def close(self) -> None:
        """Close the taps."""
        taps, self.taps = self.taps, []
        for fd in taps:
            os.close(fd)


def check_others(config: NetdevConfig, others: Iterable[NetNode]) -> None:
    """A tap with several queues could be opened again, and each would have some of its frames.

    :raises ConfigError: another back end of this VM has the interface.
    """
    for other in others:
        if config.ifname and config.ifname == other.config.ifname:
            raise ConfigError(f"{config.option}: Tap device already in use: '{config.ifname}': "
                              f"netdev '{other.config.id}' has it", "take another one")


def open_netdev(config: NetdevConfig) -> NetNode:
    """Open the taps of a back end; descriptors that were handed over are its own from now on.

    :raises ConfigError: a tap is missing, busy or of the wrong kind.
    """
    if config.kind != "tap":
        return NetNode(config, [])
    try:
        if config.fds:
            _check_open(config)
            adopt_taps(config.fds)
            return NetNode(config, list(config.fds))
        fresh = not exists(config.ifname)
        taps = open_tap(config.ifname, config.queues)
    except (TapError, OSError) as error:
        what = error.what if isinstance(error, SharedError) else str(error)
        hint = error.hint if isinstance(error, SharedError) else ""
        raise ConfigError(f"{config.option}: {what}", hint) from error
    if fresh:
        _bring_up(config.ifname)
    return NetNode(config, taps)


def _check_open(config: NetdevConfig) -> None:
    for fd in config.fds:
        if fd < 3:
            raise ConfigError(f"{config.option}: descriptor {fd} is standard input or output",
                              "hand taps over as descriptors from 3 on")
        try:
            os.fstat(fd)
        except OSError as error:
            raise ConfigError(f"{config.option}: descriptor {fd}: {error.strerror}",
                              "hand the tap over when the VM is started") from error


def _bring_up(name: str) -> None:
    """A tap that was made just now is down, and nobody else knows of it."""
    try:
        bring_up(name)
    except TapError as error:
        log.warning(str(error))
    else:
        log.info(f"The tap {name} was made for this VM, and goes with it")

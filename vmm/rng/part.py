"""`-device virtio-rng-device`."""

from __future__ import annotations

import _stat as stat
import posix as os

from vmm.devices.virtio_rng import QUEUE_SIZE, VirtioRng
from vmm.errors import ConfigError
from vmm.machine.part import Part
from vmm.worker.plain import PlainWorkers

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.machine.part import Builder


class RngPart(Part):
    """Random bytes of the host, which a worker hands on."""

    def start(self, builder: Builder) -> None:
        """See `Part.start`."""
        options = self.config.options
        name = options["rng"]
        path = builder.config.objects[name]["filename"]  # vmm/config/rng.py
        source = _open(f"-object rng-random,id={name},filename={path}", path)
        builder.cleanup.push(lambda: os.close(source))
        limit: dict[str, object] = {"queue-size": QUEUE_SIZE}
        if options["max-bytes"]:
            limit |= {"max-bytes": int(options["max-bytes"]), "period": int(options["period"])}
        assert builder.nursery is not None  # every microvm has one
        self.start_worker(builder, PlainWorkers(builder.nursery, "rng", self.name,
                                                {"source": source}, lambda: limit))

    def make(self, builder: Builder) -> VirtioRng:
        """See `Part.make`."""
        assert self.worker is not None
        return VirtioRng(self.name, self.worker.take_socket(), builder.machine.memory,
                         builder.loop)


def _open(what: str, path: str) -> int:
    try:
        # Whoever gives what nobody else may see: a device that would wait is asked again later.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}", "name a device that can be read, as "
                          "/dev/urandom") from None
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"{what}: The type of rng-random's filename is not a character special "
                          "file.", "use /dev/urandom or /dev/hwrng")
    return fd

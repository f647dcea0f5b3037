"""`-device vhost-vsock-device` and `vhost-user-fs-device`."""

from __future__ import annotations

from vmm.machine.part import Part

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import DeviceConfig
    from vmm.devices.vhost_kernel import KernelVsock
    from vmm.devices.vhost_vsock import VhostVsock
    from vmm.devices.virtio_fs import VirtioFs
    from vmm.machine.part import Builder


class VsockPart(Part):
    """Sockets between guest and host, which the kernel serves."""

    def __init__(self, config: DeviceConfig, name: str) -> None:
        super().__init__(config, name)
        self._kernel: KernelVsock | None = None
        self._option = f"-device {config.driver},guest-cid={config.options['guest-cid']}"

    def start(self, builder: Builder) -> None:
        """See `Part.start`."""
        from vmm.devices.vhost_kernel import open_vsock

        self._kernel = open_vsock(self._option, int(self.config.options.get("vhostfd", "-1")))
        builder.cleanup.push(self._kernel.close)

    def make(self, builder: Builder) -> VhostVsock:
        """See `Part.make`."""
        from vmm.devices.vhost_vsock import VhostVsock

        assert self._kernel is not None
        return VhostVsock(self.name, self._kernel, int(self.config.options["guest-cid"]),
                          builder.machine.memory, builder.loop, self._option)


class FolderPart(Part):
    """A folder of the host, which virtiofsd serves."""

    def make(self, builder: Builder) -> VirtioFs:
        """See `Part.make`."""
        from vmm.devices.vhost_user import connect_backend
        from vmm.devices.virtio_fs import VirtioFs

        options = self.config.options
        # Kata says server,nowait and means that virtiofsd listens there.
        socket_fd = connect_backend(builder.config.chardevs[options["chardev"]], server_too=True)
        return VirtioFs(self.name, socket_fd, builder.machine.memory, builder.loop,
                        options["tag"], int(options["num-request-queues"]),
                        int(options["queue-size"]))

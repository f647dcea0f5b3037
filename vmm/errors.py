"""Exceptions of the core.

    StratovirtError
    └── VmmError
        ├── ConfigError            a command line or QMP argument that can't be honoured
        ├── KernelImageError       the kernel or initrd can't be loaded
        ├── HypervisorError        KVM refused or broke
        ├── MemoryAccessError      an address outside guest RAM
        ├── DeviceError            a device can't be made, plugged or served
        │   └── BackendError       its back end failed, vanished, lied or was too slow
        ├── WorkerSpawnError       the nursery or a worker could not be started
        ├── StateError             the VM is not in a state that allows the request
        └── qmp.errors.QmpError    what a QMP client is answered (class and desc)
"""

from __future__ import annotations

from shared.errors import StratovirtError


class VmmError(StratovirtError):
    """Base of the exceptions of the core."""


class ConfigError(VmmError):
    """A command line or QMP argument that can't be honoured: names option, value and remedy."""


class KernelImageError(VmmError):
    """The kernel or initrd can't be read, is malformed, or does not fit into guest RAM."""


class HypervisorError(VmmError):
    """KVM is missing, refused a request or reported an internal error."""


class MemoryAccessError(VmmError):
    """An address range that is not inside guest RAM."""


class DeviceError(VmmError):
    """A device can't be made, plugged, unplugged or served."""


class BackendError(DeviceError):
    """A vhost-user back end failed, vanished, lied, or did not answer in time."""


class WorkerSpawnError(VmmError):
    """The nursery or a worker process could not be started."""


class StateError(VmmError):
    """The VM is not in a state that allows what was asked."""

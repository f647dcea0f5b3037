"""What the kernel does for a VM without Python: RAM, the VM itself, the copy of its kernel.

It takes milliseconds, most of them waits.  So it is begun as soon as the command line is known,
by threads of C, and goes on while Python loads what describes devices and makes them.
"""

from __future__ import annotations

from vmm.boot.loading import Loading
from vmm.hypervisor.kvm import KvmHypervisor
from vmm.memory import GuestMemory

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.cleanup import Cleanup
    from vmm.config.model import VmConfig


class Groundwork:
    """Begun when it is made; `vm` is to be waited for before it is used, `loading` at last.

    :raises VmmError: something can't be had; what was opened is closed by `cleanup`.
    """

    def __init__(self, config: VmConfig, cleanup: Cleanup) -> None:
        self.hypervisor = KvmHypervisor()
        cleanup.push(self.hypervisor.close)
        self.memory = GuestMemory(config.memory, config.machine.dump_guest_core)
        cleanup.push(self.memory.close)
        self.vm = self.hypervisor.begin_vm([(region.guest_addr, region.size, region.user_addr)
                                            for region in self.memory.regions])
        cleanup.push(self.vm.close)
        # A file behind -mem-path may hold an older life.
        self.loading = Loading(self.memory, config.boot, fresh=config.memory.path is None)
        cleanup.push(self.loading.cancel)

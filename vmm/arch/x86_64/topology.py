"""APIC ids for a topology: each level gets as many bits as its count needs.

Intel SDM vol. 3, 9.9.1; AMD APM vol. 3, E.4.10.  Clusters have no level of their own in CPUID
leaf 0xB: their cores count as cores of the die.
"""

from __future__ import annotations

from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import CpuConfig

MAX_APIC_ID = 254  # 255 is the broadcast address of an xAPIC


class Topology:
    """Counts and shifts of one machine; `apic_id(index)` numbers its vCPUs."""

    __slots__ = ("cores", "die_shift", "dies", "package_shift", "sockets", "thread_shift",
                 "threads")

    def __init__(self, config: CpuConfig) -> None:
        self.threads = config.threads
        self.cores = config.cores * config.clusters  # of one die
        self.dies = config.dies
        self.sockets = config.sockets
        self.thread_shift = (self.threads - 1).bit_length()
        self.die_shift = self.thread_shift + (self.cores - 1).bit_length()
        self.package_shift = self.die_shift + (self.dies - 1).bit_length()
        highest = self.apic_id(config.max_cpus - 1)
        if highest > MAX_APIC_ID:
            raise ConfigError(f"-smp: this topology needs APIC ids up to {highest}, "
                              f"{MAX_APIC_ID} is the highest",
                              "use powers of two for cores and threads, or fewer CPUs")

    def apic_id(self, index: int) -> int:
        """The APIC id of vCPU `index`, which is also its KVM vCPU id."""
        index, thread = divmod(index, self.threads)
        index, core = divmod(index, self.cores)
        package, die = divmod(index, self.dies)
        return (package << self.package_shift | die << self.die_shift
                | core << self.thread_shift | thread)

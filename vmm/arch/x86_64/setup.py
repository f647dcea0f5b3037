"""From a configuration to a machine that can run its first instruction: what the builder calls.

`write_tables` writes everything the kernel is told, `setup_vcpu` sets one vCPU's registers.
"""

from __future__ import annotations

from vmm.arch.x86_64 import acpi, boot_params, cpuid, layout, mptable, registers
from vmm.arch.x86_64.topology import Topology
from vmm.boot import cmdline

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.boot.loading import Loading
    from vmm.config.model import VmConfig
    from vmm.hypervisor.kvm_vcpu import KvmVcpu
    from vmm.memory import GuestMemory


class EntryPoint:
    """Where and how the bootstrap processor starts: registers.ENTRY_64 or ENTRY_PVH."""

    __slots__ = ("address", "mode")

    def __init__(self, mode: int, address: int) -> None:
        self.mode = mode
        self.address = address


def write_tables(memory: GuestMemory, config: VmConfig, loading: Loading,
                 slots: Sequence[tuple[int, int, int]]) -> EntryPoint:
    """Write command line, boot parameters, ACPI and MP tables.

    :param slots: (base, size, gsi) of each virtio-mmio device, in probe order.
    :raises ConfigError: the command line is too long.
    """
    topology = Topology(config.cpu)
    ids = [topology.apic_id(i) for i in range(config.cpu.max_cpus)]
    kernel = loading.kernel
    line = cmdline.make(config.boot.append, slots, kernel.command_line_limit)
    memory.write(layout.COMMAND_LINE, line)
    ram = [(region.guest_addr, region.size) for region in memory.regions]
    if kernel.mode == registers.ENTRY_64:
        page = boot_params.make_zero_page(kernel.setup_header, ram, len(line) - 1,
                                          loading.module)
        memory.write(layout.ZERO_PAGE, page)
    else:
        for address, data in boot_params.make_pvh(ram, loading.module):
            memory.write(address, data)
    rsdp, tables = acpi.make_acpi(ids, config.cpu.count, slots, config.serial is not None)
    pointer, mp = mptable.make_mptable(ids[:config.cpu.count])
    memory.write(layout.ACPI_RSDP, rsdp)
    memory.write(layout.ACPI_TABLES, tables)
    memory.write(layout.EBDA, pointer)
    memory.write(layout.MP_TABLE, mp)
    memory.write(layout.RESET_VECTOR, registers.RESET_CODE)
    registers.write_descriptor_tables(memory, kernel.mode)
    return EntryPoint(kernel.mode, kernel.entry)


def setup_vcpu(vcpu: KvmVcpu, entry: EntryPoint, index: int, topology: Topology,
               supported: Sequence[cpuid.Row]) -> None:
    """CPUID, MSRs, LAPIC and, for the bootstrap processor, the kernel's entry state."""
    vcpu.set_cpuid(cpuid.make_cpuid(supported, topology, index, vcpu.tsc_khz()))
    reset_vcpu(vcpu, entry, index)


def reset_vcpu(vcpu: KvmVcpu, entry: EntryPoint, index: int) -> None:
    """The same but for the CPUID, which KVM lets nobody set once the vCPU has run."""
    vcpu.set_msrs(registers.START_MSRS)
    vcpu.set_fpu_default()
    vcpu.set_lapic_lint()
    if index == 0:
        enter_kernel(vcpu, entry)


def enter_kernel(vcpu: KvmVcpu, entry: EntryPoint) -> None:
    """The bootstrap processor's registers at the kernel's first instruction."""
    vcpu.set_sregs(registers.system_registers(entry.mode))
    vcpu.set_regs(**registers.general_registers(entry.mode, entry.address))

"""CPUID for each vCPU: the host's supported rows with identity and topology made ours.

Intel SDM vol. 2, CPUID; AMD APM vol. 3, E.3-E.4; Linux Documentation/virt/kvm/x86/cpuid.rst.
What a guest sees of the topology is what `-smp` says, never the host's (compat-decisions,
"AMD hosts").
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.arch.x86_64.topology import Topology

    Row = tuple[int, int, int, int, int, int, int]

INDEX_SIGNIFICANT = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

HYPERVISOR_BASE = 0x40000000
HYPERVISOR_TIMING = 0x40000010  # VMware's and KVM's timing leaf
LAPIC_KHZ = 1_000_000  # KVM's APIC timer counts nanoseconds

_ECX_X2APIC = 1 << 21
_ECX_TSC_DEADLINE = 1 << 24
_ECX_HYPERVISOR = 1 << 31
_EDX_HTT = 1 << 28
_ECX8_CMP_LEGACY = 1 << 1

_AMD_VENDORS = (0x68747541, 0x6F677948)  # EBX of leaf 0: "Auth"enticAMD, "Hygo"nGenuine


def make_cpuid(supported: Sequence[Row], topology: Topology, index: int,
               tsc_khz: int) -> list[Row]:
    """Rows (function, index, flags, eax, ebx, ecx, edx) for vCPU `index`."""
    apic_id = topology.apic_id(index)
    per_package = 1 << topology.package_shift
    highest, vendor = next((row[3:5] for row in supported if row[0] == 0), (0, 0))
    if topology.dies > 1 and 0xB <= highest < 0x1F:
        highest = 0x1F  # the only leaf that tells dies apart
    rows: list[Row] = []
    for row in supported:
        function, sub, flags, eax, ebx, ecx, edx = row
        if function in (0xB, 0x1F, 0x80000026, HYPERVISOR_TIMING):
            continue  # ours are added below; AMD's 0x80000026 says the same as 0xB
        if function == 0:
            eax = highest
        elif function == 1:
            ebx = ebx & 0xFFFF | min(per_package, 255) << 16 | apic_id << 24
            ecx |= _ECX_X2APIC | _ECX_TSC_DEADLINE | _ECX_HYPERVISOR
            edx = edx | _EDX_HTT if per_package > 1 else edx & ~_EDX_HTT
        elif function == 4 and eax & 31:
            eax = _cache_sharing(eax, topology, 26)
        elif function == HYPERVISOR_BASE and tsc_khz:
            eax = max(eax, HYPERVISOR_TIMING)
        elif function == 0x80000001:
            # On Intel the bit would make Linux ignore threads.
            ecx &= ~_ECX8_CMP_LEGACY
            if per_package > 1 and vendor in _AMD_VENDORS:
                ecx |= _ECX8_CMP_LEGACY
        elif function == 0x80000008:
            logical = topology.threads * topology.cores * topology.dies
            ecx = ecx & ~0xF0FF | topology.package_shift << 12 | min(logical - 1, 255)
        elif function == 0x8000001D and eax & 31:
            eax = _cache_sharing(eax, topology, 32)
        elif function == 0x8000001E:
            core = apic_id >> topology.thread_shift
            eax, ebx = apic_id, core & 0xFF | min(topology.threads - 1, 255) << 8
            ecx = apic_id >> topology.die_shift & 0xFF | min(topology.dies - 1, 7) << 8
        rows.append((function, sub, flags, eax, ebx, ecx, edx))
    rows += _topology_rows(topology, apic_id, highest)
    if tsc_khz:
        rows.append((HYPERVISOR_TIMING, 0, 0, tsc_khz, LAPIC_KHZ, 0, 0))
    return rows


def _cache_sharing(eax: int, topology: Topology, core_bit: int) -> int:
    """Levels 1 and 2 belong to a core, level 3 to a die; bits 25:14 say how many ids share."""
    level = eax >> 5 & 7
    sharing = 1 << (topology.thread_shift if level < 3 else topology.die_shift)
    eax = eax & ~(0xFFF << 14) | (sharing - 1) << 14
    if core_bit < 32:  # Intel's leaf 4 also counts the cores of the package
        cores = 1 << (topology.package_shift - topology.thread_shift)
        eax = eax & ~(0x3F << 26) | (min(cores, 64) - 1) << 26
    return eax


def _topology_rows(topology: Topology, apic_id: int, highest: int) -> list[Row]:
    """Leaf 0xB: threads, then cores of the package; leaf 0x1F tells dies apart."""
    rows: list[Row] = []
    threads = topology.threads
    package = threads * topology.cores * topology.dies
    if highest >= 0xB:
        rows += [(0xB, 0, INDEX_SIGNIFICANT, topology.thread_shift, threads, 1 << 8, apic_id),
                 (0xB, 1, INDEX_SIGNIFICANT, topology.package_shift, package, 2 << 8 | 1,
                  apic_id),
                 (0xB, 2, INDEX_SIGNIFICANT, 0, 0, 2, apic_id)]
    if highest >= 0x1F:
        rows += [(0x1F, 0, INDEX_SIGNIFICANT, topology.thread_shift, threads, 1 << 8, apic_id),
                 (0x1F, 1, INDEX_SIGNIFICANT, topology.die_shift, threads * topology.cores,
                  2 << 8 | 1, apic_id),
                 (0x1F, 2, INDEX_SIGNIFICANT, topology.package_shift, package, 5 << 8 | 2,
                  apic_id),
                 (0x1F, 3, INDEX_SIGNIFICANT, 0, 0, 3, apic_id)]
    return rows

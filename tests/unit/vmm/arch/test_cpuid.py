"""What a guest's CPUID says about identity and topology, for several -smp shapes."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.arch.x86_64 import cpuid
from vmm.arch.x86_64.topology import Topology
from vmm.config.model import CpuConfig
from vmm.errors import ConfigError

INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)
AMD = (0x68747541, 0x444D4163, 0x69746E65)
BRAND = [(0x80000002 + n, 0, 0, 0x41414141, 0x42424242, 0x43434343, 0x44444444) for n in range(3)]


def supported(vendor: tuple[int, int, int] = INTEL, highest: int = 0x1F) -> list[cpuid.Row]:
    """A host of 64 cores with all bits that must not shine through."""
    return [
        (0, 0, 0, highest, *vendor), (1, 0, 0, 0x806F8, 0x40800, 0x00202001, 0x1F8BFBFF),
        (4, 0, 1, 0xFC004121, 0x2C0003F, 0x3F, 0), (4, 1, 1, 0xFC004122, 0x1C0003F, 0x3F, 0),
        (4, 2, 1, 0xFC01C143, 0x3C0003F, 0x7FF, 0), (4, 3, 1, 0xFC1FC163, 0x2C0003F, 0xFFF, 0),
        (4, 4, 1, 0, 0, 0, 0),
        (0xB, 0, 1, 1, 2, 0x100, 77), (0xB, 1, 1, 7, 128, 0x201, 77),
        (0x1F, 0, 1, 1, 2, 0x100, 77),
        (0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
        (0x40000001, 0, 0, 0x1007EFB, 0, 0, 0),
        (0x80000000, 0, 0, 0x80000022, 0, 0, 0), (0x80000001, 0, 0, 0, 0, 0x00400123, 0),
        *BRAND, (0x80000008, 0, 0, 0x3030, 0, 0x1707F, 0),
        (0x8000001D, 0, 1, 0x4121, 0x1C0003F, 0x3F, 0),
        (0x8000001D, 3, 1, 0xFC163, 0x3C0003F, 0x7FFF, 1),
        (0x8000001E, 0, 0, 77, 77, 77, 0), (0x80000026, 0, 1, 77, 77, 77, 77)]


def shape(sockets: int = 1, dies: int = 1, clusters: int = 1, cores: int = 1,
          threads: int = 1) -> CpuConfig:
    config = CpuConfig()
    config.sockets, config.dies, config.clusters = sockets, dies, clusters
    config.cores, config.threads = cores, threads
    config.count = config.max_cpus = sockets * dies * clusters * cores * threads
    return config


def leaves(config: CpuConfig, index: int, **options: Any) -> dict[tuple[int, int], cpuid.Row]:
    rows = cpuid.make_cpuid(supported(**options), Topology(config), index, 2_600_000)
    found = {row[:2]: row for row in rows}
    assert len(found) == len(rows), "no row twice"
    return found


SHAPES = [shape(), shape(sockets=4), shape(cores=4), shape(cores=2, threads=2),
          shape(sockets=2, cores=3, threads=2), shape(sockets=2, dies=2, cores=2, threads=2),
          shape(clusters=2, cores=2), shape(sockets=254), shape(cores=254), shape(sockets=128),
          shape(sockets=127, threads=2), shape(sockets=2, cores=127)]


@pytest.mark.parametrize("config", SHAPES)
def test_apic_ids_are_unique_and_below_255(config: CpuConfig) -> None:
    topology = Topology(config)
    ids = [topology.apic_id(n) for n in range(config.max_cpus)]
    assert ids[0] == 0 and len(set(ids)) == len(ids) and sorted(ids) == ids
    assert ids[-1] <= 254


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("vendor", [INTEL, AMD])
def test_every_leaf_tells_the_same_topology(config: CpuConfig,
                                            vendor: tuple[int, int, int]) -> None:
    topology = Topology(config)
    cores = config.cores * config.clusters
    in_package = config.threads * cores * config.dies
    for index in {0, config.max_cpus // 2, config.max_cpus - 1}:
        rows = leaves(config, index, vendor=vendor)
        apic_id = topology.apic_id(index)
        leaf1 = rows[1, 0]
        assert leaf1[4] >> 24 == apic_id and leaf1[4] & 0xFFFF == 0x0800
        assert bool(leaf1[6] & 1 << 28) == (in_package > 1)
        assert (leaf1[4] >> 16 & 0xFF) >= in_package
        # Leaves 0xB and 0x1F: the shifts part the id into the right numbers.
        for leaf, levels in ((0xB, (1, 2)), (0x1F, (1, 2, 5))):
            assert all(rows[leaf, n][6] == apic_id for n in range(len(levels) + 1))
            assert [rows[leaf, n][5] >> 8 for n in range(len(levels))] == list(levels)
            assert rows[leaf, len(levels)][5] >> 8 == 0, "the list ends"
        package_shift = rows[0xB, 1][3]
        assert apic_id >> package_shift == index // in_package
        assert rows[0x1F, 2][3] == package_shift
        assert rows[0xB, 0][4] == config.threads and rows[0xB, 1][4] == in_package
        assert apic_id & (1 << rows[0xB, 0][3]) - 1 == index % config.threads
        # Leaf 4: levels 1 and 2 are a core's, level 3 is a die's.
        assert rows[4, 0][3] >> 14 & 0xFFF == (1 << topology.thread_shift) - 1
        assert rows[4, 3][3] >> 14 & 0xFFF == (1 << topology.die_shift) - 1
        assert rows[4, 4][3] == 0
        # AMD: one logical processor count, the same id.
        leaf8 = rows[0x80000008, 0]
        assert leaf8[5] & 0xFF == in_package - 1 and leaf8[5] >> 12 & 15 == package_shift
        assert leaf8[5] & 0x10000 and leaf8[3] == 0x3030
        leaf1e = rows[0x8000001E, 0]
        assert leaf1e[3] == apic_id and leaf1e[4] >> 8 & 0xFF == config.threads - 1
        assert rows[0x8000001D, 3][3] >> 14 & 0xFFF == (1 << topology.die_shift) - 1
        assert bool(rows[0x80000001, 0][5] & 2) == (vendor == AMD and in_package > 1)
        assert (0x80000026, 0) not in rows


def test_what_every_guest_is_told() -> None:
    rows = leaves(shape(), 0)
    ecx = rows[1, 0][5]
    assert ecx & 1 << 31 and ecx & 1 << 24 and ecx & 1 << 21  # hypervisor, deadline, x2APIC
    assert rows[0x40000000, 0] == (0x40000000, 0, 0, 0x40000010, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert rows[0x40000001, 0][3] == 0x1007EFB
    assert rows[0x40000010, 0][3:5] == (2_600_000, 1_000_000)
    assert [rows[row[:2]] for row in BRAND] == BRAND


def test_unknown_frequency_gives_no_timing_leaf() -> None:
    rows = cpuid.make_cpuid(supported(), Topology(shape()), 0, 0)
    assert 0x40000010 not in {row[0] for row in rows}
    assert next(row[3] for row in rows if row[0] == 0x40000000) == 0x40000001


def test_dies_need_leaf_1f_where_the_host_lacks_it() -> None:
    assert (0x1F, 0) not in leaves(shape(cores=2), 0, highest=0x16)
    rows = leaves(shape(dies=2), 0, highest=0x16)
    assert rows[0, 0][3] == 0x1F and rows[0x1F, 2][4] == 2
    assert (0xB, 0) not in leaves(shape(cores=2), 0, highest=0xA)


def test_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="APIC ids up to 338"):
        Topology(shape(sockets=85, cores=3))

"""What is told when KVM can't go on, from exit data that a test wrote (api.rst, 5)."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from native import _core
from shared.errors import StratovirtError
from vmm.hypervisor.kvm_report import report

pytestmark = pytest.mark.native

ffi, lib = _core.ffi, _core.lib
EXIT_REASON, EXIT_DATA = 8, 32  # offsets in struct kvm_run


class Dead:
    """A vCPU of which nothing can be read any more."""

    index = 3

    def get_regs(self) -> dict[str, int]:
        raise StratovirtError("the vCPU is gone")

    get_sregs = get_regs


def told(reason: int, data: bytes) -> str:
    page = ffi.new("char[]", 4096)
    vcpu: Any = ffi.new("struct sv_vcpu *")
    vcpu.run = ffi.cast("struct kvm_run *", page)
    ffi.buffer(page)[EXIT_REASON:EXIT_REASON + 4] = struct.pack("=I", reason)
    ffi.buffer(page)[EXIT_DATA:EXIT_DATA + len(data)] = data
    return report(Dead(), vcpu)  # type: ignore[arg-type]


def test_a_refused_entry() -> None:
    text = told(lib.KVM_EXIT_FAIL_ENTRY, struct.pack("=QI", 0x80000021, 7))
    assert text.splitlines()[0] == "vCPU 3 can't go on: KVM_EXIT_FAIL_ENTRY"
    assert "hardware entry failure reason 0x80000021 on host CPU 7" in text
    assert "no registers: the vCPU is gone" in text


def test_an_unknown_exit_of_the_hardware() -> None:
    assert "hardware exit reason 0x1234" in told(0, struct.pack("=Q", 0x1234))


def test_an_instruction_that_kvm_cant_emulate() -> None:
    # suberror, ndata, flags (instruction bytes), their count, the bytes
    data = struct.pack("=IIQB15s", lib.KVM_INTERNAL_ERROR_EMULATION, 4, 1, 3, b"\x0f\x0b\x90")
    text = told(lib.KVM_EXIT_INTERNAL_ERROR, data)
    assert "emulation failure" in text and "instruction bytes at rip: 0f 0b 90" in text


@pytest.mark.parametrize(("ndata", "size"), [(0xFFFFFFFF, 255), (16, 255), (0, 3), (3, 15)])
def test_counts_that_lie(ndata: int, size: int) -> None:
    data = struct.pack("=IIQB15s", lib.KVM_INTERNAL_ERROR_EMULATION, ndata, 1, size, bytes(15))
    text = told(lib.KVM_EXIT_INTERNAL_ERROR, data)
    assert len(text) < 2000


def test_a_reason_that_nobody_knows() -> None:
    assert "exit reason 4242" in told(4242, b"")

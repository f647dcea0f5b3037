"""Limits on requests and bytes a second of a disk: their names, which core and worker agree on.

The names are QEMU's (`-drive throttling.NAME=`); StratoVirt has the first.  `NAME-max` is how
much may come at once after a pause; without it, what 100 ms at the rate give.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# In the order of enum sv_limit (native/blk/throttle.h); a test compares.
LIMITS = ("iops-total", "iops-read", "iops-write", "bps-total", "bps-read", "bps-write")
BURST = "-max"
OPTIONS = tuple(name + suffix for name in LIMITS for suffix in ("", BURST))

MAX_IOPS = 1_000_000  # StratoVirt's
MAX_BPS = 1 << 40


def largest(name: str) -> int:
    """The largest value of an option."""
    return MAX_IOPS if name.startswith("iops") else MAX_BPS


def complaint(limits: Mapping[str, int]) -> str:
    """What is wrong with these limits together; empty if nothing is."""
    for name in LIMITS:
        rate, burst = limits.get(name, 0), limits.get(name + BURST, 0)
        if burst and not rate:
            return f"'throttling.{name}{BURST}' needs 'throttling.{name}'"
        if burst and burst < rate:
            return f"'throttling.{name}{BURST}={burst}' is less than 'throttling.{name}={rate}'"
    return ""

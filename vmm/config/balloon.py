"""`-device virtio-balloon-device`."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.options import SubOptions


def read_balloon(options: SubOptions) -> dict[str, str]:
    """`deflate-on-oom`, `free-page-reporting`; what StratoVirt's driver adjusts itself by."""
    kept = {name: "on" if options.take_bool(name, False) else "off"
            for name in ("deflate-on-oom", "free-page-reporting")}
    if options.take_bool("auto-balloon", False):
        raise options.error("'auto-balloon' needs a driver in the guest that no released kernel "
                            "has (feature bit 16, which virtio doesn't know)",
                            "use free-page-reporting=true, and the command balloon")
    # For auto-balloon alone, and ignored without it by StratoVirt too.
    options.take_int("membuf-percent", 20, 80, 50)
    options.take_int("monitor-interval", 5, 300, 10)
    return kept

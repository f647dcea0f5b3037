"""`-device virtio-rng-device`, and the object that it names."""

from __future__ import annotations

from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.model import DeviceConfig, VmConfig
    from vmm.config.options import SubOptions

MIN_RATE, MAX_RATE = 64, 1_000_000_000  # bytes a second


def read_rng(options: SubOptions) -> dict[str, str]:
    """What it says beside driver and id: `rng`, and a limit (`max-bytes` in `period` ms)."""
    kept = {"rng": options.take("rng"), "max-bytes": "", "period": ""}
    has_limit = "max-bytes" in options.values
    if has_limit != ("period" in options.values):
        raise options.error('"max-bytes" and "period" should be configured or not configured '
                            "Simultaneously.", "give both or neither")
    if has_limit:
        max_bytes = options.take_int("max-bytes", 1, 0xFFFFFFFF)
        period = options.take_int("period", 1, 0xFFFFFFFF)
        if not MIN_RATE <= max_bytes * 1000 // period <= MAX_RATE:
            raise options.error(f"The bytes per second of rng device must >= {MIN_RATE} and <= "
                                f"{MAX_RATE}.", "max-bytes / period * 1000 is what counts")
        kept |= {"max-bytes": str(max_bytes), "period": str(period)}
    return kept


def check_rng(config: VmConfig, device: DeviceConfig) -> None:
    """:raises ConfigError: the object that a device names isn't there, or isn't one for it."""
    name = device.options["rng"]
    found = config.objects.get(name)
    if found is None or found["qom-type"] != "rng-random":
        raise ConfigError(f"-device {device.driver}: there is no rng-random object '{name}'",
                          f"add -object rng-random,id={name},filename=/dev/urandom")
    path = found.get("filename", "")
    if not path or "\0" in path or len(path) > 4095:
        raise ConfigError(f"-object rng-random,id={name}: 'filename' is missing or no path",
                          "add filename=/dev/urandom")

"""`-object memory-backend-ram|file|memfd` with `-machine memory-backend=ID`: where guest RAM is."""

from __future__ import annotations

from vmm.config.options import parse_int, parse_size
from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.config.model import VmConfig

_TRUE, _FALSE = ("on", "true", "yes"), ("off", "false", "no", "")


def resolve_memory_backend(config: VmConfig) -> None:
    """Put what the object says into `config.memory`.

    :raises ConfigError: there is no such object, or it contradicts `-m` or `-mem-path`.
    """
    id = config.machine.memory_backend
    if not id:
        return
    values = config.objects.get(id, {})
    kind = values.get("qom-type", "")
    if not kind.startswith("memory-backend-"):
        raise ConfigError(f"-machine memory-backend={id}: there is no memory backend '{id}'",
                          f"add -object memory-backend-memfd,id={id},size=…")
    option = f"-object {kind},id={id}"
    _take_size(config, option, values)
    if values.get("policy", "default") != "default":
        raise ConfigError(f"{option}: policy={values['policy']} is not supported",
                          "remove it, and bind the VM with numactl")
    memory = config.memory
    if kind == "memory-backend-file":
        path = values.get("mem-path", "")
        if not path or memory.path not in (None, path):
            raise ConfigError(f"{option}: mem-path '{path}' is missing, or not that of -mem-path",
                              "name one file or folder, once")
        memory.path = path
    elif memory.path is not None:
        raise ConfigError(f"{option} and -mem-path both say where guest RAM is", "remove one")
    if kind == "memory-backend-memfd" and _flag(option, values, "hugetlb"):
        memory.huge_page_size = _huge_page_size(option, values.get("hugetlbsize", "2M"))
    if _flag(option, values, "prealloc") or _flag(option, values, "mem-prealloc"):
        memory.prealloc = True


def _take_size(config: VmConfig, option: str, values: Mapping[str, str]) -> None:
    text = values.get("size", "")
    size = parse_size(text)
    plain = parse_int(text)
    if plain is not None and plain >= 1 << 20:
        size = plain  # bytes, as libvirt writes them: as MiB it would be a terabyte
    if size is None:
        raise ConfigError(f"{option}: 'size={text}' is not a size",
                          "write a number with K, M or G")
    memory = config.memory
    if not memory.given:
        memory.size = size
    elif size != memory.size:
        raise ConfigError(f"{option}: it has {size} bytes, -m says {memory.size}",
                          "make them the same")


def _huge_page_size(option: str, text: str) -> int:
    size = parse_size(text) or 0
    if size < 1 << 16 or size & (size - 1):
        raise ConfigError(f"{option}: 'hugetlbsize={text}' is no size of huge pages",
                          "write 2M or 1G")
    return size


def _flag(option: str, values: Mapping[str, str], name: str) -> bool:
    text = values.get(name, "")
    if text not in (*_TRUE, *_FALSE):
        raise ConfigError(f"{option}: '{name}={text}' is neither on nor off",
                          f"write {name}=on or {name}=off")
    return text in _TRUE

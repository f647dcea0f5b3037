"""`-object memory-backend-*` and `-machine memory-backend=`: they say where guest RAM is."""

from __future__ import annotations

import pytest

from vmm.cli import parse
from vmm.errors import ConfigError

TAIL = ["-qmp", "unix:q,server,nowait", "-kernel", "k"]
MIB = 1 << 20


@pytest.mark.parametrize("size", ["512M", "512", str(512 * MIB), hex(512 * MIB)])
def test_size(size: str) -> None:
    for more in ([], ["-m", "512"]):
        config = parse(["-machine", "microvm,memory-backend=ram", "-object",
                        f"memory-backend-ram,id=ram,size={size}", *more, *TAIL])
        assert config.memory.size == 512 * MIB
        assert (config.memory.path, config.memory.prealloc) == (None, False)


def test_as_libvirt_writes_it() -> None:
    config = parse(["-machine", "microvm,usb=off,dump-guest-core=off,memory-backend=pc.ram", "-m",
                    "512", "-object", '{"qom-type":"memory-backend-memfd","id":"pc.ram",'
                    '"share":true,"prealloc":true,"x-use-canonical-path-for-ramblock-id":false,'
                    '"size":536870912}', *TAIL])
    assert config.memory.prealloc and config.memory.size == 512 * MIB


def test_file_and_huge_pages() -> None:
    config = parse(["-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages,share=on",
                    "-machine", "memory-backend=m", *TAIL])
    assert (config.memory.path, config.memory.size) == ("/dev/hugepages", 1 << 30)
    config = parse(["-object", "memory-backend-memfd,id=m,size=1G,hugetlb=on,hugetlbsize=1G",
                    "-machine", "memory-backend=m", *TAIL])
    assert (config.memory.path, config.memory.huge_page_size) == (None, 1 << 30)


def test_an_object_that_nobody_names_says_nothing() -> None:
    config = parse(["-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages", *TAIL])
    assert (config.memory.path, config.memory.size) == (None, 256 * MIB)


@pytest.mark.parametrize(("line", "says"), [
    ("-machine memory-backend=x", "there is no memory backend 'x'"),
    ("-object iothread,id=x -machine memory-backend=x", "there is no memory backend 'x'"),
    ("-object memory-backend-ram,id=x -machine memory-backend=x", "'size=' is not a size"),
    ("-object memory-backend-ram,id=x,size=1T -machine memory-backend=x", "'size=1T'"),
    ("-object memory-backend-ram,id=x,size=64M -machine memory-backend=x", ">= 128MiB"),
    ("-object memory-backend-ram,id=x,size=1G -machine memory-backend=x -m 512", "-m says"),
    ("-object memory-backend-ram,id=x,size=1G -machine memory-backend=x -mem-path /d",
     "both say where"),
    ("-object memory-backend-file,id=x,size=1G -machine memory-backend=x", "mem-path"),
    ("-object memory-backend-file,id=x,size=1G,mem-path=/a -machine memory-backend=x -mem-path /b",
     "mem-path"),
    ("-object memory-backend-ram,id=x,size=1G,policy=bind -machine memory-backend=x",
     "policy=bind"),
    ("-object memory-backend-ram,id=x,size=1G,prealloc=2 -machine memory-backend=x", "prealloc=2"),
    ("-object memory-backend-memfd,id=x,size=1G,hugetlb=on,hugetlbsize=3M -machine "
     "memory-backend=x", "hugetlbsize=3M"),
])
def test_wrong(line: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([*line.split(), *TAIL])
    assert says in caught.value.what
    assert caught.value.hint

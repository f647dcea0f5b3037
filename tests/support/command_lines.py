"""Command lines to begin from where random ones are made, and what must hold for each that is
taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.config.model import VmConfig

# A command line that holds together. Less of it, and what is nearly it, is what gets furthest.
WHOLE = (
    ("-machine", "microvm,mem-share=on"), ("-kernel", "/dev/null"), ("-smp", "2"), ("-m", "512"),
    ("-qmp", "unix:/q,server,nowait"), ("-chardev", "socket,id=mon,path=/m,server,nowait"),
    ("-mon", "chardev=mon,mode=control"), ("-object", "iothread,id=t"),
    ("-drive", "id=a,file=/a,direct=false"), ("-device", "virtio-blk-device,drive=a,iothread=t"),
    ("-netdev", "tap,id=n,ifname=tap0,queues=2,rx-packets=1000,vhost=on"),
    ("-device", "virtio-net-device,id=nic,netdev=n,mac=52:54:00:12:34:56,host_mtu=1500,mq=on"),
    ("-netdev", "tap,id=f,fds=5:6"), ("-device", "virtio-net-device,netdev=f,queue-size=512"),
    ("-chardev", "socket,id=u,path=/u"), ("-netdev", "vhost-user,id=v,chardev=u"),
    ("-device", "virtio-net-device,netdev=v"),
    ("-object", "rng-random,id=r,filename=/dev/urandom"),
    ("-device", "virtio-rng-device,rng=r,max-bytes=1000,period=1000"),
    ("-device", "virtio-serial-device,id=bus,max_ports=4"), ("-chardev", "null,id=c"),
    ("-device", "virtconsole,chardev=c,nr=0"), ("-chardev", "socket,id=p,path=/p,server,nowait"),
    ("-device", "virtserialport,chardev=p,name=org.x,nr=1"), ("-serial", "null"),
    ("-device", "vhost-vsock-device,guest-cid=3,id=vsock"),
    ("-device", "virtio-balloon-device,id=balloon,deflate-on-oom=on,free-page-reporting=on"),
    ("-object", "memory-backend-memfd,id=mem,size=512M,share=on"))
# Values of one option in another one are often nearly right, too.
PARTS = sorted({part for _, text in WHOLE for part in text.split(",")})
NUMBERS = ("0", "1", "2", "3", "16", "17", "31", "32", "64", "256", "1000", "1024", "0xff", "65535",
           "4294967295", "-1", "1e9", "5:5", ":", ":".join(map(str, range(40))), "x" * 300,
           "01:00:5e:00:00:01", "52:54:00:12:34", "52:54:00:12:34:5g")


def check(config: VmConfig) -> None:
    """Fails if options do not hold together."""
    assert config.monitors
    assert 1 <= config.cpu.count <= config.cpu.max_cpus <= 254
    assert 128 << 20 <= config.memory.size <= 512 << 30
    cpu = config.cpu
    assert cpu.sockets * cpu.dies * cpu.clusters * cpu.cores * cpu.threads == cpu.max_cpus
    for netdev in config.netdevs.values():
        assert 1 <= netdev.queues <= 16 and len(netdev.fds) in (0, netdev.queues)
        assert netdev.kind != "tap" or bool(netdev.fds) != bool(netdev.ifname)
        assert all(0 < limit <= 1 << 50 for limit in netdev.limits.values())
    used = [d.options["netdev"] for d in config.devices if "netdev" in d.options]
    assert len(used) == len(set(used)) and set(used) <= set(config.netdevs)
    ids = [d.id for d in config.devices if d.id]
    assert len(ids) == len(set(ids))
    _check_ports(config)


def _check_ports(config: VmConfig) -> None:
    buses = [d for d in config.devices if d.driver == "virtio-serial-device"]
    numbers = [int(d.options["nr"]) for d in config.devices if "nr" in d.options]
    assert len(buses) <= 1 and len(numbers) == len(set(numbers))
    if numbers:
        assert 0 <= min(numbers) <= max(numbers) < int(buses[0].options["max_ports"]) <= 31

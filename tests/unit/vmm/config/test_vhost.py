"""`-device vhost-vsock-device` and `vhost-user-fs-device`, alone and beside others."""

from __future__ import annotations

import shlex

import pytest

from vmm import cli
from vmm.errors import ConfigError

BASE = "-machine microvm -kernel /k -qmp unix:/run/q.sock,server,nowait"
FOLDER = "-chardev socket,id=fs,path=/run/fs.sock -device vhost-user-fs-device,chardev=fs"

# As Kata writes them: the chardev is said to be a server, and stands before its device.
KATA = """-device vhost-vsock-device,id=vsock-id,guest-cid=1234567890,vhostfd=3
 -chardev socket,id=virtio_fs,path=/run/vc/vm/x/virtiofs_kata.socket,server,nowait
 -device vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0"""


def parse(text: str) -> cli.VmConfig:
    return cli.parse(shlex.split(f"{BASE} {text}"))


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_katas() -> None:
    config = parse(KATA)
    vsock, folder = config.devices
    assert (vsock.driver, vsock.id) == ("vhost-vsock-device", "vsock-id")
    assert (vsock.options["guest-cid"], vsock.options["vhostfd"]) == ("1234567890", "3")
    assert (folder.driver, folder.id) == ("vhost-user-fs-device", "virtio-fs0")
    assert (folder.options["chardev"], folder.options["tag"]) == ("virtio_fs", "kataShared")
    assert folder.options["queue-size"] == "128"
    assert folder.options["num-request-queues"] == "1"
    assert config.warnings == []


@pytest.mark.parametrize("cid", ["3", "4294967295", "0x10"])
def test_guest_cids(cid: str) -> None:
    options = parse(f"-device vhost-vsock-device,guest-cid={cid}").devices[0].options
    assert int(options["guest-cid"]) == int(cid, 0)
    assert "vhostfd" not in options


@pytest.mark.parametrize(("text", "says"), [
    ("", "'guest-cid' is missing; add guest-cid=…"),
    (",guest-cid=2", "'guest-cid=2' is not a number from 3 to 4294967295"),
    (",guest-cid=4294967296", "'guest-cid=4294967296' is not a number"),
    (",guest-cid=-1", "'guest-cid=-1' is not a number"),
    (",guest-cid=x", "'guest-cid=x' is not a number"),
    (",guest-cid=3,vhostfd=-1", "'vhostfd=-1' is not a number from 0 to 1048576"),
    (",guest-cid=3,vhostfd=tap", "'vhostfd=tap' is not a number"),
    (",guest-cid=3,bus=pcie.0", "Should not set bus"),
    (",guest-cid=3,queue-size=64", "there is no sub-option 'queue-size'"),
])
def test_a_wrong_vsock(text: str, says: str) -> None:
    assert says in refusal(f"-device vhost-vsock-device{text}")


def test_one_vsock_is_enough() -> None:
    assert "Only one vsock device" in refusal("-device vhost-vsock-device,guest-cid=3 "
                                              "-device vhost-vsock-device,guest-cid=4")


@pytest.mark.parametrize("tag", ["a", "x" * 35, "ä" * 17, "has blank"])
def test_tags(tag: str) -> None:
    assert parse(f"{FOLDER},'tag={tag}'").devices[0].options["tag"] == tag


@pytest.mark.parametrize(("text", "says"), [
    ("", "'tag' is missing; add tag=…"),
    (",tag=", "'tag' is not a text of 1 to 35 bytes; shorten or correct it"),
    (f",tag={'x' * 36}", "'tag' is not a text of 1 to 35 bytes"),
    (f",tag={'ä' * 18}", "'tag' is not a text of 1 to 35 bytes"),
    (",'tag=a\nb'", "'tag' is not a text"),
    (",tag=t,queue-size=100", "'queue-size=100' is not a power of two; use 8 to 1024"),
    (",tag=t,queue-size=4", "'queue-size=4' is not a number from 8 to 1024"),
    (",tag=t,queue-size=2048", "'queue-size=2048' is not a number from 8 to 1024"),
    (",tag=t,num-request-queues=0", "'num-request-queues=0' is not a number from 1 to 31"),
    (",tag=t,num-request-queues=32", "'num-request-queues=32' is not a number from 1 to 31"),
    (",tag=t,cache-size=1G", "there is no sub-option 'cache-size'"),
    (",tag=t,addr=0x4", "Should not set addr"),
])
def test_a_wrong_folder(text: str, says: str) -> None:
    assert says in refusal(f"{FOLDER}{text}")


def test_folders_beside_others() -> None:
    other = "-chardev socket,id=gs,path=/run/gs.sock -device vhost-user-fs-device,chardev=gs"
    assert len(parse(f"{FOLDER},tag=a {other},tag=b").devices) == 2
    assert "another folder has the tag 'a'" in refusal(f"{FOLDER},tag=a {other},tag=a")
    assert 'Chardev "fs" not found or is in use' in refusal(
        f"{FOLDER},tag=a -device vhost-user-fs-device,chardev=fs,tag=b")
    assert 'Chardev "nope" not found' in refusal("-device vhost-user-fs-device,chardev=nope,tag=a")

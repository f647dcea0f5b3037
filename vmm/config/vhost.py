"""`-device vhost-vsock-device` and `vhost-user-fs-device`: what the kernel or virtiofsd serves."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.config.options import SubOptions

MIN_CID, MAX_CID = 3, 0xFFFF_FFFF  # virtio 1.2, 5.10.4: 0 to 2 are reserved
TAG_LIMIT = 35  # virtio 1.2, 5.11.4: 36 bytes with what ends it
# A request of Linux needs more than four descriptors.
MIN_FOLDER_QUEUE, MAX_FOLDER_QUEUE, FOLDER_QUEUE = 8, 1024, 128
MAX_REQUEST_QUEUES = 31
MAX_DESCRIPTOR = 1 << 20


def read_vsock(options: SubOptions) -> dict[str, str]:
    """`guest-cid=N[,vhostfd=FD]`."""
    kept = {"guest-cid": str(options.take_int("guest-cid", MIN_CID, MAX_CID))}
    if "vhostfd" in options.values:
        kept["vhostfd"] = str(options.take_int("vhostfd", 0, MAX_DESCRIPTOR))
    return kept


def read_folder(options: SubOptions) -> dict[str, str]:
    """`chardev=ID,tag=TAG[,queue-size=N][,num-request-queues=N]`."""
    kept = {"chardev": options.take("chardev"), "tag": options.take("tag")}
    tag = kept["tag"]
    if not tag.isprintable() or not 0 < len(tag.encode()) <= TAG_LIMIT:
        raise options.error(f"'tag' is not a text of 1 to {TAG_LIMIT} bytes", "shorten or "
                            "correct it")
    size = options.take_int("queue-size", MIN_FOLDER_QUEUE, MAX_FOLDER_QUEUE, FOLDER_QUEUE)
    if size & (size - 1):
        raise options.error(f"'queue-size={size}' is not a power of two",
                            f"use {MIN_FOLDER_QUEUE} to {MAX_FOLDER_QUEUE}")
    kept["queue-size"] = str(size)
    count = options.take_int("num-request-queues", 1, MAX_REQUEST_QUEUES, 1)
    kept["num-request-queues"] = str(count)
    return kept

"""Hosts that lack something: the start fails and names the stage, and giving it up helps."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.blk_worker import ROOT
from tests.support.capabilities import require

pytestmark = pytest.mark.worker

# A core on a host that isn't as it should be, with one worker: prints how its start went.
CORE = """
import os, sys, time
how, off, aio = sys.argv[2], sys.argv[3], sys.argv[4]
from native import _sandbox
from shared.sandbox import policy
lib = _sandbox.lib
if how.startswith("ucounts "):
    lib.sv_enter_user_namespace(b"0 0 1", b"0 0 1", False)
    for name in how.split()[1:]:
        with open(f"/proc/sys/user/max_{name}_namespaces", "w") as file:
            file.write("0")
elif how == "ids":
    lib.sv_enter_user_namespace(b"0 0 1", b"0 0 1", False)
else:
    import fcntl
    rules = [policy._parse(rule, "a poor host", "test") for rule in how.split(";")]
    program = policy.compile_rules(rules, policy.NOTHING)
    lib.sv_no_new_privs()
    assert lib.sv_filter_install(program, len(program)) == 0
from vmm.event_loop import EventLoop
from vmm.worker.nursery import Nursery
nursery = Nursery(EventLoop(), [name for name in off.split(",") if name])
nursery.start()
image = os.open(sys.argv[1], os.O_RDWR)
worker = nursery.spawn("blk", "disk", {"image": image}, {"aio": aio})
fine = worker.wait_started(time.monotonic() + 10)
print("fine" if fine else "failed", worker.engine, worker.reason, worker.stages)
try:
    print("root holds", os.listdir(f"/proc/{nursery.pid}/root/."))
except OSError as error:
    print("root holds", error)
nursery.close()
"""


def start(tmp_path: Path, how: str, off: str = "", aio: str = "auto", uid: int = 0) -> str:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    image.chmod(0o666)
    user = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
    done = subprocess.run([sys.executable, "-c", CORE, str(image), how, off, aio], cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=60, check=False, **user)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


# What each host refuses, and the stage that fails for it.
POOR = {
    "landlock": "landlock_create_ruleset: ENOSYS",
    "landlock off at boot": "landlock_create_ruleset: EOPNOTSUPP",
    "landlock without restrict": "landlock_restrict_self: EPERM",
    "seccomp": "seccomp: ENOSYS",
    "capabilities": "prctl: arg0 == 24: EPERM",  # PR_CAPBSET_DROP
    "capabilities by capset": "capset: EPERM",
    "limits": "prlimit64: EPERM",
    "uid": "ids",
    "user": "unshare: arg0 == CLONE_NEWUSER: EPERM",
    "user by count": "ucounts user",
    "mount": "unshare: arg0 == CLONE_NEWNS: EPERM",
    "mount without pivot": "pivot_root: EPERM",
    "mount without tmpfs": "mount: ENODEV",
    "net": "ucounts net",
    "ipc": "ucounts ipc",
    "uts": "ucounts uts",
    "pid": "ucounts pid",
}


@pytest.mark.parametrize("name", POOR)
def test_a_host_without_a_stage_says_so(tmp_path: Path, name: str) -> None:
    require("root")
    require("userns")
    stage = name.split()[0]
    how = POOR[name]
    others = "uid" if how.startswith("ucounts") else ""
    said = start(tmp_path, how, others)
    assert said.startswith("failed"), said
    assert f"stage '{stage}'" in said
    assert f"-sandbox on,{stage}=off" in said
    # The way out is one.
    said = start(tmp_path, how, ",".join(filter(None, (stage, others))))
    assert said.startswith("fine"), said
    assert f"'{stage}'" not in said
    assert "'no-new-privs'" in said


@pytest.mark.parametrize("how", ["io_uring_setup: ENOSYS", "io_uring_setup: EPERM",
                                 "io_uring_register: arg1 == 11: EINVAL"])
def test_without_io_uring_threads_do_the_work(tmp_path: Path, how: str) -> None:
    require("userns")
    said = start(tmp_path, how)
    assert said.startswith("fine threads"), said
    assert "'io-uring'" in said  # there is no ring that could do more
    said = start(tmp_path, how, aio="io_uring")
    assert said.startswith("failed")
    if "register" in how:  # rings, but such that can't be restricted
        assert "stage 'io-uring'" in said and "-sandbox on,io-uring=off" in said
        assert start(tmp_path, how, "io-uring", "io_uring").startswith("fine io_uring")
    else:
        assert "say aio=threads" in said


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user reaches, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_an_ordinary_user(open_folder: Path) -> None:
    """Everything but a user of the worker's own, without any privilege."""
    require("root")
    require("userns")
    tmp_path = open_folder
    said = start(tmp_path, "getcpu: EPERM", uid=1000)
    assert said.startswith("fine"), said
    for stage in ("user", "mount", "net", "ipc", "uts", "pid", "capabilities", "seccomp"):
        assert f"'{stage}'" in said
    assert "'uid'" not in said
    # Without user namespaces an ordinary user has none of the others: the message says so.
    refused = "unshare: arg0 == CLONE_NEWUSER: EPERM"
    said = start(tmp_path, refused, uid=1000)
    assert said.startswith("failed") and "stage 'user'" in said
    said = start(tmp_path, refused, "user", uid=1000)
    assert said.startswith("failed") and "mount=off" in said
    said = start(tmp_path, refused, "user,mount,net,ipc,uts,pid", uid=1000)
    assert said.startswith("fine"), said


def test_everything_off(tmp_path: Path) -> None:
    from shared.sandbox.stages import NAMES

    said = start(tmp_path, "landlock_create_ruleset: ENOSYS", ",".join(NAMES))
    assert said.startswith("fine") and "['fds', 'no-new-privs']" in said


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_root_that_can_t_be_pivoted_is_covered(open_folder: Path, uid: int) -> None:
    """The initial ramfs: the empty directory is moved over it."""
    require("root")
    require("userns")
    said = start(open_folder, "pivot_root: EINVAL", uid=uid)
    assert said.startswith("fine") and "'mount'" in said
    assert "root holds []" in said

"""Stages as data: what they say before they are executed, and who workers can be."""

from __future__ import annotations

import pytest

from shared.errors import SandboxError, SharedError, SystemCallError
from shared.sandbox import stages
from shared.sandbox.stages import NAMES, Identity, Stage, Step
from vmm.config.machine import SANDBOX_STAGES


def identity(uid: int, users: tuple[int, int]) -> Identity:
    made = Identity.__new__(Identity)
    made.uid = made.gid = uid
    made.root = uid == 0
    made.users = users
    return made


ROOT, USER = identity(0, (0x70000040, 64)), identity(1000, (1000, 0))


def test_description_comes_before_execution() -> None:
    everything = [*stages.nursery_stages(ROOT, frozenset()),
                  *stages.worker_stages(ROOT, 3, frozenset())]
    text = stages.describe(everything)
    assert "uid: become user and group 1879048259, in no other group" in text
    assert "landlock: a Landlock domain without a rule" in text
    assert "limits: NOFILE at most 512" in text
    names = {stage.name for stage in everything} | set(stages.clone_stages(frozenset()))
    assert names == set(NAMES) - {"io-uring", "seccomp"} | {"no-new-privs"}


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_can_be_left_out(name: str) -> None:
    off = frozenset((name,))
    for who in (ROOT, USER):
        left = [*stages.nursery_stages(who, off), *stages.worker_stages(who, 0, off)]
        assert name not in {stage.name for stage in left}
    assert name not in stages.clone_stages(off)
    assert stages.clone_flags(frozenset(NAMES)) == 0


def test_who_workers_are() -> None:
    assert ROOT.maps()[0] == b"0 0 1\n1879048256 1879048256 64\n"
    assert USER.maps() == (b"1000 1000 1\n", b"1000 1000 1\n")
    assert [ROOT.of_worker(slot) for slot in (0, 1, 64)] == [0x70000040, 0x70000041, 0x70000040]
    assert USER.of_worker(5) == 1000
    assert all(stage.name != "uid" for stage in stages.worker_stages(USER, 0, frozenset()))


def test_threads_are_limited_only_where_they_are_counted_apart() -> None:
    def limits(who: Identity, *off: str) -> str:
        return stages.describe(stages.worker_stages(who, 0, frozenset(off)))

    assert "NPROC" in limits(USER) and "NPROC" in limits(ROOT, "user")
    assert "NPROC" not in limits(USER, "user") and "NPROC" not in limits(ROOT, "user", "uid")


def test_failure_names_stage_and_way_out() -> None:
    def fail() -> None:
        raise SystemCallError(38, "no such thing")

    steps = [Stage("net", Step("fine", int)), Stage("mount", Step("bad", fail))]
    with pytest.raises(SandboxError, match=r"stage 'mount'.*-sandbox on,mount=off$"):
        stages.execute(steps)
    with pytest.raises(SandboxError, match=r"-sandbox on,mount=off,user=off,net=off$"):
        stages.execute(steps, ("user", "mount", "net"))


@pytest.mark.parametrize(("text", "off"), [
    ("on", ()), ("off", NAMES), ("on,landlock=off", ("landlock",)),
    ("on,landlock=off,net=off,pid=on", ("landlock", "net"))])
def test_option(text: str, off: tuple[str, ...]) -> None:
    assert stages.parse_option(text) == frozenset(off)


@pytest.mark.parametrize("text", ["", "maybe", "on,landlock", "on,landlock=maybe", "on,x=off",
                                  "on,fds=off", "on,no-new-privs=off", "off,net=x"])
def test_bad_option(text: str) -> None:
    with pytest.raises(SharedError):
        stages.parse_option(text)


def test_core_knows_the_names() -> None:
    assert SANDBOX_STAGES == NAMES

"""Policy files: what they may say, what is wrong with the rest."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from shared.sandbox import policy
from shared.sandbox.policy import PolicyError, Rule

ROOT = Path(__file__).resolve().parents[4]


def rules(tmp_path: Path, text: str) -> list[Rule]:
    path = tmp_path / "test.policy"
    path.write_text(text)
    return policy.load(str(path))


def test_lines(tmp_path: Path) -> None:
    found = rules(tmp_path, """
# A comment

read  # why
ioctl: arg1 == 0x1277 # a number
mmap: arg2 & PROT_EXEC == 0 # bits
clone: arg0 == CLONE_VM|CLONE_FS|0x100000000 and arg1 == 7 # rare: two conditions
clone3: ENOSYS # an error
kill: arg1 == 9: EPERM # an error on a condition
""")
    assert [rule.call for rule in found] == ["read", "ioctl", "mmap", "clone", "clone3", "kill"]
    assert [rule.error for rule in found] == [0, 0, 0, 0, errno.ENOSYS, errno.EPERM]
    low = policy.LOW_HALF
    assert [rule.conditions for rule in found] == [
        [], [(1, low, 0x1277)], [(2, 4, 0)], [(0, low, 0x300), (1, low, 7)], [], [(1, low, 9)]]
    assert [rule.rare for rule in found] == [False, False, False, True, False, False]
    assert found[0].reason == "why" and found[0].place == "test.policy:4"


def test_include(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/other.policy").write_text("write # other\n")
    found = rules(tmp_path, "read # first\ninclude more/other.policy # the rest\n")
    assert [rule.place for rule in found] == ["test.policy:1", "other.policy:1"]


@pytest.mark.parametrize(("line", "text"), [
    ("read", "has no reason"), ("read #", "has no reason"),
    ("ioctl: arg6 == 1 # x", "not a condition"), ("ioctl: arg1 = 1 # x", "neither condition"),
    ("ioctl: fd == 1 # x", "not a condition"), ("ioctl: arg1 == # x", "not a constant"),
    ("ioctl: arg1 == TCGETSX # x", "not a constant"), ("ioctl: arg1 == 0x # x", "not a number"),
    ("ioctl: arg1 == sv_clone # x", "not a constant"),
    ("mmap: arg2 & PROT_NOTHING == 0 # x", "not a constant"),
    ("clone3: ENOWHERE # x", "neither condition"), ("clone3: # x", "neither condition"),
    ("a: arg0 == 1: arg1 == 2: EPERM # x", "too many parts"),
    ("re ad # x", "not a system call's name"), ("; # x", "not a system call's name"),
    ("include nowhere.policy # x", "Can't read the policy"),
    ("include test.policy # itself", "include each other"),
])
def test_bad_lines(tmp_path: Path, line: str, text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        rules(tmp_path, line + "\n")


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "test.policy"
    path.write_bytes(b"read # \xff\n")
    with pytest.raises(PolicyError, match="Can't read"):
        policy.load(str(path))


def test_unknown_call_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"test\.policy:1: can't add 'raed'"):
        policy.compile_rules(rules(tmp_path, "raed # a slip\n"))


def test_same_rule_twice_is_one(tmp_path: Path) -> None:
    once = policy.compile_rules(rules(tmp_path, "read # a\nioctl: arg1 == 3 # b\n"))
    twice = policy.compile_rules(rules(tmp_path, "read # a\nread # c\nioctl: arg1 == 3 # b\n"
                                                 "ioctl: arg1 == 3 # d\n"))
    assert once == twice


def test_too_long_a_policy_is_refused(tmp_path: Path) -> None:
    text = "".join(f"ioctl: arg1 == {number} # x\n" for number in range(4200))
    with pytest.raises(Exception, match="Can't make a filter"):
        policy.compile_rules(rules(tmp_path, text))


def test_call_names() -> None:
    assert policy.call_name(policy.lib.sv_system_call_number(b"openat")) == "openat"
    assert policy.call_name(9999) == "9999"
    assert policy.call_name(-1) == "-1"
    assert policy.call_name(1 << 40) == str(1 << 40)


@pytest.mark.parametrize("path", sorted(ROOT.glob("[wvs]*/**/*.policy")), ids=str)
def test_every_policy_compiles(path: Path) -> None:
    found = policy.load(str(path))
    assert len(policy.compile_rules(found)) < policy.MAX_BYTES
    # What no worker and no core may ever have.
    assert not {rule.call for rule in found if not rule.error} & {
        "execve", "execveat", "ptrace", "mount", "setns", "bpf", "ftruncate"}

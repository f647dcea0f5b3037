"""`stratovirt -sandbox help`: which stages this host has, and why it lacks others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shared.sandbox.stages import DESCRIPTIONS
from tests.support.blk_worker import ROOT
from tests.support.capabilities import require

pytestmark = pytest.mark.worker

# A host that refuses what the rules say, then the help text.
POOR = """
import sys
from native import _sandbox
from shared.sandbox import policy
rules = [policy._parse(rule, "a poor host", "test") for rule in sys.argv[1].split(";")]
program = policy.compile_rules(rules, policy.NOTHING)
_sandbox.lib.sv_no_new_privs()
assert _sandbox.lib.sv_filter_install(program, len(program)) == 0
from vmm.__main__ import main
sys.exit(main(["-sandbox", "help"]))
"""


def shown(rules: str = "getcpu: EPERM", uid: int = 0) -> dict[str, str]:
    """"yes" or why not, by stage."""
    user = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
    done = subprocess.run([sys.executable, "-c", POOR, rules], cwd=ROOT, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          check=False, **user)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if words and words[0] in DESCRIPTIONS:
            result[words[0]] = words[1]
            last = words[0]
        elif result and words:
            result[last] = line.strip()
    return result


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_good_host_has_all(uid: int) -> None:
    for name in ("root", "userns", "landlock", "io_uring"):
        require(name)
    assert shown(uid=uid) == dict.fromkeys(DESCRIPTIONS, "yes")


@pytest.mark.parametrize(("rules", "stage", "text"), [
    ("landlock_create_ruleset: EOPNOTSUPP", "landlock", "not supported"),
    ("landlock_create_ruleset: ENOSYS", "landlock", "not implemented"),
    ("seccomp: ENOSYS", "seccomp", "not implemented"),
    ("io_uring_setup: EPERM", "io-uring", "threads do the work"),
    ("io_uring_register: arg1 == 11: EINVAL", "io-uring", "threads do the work"),
    ("pivot_root: EPERM", "mount", "not permitted"),
    ("prlimit64: EPERM", "limits", "not permitted"),
    ("capset: EPERM", "capabilities", "not permitted"),
])
def test_what_is_missing_is_explained(rules: str, stage: str, text: str) -> None:
    require("root")
    require("userns")
    found = shown(rules)
    assert text in found[stage]
    if stage != "seccomp":
        assert found["seccomp"] == "yes"


def test_user_namespaces_take_others_with_them() -> None:
    require("root")
    found = shown("unshare: arg0 == CLONE_NEWUSER: EPERM", uid=1000)
    for stage in ("user", "mount", "net", "ipc", "uts", "pid"):
        assert "not permitted" in found[stage]
    assert found["landlock"] == found["seccomp"] == "yes"

"""Runs one VM through a list of steps; inside the lab, or on the host where KVM is real.

    python -m tests.lab.scenarios FILE      FILE holds {"arguments": […], "append": …, "steps": […]}

Steps, each a list: ["output", PATTERN, SECONDS], ["send", TEXT], ["qmp", NAME, {ARGUMENTS}],
["event", NAME, SECONDS], ["exit", SECONDS], ["run", SHELL COMMAND], ["kill"] (SIGKILL for the
VMM, and all of the VM must end), ["until", NAME, {MEMBERS}, SECONDS] (until the QMP command's
result has these).  Before the start: "before" holds shell commands to run beside
it, "await" the paths that must be there first; "wrap" is a shell command that executes "$@".
The last line of standard output is the report as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support import test_vm
from tests.support.qmp import QmpError
from tests.support.test_vm import TestVm

test_vm.LIMIT = 120.0  # in the lab a start takes seconds, on a slow machine many


def play(plan: dict[str, Any]) -> dict[str, Any]:
    """Start the VM of `plan`, go through its steps; what was seen, for the host's asserts.

    A step that fails ends the play: `failure` holds what and the whole story.
    """
    report: dict[str, Any] = {"replies": [], "events": [], "texts": [], "failure": None,
                              "exit": None, "left": []}
    helpers: list[subprocess.Popen[bytes]] = []
    folder = Path(tempfile.mkdtemp(prefix="vm-"))
    os.chdir(folder)
    vm: TestVm | None = None
    began = time.monotonic()
    try:
        for command in plan.get("before", []):
            helpers.append(subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL))
        for path in plan.get("await", []):
            test_vm.wait_until(functools.partial(os.path.exists, path), path)
        command = plan.get("command")
        if "wrap" in plan:
            command = ["sh", "-c", plan["wrap"], "sh", *test_vm.product_command()]
        # The log tells of a guest's end that nobody sees on a quiet console: a triple fault.
        logged = [] if "-D" in plan["arguments"] else ["-D", str(folder / "log")]
        vm = TestVm(folder, *plan["arguments"], *logged, append=plan.get("append", ""),
                    serial=plan.get("serial", True), command=command)
        for step in plan["steps"]:
            take_step(vm, step, report)
            report["texts"].append(f"{time.monotonic() - began:.2f} {step[0]} {step[1:]}")
        if vm.process.poll() is not None:
            report["left"] = sorted(vm.processes().values())
    except Exception as error:
        report["failure"] = f"{type(error).__name__}: {error}"
        if vm is not None:
            report["failure"] += f"\n{vm.story()}\n{evidence(vm, folder)}"
    finally:
        if vm is not None:
            report["console"] = vm.output.decode(errors="replace")
            report["errors"] = vm.error_text()
            report["events"] = [] if vm._qmp is None else [
                item for item in vm._qmp.log if "event" in item]
            vm.close()
        for helper in helpers:
            helper.kill()
    report["seconds"] = time.monotonic() - began
    return report


def evidence(vm: TestVm, folder: Path) -> str:
    """What else tells why a step failed: the VMM's log, its threads, the host's kernel log."""
    log = folder / "log"
    texts = [f"log: {log.read_text(errors='replace')[-3000:]}" if log.exists() else "no log"]
    for task in sorted(Path(f"/proc/{vm.process.pid}/task").glob("*")):
        try:
            name = (task / "comm").read_text().strip()
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        texts.append(f"thread {task.name} {name}: {fields[0]}, CPU {fields[11]}+{fields[12]} ticks")
    kernel = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout
    return "\n".join([*texts, f"dmesg: {kernel[-1500:]}"])


def take_step(vm: TestVm, step: list[Any], report: dict[str, Any]) -> None:
    """One step; what it yields goes into `report`."""
    kind, *values = step
    if kind == "output":
        report["replies"].append(vm.wait_output(*values))
    elif kind == "send":
        vm.send(values[0])
    elif kind == "qmp":
        try:
            report["replies"].append(vm.qmp.command(values[0], **(values[1:] or [{}])[0]))
        except QmpError as error:
            report["replies"].append({"error": error.error})
    elif kind == "event":
        report["replies"].append(vm.qmp.wait_event(*values))
    elif kind == "until":
        name, members, limit = values
        test_vm.wait_until(lambda: members.items() <= vm.qmp.command(name).items(),
                           f"{name} with {members}", limit)
    elif kind == "exit":
        report["exit"] = vm.wait(*values)
    elif kind == "kill":
        vm.process.kill()
        report["exit"] = vm.wait()
        test_vm.wait_until(lambda: not vm.processes(), "the end of all of the VM's processes")
    elif kind == "run":
        result = subprocess.run(["sh", "-c", values[0]], capture_output=True, text=True,
                                check=False)
        report["replies"].append(result.stdout + result.stderr)
    else:
        raise ValueError(f"no step {kind}")


if __name__ == "__main__":
    print(json.dumps(play(json.loads(Path(sys.argv[1]).read_text()))))

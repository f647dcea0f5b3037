"""Benchmarks of whole guests in the nested lab (tests/lab), where the host has no KVM for them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import vmms
from bench.report import ROOT, BenchError

if TYPE_CHECKING:
    from collections.abc import Callable


def in_lab(name: str, plan: list[Any], timeout: float) -> Any:
    """What bench/NAME.py, run in a fresh lab with this plan, answers (`inside`).

    Tried again where the lab's emulator is at fault: it hangs now and then, or ends a guest by a
    triple fault (`Lab.require_health`).

    :param timeout: seconds until it is killed.
    :raises BenchError: it failed.
    """
    from tests.lab.lab import Lab, retrying

    def once() -> Any:
        with Lab.acquire() as lab:
            (lab.share / "plan").write_text(json.dumps(plan))
            code, output = lab.run(
                f"cd {ROOT} && export HOME=/root PYTHONDONTWRITEBYTECODE=1 "
                f"PATH={os.environ['PATH']} STRATOVIRT={vmms.product()[0]} && "
                f"exec {sys.executable} -m bench.{name} /mnt/plan", timeout)
            if code:
                lab.require_health()
                raise BenchError(f"in the lab: exit {code}: {output.strip()[-800:]}")
            return json.loads(output.strip().splitlines()[-1])

    return retrying(once)


def inside(action: Callable[..., Any]) -> None:
    """The lab's end of `in_lab`: `action` with the plan's items, its answer on standard output."""
    try:
        print(json.dumps(action(*json.loads(Path(sys.argv[1]).read_text()))))
    except BenchError as error:
        sys.exit(f"{error}")

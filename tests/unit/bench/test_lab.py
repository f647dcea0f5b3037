"""Benchmarks in the nested lab: what its emulator spoils is measured again, and only that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import vmms
from bench.lab import in_lab, inside
from bench.report import BenchError
from tests.lab.lab import Lab, LabHang, Result


class FakeLab:
    """Answers in turn; an exception is raised instead.

    :param ill: what `require_health` raises.
    """

    def __init__(self, folder: Path, answers: list[Result | Exception],
                 ill: Exception | None = None) -> None:
        self.share = folder
        self.answers = answers
        self.ill = ill
        self.scripts: list[str] = []

    def run(self, script: str, timeout: float) -> Result:
        self.scripts.append(script)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def require_health(self) -> None:
        if self.ill is not None:
            raise self.ill

    def __enter__(self) -> FakeLab:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmms, "product", lambda: ["/bin/true"])


def use(lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> FakeLab:
    monkeypatch.setattr(Lab, "acquire", lambda: lab)
    return lab


FINE = Result(0, "a line of the VMM\n[1, 2]\n")
FAILED = Result(1, "the guest ended")


def test_the_plan_goes_in_and_the_last_line_comes_out(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
        ) -> None:
    lab = use(FakeLab(tmp_path, [FINE]), monkeypatch)
    assert in_lab("boot", [{"a": 1}, 7], 60) == [1, 2]
    assert "-m bench.boot /mnt/plan" in lab.scripts[0]
    monkeypatch.setattr("sys.argv", ["boot", str(tmp_path / "plan")])
    inside(lambda setting, count: [setting["a"], count])
    assert json.loads(capsys.readouterr().out) == [1, 7]


@pytest.mark.parametrize("spoilt", [[LabHang("no answer")], [LabHang("a"), LabHang("b")]])
def test_a_lab_that_hangs_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         spoilt: list[Result | Exception]) -> None:
    lab = use(FakeLab(tmp_path, [*spoilt, FINE]), monkeypatch)
    assert in_lab("guestnet", [], 60) == [1, 2]
    assert len(lab.scripts) == len(spoilt) + 1


def test_a_guest_that_the_emulator_ended_is_started_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ill = LabHang("a guest ended by a triple fault")
    lab = use(FakeLab(tmp_path, [FAILED, FAILED, FINE], ill), monkeypatch)
    assert in_lab("guestnet", [], 60) == [1, 2]
    lab.answers = [FAILED] * 3
    with pytest.raises(LabHang):
        in_lab("guestnet", [], 60)


def test_a_failure_in_a_sound_lab_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    lab = use(FakeLab(tmp_path, [FAILED, FINE]), monkeypatch)
    with pytest.raises(BenchError, match="exit 1: the guest ended"):
        in_lab("boot", [], 60)
    assert len(lab.scripts) == 1


def test_a_failure_inside_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BenchError("no tap0")

    (tmp_path / "plan").write_text("[]")
    monkeypatch.setattr("sys.argv", ["boot", str(tmp_path / "plan")])
    with pytest.raises(SystemExit, match="no tap0"):
        inside(fail)

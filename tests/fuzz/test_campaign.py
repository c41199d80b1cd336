"""The campaign of `make fuzz`: it counts, prints, leaves a summary, and fails when something is wrong."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import campaign
from tests.fuzz.check import Outcome

RIGHT = Outcome("diagonal", "none", found="diagonal", solver="divide", errors={"vjp": 1e-12})
REJECTED = Outcome("dense", "linear", rejected="ill-conditioned")
MISSED = dataclasses.replace(RIGHT, found="dense", fallbacks=("aten.foo | no rule",))
WRONG = dataclasses.replace(RIGHT, errors={"vjp": 1e-2})


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Outcome]], None]:
    """Replaces the worker processes by a function of the seed."""

    def install(outcome: Callable[[int], Outcome]) -> None:
        def answer(started: tuple[str, ...]) -> Any:
            first, count = map(int, started)
            found = {str(seed): dataclasses.asdict(outcome(seed)) for seed in range(first, first + count)}
            return {"outcomes": found, "rules": {"view": 30, "pointwise": 40}}

        monkeypatch.setattr(campaign, "run_worker", lambda *arguments: arguments)
        monkeypatch.setattr(campaign, "answer", answer)

    return install


def run(folder: Path, count: int = 20) -> tuple[int, dict[str, Any]]:
    status = campaign.main(["--count", str(count), "--processes", "2", "--out", str(folder)])
    return status, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_rejected_programs_are_made_up_for(
    tmp_path: Path, worker: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    worker(lambda seed: REJECTED if seed % 2 else MISSED if seed % 10 == 0 else RIGHT)
    status, found = run(tmp_path)
    assert status == 0
    assert 20 <= found["checked"] == found["rejected"]
    assert found["wrong"] == 0
    assert found["found"] == pytest.approx(0.8)
    assert found["fallbacks"] == pytest.approx(0.2)
    assert found["rarest_rule"] >= 30
    printed = capsys.readouterr().out
    for part in ("diagonal", "aten.foo", "pointwise", "mismatches"):
        assert part in printed


def test_a_mismatch_is_shown_and_fails(
    tmp_path: Path, worker: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    worker(lambda seed: WRONG if seed == 3 else RIGHT)
    status, found = run(tmp_path)
    assert (status, found["wrong"]) == (1, 1)
    assert "seed 3: Outcome(" in capsys.readouterr().out


def test_a_worker_that_dies_fails_and_the_others_go_on(
    tmp_path: Path, worker: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def outcome(seed: int) -> Outcome:
        if seed == 0:
            raise RuntimeError("a worker ended with status -11")
        return RIGHT

    worker(outcome)
    status, found = run(tmp_path)
    assert (status, found["wrong"]) == (1, 1)
    assert found["checked"] >= 10
    assert "seeds 0 to 9 died" in capsys.readouterr().out


def test_a_dead_process_is_noticed() -> None:
    process = campaign.run_worker("no", "number")
    with pytest.raises(RuntimeError, match="ended with status"):
        campaign.answer(process)

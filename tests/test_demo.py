"""The demonstration's parts: the point sets are as described, training works, both reports are made."""

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import implicitdiff as idf
from implicitdiff.cli import main


@pytest.fixture
def part() -> Callable[[str], Any]:
    """Imports a module of the demonstration by name."""
    return lambda name: importlib.import_module(f"implicitdiff.demo.{name}")


def test_points_follow_the_ink(part: Any) -> None:
    digits = part("digits")
    images = torch.zeros(2, 8, 8)
    images[0, 1, 6] = 16.0  # row 1, column 6
    images[1, 0, 0] = 3.0
    images[1, 7, 7] = 1.0
    points = digits.draw(images, 0.0, torch.Generator().manual_seed(0))
    assert points.shape == (2, 2, 64)
    # Pixel centres: column k is at (2 k + 1) / 8 - 1. A jitter of 0.3 pixel is 0.075.
    centre = torch.tensor([[13 / 8 - 1], [3 / 8 - 1]])
    assert (points[0].mean(1) - centre[:, 0]).abs().max() < 0.04
    assert 0.05 < float((points[0] - centre).std()) < 0.1
    share = float((points[1, 0] < 0).float().mean())
    assert 0.6 < share < 0.9  # three quarters of the ink


def test_outliers_replace_their_share_of_the_points(part: Any) -> None:
    digits = part("digits")
    images = torch.zeros(50, 8, 8)
    images[:, 3:5, 3:5] = 1.0
    points = digits.draw(images, 0.4, torch.Generator().manual_seed(0))
    far = (points.abs().amax(1) > 1).float().sum(1)
    assert points.abs().max() <= 3
    assert far.max() <= round(0.4 * 64)
    assert 20 < float(far.mean()) < 26  # 26 outliers, one in nine of them inside the square by chance
    assert not (digits.draw(images, 0.0, torch.Generator().manual_seed(0)).abs() > 1).any()


def test_sets_are_divided_once_and_for_all(part: Any) -> None:
    digits = part("digits")
    training, test = digits.load(0.0, seed=0)
    other_training, other_test = digits.load(0.4, seed=1)
    assert len(training.labels) + len(test.labels) == 1797
    assert len(training.labels) == len(training.points)
    assert torch.equal(training.labels, other_training.labels)
    assert torch.equal(test.labels, other_test.labels)
    assert training.labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("pooling", ["MeanPooling", "WelschPooling"])
def test_training_beats_guessing(part: Any, pooling: str) -> None:
    digits, training = part("digits"), part("training")
    sets, _ = digits.load(0.0, seed=0)
    few = digits.PointSets(sets.points[:256], sets.labels[:256])
    epochs: list[int] = []
    accuracy = training.train(
        getattr(training, pooling), few, few, 30, seed=0, advance=lambda: epochs.append(1)
    )
    assert len(epochs) == 30
    assert accuracy > 0.2


def test_welsch_pooling_learns_its_width(part: Any) -> None:
    training = part("training")
    torch.manual_seed(0)
    model = training.Classifier(training.WelschPooling())
    model(torch.randn(4, 2, 64)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    assert "pooling.log_alpha" in gradients


def test_both_reports_are_made(part: Any) -> None:
    comparison = part("comparison")
    for case in comparison.cases():
        report = str(comparison.explained(case))
        assert "nowhere: every operation is covered" in report, report
    small = comparison.Case("small", case.problem, case.problem.example())
    table = str(comparison.compared(small))
    assert all(name in table for name in comparison.BACKWARDS)


def test_command(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    demo, comparison, digits = part("main"), part("comparison"), part("digits")
    generator = torch.Generator().manual_seed(0)
    few = digits.PointSets(torch.randn(8, 2, 64, generator=generator), torch.arange(8))
    monkeypatch.setattr(digits, "load", lambda outliers, seed: (few, few))
    case = next(comparison.cases())
    small = comparison.Case("a title", case.problem, case.problem.example())
    monkeypatch.setattr(comparison, "cases", lambda: [small])
    monkeypatch.setattr(comparison, "BACKWARDS", ("hand", "auto"))
    found = CliRunner().invoke(main, ["demo", "--epochs", "1"])
    assert found.exit_code == 0, found.output
    assert max(map(len, found.output.splitlines())) <= 80
    assert all(name in found.output for name in (*demo.POOLINGS, "40% outliers", "a title"))
    result = json.loads(CliRunner().invoke(main, ["demo", "--epochs", "1", "--json"]).stdout)
    assert len(result["accuracies"]) == 4
    assert result["reports"][0]["explain"]["problem"] == "RobustPooling"


def test_digits_need_scikit_learn(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(idf.ImplicitDiffError, match="pip install scikit-learn"):
        part("digits").load(0.0, 0)

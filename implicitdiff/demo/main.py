"""The main job on real input: explain two problems, compare four backward passes, train on digits.

Nothing comes in; reports and test accuracies go out. `implicitdiff demo` prints them, in less than three minutes on
two cores. Reading order: digits.py, comparison.py, training.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from implicitdiff.demo import digits, training

OUTLIERS = (0.0, 0.4)
POOLINGS = {"mean": training.MeanPooling, "Welsch, through the layer": training.WelschPooling}
Advance = Callable[[int, int, str], object]
"""Called before each epoch: (epochs done, epochs in all, what is trained)."""


@dataclass(frozen=True)
class Accuracy:
    """Fraction of the test digits that a classifier gets right, with this fraction of outliers in training and test."""

    pooling: str
    outliers: float
    accuracy: float


def classify(epochs: int, seed: int, advance: Advance) -> list[Accuracy]:
    """Train a classifier for each pooling and each fraction of outliers.

    Raises:
        ImplicitDiffError: scikit-learn, which has the digits, is not installed.
    """
    found: list[Accuracy] = []
    total = epochs * len(OUTLIERS) * len(POOLINGS)
    for outliers in OUTLIERS:
        sets = digits.load(outliers, seed)
        for name, pooling in POOLINGS.items():
            done = len(found) * epochs
            what = f"{outliers:.0%} outliers, {name}"
            epoch = iter(range(1, epochs + 1))
            advance(done, total, what)
            accuracy = training.train(
                pooling, *sets, epochs, seed, lambda: advance(done + next(epoch), total, what)  # noqa: B023
            )  # fmt: skip
            found.append(Accuracy(name, outliers, accuracy))
    return found

"""The demonstration, step 3: a point-set classifier, pooled by the mean or robustly through the layer.

Point sets from digits.py come in, a test accuracy goes out. Next: main.py, which prints it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff.demo.digits import PointSets
from implicitdiff.problems import RobustPooling
from implicitdiff.torch_private import HOST

HIDDEN = 32
CLASSES = 10
BATCH = 64
LEARNING_RATE = 2e-2


class MeanPooling(nn.Module):
    """The mean over the points: (batch, channels, points) -> (batch, channels)."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(2)


class WelschPooling(nn.Module):
    """The minimiser of sum_j 1 - exp(-|u - x_j|^2 / (2 alpha^2)) over u, with a learned alpha.

    alpha is the second input of the problem, shared by the batch, and gets a gradient like the points. Its
    logarithm is learned, so that it stays positive.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(alpha, device=HOST).log())
        self.layer = idf.DeclarativeLayer(RobustPooling("welsch", alpha=None), in_dims=(0, None))

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features, self.log_alpha.exp())


class Classifier(nn.Module):
    """The same small network for every point, pooling, and one linear layer: (batch, 2, points) -> logits."""

    def __init__(self, pooling: nn.Module) -> None:
        super().__init__()
        self.each_point = nn.Sequential(nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.pooling = pooling
        self.classify = nn.Linear(HIDDEN, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        return self.classify(self.pooling(self.each_point(points.mT).mT))


def train(
    pooling: Callable[[], nn.Module],
    training: PointSets,
    test: PointSets,
    epochs: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> float:
    """Train from scratch and measure.

    Args:
        pooling: Makes the pooling module. All classifiers start from the same weights for the same seed.
        training: What is learned from.
        test: What the accuracy is measured on, once, at the end.
        epochs: Passes over the training set.
        seed: Of the weights and of the order of the batches.
        advance: Called after each epoch.

    Returns:
        Fraction of the test set that is classified rightly.
    """
    torch.manual_seed(seed)
    model = Classifier(pooling())
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(training.labels), device=HOST).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(training.points[batch]), training.labels[batch]).backward()
            optimiser.step()
        schedule.step()
        advance()
    model.eval()
    with torch.no_grad():
        right = [
            model(points).argmax(1) == labels
            for points, labels in zip(test.points.split(BATCH), test.labels.split(BATCH), strict=True)
        ]
    return float(torch.cat(right).float().mean())

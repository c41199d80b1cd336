"""The demonstration, step 1: scikit-learn's handwritten digits as point sets, with outliers.

Images (N, 8, 8) come in, point sets (N, 2, 64) with labels go out. Next: training.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.errors import ImplicitDiffError
from implicitdiff.torch_private import HOST

POINTS = 64
JITTER = 0.3
OUTLIER_RANGE = 3.0
TRAIN_FRACTION = 0.7


@dataclass(frozen=True)
class PointSets:
    """Digits as points: `points` (N, 2, 64) float32, the digit inside [-1, 1]^2; `labels` (N,)."""

    points: Tensor
    labels: Tensor


def load(outliers: float, seed: int) -> tuple[PointSets, PointSets]:
    """Training and test set; both with this fraction of outliers.

    Args:
        outliers: Fraction of the points of each digit that are replaced, 0 to 1.
        seed: Of the points drawn. The division into training and test set does not depend on it.

    Raises:
        ImplicitDiffError: scikit-learn, which has the digits, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise ImplicitDiffError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn, or implicitdiff[demo]"
        ) from missing
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0), device=HOST)
    points = draw(images, outliers, torch.Generator().manual_seed(seed))
    training, test = order.tensor_split([round(TRAIN_FRACTION * len(labels))])
    return PointSets(points[training], labels[training]), PointSets(points[test], labels[test])


def draw(images: Tensor, outliers: float, generator: torch.Generator) -> Tensor:
    """64 points for each image, drawn with probability proportional to the intensity of the pixel.

    Args:
        images: Intensities (N, 8, 8), none of them all zero.
        outliers: Fraction of the points that are replaced by points uniform in [-3, 3]^2.
        generator: The source of randomness.

    Returns:
        (N, 2, 64): pixel centres, jittered by 0.3 pixel (standard deviation), scaled to [-1, 1].
    """
    count, height, width = images.shape
    pixels = torch.multinomial(images.flatten(1), POINTS, replacement=True, generator=generator)
    place = torch.stack([pixels % width, pixels // width], 1).float()
    place = place + JITTER * torch.randn(place.shape, generator=generator, device=images.device)
    size = torch.tensor([width, height], device=images.device)[:, None]
    points = (2 * place + 1) / size - 1
    replaced = round(outliers * POINTS)
    # Points of one digit are drawn independently, so the first ones are as good a choice as any.
    anywhere = torch.rand(count, 2, replaced, generator=generator, device=images.device)
    points[:, :, :replaced] = OUTLIER_RANGE * (2 * anywhere - 1)
    return points

"""Twelve objectives, each with one operation that the algebra of structures has no rule for, marked by a comment.

Nothing comes in; Problems with examples go out. `operations.py` asks `explain` which operation it was, and where.
"""

import math

import torch
from torch import Tensor

import implicitdiff as idf


class _Outside(idf.Problem):
    """A pull towards x, and one term that is outside the algebra; u and x are vectors of six entries."""

    def term(self, u: Tensor) -> Tensor:
        """The term."""
        raise NotImplementedError

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        """|u - x|^2 / 2 and the term."""
        return 0.5 * ((u - x) ** 2).sum() + self.term(u)

    def init(self, x: Tensor) -> Tensor:
        """The minimiser without the term."""
        return x

    def example(self) -> tuple[Tensor, ...]:
        """Two samples with entries far enough apart that no two of them tie at the solution."""
        generator = torch.Generator().manual_seed(0)
        home = generator.device
        steps = torch.tensor([1.0, 2.5, 0.5, 2.0, 3.0, 1.5], device=home)
        return (steps + 0.1 * torch.rand(2, 6, generator=generator, device=home),)


class Sort(_Outside):
    """The spread of the sorted entries."""

    def term(self, u: Tensor) -> Tensor:
        rising = torch.arange(6, dtype=u.dtype, device=u.device)
        return 0.001 * (torch.sort(u).values * rising).square().sum()  # outside: sort


class Svd(_Outside):
    """A smooth function of singular values."""

    def term(self, u: Tensor) -> Tensor:
        return 0.1 * torch.linalg.svdvals(u.view(2, 3)).square().square().sum()  # outside: svd


class Convolution(_Outside):
    """The response of a filter over a grid."""

    def term(self, u: Tensor) -> Tensor:
        kernel, grid = u.new_full((1, 1, 2, 2), 0.5), u.view(1, 1, 2, 3)
        answer = torch.nn.functional.conv2d(grid, kernel)  # outside: convolution
        return 0.1 * answer.cosh().sum()


class Scatter(_Outside):
    """Sums of entries of the same group."""

    def term(self, u: Tensor) -> Tensor:
        group = torch.tensor([0, 1, 0, 2, 1, 0], device=u.device)
        sums = torch.zeros(3, dtype=u.dtype, device=u.device).scatter_add(0, group, u)  # outside: scatter
        return 0.1 * sums.cosh().sum()


class Branch(_Outside):
    """Another formula for large entries, chosen in Python."""

    def term(self, u: Tensor) -> Tensor:
        if u.sum() > 6:  # outside: branch on a value
            return 0.1 * u.square().sum()
        return u.abs().sum()


class Spectrum(_Outside):
    """The power at the lower frequencies."""

    def term(self, u: Tensor) -> Tensor:
        return 0.05 * torch.fft.rfft(u)[:2].abs().square().sum()  # outside: fft


class Determinant(_Outside):
    """The logarithm of a determinant."""

    def term(self, u: Tensor) -> Tensor:
        matrix = torch.outer(u, u) + torch.eye(6, dtype=u.dtype, device=u.device)
        return 0.2 * torch.linalg.slogdet(matrix).logabsdet  # outside: slogdet


class Eigenvalue(_Outside):
    """The largest eigenvalue of a matrix of the variables."""

    def term(self, u: Tensor) -> Tensor:
        square = u[:3, None] * u[None, 3:]
        return 0.05 * torch.linalg.eigvalsh(square + square.mT)[-1] ** 2  # outside: eigh


class TopK(_Outside):
    """The two largest entries."""

    def term(self, u: Tensor) -> Tensor:
        return 0.02 * u.topk(2).values.square().sum()  # outside: topk


class RunningSum(_Outside):
    """The path that the entries make as steps."""

    def term(self, u: Tensor) -> Tensor:
        return 0.01 * torch.cumsum(u, 0).square().sum()  # outside: cumsum


class Exponential(_Outside):
    """The trace of the exponential of a matrix."""

    def term(self, u: Tensor) -> Tensor:
        matrix = torch.outer(u[:3], u[3:]) / math.e
        return 0.02 * torch.linalg.matrix_exp(matrix).trace()  # outside: matrix_exp


class Pool(_Outside):
    """The largest entry of each window."""

    def term(self, u: Tensor) -> Tensor:
        return 0.02 * torch.nn.functional.max_pool1d(u.view(1, 1, 6), 2).square().sum()  # outside: max_pool


PROBLEMS: tuple[type[_Outside], ...] = (
    Sort,
    Svd,
    Convolution,
    Scatter,
    Branch,
    Spectrum,
    Determinant,
    Eigenvalue,
    TopK,
    RunningSum,
    Exponential,
    Pool,
)

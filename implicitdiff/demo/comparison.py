"""The demonstration, step 2: the automatic backward beside the hand-written, the dense and the unrolled one.

Nothing comes in; the reports of `explain` and `compare` for the two built-in problems go out. Next:
training.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics import Comparison, Explanation
from implicitdiff.problems import OptimalTransport, RobustPooling

# The hand-written pass first: the ratios of time are taken to it.
BACKWARDS = ("hand", "auto", "dense", "unrolled")


@dataclass(frozen=True)
class Case:
    """A built-in problem with inputs of a size at which the dense formula is still feasible."""

    title: str
    problem: idf.Problem
    inputs: tuple[Tensor, ...]


def cases() -> Iterator[Case]:
    """Robust pooling of feature maps, and optimal transport between two uneven marginals."""
    generator = torch.Generator().manual_seed(0)
    home = generator.device
    yield Case(
        "Robust pooling, pseudo-Huber: 8 sets of 256 points in R^64",
        RobustPooling("pseudo-huber", alpha=1.0),
        (torch.randn(8, 64, 256, generator=generator, device=home),),
    )
    M = torch.rand(4, 20, 25, generator=generator, device=home)
    r = torch.randn(4, 20, generator=generator, device=home).softmax(1)
    c = torch.randn(4, 25, generator=generator, device=home).softmax(1)
    yield Case(
        "Entropic optimal transport: 4 plans of 20 by 25, gamma = 10", OptimalTransport(gamma=10.0), (M, r, c)
    )


def explained(case: Case) -> Explanation:
    """What was derived from the declaration, why, and which solver was chosen."""
    return idf.explain(case.problem, *case.inputs)


def compared(case: Case) -> Comparison:
    """Error, time, and memory of the four backward passes at the same solution."""
    return idf.compare(case.problem, *case.inputs, backwards=BACKWARDS)

"""What one row of the table of cases is: a problem, its inputs, and the structure that must be found in it.

The rows are in the other files of this folder, one per family; tests/test_cases.py runs every check over the
whole table. Fixtures are asymmetric: a dropped term or transpose must show.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitdiff import Problem
from tests.oracles import solved

Sizes = tuple[int, ...]
MakeInputs = Callable[["Draw", Sizes], tuple[Any, ...]]

# What may be chosen at the small sizes of the table. Which of several correct direct solvers is cheapest
# there is the cost model's business; the sizes at which the choice is prescribed have a test of their own
# (test_cases.py).
DIVIDE = frozenset({"divide"})
BLOCKS = frozenset({"block-cholesky"})
BANDED = frozenset({"tridiagonal", "banded-cholesky", "cholesky", "lu"})
LOW_RANK = frozenset({"woodbury", "cholesky", "lu"})
KRONECKER = frozenset({"kronecker", "cholesky", "lu"})
DENSE = frozenset({"cholesky", "lu", "ldl"})
SCHUR = frozenset({"schur"})
ONE_ROW = frozenset({"divide", "schur"})  # S is a number
DENSE_KKT = frozenset({"schur", "cholesky", "ldl", "lu"})


class Draw:
    """A seeded source of inputs: `normal` and the like for batched ones, `shared_normal` for those without a
    batch.
    """

    def __init__(self, seed: int, batch: int | None, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._lead = () if batch is None else (batch,)
        self.dtype = dtype

    def shared_normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, drawn in float64 so that every dtype sees the same ones."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def shared_positive(self, *shape: int) -> Tensor:
        """Numbers uniform in [0.5, 1.5]."""
        return (torch.rand(shape, generator=self._generator, dtype=torch.float64) + 0.5).to(self.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers with the batch axis first."""
        return self.shared_normal(*self._lead, *shape)

    def positive(self, *shape: int) -> Tensor:
        """Numbers uniform in [0.5, 1.5] with the batch axis first."""
        return self.shared_positive(*self._lead, *shape)

    def mass(self, *shape: int) -> Tensor:
        """Positive numbers that sum to one along the last axis, the batch axis first."""
        weights = self.positive(*shape)
        return weights / weights.sum(-1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem of the table.

    Attributes:
        name: Unique; the test's identifier.
        make_problem: Builds the problem, always with the same Parameters and buffers.
        inputs: (draw, sizes) -> the inputs, batched unless `in_dims` says otherwise.
        sizes: The first is asymmetric, then equal ones, then sizes of 1; the first two show the structure.
        in_dims: As for the layer.
        hessian: The kind of H that must be found; None where the contract leaves the choice to the analysis.
        schur: The kind of S that must be found; None likewise, or where there are no constraints.
        solvers: The solvers that may be chosen at these sizes; empty: any.
        consistent: Maps free inputs to inputs for which dependent constraints can be met (r -> r / sum r); a
            gradient is checked against finite differences through it.
        dependent: The constraints depend on each other: some gradients are defined modulo a null space only.
        may_fall_back: Some operation may have no rule, and the dense rung is then right.
        own_solver: The problem's own `solve` is used in place of the oracle's Newton.
        built_in: The name of the case whose kinds and solver must be found here too (strangers' versions).
        notes: What the case is there for.
    """

    name: str
    make_problem: Callable[[], Problem]
    inputs: MakeInputs
    sizes: tuple[Sizes, ...]
    in_dims: Any = 0
    hessian: str | None = None
    schur: str | None = None
    solvers: frozenset[str] = frozenset()
    consistent: Callable[..., tuple[Any, ...]] | None = None
    dependent: bool = False
    may_fall_back: bool = False
    own_solver: bool = False
    built_in: str | None = None
    notes: str = ""

    def problem(self, dtype: torch.dtype = torch.float64) -> Problem:
        """The declared problem as its author wrote it."""
        return self.make_problem().to(dtype)

    def solvable(self) -> Problem:
        """The problem in float64 with an accurate `solve`: its own, or the oracle's Newton, detached."""
        problem = self.problem()
        return problem if self.own_solver else solved(problem)

    def make_inputs(
        self,
        seed: int = 0,
        batch: int | None = 5,
        dtype: torch.dtype = torch.float64,
        sizes: Sizes | None = None,
    ) -> tuple[Any, ...]:
        """Inputs for which a solution exists; one sample without `batch` where `in_dims` is None."""
        draw = Draw(seed, None if self.in_dims is None else batch, dtype)
        return self.inputs(draw, self.sizes[0] if sizes is None else sizes)

    def __str__(self) -> str:
        return self.name

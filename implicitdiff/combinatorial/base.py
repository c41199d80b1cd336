"""What a discrete solver is: a map from costs to solutions, with the facts that make gradients valid.

In: batches of cost vectors (or matrices, grids). Out: for each the y that minimises <cost, y> over a finite set Y.
Every file of ``solvers/`` is one subclass. Next file to read: ``projections.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

import numpy as np
import scipy.linalg
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from implicitdiff.combinatorial.checks import check_domain, check_finite, check_solution
from implicitdiff.errors import InputError, OptionError, ProblemDefinitionError
from implicitdiff.torch_private import HOST

Sense: TypeAlias = Literal["min", "max"]
Domain: TypeAlias = Literal["any", "nonnegative", "no_negative_cycle"]
Shape: TypeAlias = tuple[int, ...]

SENSES = ("min", "max")
DOMAINS = ("any", "nonnegative", "no_negative_cycle")
RANK_TOLERANCE = 1e-10
# Eigenvectors are tried for more rows than this; a squared singular value above CLEAR times the largest surely counts.
MANY_ROWS, CLEAR = 64, 1e-5


class Solver(ABC):
    """y(w) = argmin over Y of <w, y>, for every sample of a batch; Y is finite, a solution has the shape of its cost.

    With ``sense="max"`` it is the argmax; subclasses solve the minimisation and the base changes the sign. A solver is
    called on tensors of any batch shape and is not differentiable by itself: `DiscreteLayer` makes it a layer.

    Attributes:
        sense: "min" or "max".
        domain: The costs that the solver can take: "any", "nonnegative", or "no_negative_cycle" (signs are free as long
            as no cycle of the graph has a negative sum). Only "any" can be maximised.
        cost_shape: The shape of one sample's cost; None stands for a size that is free.
    """

    sense: Sense = "min"
    domain: Domain = "any"

    def __init__(
        self, cost_shape: tuple[int | None, ...], *, sense: Sense = "min", domain: Domain = "any"
    ) -> None:
        if sense not in SENSES:
            raise OptionError(f"sense={sense!r} of {type(self).__name__}: one of {', '.join(SENSES)}")
        if domain not in DOMAINS:
            raise OptionError(f"domain={domain!r} of {type(self).__name__}: one of {', '.join(DOMAINS)}")
        if sense == "max" and domain != "any":
            raise OptionError(
                f"{type(self).__name__} takes {domain} costs only, so it cannot maximise: pass the costs of what is "
                "lost"
            )
        self.cost_shape = tuple(cost_shape)
        self.sense = sense
        self.domain = domain
        self._row_spaces: dict[Shape, np.ndarray] = {}
        self._bases: dict[tuple[Shape, torch.dtype, torch.device], Tensor] = {}

    @abstractmethod
    def solve(self, costs: Tensor) -> Tensor:
        """The minimisers: costs (B, *shape) without history, B >= 1, to y (B, *shape) of the same dtype and device, in
        a tensor of its own.

        Raises:
            InfeasibleError: some sample has no solution; the message gives its index.
            SolverError: some sample was not solved.
        """

    def equalities(self, shape: Shape) -> np.ndarray | None:
        """A, (rows, n) over flattened samples, with A y the same for every y of Y; None where nothing is known."""
        return None

    def known_solutions(self) -> Tensor | None:
        """Y, (K, *shape), where it is listed."""
        return None

    def example(self) -> tuple[Tensor, ...]:
        """A batch of costs to try things with, optional; the ready-made problems have one.

        Raises:
            ProblemDefinitionError: this solver declares none.
        """
        raise ProblemDefinitionError(
            f"{self.name} declares no example: add a method example, or take one of implicitdiff.problems"
        )

    def __call__(self, cost: Tensor) -> Tensor:
        """Solve for costs (*batch, *cost_shape); the solution has the same shape, dtype and device, and no history.

        Raises:
            InputError: wrong shape, not a floating dtype, NaN or inf, or a cost outside of the domain.
            InfeasibleError, SolverError: see `solve`.
        """
        batch = self.batch_shape(cost)
        flat = cost.detach().reshape(-1, *cost.shape[len(batch) :])
        check_finite(flat, self.name)
        if self.domain == "nonnegative":
            check_domain(flat, self.name)
        return self.minimise(flat if self.sense == "min" else -flat).reshape(cost.shape)

    def minimise(self, costs: Tensor) -> Tensor:
        """`solve` with its result checked, for any batch size."""
        if len(costs) == 0 or costs[0].numel() == 0:
            return torch.zeros_like(costs)
        y = self.solve(costs)
        check_solution(y, costs, self.name)
        return y

    @property
    def name(self) -> str:
        """The class, for messages."""
        return type(self).__name__

    def batch_shape(self, cost: Tensor) -> tuple[int, ...]:
        """The axes in front of one sample's cost.

        Raises:
            InputError: the last axes are not those of a cost, or the tensor is not floating.
        """
        if not isinstance(cost, Tensor) or not cost.is_floating_point():
            found = cost.dtype if isinstance(cost, Tensor) else type(cost).__name__
            raise InputError(f"costs of {self.name}: expected a floating tensor, got {found}")
        rank = len(self.cost_shape)
        tail = tuple(cost.shape[cost.dim() - rank :]) if cost.dim() >= rank else ()
        if len(tail) != rank or any(
            want is not None and want != size for want, size in zip(self.cost_shape, tail, strict=True)
        ):
            wanted = ", ".join("*" if size is None else str(size) for size in self.cost_shape)
            raise InputError(
                f"costs of {self.name} have shape {tuple(cost.shape)}, expected (*batch, {wanted}), where * is any size"
            )
        return tuple(cost.shape[: cost.dim() - rank])

    def row_space(self, shape: Shape) -> np.ndarray:
        """An orthonormal basis (rank, n) of the normals that `equalities` declares; computed once for a shape."""
        if shape not in self._row_spaces:
            size = int(np.prod(shape))
            rows = self.equalities(shape)
            known = rows is not None and len(rows) > 0
            self._row_spaces[shape] = (
                orthonormal_rows(np.asarray(rows, dtype=float).reshape(-1, size))
                if known
                else np.zeros((0, size))
            )
        return self._row_spaces[shape]

    def without_normals(self, w: Tensor) -> Tensor:
        """(I - A^+ A) w for w (B, *shape): what is left of a cost when everything that cannot matter is taken out."""
        basis = self._basis(tuple(w.shape[1:]), w.dtype, w.device)
        if len(basis) == 0:
            return w
        flat = w.flatten(1)
        return (flat - (flat @ basis.mT) @ basis).reshape(w.shape)

    def _basis(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (shape, dtype, device)
        if key not in self._bases:
            self._bases[key] = torch.from_numpy(self.row_space(shape)).to(device, dtype)
        return self._bases[key]


def orthonormal_rows(rows: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the space that the rows span.

    By QR with pivoting; where there are many rows, by the eigenvectors of A A', provided its spectrum has a clear gap:
    for the incidence matrix of a grid that is a hundred times faster.
    """
    if MANY_ROWS < len(rows) <= rows.shape[1]:
        sparse = csr_matrix(rows)
        values, vectors = scipy.linalg.eigh((sparse @ sparse.T).toarray())
        kept = values > CLEAR * values[-1]
        rounding = 4 * len(rows) * np.finfo(float).eps
        if (values[~kept] < rounding * values[-1]).all():
            return np.ascontiguousarray((sparse.T @ (vectors[:, kept] / np.sqrt(values[kept]))).T)
    q, r, _ = scipy.linalg.qr(rows.T, mode="economic", pivoting=True)
    pivots = np.abs(np.diag(r))
    rank = int((pivots > RANK_TOLERANCE * max(pivots[0], 1e-300)).sum()) if len(pivots) else 0
    return np.ascontiguousarray(q[:, :rank].T)


class NumpySolver(Solver):
    """A solver on the host in double precision: costs are copied there and solutions back."""

    def solve(self, costs: Tensor) -> Tensor:
        """Copy, solve, copy back."""
        array = costs.detach().to(HOST, torch.float64).numpy()
        return torch.as_tensor(self.solve_numpy(array), device=HOST).to(costs)

    @abstractmethod
    def solve_numpy(self, costs: np.ndarray) -> np.ndarray:
        """The minimisers of costs (B, *shape) in float64."""


__all__ = ["Domain", "NumpySolver", "Sense", "Shape", "Solver", "orthonormal_rows"]

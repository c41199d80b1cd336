"""``implicit``: an existing solver function made differentiable by the equations that its result fulfils.

Comes in: a solver ``fn(*inputs) -> u`` of any library, and the residual that is 0 at its result. Goes out: the same
function, differentiable in its inputs: a ``Root`` with that solver in a ``DeclarativeLayer``. Next: ``module.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitdiff.equations import Root
from implicitdiff.errors import ProblemDefinitionError
from implicitdiff.inputs import InDims
from implicitdiff.layer.module import DeclarativeLayer
from implicitdiff.problem import Problem, Solution
from implicitdiff.pytrees import flatten, unflatten
from implicitdiff.torch_private import broadcast_prefix

Solver = Callable[..., Any]


class _Held:
    """A solver, out of sight of what looks for tensors and values that the declared functions read."""

    __slots__ = ("fn",)

    def __init__(self, fn: Solver) -> None:
        self.fn = fn


class Solved(Root):
    """A residual and a solver, given as functions.

    Attributes:
        function: the residual.
        held: the solver, called with the inputs as the decorated function is.
        in_dims: where the batch axes of the inputs are; None: they have none.
    """

    def __init__(self, function: Callable[..., Any], solver: Solver, in_dims: InDims) -> None:
        super().__init__()
        self.function = function
        self.held = _Held(solver)
        self.in_dims = in_dims

    @property
    def residual(self) -> Any:
        """The residual, with the signature that it was given with."""
        return self.function

    def solve(self, *inputs: Any, **unused: Any) -> Any:
        """Call the solver, with shared inputs and batch axes as the caller of the decorated function has them."""
        leaves, spec = flatten(inputs)
        dims = broadcast_prefix(self.in_dims, spec) or [None] * len(leaves)
        if any(dim is None and _differs(leaf) for leaf, dim in zip(leaves, dims, strict=True)):
            # An input that is shared in the call differs between the samples here: under vmap over that input.
            return self._one_by_one(leaves, spec, dims)
        given = [_as_called(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True)]
        found = self.held.fn(*unflatten(given, spec))
        return _with_batch(found) if all(dim is None for dim in dims) else found

    def _one_by_one(self, leaves: tuple[Any, ...], spec: Any, dims: list[Any]) -> Any:
        batch = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        single = all(dim is None for dim in dims)
        rows, tree = [], None
        for b in range(batch):
            given = [
                _as_called(leaf[b : b + 1], dim) if isinstance(leaf, Tensor) else leaf
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            found = self.held.fn(*unflatten(given, spec))
            found = found.u if isinstance(found, Solution) else found
            row, tree = flatten(_with_batch(found) if single else found)
            rows.append(row)
        assert tree is not None
        return unflatten([torch.cat(column) for column in zip(*rows, strict=True)], tree)


def _differs(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape[0] > 1 and leaf.stride(0) != 0


def _as_called(leaf: Any, dim: int | None) -> Any:
    """A leaf with the batch axis first, as the decorated function was given it."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf[0] if dim is None else leaf.movedim(0, dim)


def _with_batch(found: Any) -> Any:
    if isinstance(found, Solution):
        raise ProblemDefinitionError("a solver for one sample returns u alone, not a Solution")
    leaves, spec = flatten(found)
    return unflatten([leaf[None] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def implicit(
    residual: Callable[..., Any],
    *,
    in_dims: InDims = 0,
    linear_solver: str = "auto",
    backward: str = "auto",
    on_failure: str = "raise",
    optimality_tol: float | None = None,
) -> Callable[[Solver], Callable[..., Any]]:
    """Make an existing solver differentiable: a decorator over `fn(*inputs) -> u`.

    Args:
        residual: residual(u, *inputs) of one sample, 0 at the solution, with as many entries as u; a function of torch
            operations, or a module, whose Parameters then get gradients.
        in_dims: where the batch axis of each input of `fn` is, as in torch.vmap; None: `fn` takes and returns one
            sample. u has its batch axis first.
        linear_solver, backward, on_failure, optimality_tol: as for `DeclarativeLayer`.

    Returns:
        A decorator. The decorated function takes the same positional inputs and returns u, differentiable in any mode,
        and checked: a u that does not make the residual 0 is an error, since its gradient would be wrong. Its attribute
        `layer` is the layer behind it; `fn` itself runs without gradients, in any library.

    Raises:
        ProblemDefinitionError: `residual` or `fn` is not callable.

    Example:
        >>> @idf.implicit(lambda u, a, b: u**3 + a * u - b)
        ... def cubic(a, b):                                   # (batch,), (batch,) -> (batch,)
        ...     return torch.from_numpy(solve_with_numpy(a.numpy(), b.numpy()))
        >>> cubic(a, b).sum().backward()
    """
    if not callable(residual):
        raise ProblemDefinitionError(
            f"implicit(residual) needs a function residual(u, *inputs), got {type(residual).__name__}: write "
            "@idf.implicit(residual) above the solver"
        )

    def decorate(fn: Solver) -> Callable[..., Any]:
        if not callable(fn):
            raise ProblemDefinitionError(
                f"implicit decorates a solver fn(*inputs) -> u, got {type(fn).__name__}"
            )
        name = getattr(fn, "__name__", type(fn).__name__)
        kind: type[Problem] = type(name, (Solved,), {"__doc__": getattr(fn, "__doc__", None)})
        layer = DeclarativeLayer(
            kind(residual, fn, in_dims),
            in_dims=in_dims,
            linear_solver=linear_solver,
            backward=backward,
            on_failure=on_failure,
            optimality_tol=optimality_tol,
        )

        @functools.wraps(fn, updated=())
        def wrapper(*inputs: Any) -> Any:
            return layer(*inputs)

        wrapper.layer = layer  # type: ignore[attr-defined]
        return wrapper

    return decorate

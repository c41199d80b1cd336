"""The module users build: a discrete solver in a network, with an estimator for its gradient.

In: a `Solver`, an `Estimator`, and costs of any batch shape. Out: solutions of the same shape, and diagnostics. Next
file to read: ``function.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from implicitdiff.combinatorial.base import Shape, Solver
from implicitdiff.combinatorial.checks import require_values
from implicitdiff.combinatorial.estimator import Estimator, Pass
from implicitdiff.combinatorial.function import DiscreteFunction
from implicitdiff.combinatorial.invariance import check_invariance, proof
from implicitdiff.combinatorial.oracle import Oracle, Policy
from implicitdiff.combinatorial.projections import Projection
from implicitdiff.combinatorial.tally import Diagnostics, Tally
from implicitdiff.errors import OptionError
from implicitdiff.torch_private import clean_context, outside_of_graphs

LOW_PRECISION = (torch.float16, torch.bfloat16)


class DiscreteLayer(nn.Module):
    """y = argmin over Y of <cost, y> (argmax if the solver says so), with the estimator's gradient.

    The layer computes vector-Jacobian products of a replacement for the solver's derivative, which is zero almost
    everywhere; each estimator's docstring has its formula. It works under torch.func (grad, vmap, jacrev, and jacfwd,
    hessian where the estimator has them), in float64, float32 and lower, on batches of any shape, also empty ones.
    torch.compile leaves it between two graphs; whatever else records operators instead of values is refused.

    In training mode estimators add their noise; in evaluation every estimator returns the plain solution y(cost).

    Example:
        >>> layer = DiscreteLayer(GridShortestPath(12, 12), Identity(margin=Rademacher(0.2)))
        >>> path = layer(cost)                      # (*batch, 12, 12)
        >>> (path - target).abs().sum().backward()
        >>> print(layer.diagnostics())

    Args:
        solver: what is solved.
        estimator: what stands for its derivative.
        domain: what happens to costs, and perturbed costs, that are negative where the solver takes none: "error", or
            "clamp" to eps, past which the gradient goes unchanged.
        eps: the smallest cost under domain="clamp".
        generator: of all random numbers; None for torch's own state. Noise is drawn on the generator's device.
        check: test a projection that the solver's declarations do not prove before it is used for the first time.
    """

    def __init__(
        self,
        solver: Solver,
        estimator: Estimator,
        *,
        domain: Policy = "error",
        eps: float = 1e-6,
        generator: torch.Generator | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(solver, Solver):
            raise OptionError(
                f"solver is {type(solver).__name__}: expected a Solver; combinatorial.solver(fn, ...) makes one of a "
                "function"
            )
        if not isinstance(estimator, Estimator):
            raise OptionError(
                f"estimator is {type(estimator).__name__}: expected an Estimator such as Identity()"
            )
        self.solver = solver
        self.estimator = estimator
        self.generator = generator
        self.check = check
        self.oracle = Oracle(solver, domain, eps, Tally())
        self.projection: Projection = estimator.bind(solver)
        self._checked: set[Shape] = set()

    def forward(self, cost: Tensor) -> Tensor:
        """The solutions for costs (*batch, *cost_shape).

        Raises:
            InputError: wrong shape; NaN or inf; costs outside of the domain; zero costs where a norm is divided by.
            InfeasibleError, SolverError: some sample has no solution, or was not solved.
            ProjectionError: the estimator's projection changes the solution.
            NotSupportedYetError: the costs have no values, because a graph is being recorded.
        """
        if torch.compiler.is_compiling():
            compiled: Tensor = _outside(self, cost)
            return compiled
        return self._solve(cost)

    def _solve(self, cost: Tensor) -> Tensor:
        batch = self.solver.batch_shape(cost)
        require_values(cost, self.solver.name)
        shape = tuple(cost.shape[len(batch) :])
        if self.check and shape not in self._checked:
            self._check(shape)
        low = cost.dtype in LOW_PRECISION
        w = cost.reshape(-1, *shape)
        w = w.float() if low else w
        run = Pass(self.oracle, self.projection, self.training, self.generator)
        sign = self.oracle.sign
        y: Tensor = DiscreteFunction.apply(self.estimator, run, w if sign == 1 else -w)[0]
        return (y.to(cost.dtype) if low else y).reshape(cost.shape)

    def _check(self, shape: Shape) -> None:
        if proof(self.solver, self.projection, shape) is None:
            with clean_context(), torch.no_grad():
                check_invariance(self.solver, self.projection, shape=shape)
        self._checked.add(shape)

    @property
    def solver_calls(self) -> int:
        """Instances solved so far by forward and backward passes."""
        return self.oracle.tally.instances

    def diagnostics(self) -> Diagnostics:
        """Sizes of costs, shares of zero gradients, solver calls; names a cost collapse (see `Diagnostics`)."""
        return self.oracle.tally.diagnostics()

    def reset_diagnostics(self) -> None:
        """Start counting anew."""
        self.oracle.tally.reset()

    def extra_repr(self) -> str:
        """The parts, for print(layer)."""
        return f"{self.solver.name}, {self.estimator.name}, domain={self.oracle.domain!r}"


# A compiler would walk into NumPy code; a solver is left as a break between two graphs instead.
_outside = outside_of_graphs(DiscreteLayer._solve)

__all__ = ["DiscreteLayer"]

"""The layer: a declared problem as a differentiable module, and the same as a function.

In: a problem, options, and batched inputs. Out: the solution of every sample, differentiable in the inputs and in the
problem's parameters. One call goes: inputs.bind -> plan.plan_for -> optimizers.solve_forward inside autograd's
function.
Next: `layer/prepare.py`, which prepares one call.
"""

from __future__ import annotations

from typing import Any

import torch

from implicitdiff.autograd.options import PLAIN, KKTOptions
from implicitdiff.inputs import InDims
from implicitdiff.layer.options import Options
from implicitdiff.layer.prepare import prepare
from implicitdiff.layer.recorded import solution_in_graph
from implicitdiff.layer.run import run
from implicitdiff.problem import Problem, Solution, require_problem


class DeclarativeLayer(torch.nn.Module):
    """A problem as a layer: `layer(*inputs)` is the argmin of each sample.

    Attributes:
        problem: the declaration, a submodule, so that its parameters are the layer's.
        options: the options as given, checked.

    Example:
        >>> layer = idf.DeclarativeLayer(GeometricMedian(), in_dims=0)
        >>> u = layer(x)                      # x (batch, m, n) -> u (batch, m)
        >>> u.square().sum().backward()       # gradients for x and for the problem's parameters
    """

    problem: Problem
    options: Options

    def __init__(
        self,
        problem: Problem,
        *,
        in_dims: InDims = 0,
        optimizer: Any = None,
        linear_solver: str = "auto",
        backward: str = "auto",
        on_failure: str = "raise",
        optimality_tol: float | None = None,
        compile: bool = False,
        tie: str = "inactive",
        kkt: KKTOptions | None = None,
    ) -> None:
        """Check the options and keep them.

        Args:
            problem: the declaration.
            in_dims: where the batch axis of each input is, as in torch.vmap: an int, None (shared by all samples), or a
                pytree prefix of the tuple of inputs. None alone: one sample, nothing has a batch axis.
            optimizer: one of `implicitdiff.optimizers`; None: the problem's own `solve`, else
                what `default_optimizer` chooses, which `explain` prints.
            linear_solver: the solver of the backward pass by name; "auto" chooses by structure and cost.
            backward: "auto" (structured), "dense" (the formula literally), "matrix-free" (products only), "unrolled"
                (differentiate the solver itself), "hand" (the problem's `vjp`), "approximate" (constraints
                ignored; the multipliers then have no gradient; for a `FixedPoint` one step, D_u step ignored).
            on_failure: what becomes of a sample without a solution or without a derivative: "raise"; "warn" (keep it);
                "nan" or "zero" (so in u and in its gradients; a shared tensor's gradient is NaN, or the sum over the
                other samples); "damp" (regularise, with a warning).
            optimality_tol: relative tolerance of the check that u is optimal; None: sqrt(eps) of the dtype.
            compile: gives the emitted code, backward and forward, to torch.compile, a stretch between two calls of
                solvers at a time. It takes seconds per signature on the first call; derivatives of derivatives, and
                whatever is vmapped, run eagerly. Inside torch.compile it has no effect.
            tie: at a weakly active inequality or bound (active, with a multiplier of 0) u has two one-sided
                derivatives: "inactive" takes that of the constraint left out, "active" that of it kept as an equality,
                "average" the mean of both.
            kkt: what the backward pass does about the KKT system beside solving with it: derivatives of least norm for
                minimisers that are not unique, a trust region, refinement, float64 inside; None: nothing.

        Raises:
            ProblemDefinitionError: `problem` is not a complete declaration, or lacks the `vjp` that "hand" needs.
            OptionError: an option has a value that does not exist; the message lists those that do.

        Warns:
            FallbackWarning: compile=True together with a `backward` of which no code is emitted. The same warning
                comes on the first call where no compiler is found, or where it fails.
        """
        super().__init__()
        self.problem = require_problem(problem)
        self.options = Options(
            in_dims=in_dims,
            optimizer=optimizer,
            linear_solver=linear_solver,
            backward=backward,
            on_failure=on_failure,
            optimality_tol=optimality_tol,
            compile=compile,
            tie=tie,
            kkt=PLAIN if kkt is None else kkt,
        )
        self.options.check(self.problem)

    def forward(self, *inputs: Any, init: Any = None) -> Any:
        """The solution u of every sample, in the structure of the problem's `init`.

        Args:
            inputs: as the problem's functions take them after u, with the batch axes that `in_dims` says.
            init: a start point for every sample, batch axis first (none if `in_dims` is None); None: the problem's
                `init`.

        Returns:
            u with the batch axis first, differentiable.

        Raises:
            ImplicitDiffError: one of its children says what is wrong, where, and how to mend it.
        """
        if torch.compiler.is_compiling():
            return solution_in_graph(self.problem, self.options, inputs, init, with_value=False).u
        return run(prepare(self.problem, inputs, self.options, init), with_value=False).u

    def solve(self, *inputs: Any, init: Any = None) -> Solution:
        """The same as calling the layer, with everything known about the solution.

        Args:
            inputs: see `forward`.
            init: see `forward`.

        Returns:
            Solution: u, the multipliers (lambda' A = D_u f) and the value are differentiable.
        """
        if torch.compiler.is_compiling():
            return solution_in_graph(self.problem, self.options, inputs, init, with_value=True)
        return run(prepare(self.problem, inputs, self.options, init), with_value=True)

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return self.options.shown()


def solve(
    problem: Problem,
    *inputs: Any,
    in_dims: InDims = 0,
    init: Any = None,
    optimizer: Any = None,
    linear_solver: str = "auto",
    backward: str = "auto",
    on_failure: str = "raise",
    optimality_tol: float | None = None,
    compile: bool = False,
    tie: str = "inactive",
    kkt: KKTOptions | None = None,
) -> Solution:
    """Solve every sample: `DeclarativeLayer(problem, ...).solve(*inputs, init=init)` as a function.

    Args:
        problem: the declaration.
        inputs: as its functions take them after u.
        in_dims: see `DeclarativeLayer`.
        init: a start point for every sample, or None.
        optimizer: see `DeclarativeLayer`.
        linear_solver: see `DeclarativeLayer`.
        backward: see `DeclarativeLayer`.
        on_failure: see `DeclarativeLayer`.
        optimality_tol: see `DeclarativeLayer`.
        compile: see `DeclarativeLayer`.
        tie: see `DeclarativeLayer`.
        kkt: see `DeclarativeLayer`.

    Returns:
        Solution, differentiable in u, the multipliers and the value.
    """
    options = Options(
        in_dims=in_dims,
        optimizer=optimizer,
        linear_solver=linear_solver,
        backward=backward,
        on_failure=on_failure,
        optimality_tol=optimality_tol,
        compile=compile,
        tie=tie,
        kkt=PLAIN if kkt is None else kkt,
    )
    if torch.compiler.is_compiling():
        return solution_in_graph(problem, options, inputs, init, with_value=True)
    options.check(require_problem(problem))
    return run(prepare(problem, inputs, options, init), with_value=True)

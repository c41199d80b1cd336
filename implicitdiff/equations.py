"""Systems of equations as problems: ``Root``, residual(u, x) = 0, and ``FixedPoint``, u = step(u, x).

Comes in: the user's residual or step for one sample. Goes out: a ``Problem`` without an objective, whose only
constraint is the residual; everything after the declaration treats it as one, with as many constraints as variables and
multipliers that are 0. Next file to read: ``derivatives/equations.py``.
"""

from typing import Any, ClassVar

import torch

from implicitdiff.errors import ProblemDefinitionError
from implicitdiff.problem import Problem, undeclared
from implicitdiff.pytrees import flatten, flatten_like, unflatten


class Equations(Problem):
    """What ``Root`` and ``FixedPoint`` share: no objective, no multipliers, no inequalities.

    With r the residual and J = D_u r, regular at the solution, D_x u = -J^-1 D_x r. In terms of the formula for
    optimisation problems: f = 0, h = r, so that lambda = 0, H = 0 and A = J, which is square.
    """

    def declares(self, name: str) -> bool:
        """Whether the hook ``name`` is declared; ``objective`` and ``equality`` follow from the residual."""
        if name in ("objective", "equality"):
            return True
        if name == self.MAIN:
            base = Root if self.MAIN == "residual" else FixedPoint
            return name in self.__dict__ or getattr(type(self), name) is not getattr(base, name)
        return super().declares(name)

    def check_declaration(self) -> None:
        """Raise ProblemDefinitionError if hooks of optimisation problems are declared too."""
        base = Root if self.MAIN == "residual" else FixedPoint
        derived = [n for n in ("objective", "equality") if getattr(type(self), n) is not getattr(base, n)]
        extra = [n for n in ("inequality", "bounds", "hessian") if self.declares(n)]
        if derived or extra:
            raise ProblemDefinitionError(
                f"{type(self).__name__} declares {', '.join([*derived, *extra])}, but an idf.{base.__name__} has a "
                f"{self.MAIN} and nothing to minimise: leave it out, or subclass idf.Problem"
            )

    def objective(self, u: Any, *inputs: Any, **unused: Any) -> torch.Tensor:
        """0: there is nothing to minimise. Not to be declared."""
        return flatten(u)[0][0].new_zeros(())


class Root(Equations):
    """The solution u of residual(u, x) = 0, as many equations as unknowns, differentiable in x.

    Subclass it and declare ``residual``, and ``init`` or ``solve``; ``vjp`` and ``example`` are optional, as for
    ``Problem``. Where J = D_u residual is singular there is no derivative, and the layer says so.

    Example:
        >>> class Kepler(idf.Root):
        ...     def residual(self, u, mean, eccentricity):      # one sample, all 0-dim
        ...         return u - eccentricity * torch.sin(u) - mean
        ...     def init(self, mean, eccentricity):
        ...         return mean
        >>> layer = idf.DeclarativeLayer(Kepler())
        >>> anomaly = layer(mean, eccentricity)                 # (batch,), (batch,) -> (batch,)
    """

    MAIN: ClassVar[str] = "residual"
    HOOKS: ClassVar[tuple[str, ...]] = (*Problem.HOOKS, "residual")

    def residual(self, u: Any, *inputs: Any, **unused: Any) -> Any:
        """The residual r(u, x) of one sample.

        Args:
            u: The variable, of the structure and shapes that ``init`` (or ``solve``) returns, without a batch axis.
            inputs: The inputs of one sample; shared ones whole.

        Returns:
            A tensor or a pytree of tensors with as many entries as u in all. Only where it has the structure and the
            shapes of u can the Jacobian have structure of its own; otherwise it is dense.
        """
        raise undeclared(self, "residual")

    def equality(self, u: Any, *inputs: Any, **unused: Any) -> Any:
        """The residual, as the constraint that it is. Not to be declared."""
        return self.residual(u, *inputs)


class FixedPoint(Equations):
    """The solution of u = step(u, x), differentiable in x: a ``Root`` with residual u - step(u, x).

    Subclass it and declare ``step``, and ``init`` or ``solve``. The step need not contract: without ``solve``
    Anderson's acceleration is tried first, then Newton's method.

    Example:
        >>> class Equilibrium(idf.FixedPoint):
        ...     def __init__(self, n):
        ...         super().__init__()
        ...         self.mix = torch.nn.Linear(n, n)
        ...     def step(self, u, x):                           # u (n,), x (n,)
        ...         return torch.tanh(self.mix(u) + x)
        ...     def init(self, x):
        ...         return torch.zeros_like(x)
    """

    MAIN: ClassVar[str] = "step"
    HOOKS: ClassVar[tuple[str, ...]] = (*Problem.HOOKS, "step")

    def step(self, u: Any, *inputs: Any, **unused: Any) -> Any:
        """One step for one sample, in the structure and shapes of u."""
        raise undeclared(self, "step")

    def equality(self, u: Any, *inputs: Any, **unused: Any) -> Any:
        """u - step(u, x), as the constraint that it is. Not to be declared."""
        leaves, spec = flatten(u)
        after = flatten_like(
            self.step(u, *inputs), spec, f"{type(self).__name__}.step", ProblemDefinitionError
        )
        return unflatten([a - b for a, b in zip(leaves, after, strict=True)], spec)

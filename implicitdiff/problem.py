"""The declaration of one optimisation problem: the class a user subclasses, and the record a solve returns.

Comes in: the user's functions for one sample. Goes out: a ``Problem`` that ``inputs.py`` binds to tensors and
``graph/trace.py`` turns into a graph. Nothing is computed or stored here. Next file to read: ``inputs.py``.
"""

import dataclasses
import weakref
from typing import Any, ClassVar, NoReturn, Self

import torch

from implicitdiff.errors import ProblemDefinitionError

_ALIVE: weakref.WeakValueDictionary[int, "Problem"] = weakref.WeakValueDictionary()

# The hooks end in ``**unused: Any`` for the type checker alone: mypy takes (self, u, *inputs: Any, **unused:
# Any) as compatible with every signature, so that a subclass may write ``def objective(self, u, x)``. Hooks
# are always called with positional arguments.


class Problem(torch.nn.Module):
    """One node: minimise over u  f(u, x)  subject to  h(u, x) = 0.

    Subclass it and declare ``objective``, and ``init`` or ``solve``; the other hooks are optional.
    Parameters, buffers and tensor attributes of the Problem are inputs too: they get gradients where they
    require them. The variable u and every input is a tensor (0-dim too) or a pytree of tensors (tuple, list,
    dict); integer and boolean tensors, numbers, strings and None are constants.

    Sign convention: lambda' A = D_u f with A = D_u h, and L = f - lambda' h.

    Example:
        >>> class GeometricMedian(idf.Problem):
        ...     def objective(self, u, x):                  # u (m,), x (m, n)
        ...         return torch.sqrt(((u[:, None] - x) ** 2).sum(0) + 1e-3).sum()
        ...     def init(self, x):
        ...         return x.mean(1)
        >>> layer = idf.DeclarativeLayer(GeometricMedian())
        >>> u = layer(x)                                    # x (batch, m, n) -> u (batch, m)
    """

    MAIN: ClassVar[str] = "objective"
    """The hook that a declaration cannot do without; its signature names the variable and the inputs."""
    HOOKS: ClassVar[tuple[str, ...]] = (
        "objective", "equality", "inequality", "bounds", "init", "solve", "vjp", "hessian", "example",
    )  # fmt: skip

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Note the identity of the new problem, under which torch.compile knows it."""
        problem = super().__new__(cls)
        _ALIVE[id(problem)] = problem
        return problem

    def declares(self, name: str) -> bool:
        """Whether the hook ``name`` is declared, in a subclass or on the instance.

        Args:
            name: One of ``Problem.HOOKS``.

        Returns:
            True if it is not the one that ``Problem`` itself inherits to everybody.

        Raises:
            ProblemDefinitionError: There is no hook of that name.
        """
        if name not in Problem.HOOKS:
            hooks = ", ".join(Problem.HOOKS)
            raise ProblemDefinitionError(f"there is no hook named {name!r}; the hooks are {hooks}")
        return name in self.__dict__ or getattr(type(self), name) is not getattr(Problem, name)

    @property
    def square(self) -> bool:
        """Whether this is a system of as many equations as unknowns (``idf.Root``, ``idf.FixedPoint``)."""
        return self.MAIN != "objective"

    def check_declaration(self) -> None:
        """Raise ProblemDefinitionError where hooks that are declared contradict each other; here none do."""

    def forward(self, *inputs: Any, **unused: Any) -> NoReturn:
        """Raise: a Problem is a declaration, the layer solves it."""
        name = type(self).__name__
        raise ProblemDefinitionError(
            f"{name} is a declaration and cannot be called: wrap it in idf.DeclarativeLayer, as in layer = "
            f"idf.DeclarativeLayer({name}(...)); u = layer(x)"
        )

    # The declaration, for one sample

    def objective(self, u: Any, *inputs: Any, **unused: Any) -> torch.Tensor:
        """The function to minimise, f(u, x), for one sample.

        Args:
            u: The variable, of the structure and shapes that ``init`` (or ``solve``) returns, without a batch
                axis.
            inputs: The inputs of one sample; shared ones whole.

        Returns:
            A real floating tensor of shape ().

        It is traced once per signature, so it is written in torch operations, without reading values in
        Python (``if``, ``float``, ``.item()``) and without random numbers.
        """
        raise undeclared(self, "objective")

    def equality(self, u: Any, *inputs: Any, **unused: Any) -> Any:
        """The constraints h(u, x) = 0, for one sample.

        Args:
            u: The variable of one sample.
            inputs: The inputs of one sample.

        Returns:
            A tensor or a pytree of tensors, each of any shape (0-dim too); each entry is one constraint. They
            may be nonlinear, depend on the inputs, and be redundant.
        """
        raise undeclared(self, "equality")

    def inequality(self, u: Any, *inputs: Any, **unused: Any) -> Any:
        """The constraints g(u, x) <= 0, for one sample; as ``equality``.

        The multipliers mu are non-positive at a minimum, the negative of the textbook's. Constraints that are not
        active (g < 0) never change a derivative.
        """
        raise undeclared(self, "inequality")

    def bounds(self, *inputs: Any, **unused: Any) -> tuple[Any, Any]:
        """(lower, upper) bounds of u for one sample; they may depend on the inputs and on Parameters.

        Args:
            inputs: The inputs of one sample.

        Returns:
            A pair; each part None, one number or tensor that broadcasts to u, or (where u is a pytree) the structure of
            u with None, numbers and tensors in it. Infinite entries are no bounds. A variable on its bound follows it,
            and is masked out of the linear systems: bounds make no rows of A.
        """
        raise undeclared(self, "bounds")

    def init(self, *inputs: Any, **unused: Any) -> Any:
        """A start point for one sample; it fixes the structure, the shapes and the dtype of u.

        Args:
            inputs: The inputs of one sample.

        Returns:
            A tensor or a pytree of tensors of the dtype and device of the inputs. It may be left out if
            ``solve`` is declared.
        """
        raise undeclared(self, "init")

    def hessian(self, u: Any, multipliers: Any, *inputs: Any, **unused: Any) -> Any:
        """D_uu of the *Lagrangian* f - lambda'h for one sample, as one of ``idf.operators``; for hybrid problems.

        Args:
            u: The variable of one sample.
            multipliers: lambda, in the structure of ``equality``; None without constraints.
            inputs: The inputs of one sample.

        Returns:
            A symmetric operator over the entries of u in order, its tensors with a leading axis of 1, as
            ``idf.operators.Diagonal(d[None])``. ``idf.operators.Sum((structured, idf.operators.Autodiff(rest,
            u)))`` has structure for some terms and automatic differentiation for the rest. It is traced like the
            objective.

        Not used with inequalities or bounds, whose active sets change the system. Elsewhere it takes the place of the
        derivation from the graph, which needs no help for operations that it knows. It is held against
        a Hessian-vector product at every solve: a contradiction raises StructureError.
        """
        raise undeclared(self, "hessian")

    # Batched: the batch axis first on everything, shared inputs expanded with stride 0, no gradient recorded

    def solve(self, *inputs: Any, **unused: Any) -> Any:
        """A hook, not the thing to call: call ``DeclarativeLayer(problem)(*inputs)`` or ``idf.solve(problem,
        *inputs)``.

        Declare it to bring an own solver; any library may be used inside.

        Args:
            inputs: All inputs with the batch axis first (shared ones expanded with stride 0, do not write
                into them).

        Returns:
            u with the batch axis first, or ``idf.Solution(u, equality_multipliers=..., status=...)``. The
            result is checked for optimality.
        """
        raise undeclared(self, "solve")

    def vjp(self, u: Any, v: Any, *inputs: Any, **unused: Any) -> Any:
        """A hand-written gradient, for comparison and for ``backward="hand"``; the automatic path never calls
        it.

        Args:
            u: The solution, batch axis first.
            v: The cotangent of u, of the same shapes.
            inputs: All inputs, batch axis first.

        Returns:
            One gradient per input, of the input's shape with the batch axis first; a tensor if there is one
            input, else a tuple.
        """
        raise undeclared(self, "vjp")

    def example(self) -> tuple[Any, ...]:
        """A tuple of batched inputs to try the problem on: for the command line, the gallery, the tests.

        It may take sizes by keyword, as ``def example(self, batch=3, n=9)``: ``idf.compare(problem, sweep={"n": [16,
        64]})`` and ``implicitdiff explain PROBLEM --size n=64`` then call it with them.
        """
        raise undeclared(self, "example")


@dataclasses.dataclass(frozen=True)
class Solution:
    """What a solve returns; ``u``, the multipliers and ``value`` are differentiable when the layer returns
    it.

    Attributes:
        u: The variable, batch axis first, in the structure of ``init``.
        equality_multipliers: lambda with lambda' A = D_u f, in the structure of ``equality``; None if there
            is none.
        inequality_multipliers: mu, in the structure of ``inequality``: non-positive at a minimum.
        value: The objective at u, shape (batch,).
        status: int8, shape (batch,), see ``idf.Status``.
        iterations: Number of iterations, shape (batch,).
        residual: The scaled stationarity residual, shape (batch,).
        bound_multipliers: (of lower bounds, of upper bounds), each like ``u``: non-positive at a minimum, 0 where the
            bound is not active; None if there are no bounds. With L = f - lambda'h - mu'g they are -D_u L on lower
            bounds and D_u L on upper ones. What ``solve`` returns here is not read.
        margin: Strict complementarity, shape (batch,): the least over all inequalities and bounds of the larger of
            slack and multiplier, each relative to its own terms; near 0 at a weakly active constraint, where only
            one-sided derivatives exist. None if there are neither.
    """

    u: Any
    equality_multipliers: Any = None
    inequality_multipliers: Any = None
    value: torch.Tensor | None = None
    status: torch.Tensor | None = None
    iterations: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    bound_multipliers: Any = None
    margin: torch.Tensor | None = None


def require_problem(problem: object) -> Problem:
    """Return ``problem`` if it is a complete declaration.

    Args:
        problem: What the user handed over.

    Returns:
        The same object.

    Raises:
        ProblemDefinitionError: It is not a Problem, has no objective, or has neither ``init`` nor ``solve``.
    """
    if isinstance(problem, type) and issubclass(problem, Problem):
        raise ProblemDefinitionError(
            f"expected an instance of a Problem, got a class: write {problem.__name__}(...)"
        )
    if not isinstance(problem, Problem):
        raise ProblemDefinitionError(
            f"expected a Problem, got {type(problem).__name__}: subclass idf.Problem and declare "
            "objective(self, u, ...) and init(self, ...)"
        )
    name = type(problem).__name__
    if "_parameters" not in problem.__dict__:
        raise ProblemDefinitionError(
            f"{name}.__init__ does not call super().__init__(): make that its first line"
        )
    if not problem.declares(problem.MAIN):
        raise undeclared(problem, problem.MAIN)
    problem.check_declaration()
    if not (problem.declares("init") or problem.declares("solve")):
        raise ProblemDefinitionError(
            f"{name} declares neither init nor solve, so the structure and shape of u are unknown: declare "
            "init(self, *inputs), which returns a start point for one sample, or solve(self, *inputs)"
        )
    return problem


def undeclared(problem: Problem, hook: str) -> ProblemDefinitionError:
    """The error for a hook that is needed and not declared."""
    kind = {"residual": "Root", "step": "FixedPoint"}.get(hook, "Problem")
    return ProblemDefinitionError(
        f"{type(problem).__name__} does not declare {hook}: add a method {hook} (see idf.{kind}.{hook})"
    )


def problem_of(identity: int) -> Problem:
    """The problem that is alive under this `id`."""
    return _ALIVE[identity]

"""The table of bad inputs and hard cases: what a user may do, and the error or the result that is promised for it.

Each row is a name, a function that does it, and what must come: an error with words of its message, or a check of the
result. Next: tests/test_hard_cases.py, which runs the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.status import Status

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


class Mean(idf.Problem):
    """minimise |u - x|^2: u = x."""

    def objective(self, u, x):
        return (u - x).square().sum()

    def init(self, x):
        return torch.zeros_like(x)


class Plane(Mean):
    """The same on sum u = 1: u = x + (1 - sum x) / m."""

    def equality(self, u, x):
        return u.sum() - 1


def problem(base: type[idf.Problem] = Mean, **hooks: Callable[..., Any]) -> idf.Problem:
    """An instance of a problem with some hooks in place of its own."""
    made: idf.Problem = type("Changed", (base,), hooks)()
    return made


def call(what: idf.Problem, *inputs: Any, **options: Any) -> Callable[[], Any]:
    """The solution of the layer, on x (3, 4) where nothing else is given."""
    given = inputs or (normal(3, 4),)
    return lambda: idf.DeclarativeLayer(what, **options)(*given)


def gradient(what: idf.Problem, x: Tensor, **options: Any) -> Callable[[], Any]:
    """(u, the gradient of the sum of u's first entries)."""

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        u = idf.DeclarativeLayer(what, **options)(leaf)
        first = u[:, 0] if u.dim() > 1 else u
        (found,) = torch.autograd.grad(first.sum(), leaf)
        return u.detach(), found

    return run


def close(u: Tensor, gradient: Tensor | None = None) -> Callable[[Any], None]:
    """A result is this u, or this u and this gradient."""

    def check(result: Any) -> None:
        expected = (u,) if gradient is None else (u, gradient)
        for mine, theirs in zip(result if gradient is not None else (result,), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)

    return check


@dataclass(frozen=True)
class Hard:
    """One row: `error` with `words` of its message, or `result`, which looks at what came out."""

    name: str
    run: Callable[[], Any]
    error: type[Exception] | None = None
    words: str = ""
    result: Callable[[Any], None] | None = None

    def __str__(self) -> str:
        return self.name


def spoilt(value: float, sample: int = 1) -> Tensor:
    x = normal(3, 4)
    x[sample, 2] = value
    return x


def branching(self: Any, u: Tensor, x: Tensor) -> Tensor:
    return (u - x).square().sum() if u.sum() > 0 else u.square().sum()


def noisy(self: Any, u: Tensor, x: Tensor) -> Tensor:
    return (u - x - torch.randn(4, dtype=x.dtype)).square().sum()


def writing(self: Any, u: Tensor, x: Tensor) -> Tensor:
    x += 1
    return (u - x).square().sum()


OUTSIDE = torch.ones(4, dtype=DOUBLE, requires_grad=True)


def constant(value: Any) -> Callable[..., Any]:
    return lambda self, *inputs, **options: value


DECLARATIONS = (
    Hard("not a problem", call(torch.nn.Linear(2, 2)), idf.ProblemDefinitionError, "subclass idf.Problem"),
    Hard("a class for an instance", call(Mean), idf.ProblemDefinitionError, "write Mean"),  # type: ignore[arg-type]
    Hard(
        "neither init nor solve",
        lambda: idf.DeclarativeLayer(type("Bare", (idf.Problem,), {"objective": Mean.objective})()),
        idf.ProblemDefinitionError,
        "neither init nor solve",
    ),
    Hard(
        "the problem called itself", lambda: Mean()(normal(3, 4)), idf.ImplicitDiffError, "DeclarativeLayer"
    ),
    Hard(
        "an objective that is no scalar",
        call(problem(objective=lambda self, u, x: (u - x).square())),
        idf.ProblemDefinitionError,
        "objective",
    ),
    Hard(
        "an objective without u",
        call(problem(objective=lambda self, u, x: x.square().sum())),
        idf.ProblemDefinitionError,
        "u",
    ),
    Hard("a branch on values", call(problem(objective=branching)), idf.ControlFlowError, "value"),
    Hard("random numbers", call(problem(objective=noisy)), idf.RandomnessError, "random"),
    Hard("a write into an input", call(problem(objective=writing)), idf.TraceError, ""),
    Hard(
        "numpy inside",
        call(problem(objective=lambda self, u, x: torch.as_tensor(np.square(u.numpy())).sum())),
        idf.TraceError,
        "",
    ),
    Hard(
        "a tensor from outside that requires grad",
        call(problem(objective=lambda self, u, x: (u - x * OUTSIDE).square().sum())),
        idf.CapturedTensorError,
        "requires",
    ),
    Hard(
        "an error of the user's own",
        call(problem(objective=lambda self, u, x: (u - x[:3]).square().sum())),
        idf.ImplicitDiffError,
        "objective",
    ),
    Hard(
        "an integer variable",
        call(problem(init=lambda self, x: torch.zeros(4, dtype=torch.int64))),
        idf.ImplicitDiffError,
        "int64",
    ),
    Hard(
        "constraints without entries",
        call(problem(equality=lambda self, u, x: u[:0])),
        result=close(normal(3, 4)),
    ),
)

INPUTS = (
    Hard("NaN in an input", call(Mean(), spoilt(torch.nan)), idf.InputError, "x contains NaN in sample 1"),
    Hard("infinity in an input", call(Mean(), spoilt(torch.inf)), idf.InputError, "x contains inf in sample 1"),
    Hard("too many inputs", call(Mean(), normal(3, 4), normal(3, 4)), idf.InputError, "takes 1 inputs"),
    Hard("no input at all", lambda: idf.DeclarativeLayer(Mean())(), idf.InputError, "takes 1 inputs"),
    Hard("no tensor among the inputs", call(Mean(), 3.0), idf.InputError, "no inputs that are tensors"),
    Hard("a numpy array", call(Mean(), np.zeros((3, 4))), idf.InputError, "torch.as_tensor"),
    Hard("a complex input", call(Mean(), normal(3, 4).to(torch.complex128)), idf.InputError, "complex"),
    Hard("a sparse input", call(Mean(), normal(3, 4).to_sparse()), idf.InputError, "to_dense"),
    Hard("half precision", call(Mean(), normal(3, 4).half()), idf.InputError, "float16"),
    Hard("a batch axis that is not there", call(Mean(), normal(3), in_dims=1), idf.InputError, "rank"),
    Hard("in_dims of the wrong length", call(Mean(), in_dims=(0, 0)), idf.InputError, "in_dims has 2 entries"),
    Hard("in_dims that is no axis", call(Mean(), in_dims="0"), idf.InputError, "in_dims"),
    Hard(
        "batch sizes that differ",
        call(problem(objective=lambda self, u, x, y: (u - x - y).square().sum(),
                     init=lambda self, x, y: torch.zeros_like(x)), normal(3, 4), normal(2, 4)),
        idf.InputError,
        "batch sizes differ",
    ),
    Hard(
        "dtypes that differ",
        call(problem(objective=lambda self, u, x, y: (u - x - y).square().sum(),
                     init=lambda self, x, y: torch.zeros_like(x)), normal(3, 4), normal(3, 4).float()),
        idf.InputError,
        "share their dtype",
    ),
    Hard("no samples", gradient(Plane(), normal(0, 4)), result=close(normal(0, 4), normal(0, 4))),
    Hard("one sample without a batch axis", call(Mean(), normal(4), in_dims=None), result=close(normal(4))),
    Hard("strides of all kinds", call(Mean(), normal(4, 3).T), result=close(normal(4, 3).T)),
    Hard("an expanded input", call(Mean(), normal(1, 4).expand(3, 4)), result=close(normal(1, 4).expand(3, 4))),
    Hard(
        "a variable without axes",
        gradient(problem(objective=lambda self, u, x: (u - x) ** 2 + u**4), torch.tensor([0.0, 3.0], dtype=DOUBLE)),
        result=close(torch.tensor([0.0, 1.0], dtype=DOUBLE), torch.tensor([1.0, 1 / 7], dtype=DOUBLE)),
    ),
    Hard("tiny numbers", gradient(Plane(), 1e-150 * normal(2, 4)), result=close(
        torch.full((2, 4), 0.25, dtype=DOUBLE), torch.tensor([[0.75, -0.25, -0.25, -0.25]] * 2, dtype=DOUBLE))),
    Hard("huge numbers", gradient(Mean(), 1e150 * normal(2, 4)), result=close(
        1e150 * normal(2, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2, dtype=DOUBLE))),
)  # fmt: skip

OPTIONS = (
    Hard("an unknown backward", call(Mean(), backward="fast"), idf.OptionError, "matrix-free"),
    Hard("an unknown linear solver", call(Mean(), linear_solver="qr"), idf.OptionError, "cholesky"),
    Hard(
        "a linear solver that does not fit",
        call(Mean(), linear_solver="woodbury"),
        idf.OptionError,
        "woodbury",
    ),
    Hard("an unknown policy", call(Mean(), on_failure="ignore"), idf.OptionError, "raise"),
    Hard("a tolerance that is negative", call(Mean(), optimality_tol=-1.0), idf.OptionError, "positive"),
    Hard("an optimizer that is none", call(Mean(), optimizer="newton"), idf.OptionError, "Newton"),
    Hard("no vjp for backward='hand'", call(Mean(), backward="hand"), idf.ProblemDefinitionError, "vjp"),
    Hard(
        "unrolling another method than Newton's",
        lambda: idf.DeclarativeLayer(Mean(), backward="unrolled", optimizer=idf.optimizers.LBFGS())(
            normal(3, 4).requires_grad_()
        ),
        idf.UnrollError,
        "not LBFGS",
    ),
    Hard(
        "LDL' of dependent constraints that are proved",
        call(problem(Plane, equality=lambda self, u, x: (u.sum() - 1, 2 * u.sum() - 2)), linear_solver="ldl"),
        idf.OptionError,
        "ldl",
    ),
    Hard(
        "a warm start that solve does not take",
        lambda: idf.DeclarativeLayer(problem(solve=lambda self, x: x))(normal(3, 4), init=normal(3, 4)),
        idf.OptionError,
        "init=None",
    ),
)

SOLUTIONS = (
    Hard("a solution of the wrong shape", call(problem(solve=lambda self, x: x[:, :3])), idf.SolutionError, "shape"),
    Hard("a solution of the wrong dtype", call(problem(solve=lambda self, x: x.float())), idf.SolutionError, "float32"),
    Hard("a solution in numpy", call(problem(solve=lambda self, x: x.numpy())), idf.SolutionError, "ndarray"),
    Hard("no solution", call(problem(solve=constant(None))), idf.SolutionError, "None"),
    Hard("a solution that is NaN", call(problem(solve=lambda self, x: x / 0 * 0)), idf.SolutionError, "NaN"),
    Hard("a solution off by 1 %", call(problem(solve=lambda self, x: 1.01 * x)),
         idf.NotOptimalError, "samples 0, 1, 2"),
    Hard(
        "multipliers of the wrong sign",
        call(problem(Plane, solve=lambda self, x: idf.Solution(
            x + (1 - x.sum(1, keepdim=True)) / 4, equality_multipliers=-(1 - x.sum(1)) / 2))),
        idf.NotOptimalError,
        "negatives",
    ),
    Hard("a warm start of the wrong shape", lambda: idf.solve(Mean(), normal(3, 4), init=normal(3, 5)),
         idf.SolutionError, "init="),
    Hard("a warm start that is NaN", lambda: idf.solve(Mean(), normal(3, 4), init=spoilt(torch.nan)),
         idf.ConvergenceError, "sample 1 of 3"),
    Hard(
        "a start outside of the domain",
        call(problem(objective=lambda self, u, x: x.square().sum() * u.sum() - u.log().sum(),
                     init=lambda self, x: -torch.ones_like(x))),
        idf.ConvergenceError,
        "not finite at the start",
    ),
    Hard("too few steps", call(problem(objective=lambda self, u, x: ((u - x) ** 4).sum()),
                               optimizer=idf.optimizers.Newton(max_iter=2)), idf.ConvergenceError, "max_iter"),
    Hard("no minimum", call(problem(objective=lambda self, u, x: -(u - x).square().sum())),
         idf.ConvergenceError, "Newton"),
    Hard(
        "constraints that contradict each other",
        call(problem(Plane, equality=lambda self, u, x: {"one": u.sum() - 1, "two": u.sum() - 2})),
        idf.InfeasibleError,
        r"equality\['one'\], equality\['two'\] contradict",
    ),
    Hard(
        "a constraint that nothing meets",
        call(problem(Plane, equality=lambda self, u, x: u @ u + 1)),
        idf.InfeasibleError,
        "cannot be met",
    ),
)  # fmt: skip


def flat(self: Any, u: Tensor, x: Tensor) -> Tensor:
    return (u.sum() - x.sum()).square()


ROOT = normal(3, 4)
DERIVATIVES = (
    Hard("minimisers that are not unique", gradient(problem(objective=flat), ROOT), idf.SingularError, "unique"),
    Hard("the same, products only", gradient(problem(objective=flat), ROOT, backward="matrix-free"),
         idf.ConvergenceError, "tolerance"),
    Hard("the same, set to zero", gradient(problem(objective=flat), ROOT, on_failure="zero"),
         result=lambda found: close(torch.zeros(3, 4, dtype=DOUBLE))(found[1])),
    Hard("the same, set to NaN", gradient(problem(objective=flat), ROOT, on_failure="nan"),
         result=lambda found: close(torch.full((3, 4), torch.nan, dtype=DOUBLE))(found[1])),
    Hard("the same, unasked", lambda: torch.autograd.grad(
        idf.DeclarativeLayer(problem(objective=flat))(leaf := ROOT.clone().requires_grad_()), leaf,
        torch.zeros(3, 4, dtype=DOUBLE))[0], result=lambda found: close(torch.zeros(3, 4, dtype=DOUBLE))(found)),
    Hard("the constraints alone decide", gradient(
        problem(objective=lambda self, u, x: u.sum(), equality=lambda self, u, x: u - x**2), ROOT),
        result=close(ROOT**2, 2 * ROOT * torch.tensor([1.0, 0, 0, 0], dtype=DOUBLE))),
    Hard("a constraint told twice", gradient(
        problem(equality=lambda self, u, x: torch.stack([u.sum() - 1, 3 * u.sum() - 3])), ROOT),
        result=close(ROOT + (1 - ROOT.sum(1, keepdim=True)) / 4,
                     torch.tensor([[0.75, -0.25, -0.25, -0.25]] * 3, dtype=DOUBLE))),
    Hard("a kink of the constraints", gradient(
        problem(equality=lambda self, u, x: u[0] * u[1], solve=lambda self, x: x * 1.0),
        torch.zeros(2, 2, dtype=DOUBLE)), idf.SingularError, "kink"),
    Hard("a saddle from solve", gradient(
        problem(objective=lambda self, u, x: (u[0] - x[0]) ** 2 - (u[1] - x[1]) ** 2, solve=lambda self, x: x * 1.0),
        normal(3, 2)), result=close(normal(3, 2), torch.tensor([[1.0, 0.0]] * 3, dtype=DOUBLE))),
    Hard("multipliers of a hand-written vjp", lambda: torch.autograd.grad(idf.solve(
        problem(Plane, vjp=lambda self, u, v, x: v), leaf := ROOT.clone().requires_grad_(), backward="hand"
        ).equality_multipliers.sum(), leaf), idf.NotSupportedYetError, "multipliers"),
    Hard("statuses under a policy", lambda: idf.solve(
        problem(solve=lambda self, x: torch.where(torch.arange(3)[:, None] == 1, torch.nan, x)), ROOT,
        on_failure="zero").status.tolist(), result=lambda found: close(
            torch.tensor([Status.OK, Status.NONFINITE, Status.OK]))(torch.tensor(found))),
)  # fmt: skip

ROWS: tuple[Hard, ...] = (*DECLARATIONS, *INPUTS, *OPTIONS, *SOLUTIONS, *DERIVATIVES)

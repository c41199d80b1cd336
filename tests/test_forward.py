"""The forward pass: which solver runs, how hooks are called, what they may return, what failures become."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.errors import (
    OptionError,
    ProblemDefinitionError,
    SolutionError,
)
from implicitdiff.optimizers import Newton
from implicitdiff.optimizers.forward import ForwardResult, solve_forward
from implicitdiff.status import Status
from tests.plan_double import double_of

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def forward(
    problem: idf.Problem, *inputs: Any, in_dims: Any = 0, u: Any = None, **options: Any
) -> ForwardResult:
    plan, bound, theta = double_of(problem, *inputs, in_dims=in_dims, u=u)
    return solve_forward(problem, plan, bound, theta, **options)


class Softmax(idf.Problem):
    """minimise over u  sum u log u - x'u  s.t.  sum u = 1."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.special.xlogy(u, u).sum() - x @ u

    def equality(self, u: Tensor, x: Tensor) -> Tensor:
        return u.sum() - 1

    def init(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 1 / len(x))


class Solved(Softmax):
    """The same with a solve that returns whatever `answer` makes of x."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer or (lambda x: x.softmax(1))
        self.calls: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = []

    def solve(self, x: Tensor) -> Any:
        self.calls.append((tuple(x.shape), x.stride(), torch.is_grad_enabled()))
        return self.answer(x)


class Mean(idf.Problem):
    """minimise over u  sum_j w_j |u - x_j|^2 + eps |u|^2, without constraints; w shared, eps a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return ((u[:, None] - x).square() * w).sum() + self.eps * u.square().sum()

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(x[:, 0])


def mean_of(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).sum(-1) / (w.sum() + 0.5)


# The built-in optimizer


def test_newton_from_init() -> None:
    x, w = normal(3, 4, 6), normal(6, seed=1).abs()
    found = forward(Mean(), x, w, in_dims=(0, None))
    torch.testing.assert_close(found.u[0], mean_of(x, w))
    assert found.multipliers == ()
    assert found.status.dtype == torch.int8
    assert found.status.tolist() == [Status.OK] * 3
    assert found.iterations.dtype == torch.int64
    assert (found.iterations > 0).all()
    assert (found.residual < 1e-14).all()
    assert not found.failed.any()
    assert not found.u[0].requires_grad


def test_multipliers_have_the_shapes_of_the_constraints() -> None:
    x = normal(3, 4)
    found = forward(Softmax(), x)
    torch.testing.assert_close(found.u[0], x.softmax(1))
    assert found.multipliers[0].shape == (3,)
    torch.testing.assert_close(found.multipliers[0], 1 - x.logsumexp(1))  # 1 + log u - x = lambda


def test_one_sample_without_a_batch_axis() -> None:
    x = normal(4)
    found = forward(Softmax(), x, in_dims=None)
    torch.testing.assert_close(found.u[0], x.softmax(0)[None])
    assert found.status.shape == (1,)


def test_a_warm_start_is_where_newton_begins() -> None:
    x = normal(3, 4)
    cold = forward(Softmax(), x)
    warm = forward(Softmax(), x, init=cold.u)
    assert (warm.iterations == 0).all()
    assert torch.equal(warm.u[0], cold.u[0])


def test_a_warm_start_of_a_wrong_shape_is_refused() -> None:
    x = normal(3, 4)
    with pytest.raises(SolutionError, match=re.escape("init=: u has shape (3, 5), expected (3, 4)")):
        forward(Softmax(), x, init=(torch.ones(3, 5, dtype=DOUBLE),))
    with pytest.raises(SolutionError, match=r"init= has 2 leaves, expected 1"):
        forward(Softmax(), x, init=(x, x))


class Looping(Softmax):
    """An init that vmap cannot run: it reads a value."""

    def __init__(self, steps: int = 0) -> None:
        super().__init__()
        self.samples = steps

    def init(self, x: Tensor) -> Tensor:
        self.samples += 1
        start = torch.ones_like(x) + (0.5 if x[0].item() > 0 else 0.0)
        return start / start.sum()


def test_an_init_that_vmap_cannot_run_is_looped() -> None:
    x = normal(3, 4)
    problem = Looping()
    plan, bound, theta = double_of(problem, x)
    problem.samples = 0
    found = solve_forward(problem, plan, bound, theta)
    torch.testing.assert_close(found.u[0], x.softmax(1))
    assert problem.samples == 4  # once under vmap, in vain, and once for each sample


class Wrong(Softmax):
    """An init of a wrong shape; the plan is made for another one."""

    def init(self, x: Tensor) -> Tensor:
        return x[:-1]


def test_an_init_of_a_wrong_shape_is_refused() -> None:
    x = normal(3, 4)
    with pytest.raises(SolutionError, match=re.escape("init of Wrong: u has shape (3, 3), expected (3, 4)")):
        forward(Wrong(), x, u=x[0])


class Failing(Softmax):
    def init(self, x: Tensor) -> Tensor:
        raise RuntimeError("my own bug")


def test_an_error_of_init_itself_is_passed_on() -> None:
    x = normal(3, 4)
    with pytest.raises(RuntimeError, match="my own bug"):
        forward(Failing(), x, u=x[0])


def test_an_empty_batch_calls_nothing() -> None:
    problem = Solved(lambda x: 1 / 0)
    plan, bound, theta = double_of(problem, normal(2, 4))
    empty = tuple(tensor[:0] for tensor in theta)
    found = solve_forward(problem, plan, bound, empty)
    assert [tuple(leaf.shape) for leaf in (*found.u, *found.multipliers, found.status)] == [
        (0, 4),
        (0,),
        (0,),
    ]
    assert found.failed.shape == found.iterations.shape == found.residual.shape == (0,)
    assert problem.calls == []


class Trees(idf.Problem):
    """Variables, inputs and constraints as pytrees, a constant among the inputs."""

    def objective(self, u: dict[str, Tensor], data: tuple[Tensor, dict[str, Tensor]], kind: str) -> Tensor:
        x, rest = data
        value = (u["a"] - x).square().sum() + (u["b"] - rest["y"]).square()
        return value if kind == "plain" else 2 * value

    def equality(self, u: dict[str, Tensor], data: Any, kind: str) -> dict[str, Tensor]:
        return {"rows": u["a"].sum(1), "one": u["b"] - 1}

    def init(self, data: tuple[Tensor, dict[str, Tensor]], kind: str) -> dict[str, Tensor]:
        return {"a": torch.zeros_like(data[0]), "b": torch.zeros_like(data[1]["y"])}


def test_pytrees_and_constants() -> None:
    x, y = normal(3, 2, 5), normal(3, seed=1)
    found = forward(Trees(), (x, {"y": y}), "double")
    torch.testing.assert_close(found.u[0], x - x.mean(2, keepdim=True))
    torch.testing.assert_close(found.u[1], torch.ones(3, dtype=DOUBLE))
    assert [tuple(leaf.shape) for leaf in found.multipliers] == [(3, 2), (3,)]
    torch.testing.assert_close(found.multipliers[1], 4 * (1 - y))


# The problem's own solve


def test_solve_is_called_once_batched_without_grad() -> None:
    x = normal(3, 4).requires_grad_()
    problem = Solved()
    found = forward(problem, x)
    assert problem.calls == [((3, 4), (4, 1), False)]
    assert torch.equal(found.u[0], x.softmax(1))
    assert found.status.tolist() == [Status.OK] * 3
    assert found.iterations.tolist() == [-1] * 3  # solve did not say
    torch.testing.assert_close(found.multipliers[0], 1 - x.detach().logsumexp(1))


def test_shared_inputs_are_expanded_without_a_copy() -> None:
    seen: list[tuple[Any, ...]] = []

    class Own(Mean):
        def solve(self, x: Tensor, w: Tensor) -> Tensor:
            seen.append((tuple(x.shape), tuple(w.shape), w.stride(0)))
            return (x * w[:, None]).sum(2) / (w.sum(1) + self.eps)[:, None]

    x, w = normal(3, 4, 6), normal(6, seed=1).abs()
    found = forward(Own(), x, w, in_dims=(0, None))
    assert seen == [((3, 4, 6), (3, 6), 0)]
    assert found.status.tolist() == [Status.OK] * 3
    forward(Own(), x[0], w, in_dims=None)
    assert seen[1][:2] == ((1, 4, 6), (1, 6))


def test_a_solution_may_carry_everything() -> None:
    x = normal(3, 4)
    lam = 1 - x.logsumexp(1)
    full = idf.Solution(
        x.softmax(1),
        equality_multipliers=lam,
        status=torch.tensor([0, int(Status.NOT_CONVERGED), int(Status.WEAKLY_ACTIVE)]),
        iterations=torch.tensor([3, 4, 5], dtype=torch.int32),
    )
    found = forward(Solved(lambda _: full), x)
    assert torch.equal(found.multipliers[0], lam)
    assert found.iterations.tolist() == [3, 4, 5]
    # The rule says that sample 1 is optimal; what solve says about sample 2 is something else.
    assert found.status.tolist() == [Status.OK, Status.OK, Status.WEAKLY_ACTIVE]


def test_an_optimizer_that_was_asked_for_comes_before_solve() -> None:
    x = normal(3, 4)
    problem = Solved()
    found = forward(problem, x, optimizer=Newton(max_iter=30))
    assert problem.calls == []
    torch.testing.assert_close(found.u[0], x.softmax(1))
    with pytest.raises(OptionError, match="optimizer='newton' is none"):
        forward(problem, x, optimizer="newton")


def test_a_warm_start_is_handed_to_a_solve_that_takes_one() -> None:
    given: list[Any] = []

    class Warm(Softmax):
        def solve(self, x: Tensor, init: Tensor | None = None) -> Tensor:
            given.append(init)
            return x.softmax(1)

    x = normal(3, 4)
    forward(Warm(), x, init=(x,))
    forward(Warm(), x)
    assert torch.equal(given[0], x)
    assert given[1] is None
    with pytest.raises(OptionError, match="Solved has its own solve, which takes no start"):
        forward(Solved(), x, init=(x,))


def test_without_solve_and_init_there_is_no_start() -> None:
    class OnlySolve(idf.Problem):
        objective, solve = Softmax.objective, lambda self, x: x

    x = normal(3, 4)
    with pytest.raises(ProblemDefinitionError, match="OnlySolve declares no init, so Newton has no start"):
        forward(OnlySolve(), x, u=x[0], optimizer=Newton())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.softmax(1)[:, :-1], "solve of Solved: u has shape (3, 3), expected (3, 4)"),
        (lambda x: x.softmax(1)[0], "u has shape (4,), expected (3, 4) (the batch axis comes first)"),
        (lambda x: x.softmax(1).float(), "u has dtype torch.float32, expected torch.float64"),
        (lambda x: x.softmax(1).to("meta"), "u is on meta, expected cpu"),
        (lambda x: x.softmax(1).numpy(), "u is a ndarray, expected a tensor"),
        (lambda x: {"u": x}, "solve of Solved has the structure {'u': *}, expected *"),
        (lambda x: (x, x), "solve of Solved has the structure (*, *), expected *"),
        (lambda x: None, "u is a NoneType, expected a tensor"),
        (
            lambda x: idf.Solution(x.softmax(1), equality_multipliers=x),
            "equality_multipliers has shape (3, 4), expected (3,)",
        ),
        (
            lambda x: idf.Solution(x.softmax(1), equality_multipliers=(x[:, 0],)),
            "equality_multipliers of solve of Solved has the structure (*,), expected *",
        ),
        (lambda x: idf.Solution(x.softmax(1), status=torch.zeros(3)), "status is a torch.float32"),
        (
            lambda x: idf.Solution(x.softmax(1), status=torch.zeros(2).int()),
            "status has shape (2,), expected (3,)",
        ),
        (lambda x: idf.Solution(x.softmax(1), iterations=7), "iterations is a int"),
        (lambda x: idf.Solution(x.softmax(1), status=torch.full((3,), 42)), "status holds [42, 42, 42]"),
    ],
)
def test_what_solve_returns_is_checked(answer: Any, message: str) -> None:
    with pytest.raises(SolutionError, match=re.escape(message)):
        forward(Solved(answer), normal(3, 4))


def test_multipliers_without_constraints_are_refused() -> None:
    class Own(Mean):
        def solve(self, x: Tensor, w: Tensor) -> idf.Solution:
            return idf.Solution(x.mean(2), equality_multipliers=x)

    with pytest.raises(SolutionError, match="the problem declares no equality"):
        forward(Own(), normal(3, 4, 6), normal(3, 6))


# Transforms outside: attributes of the problem may be wrappers, or differ between the samples


class Scaled(idf.Problem):
    """minimise over u  |u - scale x|^2; its own solve reads the Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=DOUBLE))

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u - self.scale * x).square().sum()

    def init(self, x: Tensor) -> Tensor:
        return x

    def solve(self, x: Tensor) -> Tensor:
        assert self.scale.shape == ()
        return self.scale * x


def test_tensors_of_the_problem_that_differ_between_samples() -> None:
    from tests.plan_double import PlanDouble

    problem, x = Scaled(), normal(3, 4)
    _, bound, _ = double_of(problem, x)
    scale = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    theta = (x, scale)
    plan = PlanDouble(lambda u, x, s: (u - s * x).square().sum(), None, x[0], theta, (True, True))
    inputs = plan.trace.inputs
    plan.trace = type(plan.trace)(
        plan.trace.variables, inputs[:1], inputs[1:], None, plan.trace.variable_spec, None
    )
    found = solve_forward(problem, plan, bound, theta)  # type: ignore[arg-type]
    torch.testing.assert_close(found.u[0], scale[:, None] * x)
    assert problem.scale.item() == 2.0
    newton = solve_forward(problem, plan, bound, theta, optimizer=Newton())  # type: ignore[arg-type]
    torch.testing.assert_close(newton.u[0], scale[:, None] * x)

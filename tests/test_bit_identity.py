"""One bad sample leaves the numbers of the others bit-identical: on every solver, every structure, every policy.

A sample is made bad in place (NaN, infinity, zero, the negative, a tiny part of its matrix): nothing changes for
the others but their neighbour. The optimizers have the same test in tests/test_optimizers.py.
"""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import implicitdiff as idf
from implicitdiff.graph.trace import variable_example
from implicitdiff.inputs import bind
from implicitdiff.operators import Block, Kronecker, LinearOperator
from implicitdiff.plan import Plan, plan_for
from tests.cases import BY_NAME as CASES
from tests.cases import Case
from tests.operator_cases import BY_NAME as ROWS
from tests.operator_draws import Draw
from tests.solver_checks import ALL, PAIRS

BAD = 1
OTHERS = [0, 2]


def spoilt(values: Tensor, how: str) -> Tensor:
    """A copy with the second sample made bad; shared tensors (batch axis 1) and integers stay."""
    values = values.clone()
    if values.shape[0] == 1 or not values.is_floating_point():
        return values
    other = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0}
    values[BAD] = other[how] if how in other else values[BAD] * {"negative": -1.0, "tiny": 1e-3}[how]
    return values


def spoilt_operator(operator: LinearOperator, how: str) -> LinearOperator:
    """The operator with all parameters of the second sample made bad."""

    def mend(value: Any) -> Any:
        if isinstance(value, LinearOperator):
            return spoilt_operator(value, how)
        return spoilt(value, how) if isinstance(value, Tensor) else value

    if isinstance(operator, Block):
        blocks = tuple(tuple(map(mend, row)) for row in operator.blocks)
        return dataclasses.replace(operator, blocks=blocks)
    if isinstance(operator, Kronecker):
        return dataclasses.replace(operator, factors=tuple(map(mend, operator.factors)))
    fields = {f.name: getattr(operator, f.name) for f in dataclasses.fields(operator)}  # type: ignore[arg-type]
    changes = {name: mend(value) for name, value in fields.items() if isinstance(value, Tensor)}
    return dataclasses.replace(operator, **changes) if changes else operator  # type: ignore[type-var]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors hold the same bits: 0.0 is not -0.0, and NaN is NaN."""
    word = torch.int32 if found.dtype == torch.float32 else torch.int64
    return torch.equal(found.contiguous().view(word), expected.contiguous().view(word))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_solvers(name: str, row: str, dtype: torch.dtype) -> None:
    operator, _ = ROWS[row].build(Draw(3, dtype=dtype))
    if operator.batch == 1:
        return  # one matrix for all samples: there is no bad one
    for lead in ((),) if dtype == torch.float32 else ((), (2,)):
        rhs = torch.randn(
            *lead, 3, operator.size, dtype=dtype, generator=torch.Generator().manual_seed(len(lead))
        )
        expected = ALL[name].factor(operator).solve(rhs)
        for how in ("nan", "inf", "zero", "negative", "tiny"):
            factorization = ALL[name].factor(spoilt_operator(operator, how))
            found = factorization.solve(rhs)
            assert same_bits(found[..., OTHERS, :], expected[..., OTHERS, :]), how
            # one solve with a factorisation leaves nothing behind for the next
            again = factorization.solve(rhs)
            assert same_bits(again[..., OTHERS, :], expected[..., OTHERS, :]), how


# Plans


@dataclasses.dataclass(frozen=True)
class Point:
    """A plan at a point that need not be a solution, and right-hand sides."""

    plan: Plan
    u: tuple[Tensor, ...]
    lam: tuple[Tensor, ...]
    theta: tuple[Tensor, ...]

    def answers(self) -> dict[str, tuple[Tensor, ...]]:
        """Whatever a plan is asked, as far as it has a batch axis (which is then the first)."""
        plan, u, lam, theta = self.plan, self.u, self.lam, self.theta
        generator = torch.Generator().manual_seed(7)

        def drawn(leaves: tuple[Tensor, ...], *lead: int) -> tuple[Tensor, ...]:
            return tuple(torch.randn(*lead, *t.shape, generator=generator, dtype=t.dtype) for t in leaves)

        v, v_lam, rhs_u, rhs_h = drawn(u), drawn(lam), drawn(u, 2), drawn(lam, 2)
        needs = tuple(t.is_floating_point() for t in theta)
        flags = [placeholder.batched for placeholder in (*plan.trace.inputs, *plan.trace.tensors)]
        found: dict[str, tuple[Tensor, ...]] = {
            "value": (plan.value(u, theta),),
            "multipliers": plan.multipliers(u, theta),
        }
        for name, cotangent in (("vjp", None), ("vjp with multipliers", v_lam)):
            grads, _ = plan.vjp(u, lam, theta, v, cotangent, needs)
            found[name] = tuple(
                g
                for g, own in zip(grads, (*flags, *(False,) * len(theta)), strict=False)
                if own and g is not None
            )
        for name, solve in (
            ("solve", lambda: plan.kkt_solve(u, lam, theta, rhs_u, rhs_h)),
            ("factor", lambda: plan.kkt_factor(u, lam, theta).solve(rhs_u, rhs_h)),
        ):
            w, s, _ = solve()
            found[name] = tuple(t.movedim(1, 0) for t in (*w, *s))
        stationarity = plan.stationarity(u, lam, theta)
        found["stationarity"] = (*stationarity.gradient, *stationarity.constraint)
        return found

    def spoilt(self, how: str, which: str) -> "Point":
        """The point with one sample bad: in u, or in the inputs."""
        if which == "u":
            return dataclasses.replace(self, u=tuple(spoilt(t, how) for t in self.u))
        flags = [placeholder.batched for placeholder in self.plan.trace.inputs]
        flags += [False] * (len(self.theta) - len(flags))
        theta = (spoilt(t, how) if own else t for t, own in zip(self.theta, flags, strict=True))
        return dataclasses.replace(self, theta=tuple(theta))


def point_of(
    case: Case, backward: str, linear_solver: str = "auto", dtype: torch.dtype = torch.float64
) -> Point:
    """A case with three samples, at its start."""
    problem = case.problem(dtype)
    inputs = case.make_inputs(batch=3, dtype=dtype)
    bound = bind(problem, inputs, case.in_dims)
    example = variable_example(problem, bound)
    plan = plan_for(
        problem, bound, example.leaves, example.spec, backward=backward, linear_solver=linear_solver
    )
    theta = tuple(t.detach() for t in plan.trace.theta(bound))
    starts = [pytree.tree_leaves(problem.init(*bound.sample(b))) for b in range(bound.batch)]
    u = tuple(torch.stack([t.detach() for t in leaves]) for leaves in zip(*starts, strict=True))
    u = tuple(
        t + 0.01 * torch.rand(t.shape, generator=torch.Generator().manual_seed(3), dtype=dtype) for t in u
    )
    return Point(plan, u, plan.multipliers(u, theta), theta)


def hold_to_bits(point: Point) -> None:
    with torch.no_grad():
        expected = point.answers()
        for which in ("u", "theta"):
            for how in ("nan", "zero") if which == "u" else ("nan", "negative"):
                found = point.spoilt(how, which).answers()
                for name, leaves in found.items():
                    for mine, theirs in zip(leaves, expected[name], strict=True):
                        assert same_bits(mine[OTHERS], theirs[OTHERS]), (name, which, how)


@pytest.mark.parametrize("backward", ["auto", "dense"])
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.in_dims is not None], ids=str)
def test_plans(case: Case, backward: str) -> None:
    hold_to_bits(point_of(case, backward))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("case", "linear_solver"),
    [
        ("transport", "schur"),
        ("transport", "schur-cg"),
        ("transport", "lu"),
        ("transport", "cholesky"),
        ("pooling-pseudo-huber", "cg"),
        ("pooling-pseudo-huber", "woodbury"),
        ("pooling-pseudo-huber", "cholesky"),
        ("pooling-pseudo-huber", "lu"),
        ("pooling-pseudo-huber", "ldl"),
    ],
)
def test_every_solver_by_name(case: str, linear_solver: str, dtype: torch.dtype) -> None:
    hold_to_bits(point_of(CASES[case], "auto", linear_solver, dtype))


@pytest.mark.parametrize("case", ["circle", "pooling-pseudo-huber"])
def test_products_only(case: str) -> None:
    hold_to_bits(point_of(CASES[case], "matrix-free"))


# Layers


class Valley(idf.Problem):
    """minimise (x_0 (u_0 - x_1))^2 + (u_1 - x_1)^2 + c u_1^2: where x_0 = 0, u_0 may be anything."""

    def objective(self, u, x, c):
        return (x[0] * (u[0] - x[1])) ** 2 + (u[1] - x[1]) ** 2 + c * u[1] ** 2

    def init(self, x, c):
        return torch.zeros_like(x)


class Tied(Valley):
    """The same with u_1 + u_2 x_0 = x_1 beside a third variable that has no curvature of its own."""

    def objective(self, u, x, c):
        return super().objective(u[:2], x, c)

    def equality(self, u, x, c):
        return u[1] + u[2] * x[0] - x[1]

    def init(self, x, c):
        return torch.zeros_like(torch.cat([x, x[:1]]))


@pytest.mark.parametrize("problem", [Valley, Tied])
@pytest.mark.parametrize("backward", ["auto", "dense"])
@pytest.mark.parametrize("policy", ["warn", "nan", "zero", "damp"])
@pytest.mark.parametrize("bad", ["singular", "nan"])
def test_layers(problem: type[Valley], backward: str, policy: str, bad: str) -> None:
    good = torch.tensor([[1.0, 2.0], [0.7, 3.1], [1.3, -0.4]], dtype=torch.float64)
    start = torch.zeros(3, 3 if problem is Tied else 2, dtype=torch.float64)
    hurt, start_hurt = good.clone(), start.clone()
    if bad == "singular":
        hurt[BAD, 0] = 0
    else:
        start_hurt[BAD, 0] = torch.nan
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    layer = idf.DeclarativeLayer(problem(), in_dims=(0, None), backward=backward, on_failure=policy)
    found = []
    for x, init in ((good, start), (hurt, start_hurt)):
        x = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", idf.OptimalityWarning)
            u = layer(x, c, init=init)
            weights = torch.tensor([1.0, -0.6, 0.3], dtype=torch.float64)[: u.shape[1]]
            first = torch.autograd.grad((u * weights).sum(), x, create_graph=True)[0]
            lean = torch.autograd.grad((u * weights).sum(), x, retain_graph=True)[0]
        found.append((u.detach(), first.detach(), lean))
    for mine, theirs in zip(*found, strict=True):
        assert same_bits(mine[OTHERS], theirs[OTHERS])

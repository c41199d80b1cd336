"""Every case of the KKT system with equality constraints, each against its derivative in closed form.

Singular H with a regular reduced Hessian, indefinite H, dependent and contradicting constraints, more constraints than
variables; dense and structured plans, one sample and batches that mix the kinds. Next: test_kkt_points.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.status import Status

DOUBLE = torch.float64
Inputs = tuple[Tensor, ...]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Quadratic(idf.Problem):
    """minimise |b u|^2 / 2 - x'u  s.t.  a u = c; b'b is singular, its part along the constraints is not."""

    def objective(self, u, b, x, a, c):
        return 0.5 * (b @ u).square().sum() - x @ u

    def equality(self, u, b, x, a, c):
        return a @ u - c

    def init(self, b, x, a, c):
        return torch.zeros_like(x)


def quadratic_inputs(batch: int) -> Inputs:
    return (
        normal(batch, 2, 5),
        normal(batch, 5, seed=1),
        normal(batch, 3, 5, seed=2),
        normal(batch, 3, seed=3),
    )


def quadratic_solution(b: Tensor, x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """By the pseudo-inverse of K: the true one where K is regular, that of least norm for dependent rows."""
    corner = torch.zeros(len(a), len(a), dtype=DOUBLE)
    matrix = torch.cat([torch.cat([b.T @ b, a.T], 1), torch.cat([a, corner], 1)])
    return (torch.linalg.pinv(matrix, rtol=1e-10) @ torch.cat([x, c]))[: len(x)]


class NoCurvature(idf.Problem):
    """minimise (u_0 - x_0)^2 + (u_1 - x_1)^2  s.t.  u_0 + u_1 + u_2 = x_2: u_2 has no curvature at all."""

    def objective(self, u, x):
        return ((u[:2] - x[:2]) ** 2).sum()

    def equality(self, u, x):
        return u.sum() - x[2]

    def init(self, x):
        return torch.zeros_like(x)


class Steps(idf.Problem):
    """minimise |u_{i+1} - u_i - x_i|^2  s.t.  u_0 = a: differences alone do not see a constant; u = a + cumsum x."""

    def objective(self, u, x, a):
        return ((u[1:] - u[:-1] - x) ** 2).sum()

    def equality(self, u, x, a):
        return u[0] - a

    def init(self, x, a):
        return torch.zeros_like(torch.cat([x, x[:1]]))


class Rows(idf.Problem):
    """minimise sum_i (u_i0 + u_i1 - x_i)^2  s.t.  u_i0 = c_i^3: singular blocks; u_i1 = x_i - c_i^3."""

    def objective(self, u, x, c):
        return ((u.sum(1) - x) ** 2).sum()

    def equality(self, u, x, c):
        return u[:, 0] - c**3

    def init(self, x, c):
        return torch.zeros_like(torch.stack([x, x], 1))


class Fixed(idf.Problem):
    """The constraints alone decide: minimise x'u  s.t.  u = x^2, so that H = 0."""

    def objective(self, u, x):
        return x @ u

    def equality(self, u, x):
        return u - x**2

    def init(self, x):
        return torch.zeros_like(x)


class Indefinite(idf.Problem):
    """minimise u_0 u_1 - x_0 u_0 - x_1 u_1  s.t.  u_0 - u_1 = x_2: H indefinite, along the constraint u_1^2."""

    def objective(self, u, x):
        return u[0] * u[1] - x[:2] @ u

    def equality(self, u, x):
        return u[0] - u[1] - x[2]

    def init(self, x):
        return torch.zeros_like(x[:2])


class Repeated(idf.Problem):
    """minimise |u - x|^2  s.t.  a_k (u_0 + u_1 - x_0 x_1) = 0 for three numbers a: one constraint, told thrice."""

    def objective(self, u, x, a):
        return ((u - x) ** 2).sum()

    def equality(self, u, x, a):
        return a * (u.sum() - x[0] * x[1])

    def init(self, x, a):
        return torch.zeros_like(x)


class Curved(idf.Problem):
    """minimise -x'u  s.t.  |u|^2 = 1 and |u|^4 = 1: dependent all along the sphere; u = x / |x|."""

    def objective(self, u, x):
        return -(x @ u)

    def equality(self, u, x):
        return torch.stack([u @ u - 1, (u @ u) ** 2 - 1])

    def init(self, x):
        return x

    def solve(self, x):
        return torch.nn.functional.normalize(x.detach(), dim=1)


class Overdetermined(idf.Problem):
    """minimise |u|^2  s.t.  a (u - x^2) = 0 with more rows than columns, of full column rank: u = x^2."""

    def objective(self, u, x, a):
        return u.square().sum()

    def equality(self, u, x, a):
        return a @ (u - x**2)

    def init(self, x, a):
        return torch.zeros_like(x)


@dataclass(frozen=True)
class KKTCase:
    """A problem, inputs for a batch, and the solution of one sample as a function that autograd may differentiate.

    `moving` are the inputs for which the closed form holds (dependent constraints leave the others without one).
    """

    name: str
    problem: Callable[[], idf.Problem]
    inputs: Callable[[int], Inputs]
    solution: Callable[..., Tensor]
    in_dims: Any = 0
    moving: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return self.name


def mixed_inputs(batch: int) -> Inputs:
    """The first sample's rows are dependent and consistent, those of the others are not dependent."""
    b, x, a, c = quadratic_inputs(batch)
    b = torch.cat([b, normal(batch, 2, 5, seed=9)], 1)
    a[0, 2], c[0, 2] = 2 * a[0, 0] - a[0, 1], 2 * c[0, 0] - c[0, 1]
    return b, x, a, c


CASES = (
    KKTCase(
        "singular H, regular reduced", Quadratic, quadratic_inputs, quadratic_solution, moving=(0, 1, 2, 3)
    ),
    KKTCase(
        "a variable without curvature",
        NoCurvature,
        lambda batch: (normal(batch, 3),),
        lambda x: torch.cat([x[:2], (x[2] - x[0] - x[1])[None]]),
    ),
    KKTCase(
        "a singular band",
        Steps,
        lambda batch: (normal(batch, 6), normal(batch, seed=1)),
        lambda x, a: a + torch.cat([torch.zeros(1, dtype=DOUBLE), x.cumsum(0)]),
        moving=(0, 1),
    ),
    KKTCase(
        "singular blocks",
        Rows,
        lambda batch: (normal(batch, 4), normal(batch, 4, seed=1)),
        lambda x, c: torch.stack([c**3, x - c**3], 1),
        moving=(0, 1),
    ),
    KKTCase("H = 0", Fixed, lambda batch: (normal(batch, 3),), lambda x: x**2),
    KKTCase(
        "H indefinite at a strict minimum",
        Indefinite,
        lambda batch: (normal(batch, 3),),
        lambda x: torch.stack([(x[0] + x[1] + x[2]) / 2, (x[0] + x[1] - x[2]) / 2]),
    ),
    KKTCase(
        "rank-deficient and consistent",
        Repeated,
        lambda batch: (normal(batch, 2), normal(3, seed=1)),
        lambda x, a: x + (x[0] * x[1] - x.sum()) / 2,
        in_dims=(0, None),
    ),
    KKTCase("dependent and curved", Curved, lambda batch: (normal(batch, 3),), lambda x: x / x.norm()),
    KKTCase(
        "more constraints than variables, full column rank",
        Overdetermined,
        lambda batch: (normal(batch, 2), normal(4, 2, seed=1)),
        lambda x, a: x**2,
        in_dims=(0, None),
    ),
    KKTCase("dependent in one sample", Quadratic, mixed_inputs, quadratic_solution, moving=(1,)),
)
backwards = pytest.mark.parametrize("backward", ["auto", "dense"])
batches = pytest.mark.parametrize("batch", [1, 3])


@backwards
@batches
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_derivative_is_that_of_the_closed_form(case: KKTCase, batch: int, backward: str) -> None:
    inputs = tuple(t.clone().requires_grad_() for t in case.inputs(batch))
    with idf.record() as log:
        u = idf.DeclarativeLayer(case.problem(), in_dims=case.in_dims, backward=backward)(*inputs)
        dims = case.in_dims if isinstance(case.in_dims, tuple) else (0,) * len(inputs)
        expected = torch.stack(
            [
                case.solution(*(t if d is None else t[b] for t, d in zip(inputs, dims, strict=True)))
                for b in range(batch)
            ]
        )
        torch.testing.assert_close(u, expected, rtol=1e-7, atol=1e-7)
        v = normal(*u.shape, seed=11)
        moving = [inputs[k] for k in case.moving]
        found = torch.autograd.grad(u, moving, v)
        truth = torch.autograd.grad(expected, moving, v)
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)
    assert not len(log), str(log)


@backwards
def test_multipliers_of_dependent_constraints_are_of_least_norm(backward: str) -> None:
    """lam'A = D_u f with A = a 1' and D_u f = r 1, r = x_0 x_1 - x_0 - x_1: lam = a r / |a|^2."""
    x, a = normal(3, 2).requires_grad_(), normal(3, seed=1)
    lam = idf.solve(Repeated(), x, a, in_dims=(0, None), backward=backward).equality_multipliers
    truth = (x[:, 0] * x[:, 1] - x.sum(1))[:, None] * a / a.square().sum()
    torch.testing.assert_close(lam, truth)
    v = normal(3, 3, seed=2)
    found, expected = (torch.autograd.grad(t, x, v)[0] for t in (lam, truth))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


class Loose(idf.Problem):
    """minimise |u|^2  s.t.  a u = c with more rows than columns: Du/dc = A^+ (minus A^+ C, C = -I)."""

    def objective(self, u, c, a):
        return u.square().sum()

    def equality(self, u, c, a):
        return a @ u - c

    def init(self, c, a):
        return torch.zeros_like(a[0])


@backwards
@batches
def test_an_overdetermined_solution_moves_by_the_pseudo_inverse(batch: int, backward: str) -> None:
    a = normal(4, 2, seed=1)
    c = (normal(batch, 2) @ a.T).requires_grad_()
    u = idf.DeclarativeLayer(Loose(), in_dims=(0, None), backward=backward)(c, a)
    v = normal(batch, 2, seed=2)
    found = torch.autograd.grad(u, c, v)[0]
    torch.testing.assert_close(found, v @ torch.linalg.pinv(a), rtol=1e-8, atol=1e-9)


@backwards
def test_contradictions_are_named(backward: str) -> None:
    a = normal(4, 2, seed=1)
    a[2] = 0.5 * a[1]
    a[0], a[3] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    a[1, 1] = a[2, 1] = 0.0
    c = normal(2, 2) @ a.T  # u_1 is named by the last row alone, u_0 by the three others
    c[1, 1] += 0.5
    with pytest.raises(
        idf.InfeasibleError, match=r"^sample 1 of 2: .*equality\[0\], equality\[1\], equality\[2\] contradict"
    ):
        idf.solve(Loose(), c, a, in_dims=(0, None), backward=backward)
    status = idf.solve(Loose(), c, a, in_dims=(0, None), backward=backward, on_failure="nan").status
    assert status.tolist() == [Status.OK, Status.INFEASIBLE]

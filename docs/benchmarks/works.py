"""The list of benchmarks: every function makes one `Work` of a family at a size.

Sizes come in, problems with inputs, a solution and the hand-written pass go out. Data are drawn from fixed
seeds. Next: methods.py.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import implicitdiff as idf
from benchmarks import byhand
from benchmarks.work import Work, solve_work
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.reference import fig2, fig4

ALPHA = 16.0
MU = 0.7
EPS = 1e-3


class QuadraticProgram(idf.Problem):
    """minimise over u  u'Q u / 2 + q'u  s.t.  A u = b"""

    def objective(self, u: Tensor, Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return 0.5 * u @ Q @ u + q @ u

    def equality(self, u: Tensor, Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return A @ u - b

    def init(self, Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(q)


class Softmax(idf.Problem):
    """minimise over u  sum_i u_i log u_i - x'u  s.t.  sum(u) = 1"""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u * u.log()).sum() - x @ u

    def equality(self, u: Tensor, x: Tensor) -> Tensor:
        return u.sum() - 1

    def init(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 1 / x.shape[0])

    def solve(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


class Smoothing(idf.Problem):
    """minimise over u  sum_i w_i (u_i - x_i)^2 / 2 + mu / 2 sum_i (u_{i+1} - u_i)^2"""

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return 0.5 * (w * (u - x) ** 2).sum() + 0.5 * MU * ((u[1:] - u[:-1]) ** 2).sum()

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return x

    def solve(self, x: Tensor, w: Tensor) -> Tensor:
        return byhand.solve_smoothing(w * x, w, MU)


class LogisticRegression(idf.Problem):
    """minimise over u  sum_i log(1 + exp(-y_i x_i'u)) + mu |u|^2 / 2"""

    def objective(self, u: Tensor, X: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-y * (X @ u)).sum() + 0.5 * mu * (u * u).sum()

    def init(self, X: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        return torch.zeros_like(X[0])


class GeometricMedian(idf.Problem):
    """minimise over u  sum_j sqrt(|u - x_j|^2 + eps)"""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.sqrt(((u[:, None] - x) ** 2).sum(0) + EPS).sum()

    def init(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _fig2(penalty: str, u: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor]:
    return (fig2.backward(x, u, v, penalty, ALPHA),)


def _fig4(gamma: float, P: Tensor, v: Tensor, M: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    return fig4.backward(M, r, c, P, v, gamma)


def _without_constant(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients for r (b, m) and c (b, n) of transport are defined up to a multiple of (1_m, -1_n)."""
    M, r, c = gradients
    shift = ((r.sum(1) - c.sum(1)) / (r.shape[1] + c.shape[1]))[:, None]
    return [M, r - shift, c + shift]


def pooling(b: int, m: int, n: int, penalty: str = "pseudo-huber") -> Work:
    """Robust pooling, alpha = 16, of standard normal points x (b, m, n), against Fig. 2."""
    x = torch.randn(b, m, n, generator=_generator())
    hand = byhand.with_backward(functools.partial(_fig2, penalty))
    setting = f"{penalty} b{b} m{m} n{n}"
    return solve_work("pooling", setting, RobustPooling(penalty, ALPHA), (x,), (True,), hand)


def transport(b: int, m: int, n: int, gamma: float = 10.0) -> Work:
    """Optimal transport with costs uniform in [0, 1] and uneven marginals, gradients for M, r, c; Fig. 4."""
    generator = _generator()
    M = torch.rand(b, m, n, generator=generator)
    r, c = (torch.rand(b, k, generator=generator, dtype=torch.float64) + 0.5 for k in (m, n))
    inputs = (M, r / r.sum(1, keepdim=True), c / c.sum(1, keepdim=True))
    return solve_work(
        "transport",
        f"b{b} {m}x{n} gamma {gamma:g}",
        OptimalTransport(gamma),
        inputs,
        (True,) * 3,
        byhand.with_backward(functools.partial(_fig4, gamma)),
        determined=_without_constant,
    )


def quadratic(b: int, m: int, p: int, whole: bool = True, dtype: torch.dtype = torch.float64) -> Work:
    """A batch of QPs with equality constraints, gradients for q and b, against a Cholesky and Schur layer."""
    generator = _generator()
    factor, q = torch.randn(b, m, m, generator=generator), torch.randn(b, m, generator=generator)
    A, right = torch.randn(b, p, m, generator=generator), torch.randn(b, p, generator=generator)
    Q = factor @ factor.mT / m + torch.eye(m)
    needs, setting = (False, True, False, True), f"b{b} m{m} p{p}"
    inputs = (Q.double(), q.double(), A.double(), right.double())
    return solve_work(
        "QP layer" if whole else "QP backward",
        setting,
        QuadraticProgram(),
        inputs,
        needs,
        byhand.quadratic,
        dtype,
        whole=whole,
        note="hand keeps the factors of the forward pass",
    )


def softmax(b: int, m: int) -> Work:
    """The entropic projection on the simplex against torch.softmax."""
    x = torch.randn(b, m, generator=_generator())
    return solve_work("softmax", f"b{b} m{m}", Softmax(), (x,), (True,), byhand.softmax)


def smoothing(b: int, m: int) -> Work:
    """Weighted smoothing of a signal, tridiagonal, gradients for x and w, against LAPACK's banded Cholesky."""
    generator = _generator()
    x, w = torch.randn(b, m, generator=generator), 0.5 + torch.rand(b, m, generator=generator)
    hand = byhand.with_backward(functools.partial(byhand.smoothing, mu=MU))
    note = "hand runs in SciPy, whose work the meter cannot see"
    return solve_work("smoothing", f"b{b} m{m}", Smoothing(), (x, w), (True, True), hand, note=note)


def logistic(b: int, m: int, n: int) -> Work:
    """Logistic regression with n rows of m features, gradients for the rows and the ridge."""
    generator = _generator()
    X = torch.randn(b, n, m, generator=generator) / math.sqrt(m)
    y = torch.randn(b, n, generator=generator).sign()
    mu = 0.5 + torch.rand(b, generator=generator)
    hand = byhand.with_backward(byhand.logistic)
    return solve_work(
        "logistic", f"b{b} m{m} n{n}", LogisticRegression(), (X, y, mu), (True, False, True), hand
    )


def median(b: int = 4, m: int = 3, n: int = 5) -> Work:
    """A problem of a handful of variables: the geometric median of n points in R^m."""
    x = torch.randn(b, m, n, generator=_generator())
    hand = byhand.with_backward(functools.partial(byhand.median, eps=EPS))
    return solve_work("tiny median", f"b{b} m{m} n{n}", GeometricMedian(), (x,), (True,), hand)

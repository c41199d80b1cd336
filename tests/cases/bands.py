"""Signals and trajectories: neighbours along one axis are coupled by slices, so that H is banded."""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import BANDED, DENSE_KKT, Case, Draw, Sizes

softplus = torch.nn.functional.softplus


class Smoothing(idf.Problem):
    """minimise over u  sum_t w_t (u_t+1 - u_t)^2 + |u - x|^2,  x (T,), w (T - 1,) shared."""

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return (w * (u[1:] - u[:-1]) ** 2).sum() + ((u - x) ** 2).sum()

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return x.clone()


class TotalVariation(idf.Problem):
    """minimise over u  lam sum_t sqrt((u_t+1 - u_t)^2 + eps) + |u - x|^2 / 2,  x (T,), lam ()."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def objective(self, u: Tensor, x: Tensor, lam: Tensor) -> Tensor:
        return lam * torch.sqrt(torch.diff(u).square() + self.eps).sum() + 0.5 * (u - x).square().sum()

    def init(self, x: Tensor, lam: Tensor) -> Tensor:
        return x.clone()


class Trend(idf.Problem):
    """minimise over u  lam |second differences|^2 + sum_t softplus(u_t) - x'u  s.t.  sum(u) = c."""

    def objective(self, u: Tensor, x: Tensor, lam: Tensor, c: Tensor) -> Tensor:
        bends = u[2:] - 2 * u[1:-1] + u[:-2]
        return lam * (bends * bends).sum() + softplus(u).sum() + 0.2 * (u * u).sum() - torch.dot(x, u)

    def equality(self, u: Tensor, x: Tensor, lam: Tensor, c: Tensor) -> Tensor:
        return u.sum() - c

    def init(self, x: Tensor, lam: Tensor, c: Tensor) -> Tensor:
        return x - x.mean() + c / x.shape[0]


class Autoregressive(idf.Problem):
    """minimise over u  sum_t (x_t - a u_t-1 - b u_t-2)^2 + |u|^2 / 3,  x (T,), a () shared, b ()."""

    def objective(self, u: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ((x[2:] - a * u[1:-1] - b * u[:-2]) ** 2).sum() + (u**2).sum() / 3

    def init(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Series(idf.Problem):
    """minimise over u (R, T)  huber differences along T, with other weights for each series, + |u - x|^2."""

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        steps = torch.nn.functional.huber_loss(u[:, 1:], u[:, :-1], reduction="none", delta=0.7)
        return (w[:, None] * steps).sum() + ((u - x) ** 2).sum()

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return x.clone()


class Trajectory(idf.Problem):
    """minimise over u (T, d)  sum_t |u_t+1 - tanh(A u_t)|^2 + |u - x|^2 / 2,  A (d, d) shared."""

    def objective(self, u: Tensor, x: Tensor, A: Tensor) -> Tensor:
        return (u[1:] - torch.tanh(u[:-1] @ A.mT)).square().sum() + 0.5 * (u - x).square().sum()

    def init(self, x: Tensor, A: Tensor) -> Tensor:
        return x.clone()


class Steered(idf.Problem):
    """minimise over u (T, d)  sum_t |u_t+1 - A u_t|^2 + |u - x|^2 / 2  s.t.  u_0 = a, u_T-1 = b,  A (d, d)."""

    def objective(self, u: Tensor, x: Tensor, A: Tensor, a: Tensor, b: Tensor) -> Tensor:
        steps = u[1:] - torch.einsum("ij,tj->ti", A, u[:-1])
        return (steps * steps).sum() + 0.5 * ((u - x) ** 2).sum()

    def equality(self, u: Tensor, x: Tensor, A: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return u[0] - a, b - u[-1]

    def init(self, x: Tensor, A: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[None], x[1:-1], b[None]])


class GroupVariation(idf.Problem):
    """minimise over u (T, d)  sum_t sqrt(|u_t+1 - u_t|^2 + 0.3) + |u - x|^2: whole rows are coupled."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.sqrt((u[1:] - u[:-1]).square().sum(1) + 0.3).sum() + (u - x).square().sum()

    def init(self, x: Tensor) -> Tensor:
        return x.clone()


class Image(idf.Problem):
    """minimise over u (h, w)  differences down and across, pseudo-Huber, + |u - x|^2."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        down, across = u[1:] - u[:-1], u[:, 1:] - u[:, :-1]
        variation = torch.sqrt(down**2 + 0.4).sum() + torch.sqrt(across**2 + 0.4).sum()
        return variation + (u - x).square().sum()

    def init(self, x: Tensor) -> Tensor:
        return x.clone()


class Pendulum(idf.Problem):
    """minimise over u (T, 2), angle and speed,  the residuals of a pendulum's steps + |u - x|^2  s.t.  u_0 = a."""

    def objective(self, u: Tensor, x: Tensor, g: Tensor, a: Tensor) -> Tensor:
        angle, speed = u[:, 0], u[:, 1]
        first = angle[1:] - angle[:-1] - 0.3 * speed[:-1]
        second = speed[1:] - speed[:-1] + 0.3 * g * torch.sin(angle[:-1])
        return (first**2).sum() + (second**2).sum() + ((u - x) ** 2).sum()

    def equality(self, u: Tensor, x: Tensor, g: Tensor, a: Tensor) -> Tensor:
        return u[0] - a

    def init(self, x: Tensor, g: Tensor, a: Tensor) -> Tensor:
        return torch.cat([a[None], x[1:]])


class Pairs(idf.Problem):
    """minimise over u  sum_k cosh(u_2k - u_2k+1 - y_k) + 2 exp(u_0) + |u - x|^2 / 2,  T even."""

    def objective(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.cosh(u[::2] - u[1::2] - y).sum() + 2 * torch.exp(u[0]) + 0.5 * (u - x).square().sum()

    def init(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


class ArcLength(idf.Problem):
    """minimise over u  |u - x|^2  s.t.  sum_t sqrt((u_t+1 - u_t)^2 + 1) = c: the constraint curves."""

    def objective(self, u: Tensor, x: Tensor, c: Tensor) -> Tensor:
        return (u - x).square().sum()

    def equality(self, u: Tensor, x: Tensor, c: Tensor) -> Tensor:
        return torch.sqrt((u[1:] - u[:-1]).square() + 1).sum() - c

    def init(self, x: Tensor, c: Tensor) -> Tensor:
        return x.clone()


class Ends(idf.Problem):
    """minimise over u  (u_0 - a)^2 + exp(u_T-1) + |u - x|^2: single entries leave H diagonal."""

    def objective(self, u: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return (u[0] - a) ** 2 + torch.exp(u[-1]) + ((u - x) ** 2).sum()

    def init(self, x: Tensor, a: Tensor) -> Tensor:
        return x.clone()


class Held(idf.Problem):
    """minimise over u  sum_t cosh(u_t+1 - u_t) - x'u + |w u|^2  s.t.  u_0 = a, u_T-1 = b: H may be singular."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen = seen

    def objective(self, u: Tensor, x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        own = (w * u).square().sum() if self.seen else w.sum()
        return torch.cosh(u[1:] - u[:-1]).sum() - torch.dot(x, u) + own

    def equality(self, u: Tensor, x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return u[0] - a, u[-1] - b

    def init(self, x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return torch.linspace(0, 1, x.shape[0], dtype=x.dtype, device=x.device) * (b - a) + a


class Circle(idf.Problem):
    """minimise over u  |differences|^2 + (u_0 - u_T-1)^2 + |u - x|^2: the ends meet, which is no band."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u[1:] - u[:-1]).square().sum() + (u[0] - u[-1]) ** 2 + (u - x).square().sum()

    def init(self, x: Tensor) -> Tensor:
        return x.clone()


def _bent(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    x = draw.normal(*sizes)
    straight = torch.sqrt((0.8 * (x[..., 1:] - x[..., :-1])) ** 2 + 1).sum(-1)
    return x, straight


def _held(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    x = draw.normal(*sizes)
    return x, draw.normal(), draw.normal(), torch.zeros_like(x)


CASES = (
    Case(
        name="smoothing",
        make_problem=Smoothing,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.shared_positive(sizes[0] - 1)),
        in_dims=(0, None),
        sizes=((7,), (4,), (2,)),
        hessian="banded",
        solvers=BANDED,
        notes="H is shared by the batch; the weights' gradient is the sum over it",
    ),
    Case(
        name="total-variation",
        make_problem=TotalVariation,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.positive()),
        sizes=((8,), (3,), (1,)),
        hessian="banded",
        solvers=BANDED,
    ),
    Case(
        name="trend",
        make_problem=Trend,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.positive(), draw.normal()),
        sizes=((7,), (5,), (3,)),
        hessian="banded",
        schur="dense",
        solvers=DENSE_KKT,
    ),
    Case(
        name="autoregressive",
        make_problem=Autoregressive,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.shared_normal(), draw.normal()),
        in_dims=(0, None, 0),
        sizes=((9,), (4,), (3,)),
        hessian="banded",
        solvers=BANDED,
    ),
    Case(
        name="series",
        make_problem=Series,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.positive(sizes[0])),
        sizes=((2, 6), (3, 3), (1, 4)),
        hessian="banded",
        solvers=BANDED,
        notes="independent chains along the last axis",
    ),
    Case(
        name="trajectory",
        make_problem=Trajectory,
        inputs=lambda draw, sizes: (draw.normal(*sizes), 0.6 * draw.shared_normal(sizes[1], sizes[1])),
        in_dims=(0, None),
        sizes=((6, 3), (3, 3), (4, 1), (2, 2)),
        hessian="banded",
        solvers=BANDED,
        notes="block tridiagonal: A couples the d entries of neighbouring rows",
    ),
    Case(
        name="steered",
        make_problem=Steered,
        inputs=lambda draw, sizes: (
            draw.normal(*sizes),
            0.6 * draw.normal(sizes[1], sizes[1]),
            draw.normal(sizes[1]),
            draw.normal(sizes[1]),
        ),
        sizes=((6, 3), (3, 3), (4, 1)),
        hessian="banded",
        solvers=DENSE_KKT,
    ),
    Case(
        name="group-variation",
        make_problem=GroupVariation,
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((5, 2), (3, 3), (4, 1)),
        hessian="banded",
        solvers=BANDED,
    ),
    Case(
        name="image",
        make_problem=Image,
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((5, 3), (4, 4), (3, 2)),
        hessian="banded",
        solvers=BANDED,
    ),
    Case(
        name="pendulum",
        make_problem=Pendulum,
        inputs=lambda draw, sizes: (draw.normal(*sizes, 2), draw.positive(), draw.normal(2)),
        sizes=((6,), (3,), (2,)),
        hessian="banded",
        solvers=DENSE_KKT,
        notes="single columns of u: offsets inside the blocks",
    ),
    Case(
        name="pairs",
        make_problem=Pairs,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.normal(sizes[0] // 2)),
        sizes=((8,), (4,), (2,)),
        hessian="banded",
        solvers=BANDED,
        notes="every second entry",
    ),
    Case(
        name="arc-length",
        make_problem=ArcLength,
        inputs=_bent,
        sizes=((7,), (4,), (3,)),
        hessian="banded",
        schur="dense",
        solvers=DENSE_KKT,
    ),
    Case(
        name="single-entries",
        make_problem=Ends,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.normal()),
        sizes=((5,), (2,), (1,)),
        hessian="diagonal",
        solvers=frozenset({"divide"}),
    ),
    Case(
        name="circle",
        make_problem=Circle,
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((6,), (4,), (3,)),
        hessian="sparse",
        notes="the last entry is a neighbour of the first: no band",
    ),
)

# K is regular and H is not: Eqn. 3 as printed does not exist, so that these are no rows of the table.
SINGULAR = (
    Case(
        name="held",
        make_problem=lambda: Held(seen=False),
        inputs=_held,
        sizes=((7,), (4,), (3,)),
        hessian="banded",
        solvers=DENSE_KKT,
        notes="differences do not see a constant: H + rho A'A in place of H",
    ),
    Case(
        name="held-and-seen",
        make_problem=lambda: Held(seen=True),
        inputs=_held,
        sizes=((7,), (4,)),
        hessian="banded",
        solvers=DENSE_KKT,
        notes="the weights are 0 here: H is singular, but not for all inputs",
    ),
)

"""Variables with several axes: rows coupled only within the row, columns likewise, and a coupling of
everything.
"""

import torch
from torch import Tensor

import implicitdiff as idf
from tests.cases.base import BLOCKS, KRONECKER, LOW_RANK, Case, Draw, Sizes


class Rows(idf.Problem):
    """minimise over U (k, s)  sum_i [log sum_j exp(U_ij) + U_i' Q U_i / 2 - X_i'U_i],  X (k, s), Q (s, s)."""

    def objective(self, u: Tensor, x: Tensor, Q: Tensor) -> Tensor:
        quadratic = 0.5 * ((u @ Q) * u).sum()
        return torch.logsumexp(u, dim=1).sum() + quadratic - torch.einsum("ij,ij->", x, u)

    def init(self, x: Tensor, Q: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Columns(idf.Problem):
    """minimise over U (k, s)  sum_j (sum_i w_i U_ij)^4 / 4 + |U - X|^2.

    X (k, s), w (k,): blocks are the columns.
    """

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return (w @ u).pow(4).sum() / 4 + ((u - x) ** 2).sum()

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(x)


class CubeSlices(idf.Problem):
    """minimise over U (k, s, t)  sum_j sqrt(1 + sum_ik (U_ijk - X_ijk)^2) + |U|^2 / 2.

    Blocks along the middle axis.
    """

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        distance = ((u - x) ** 2).sum((0, 2))
        return torch.sqrt(1 + distance).sum() + 0.5 * (u * u).sum()

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class FlatRows(idf.Problem):
    """Rows of a vector u of length k s, reshaped inside:  sum_i sqrt(1 + |U_i|^2) + |u - x|^2,  x (k s,)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        rows = u.reshape(self.k, -1)
        return torch.sqrt(1 + (rows**2).sum(1)).sum() + ((u - x) ** 2).sum()

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Frobenius(idf.Problem):
    """minimise over U (k, s)  sqrt(1 + |U|^2) + sum_a (tr V_a'U)^2 + |U - X|^2.

    V (a, k, s): everything coupled.
    """

    def objective(self, u: Tensor, x: Tensor, V: Tensor) -> Tensor:
        traces = torch.einsum("aij,ij->a", V, u)
        return torch.sqrt(1 + u.square().sum()) + traces.square().sum() + (u - x).square().sum()

    def init(self, x: Tensor, V: Tensor) -> Tensor:
        return torch.zeros_like(x)


class SeveralOutputs(idf.Problem):
    """minimise over U (d, k)  |X U - Y|^2 / 2 + ridge |U|^2 / 2,  X (n, d), Y (n, k): (X'X + ridge I) x I."""

    def __init__(self) -> None:
        super().__init__()
        self.ridge = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def objective(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return ((x @ u - y) ** 2).sum() / 2 + self.ridge * (u * u).sum() / 2

    def init(self, x: Tensor, y: Tensor) -> Tensor:
        return x.mT @ y


class SeveralOutputsSummed(SeveralOutputs):
    """The same with the columns of U summing to c (k,)."""

    def objective(self, u: Tensor, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return super().objective(u, x, y)

    def equality(self, u: Tensor, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return u.sum(0) - c

    def init(self, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return x.mT @ y


class TwoSided(idf.Problem):
    """minimise over U (d, k)  |X U Z - Y|^2,  X (n, d), Z (k, l), Y (n, l), n >= d, l >= k: H = 2 X'X x Z Z'."""

    def objective(self, u: Tensor, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        return ((x @ u @ z - y) ** 2).sum()

    def init(self, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        return x.mT @ y @ z.mT


def _rows(draw: Draw, sizes: Sizes) -> tuple[Tensor, ...]:
    k, s = sizes
    return draw.normal(k, s), 0.2 * draw.normal(s, s) + 1.5 * torch.eye(s, dtype=draw.dtype)


CASES = (
    Case(
        name="rows",
        make_problem=Rows,
        inputs=_rows,
        sizes=((4, 3), (3, 3), (1, 3), (4, 1), (1, 1)),
        hessian="block-diagonal",
        solvers=BLOCKS,
    ),
    Case(
        name="columns",
        make_problem=Columns,
        inputs=lambda draw, sizes: (draw.normal(*sizes), draw.normal(sizes[0])),
        sizes=((3, 4), (3, 3), (1, 3), (3, 1), (1, 1)),
        hessian="block-diagonal",
        solvers=BLOCKS,
        notes="the blocks do not lie next to each other in memory",
    ),
    Case(
        name="cube-slices",
        make_problem=CubeSlices,
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((2, 3, 4), (3, 3, 3), (2, 1, 3)),
        hessian="block-diagonal",
        solvers=BLOCKS,
    ),
    Case(
        name="flat-rows",
        make_problem=lambda: FlatRows(3),
        inputs=lambda draw, sizes: (draw.normal(*sizes),),
        sizes=((12,), (9,), (3,)),
        hessian="block-diagonal",
        solvers=BLOCKS,
        notes="the variable is a vector; the axes appear by reshape",
    ),
    Case(
        name="several-outputs",
        make_problem=SeveralOutputs,
        inputs=lambda draw, sizes: (draw.normal(*sizes[:2]), draw.normal(sizes[0], sizes[2])),
        sizes=((5, 3, 4), (3, 3, 3), (2, 3, 1), (1, 1, 2)),
        hessian="kronecker",
        solvers=KRONECKER,
    ),
    Case(
        name="several-outputs-summed",
        make_problem=SeveralOutputsSummed,
        inputs=lambda draw, sizes: (
            draw.normal(*sizes[:2]),
            draw.normal(sizes[0], sizes[2]),
            draw.normal(sizes[2]),
        ),
        sizes=((5, 3, 4), (3, 3, 3), (2, 3, 1)),
        hessian="kronecker",
        solvers=frozenset({"schur"}),
    ),
    Case(
        name="two-sided",
        make_problem=TwoSided,
        inputs=lambda draw, sizes: (
            draw.normal(sizes[0], sizes[1]),
            draw.normal(sizes[2], sizes[3]),
            draw.normal(sizes[0], sizes[3]),
        ),
        sizes=((5, 3, 2, 4), (4, 3, 3, 4), (2, 1, 2, 3)),
        hessian="kronecker",
        solvers=KRONECKER,
    ),
    Case(
        name="frobenius",
        make_problem=Frobenius,
        inputs=lambda draw, sizes: (draw.normal(*sizes[1:]), 0.5 * draw.normal(*sizes)),
        sizes=((2, 4, 3), (3, 3, 3), (1, 2, 1)),
        hessian="low-rank-plus-diagonal",
        solvers=LOW_RANK,
        notes="two low-rank terms, of rank 1 and a",
    ),
)

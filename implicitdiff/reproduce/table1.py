"""Table 1 of the paper: kappa_1 and kappa_2 of each penalty, derived from rho by the framework, against closed forms.

In: settings. Out: findings. One point x at distance z from u: the derived Hessian is then kappa_1 I + kappa_2 d d' with
d = u - x, and both numbers are read off the structured operator. Next: `table1_plot.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.problems import RobustPooling
from implicitdiff.reproduce.base import Advance, Claim, Experiment, Findings, Settings, Table
from implicitdiff.torch_private import HOST

ALPHA = 1.5
M = 3
TOLERANCE = 1e-14
Form = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Closed:
    """The paper's row of a penalty: kappa_1 and kappa_2 as functions of z and alpha, and how they are printed."""

    kappa1: Form
    kappa2: Form
    text1: str
    text2: str


def _zero(z: Tensor, alpha: float) -> Tensor:
    return torch.zeros_like(z)


CLOSED: dict[str, Closed] = {
    "quadratic": Closed(lambda z, a: torch.ones_like(z), _zero, "1", "0"),
    "pseudo-huber": Closed(
        lambda z, a: (1 + (z / a) ** 2) ** -0.5,
        lambda z, a: -1 / a**2 * (1 + (z / a) ** 2) ** -1.5,
        "(1 + (z/α)²)^(-1/2)",
        "-1/α² (1 + (z/α)²)^(-3/2)",
    ),
    "huber": Closed(
        lambda z, a: torch.where(z <= a, 1, a / z),
        lambda z, a: torch.where(z <= a, 0, -a / z**3),
        "1 for z ≤ α, else α/z",
        "0 for z ≤ α, else -α/z³",
    ),
    "welsch": Closed(
        lambda z, a: torch.exp(-(z**2) / (2 * a**2)) / a**2,
        lambda z, a: -torch.exp(-(z**2) / (2 * a**2)) / a**4,
        "1/α² exp(-z²/(2α²))",
        "-1/α⁴ exp(-z²/(2α²))",
    ),
    "truncated-quadratic": Closed(lambda z, a: (z <= a).to(z.dtype), _zero, "1 for z ≤ α, else 0", "0"),
}


@dataclass(frozen=True)
class Row:
    """A penalty: the kind that was proved, the largest relative differences, the derivation in symbols."""

    penalty: str
    kind: str
    paper_kappa1: str
    paper_kappa2: str
    difference1: float
    difference2: float
    derivation: str


@dataclass(frozen=True)
class Point:
    """Both numbers at one distance, derived and closed."""

    penalty: str
    z: float
    kappa1: float
    kappa2: float
    closed1: float
    closed2: float


def run(settings: Settings, advance: Advance) -> Findings:
    """Derive both numbers for all penalties at many distances."""
    count = 6 if settings.quick else 40
    # Between the points, never at them, lies alpha, where two penalties have no second derivative.
    z = torch.linspace(0.03, 4.0, count, dtype=torch.float64, device=HOST) * ALPHA
    rows, points = [], []
    for done, (penalty, closed) in enumerate(CLOSED.items()):
        advance(done, len(CLOSED), penalty)
        problem = RobustPooling(penalty, ALPHA).double()
        found = [derived(problem, float(distance)) for distance in z]
        pairs = zip(z, found, closed.kappa1(z, ALPHA), closed.kappa2(z, ALPHA), strict=True)
        points += [Point(penalty, float(d), *kappas, float(one), float(two)) for d, kappas, one, two in pairs]
        rows.append(_row(penalty, closed, problem, [p for p in points if p.penalty == penalty]))
    table = Table("table1", "kappa_1 and kappa_2 from H = D_uu f, against the paper's closed forms", tuple(rows),
                  ("penalty", "κ₁ in the paper", "κ₂ in the paper", "diff. κ₁", "diff. κ₂"), _cells,
                  ("diff. κ₁", "diff. κ₂"))  # fmt: skip
    derivations = Table("table1-derivations", "H as it was derived, for one point x", tuple(rows),
                        ("penalty", "derived"), lambda row: (row.penalty, row.derivation))  # fmt: skip
    values = Table("table1-points", "Values", tuple(points), ("penalty", "z", "κ₁", "κ₂"),
                   lambda p: (p.penalty, f"{p.z:.4g}", f"{p.kappa1:.6g}", f"{p.kappa2:.6g}"),
                   printed=False)  # fmt: skip
    worst = max(max(row.difference1, row.difference2) for row in rows)
    claim = Claim(
        "kappa_1 and kappa_2 follow from rho alone, by the framework",
        worst <= TOLERANCE,
        f"largest relative difference {worst:.1e} over {count} distances up to 4 alpha, in float64; the line is "
        f"{TOLERANCE:.0e}",
    )
    about = (
        f"For one point x in R^{M} at the distance z the Hessian is κ₁ I + κ₂ (u - x)(u - x)'. The framework knows the "
        "penalty only as rho(z²); both numbers are read off the operator that its backward pass would solve with. "
        f"α = {ALPHA:g}."
    )
    figures = (("table1", partial(_draw, points)),)
    return Findings("Table 1: penalties", about, (table, derivations, values), (claim,), figures)


def derived(problem: RobustPooling, z: float) -> tuple[float, float]:
    """(kappa_1, kappa_2) read off the derived operator, with x at the distance z from u = 0 in a fixed direction."""
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64, device=HOST) / 3
    u = torch.zeros(M, dtype=torch.float64, device=HOST)
    found: Any = idf.derivatives(problem, u, -z * direction[:, None]).structured.hessian
    if isinstance(found, idf.operators.ScaledIdentity):
        return float(found.scale[0]), 0.0
    if not isinstance(found, idf.operators.LowRankPlusDiagonal) or found.rank != 1:
        raise idf.StructureError(
            f"expected a multiple of the identity plus one outer product, found {found.kind}"
        )
    left, right = found.left[0, :, 0], found.right_factor[0, :, 0]
    return float(found.diagonal[0, 0]), float(found.weights[0, 0] * (left @ right)) / z**2


def _row(penalty: str, closed: Closed, problem: RobustPooling, points: Sequence[Point]) -> Row:
    found = idf.explain(problem, torch.zeros(1, M, 1, dtype=torch.float64, device=HOST))
    return Row(
        penalty,
        found.hessian.kind,
        closed.text1,
        closed.text2,
        max(_relative(p.kappa1, p.closed1) for p in points),
        max(_relative(p.kappa2, p.closed2) for p in points),
        "; ".join(found.derivation),
    )


def _relative(found: float, right: float) -> float:
    return abs(found - right) / abs(right) if right else abs(found)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.penalty,
        row.paper_kappa1,
        row.paper_kappa2,
        f"{row.difference1:.0e}",
        f"{row.difference2:.0e}",
    )


def _draw(points: Sequence[Point]) -> Any:
    from implicitdiff.reproduce.table1_plot import draw

    return draw(points, ALPHA)


EXPERIMENT = Experiment("table1", "Table 1: kappa_1 and kappa_2, derived from the penalties", run)

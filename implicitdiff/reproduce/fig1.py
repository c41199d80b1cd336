"""Fig. 1 of the paper: time and memory of both passes of robust pooling against n, for the five penalties, m = 128.

In: settings. Out: findings. The backward pass is the derived one, beside it the paper's own (Fig. 2) and the
approximation of H by its diagonal. Next: `fig1_plot.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics.meter import format_bytes
from implicitdiff.diagnostics.tables import number, seconds
from implicitdiff.problems import PENALTIES, RobustPooling
from implicitdiff.reproduce.base import Advance, Claim, Experiment, Findings, Settings, Table, machine
from implicitdiff.reproduce.measuring import Method, cosine_and_norm, costs, one_quiet_thread
from implicitdiff.torch_private import HOST

WIDTH = 1.06
"""alpha over sqrt(m), the distance of most points: both branches of the penalties that have two are in use."""
OUTLIERS = 0.1
"""Of the points, three times as far out as the others."""
COMPARABLE = 3.0
"""Two peaks are comparable if neither is more than this many times the other."""
METHODS = ("ours", "Fig. 2", "diagonal of H")


@dataclass(frozen=True)
class Row:
    """One method for one penalty at one size: seconds with quartiles, bytes, and how close its gradient is.

    `cosine` and `norm` compare with the formula in float64: cosine of the angle, length over the exact length.
    """

    penalty: str
    m: int
    n: int
    method: str
    forward: float
    forward_low: float
    forward_high: float
    backward: float
    backward_low: float
    backward_high: float
    forward_peak: int
    backward_peak: int
    cosine: float
    norm: float


def run(settings: Settings, advance: Advance) -> Findings:
    """Measure all penalties at all sizes."""
    m, sides = (16, (3, 5)) if settings.quick else (128, (4, 8, 16, 32, 64, 128))
    cells = [(name, side * side) for side in sides for name in PENALTIES]
    rows: list[Row] = []
    with one_quiet_thread(settings.cpu_clock):
        for done, (penalty, n) in enumerate(cells):
            advance(done, len(cells), f"{penalty}, n = {n}")
            rows += _measured(penalty, m, n, settings.rounds)
    ours = tuple(row for row in rows if row.method == "ours")
    about = (
        f"One set of n normal points in R^{m}, a tenth of them three times as far out, alpha = "
        f"{WIDTH * math.sqrt(m):.3g}, float32, {machine(settings)}. Forward: the problem's own solver (a closed form "
        "for the quadratic penalty, several starts for the last two), where the paper has L-BFGS. Backward: derived "
        "from the objective; Fig. 2 is the paper's code. Memory: bytes alive at the peak, inputs included."
    )
    table = Table(
        "fig1",
        "Derived backward pass; the last two columns: over that of the paper's Fig. 2",
        ours,
        ("penalty", "n", "forward", "backward", "memory", "(back)", "time", "peak"),
        partial(_cells, rows),
        ("n", "forward", "backward", "memory", "(back)", "time", "peak"),
    )
    everything = Table("fig1-all", "All methods", tuple(rows), ("penalty", "n", "method", "backward", "cosine", "norm"),
                       _all_cells, ("n", "backward", "cosine", "norm"), printed=False)  # fmt: skip
    return Findings(
        "Fig. 1: robust vector pooling",
        about,
        (table, everything),
        tuple(_claims(rows)),
        (("fig1", partial(_draw, rows)),),
    )


def _draw(rows: Sequence[Row]) -> Any:
    from implicitdiff.reproduce.fig1_plot import draw

    return draw(rows)


def _measured(penalty: str, m: int, n: int, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, m, n, generator=generator, device=HOST)
    x[:, :, : max(1, round(OUTLIERS * n))] *= 3
    x.requires_grad_()
    v = torch.randn(1, m, generator=generator, device=HOST)
    problem = RobustPooling(penalty, WIDTH * math.sqrt(m))
    layer = idf.DeclarativeLayer(problem, on_failure="warn")

    def solved() -> Tensor:
        with torch.no_grad():
            return layer(x)

    # Fig. 2 and the approximation start from the same solution as ours; only their backward passes are their own.
    methods = [
        Method("ours", lambda: layer(x), lambda u: torch.autograd.grad(u, x, v, retain_graph=True), (x, v)),
        Method("Fig. 2", solved, lambda u: (_plain(problem, u, v, x.detach()),), (x, v)),
        Method("diagonal of H", solved, lambda u: (diagonal(problem, u, v, x.detach()),), (x, v)),
    ]
    priced, gradients = costs(methods, rounds)
    exact = _plain(problem, solved().double(), v.double(), x.detach().double())
    found = []
    for method in METHODS:
        cost = priced[method]
        near = cosine_and_norm(gradients[method][0], exact)
        found.append(
            Row(penalty, m, n, method, cost.forward, cost.forward_low, cost.forward_high, cost.backward,
                cost.backward_low, cost.backward_high, cost.forward_peak, cost.backward_peak, *near)
        )  # fmt: skip
    return found


def _plain(problem: RobustPooling, u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    found = problem.vjp(u, v, x)
    assert isinstance(found, Tensor)  # alpha is no input here
    return found


def diagonal(problem: RobustPooling, u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Fig. 2 with H replaced by its diagonal, as in Fernando and Gould (2016): no m x m matrix, no factorisation."""
    from implicitdiff.problems.penalties import slopes

    assert problem.alpha is not None
    difference = u[:, :, None] - x
    first, second = slopes(problem.rho, difference.square().sum(1), problem.alpha.to(x.dtype))
    kappa1, kappa2 = 2 * first, 4 * second
    w = v / (kappa1.sum(1, keepdim=True) + (kappa2[:, None] * difference.square()).sum(2))
    along = (w[:, None] @ difference)[:, 0] * kappa2
    return kappa1[:, None] * w[:, :, None] + along[:, None] * difference


def _cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    hand = next(r for r in rows if (r.penalty, r.n, r.method) == (row.penalty, row.n, "Fig. 2"))
    return (
        row.penalty,
        str(row.n),
        seconds(row.forward),
        seconds(row.backward),
        format_bytes(row.forward_peak),
        format_bytes(row.backward_peak),
        number(row.backward / hand.backward),
        number(row.backward_peak / hand.backward_peak),
    )


def _all_cells(row: Row) -> tuple[str, ...]:
    return (
        row.penalty,
        str(row.n),
        row.method,
        seconds(row.backward),
        f"{row.cosine:.6f}",
        f"{row.norm:.4f}",
    )


def _peak_ratios(rows: Sequence[Row], method: str) -> dict[tuple[str, int], float]:
    return {(r.penalty, r.n): r.backward_peak / r.forward_peak for r in rows if r.method == method}


def _claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    ratios = _peak_ratios(rows, "Fig. 2")
    sizes = {n for _, n in ratios}
    large = {n for n in sizes if n >= rows[0].m} or sizes
    large_ratios = [ratio for (_, n), ratio in ratios.items() if n in large]
    found.append(
        Claim(
            "Memory for the forward and backward passes is comparable (Fig. 2)",
            all(1 / COMPARABLE <= ratio <= COMPARABLE for ratio in large_ratios),
            f"backward over forward {number(min(large_ratios))} to {number(max(large_ratios))} from n = {min(large)} "
            f"on; comparable means within a factor of {COMPARABLE:g}; for fewer points than channels H alone is larger "
            f"than the data: up to {number(max(ratios.values()))}",
        )
    )
    ratios = _peak_ratios(rows, "ours")
    found.append(
        Claim(
            "The derived backward pass needs no more memory than the forward pass",
            max(ratios.values()) <= 1,
            f"backward over forward {number(min(ratios.values()))} to {number(max(ratios.values()))}",
        )
    )
    last = max(row.n for row in rows)
    flat = [r for r in rows if r.n == last and r.method == "Fig. 2"]
    cheap = [r.backward for r in flat if r.penalty in ("quadratic", "truncated-quadratic")]
    full = [r.backward for r in flat if r.penalty not in ("quadratic", "truncated-quadratic")]
    found.append(
        Claim(
            "Penalties with kappa_2 = 0 avoid the computation of H entirely (Fig. 2)",
            max(cheap) < min(full),
            f"at n = {last}: {seconds(min(cheap))} to {seconds(max(cheap))} against {seconds(min(full))} to "
            f"{seconds(max(full))}",
        )
    )
    rough = [r for r in rows if r.method == "diagonal of H"]
    least = min(rough, key=lambda r: r.cosine)
    found.append(
        Claim(
            "The diagonal of the Hessian makes a usable approximation (Fernando and Gould 2016, cited)",
            least.cosine > 0.95,
            f"least cosine {least.cosine:.4f} ({least.penalty}, n = {least.n}), lengths "
            f"{number(min(r.norm for r in rough))} to {number(max(r.norm for r in rough))}; usable means a cosine "
            "above 0.95",
        )
    )
    return found


EXPERIMENT = Experiment("fig1", "Fig. 1: time and memory of robust pooling", run)

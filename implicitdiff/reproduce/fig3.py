"""Fig. 3 of the paper: time and memory of optimal transport, forward and backward, against the size and the iterations.

In: settings. Out: findings, for the seven methods of `transport_methods.py`, and how close the two approximations are.
Next: `fig3_plot.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.meter import format_bytes
from implicitdiff.diagnostics.tables import number, seconds
from implicitdiff.problems import OptimalTransport
from implicitdiff.reproduce.base import Advance, Claim, Experiment, Findings, Settings, Table, machine
from implicitdiff.reproduce.fig3_claims import claims
from implicitdiff.reproduce.measuring import cosine_and_norm, costs, one_quiet_thread
from implicitdiff.reproduce.transport_methods import (
    NAMES,
    approximate,
    diagonal_schur,
    methods,
)
from implicitdiff.torch_private import HOST

GAMMA = 10.0
ITERATIONS = 10
"""Sinkhorn iterations where the size changes."""
CONVERGED = 1e-4
"""Iterations are counted until the marginals are violated by at most this share of the largest one."""


@dataclass(frozen=True)
class Row:
    """One method at one size and one number of iterations: seconds with quartiles, bytes at the peak with inputs."""

    swept: str
    method: str
    n: int
    iterations: int
    forward: float
    forward_low: float
    forward_high: float
    backward: float
    backward_low: float
    backward_high: float
    forward_peak: int
    backward_peak: int

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    @property
    def peak(self) -> int:
        """Of both passes."""
        return max(self.forward_peak, self.backward_peak)


@dataclass(frozen=True)
class Closeness:
    """How close an approximate gradient for M is to the exact one, and how many iterations the plan needs."""

    method: str
    loss: str
    gamma: float
    iterations: int
    cosine: float
    norm: float


def run(settings: Settings, advance: Advance) -> Findings:
    """Measure over sizes, then over iterations, then the approximations over gamma."""
    sizes = (10, 20) if settings.quick else (25, 50, 100, 200, 300, 500, 750, 1000)
    fixed = 20 if settings.quick else 500
    counts = (1, 3, 6) if settings.quick else (1, 2, 3, 4, 5, 6, 8, 10, 20, 50)
    gammas = (1.0, 20.0) if settings.quick else (1.0, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0)
    cells = [("n", n, ITERATIONS) for n in sizes] + [("iterations", fixed, k) for k in counts]
    steps = len(cells) + len(gammas)
    rows: list[Row] = []
    near: list[Closeness] = []
    with one_quiet_thread(settings.cpu_clock):
        for done, (swept, n, iterations) in enumerate(cells):
            advance(done, steps, f"{n} x {n}, {iterations} iterations")
            rows += _measured(swept, n, iterations, settings.rounds)
        for done, gamma in enumerate(gammas):
            advance(len(cells) + done, steps, f"gamma = {gamma:g}")
            near += _closeness(20 if settings.quick else 200, gamma)
    about = (
        f"Costs uniform in [0, 1], uneven marginals, gamma = {GAMMA:g}, batch 1, float32, {machine(settings)}; "
        f"{ITERATIONS} Sinkhorn iterations where the size changes, {fixed} x {fixed} where their number does; "
        "gradients for M, r and c. Unrolled: autograd through the iterations; in scaling form it saves vectors only. H "
        "is diagonal here, so the approximation by a diagonal is that of S = A H^-1 A'. Memory: bytes alive at the "
        "peak, inputs included."
    )
    tables = (
        _table("fig3-size", f"Against the size, {ITERATIONS} iterations", rows, "n"),
        _table("fig3-iterations", f"Against the iterations, {fixed} x {fixed}", rows, "iterations"),
        Table("fig3-approximations", "Gradient for M over the exact one", tuple(near),
              ("method", "loss", "gamma", "iterations", "cosine", "length"), _near_cells,
              ("gamma", "iterations", "cosine", "length")),
    )  # fmt: skip
    figures: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("fig3", partial(_draw, "costs", rows, "both passes")),
        ("fig3-backward", partial(_draw, "costs", rows, "backward")),
        ("fig3-approximations", partial(_draw, "closeness", near)),
    )
    return Findings("Fig. 3: optimal transport", about, tables, tuple(_claims(rows, near)), figures)


def _draw(function: str, *arguments: Any) -> Any:
    from implicitdiff.reproduce import fig3_plot

    return getattr(fig3_plot, function)(*arguments)


def _claims(rows: Sequence[Row], near: Sequence[Closeness]) -> list[Claim]:
    return claims(rows, near)


def problem(
    n: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(M, r, c, v) of size n by n."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device=HOST)

    M, r, c = uniform(1, n, n), uniform(1, n) + 0.5, uniform(1, n) + 0.5
    v = torch.randn(1, n, n, generator=generator, dtype=torch.float64, device=HOST)
    return M.to(dtype), (r / r.sum()).to(dtype), (c / c.sum()).to(dtype), v.to(dtype)


def _measured(swept: str, n: int, iterations: int, rounds: int) -> list[Row]:
    priced, _ = costs(methods(*problem(n), GAMMA, iterations), rounds)
    found = []
    for name in NAMES:
        cost = priced[name]
        found.append(
            Row(swept, name, n, iterations, cost.forward, cost.forward_low, cost.forward_high, cost.backward,
                cost.backward_low, cost.backward_high, cost.forward_peak, cost.backward_peak)
        )  # fmt: skip
    return found


def _closeness(n: int, gamma: float) -> list[Closeness]:
    """Both approximations in float64 at the converged plan, for two losses: one random, one the transport cost."""
    M, r, c, v = problem(n, dtype=torch.float64)
    iterations = _needed(M, r, c, gamma)
    transport = OptimalTransport(gamma).double()
    solved = transport.solve(M, r, c)
    found = []
    for loss, cotangent in (("random", v), ("cost <M, P>", M)):
        exact = transport.vjp(solved.u, cotangent, M, r, c)
        assert isinstance(exact, tuple)
        assert exact[0] is not None
        for name, formula in (("approximate", approximate), ("diagonal of S", diagonal_schur)):
            grad = formula(solved.u, cotangent, r, c, gamma)[0]
            found.append(Closeness(name, loss, gamma, iterations, *cosine_and_norm(grad, exact[0])))
    return found


def _needed(M: Tensor, r: Tensor, c: Tensor, gamma: float, most: int = 2000) -> int:
    """Sinkhorn iterations until the row sums are right to CONVERGED of the largest one (the column sums always are)."""
    K, column = torch.exp(-gamma * M), torch.ones_like(c)
    for done in range(1, most + 1):
        row = r / (K @ column[:, :, None])[:, :, 0]
        column = c / (row[:, None] @ K)[:, 0]
        sums = row * (K @ column[:, :, None])[:, :, 0]
        if float((sums - r).abs().max() / r.max()) <= CONVERGED:
            return done
    return most


def _table(name: str, title: str, rows: Sequence[Row], swept: str) -> Table:
    mine = tuple(row for row in rows if row.swept == swept)
    header = (swept, "method", "forward", "backward", "both", "memory", "(back)")

    def cells(row: Row) -> tuple[str, ...]:
        return (
            str(getattr(row, swept)),
            row.method,
            seconds(row.forward),
            seconds(row.backward),
            seconds(row.seconds),
            format_bytes(row.forward_peak),
            format_bytes(row.backward_peak),
        )

    return Table(name, title, mine, header, cells, (swept, *header[2:]))


def _near_cells(row: Closeness) -> tuple[str, ...]:
    return (
        row.method,
        row.loss,
        f"{row.gamma:g}",
        str(row.iterations),
        f"{row.cosine:.4f}",
        number(row.norm, 3),
    )


EXPERIMENT = Experiment("fig3", "Fig. 3: time and memory of optimal transport", run)

"""Eqn. 3 of the seed paper factor by factor, with the matrices of one point: for lessons.

In: A, B, C and H, dense. Out: the factors with their values, and a text of them. Nothing of the layer uses this. Next:
`vjp.py`, whose `Derivatives` shows it, and `diagnostics/walkthrough.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHOWN = 8
"""Rows and columns of a matrix that are printed; 8 columns fit into 80 characters."""


@dataclass(frozen=True)
class Factor:
    """One factor: what it is, in the symbols of the paper, its value, and what there is to say about it."""

    formula: str
    value: Tensor
    remark: str = ""


@dataclass(frozen=True)
class Walk:
    """The factors in the order in which they are multiplied, and Dy (m, n), the last of them.

    Attributes:
        equation: The form of Eqn. 3 that was used.
        factors: All factors; the last one is Dy.
        left_over: The largest entry of A Dy + C, which vanishes where Dy keeps the constraints; None without them.
    """

    equation: str
    factors: tuple[Factor, ...]
    left_over: float | None

    @property
    def Dy(self) -> Tensor:
        """D_x y (m, n)."""
        return self.factors[-1].value


def walk(A: Tensor, B: Tensor, C: Tensor, H: Tensor) -> Walk:
    """Multiply Eqn. 3 out, as it stands where H is regular.

    Args:
        A: D_Y h (p, m); p = 0 without constraints.
        B: D_XY L (m, n).
        C: D_X h (p, n).
        H: D_YY L (m, m).

    Returns:
        Walk. If H is singular and p > 0, the KKT system that Eqn. 3 solves takes its place; if A has dependent rows,
        A H^-1 A' is singular and its pseudo-inverse is taken (gradients of least norm). Cost: O((m + p)^3).
    """
    regular = bool(_rank(H) == H.shape[0])
    if A.shape[0] == 0:
        remark = "" if regular else "H is singular: y is not locally unique, and the pseudo-inverse is taken"
        HB = _inverse(H) @ B
        return Walk("Dy(x) = -H^-1 B", (Factor("H^-1 B", HB, remark), Factor("Dy(x) = -H^-1 B", -HB)), None)
    if not regular:
        return _by_kkt(A, B, C, H)
    inverse = _inverse(H)
    HB, HA = inverse @ B, inverse @ A.mT
    S, right = A @ HA, A @ HB - C
    dependent = A.shape[0] - _rank(S)
    remark = (
        f"{dependent} dependent row{'s' * (dependent > 1)} in A: its pseudo-inverse is taken"
        if dependent
        else ""
    )
    inner = _inverse(S) @ right
    Dy = HA @ inner - HB
    factors = (
        Factor("H^-1 B", HB),
        Factor("H^-1 A'", HA),
        Factor("A H^-1 A'", S, remark),
        Factor("A H^-1 B - C", right),
        Factor("(A H^-1 A')^-1 (A H^-1 B - C)", inner, "that is Dλ(x)"),
        Factor("Dy(x) = H^-1 A' (A H^-1 A')^-1 (A H^-1 B - C) - H^-1 B", Dy),
    )
    equation = "Dy(x) = H^-1 A' (A H^-1 A')^-1 (A H^-1 B - C) - H^-1 B"
    return Walk(equation, factors, float((A @ Dy + C).abs().max()) if C.numel() else 0.0)


def _by_kkt(A: Tensor, B: Tensor, C: Tensor, H: Tensor) -> Walk:
    """[H -A'; -A 0] [Dy; Dλ] = [-B; C], the two equations that Eqn. 3 is the solution of."""
    m = H.shape[0]
    K = torch.cat([torch.cat([H, -A.mT], 1), torch.cat([-A, A.new_zeros(A.shape[0], A.shape[0])], 1)])
    right = torch.cat([-B, C])
    Dy = (_inverse(K) @ right)[:m]
    factors = (
        Factor("K = [H, -A'; -A, 0]", K, "H is singular, so Eqn. 3 cannot be multiplied out; K is not"),
        Factor("[-B; C]", right),
        Factor("Dy(x) = the first m rows of K^-1 [-B; C]", Dy),
    )
    return Walk(
        "[H, -A'; -A, 0] [Dy; Dλ] = [-B; C]", factors, float((A @ Dy + C).abs().max()) if C.numel() else 0.0
    )


def _rank(matrix: Tensor) -> int:
    return int(
        torch.linalg.matrix_rank(matrix.double(), rtol=_tolerance(matrix), hermitian=_is_symmetric(matrix))
    )


def _inverse(matrix: Tensor) -> Tensor:
    symmetric = _is_symmetric(matrix)
    return torch.linalg.pinv(matrix.double(), rtol=_tolerance(matrix), hermitian=symmetric).to(matrix.dtype)


def _is_symmetric(matrix: Tensor) -> bool:
    """Up to rounding; the Jacobian of a system of equations, which stands in the place of H, need not be."""
    return (
        bool((matrix - matrix.mT).abs().max() <= _tolerance(matrix) * matrix.abs().max())
        if matrix.numel()
        else True
    )


def _tolerance(matrix: Tensor) -> float:
    return 10 * max(matrix.shape[0], 1) * torch.finfo(matrix.dtype).eps


def shape(value: Tensor) -> str:
    """(3 x 4)."""
    return f"({' x '.join(str(size) for size in value.shape)})"


def matrix_text(value: Tensor, indent: int = 4) -> str:
    """The entries, at most SHOWN rows and columns of them; dots stand for the rest."""
    rows = value if value.dim() == 2 else value[None]
    if not rows.numel():
        return " " * indent + "(empty)"
    kept = [_line(row.tolist(), rows.shape[1]) for row in rows[:SHOWN]]
    if rows.shape[0] > SHOWN:
        kept.append("    ...")
    return "\n".join(" " * indent + line for line in kept)


def _line(entries: Sequence[float], columns: int) -> str:
    text = " ".join(f"{_entry(entry):>8}" for entry in entries[:SHOWN])
    return f"{text} ..." if columns > SHOWN else text


def _entry(entry: float) -> str:
    """At most eight characters."""
    text = f"{entry + 0.0:.4g}"  # -0 is 0
    return text if len(text) <= 8 else f"{entry:.1e}"

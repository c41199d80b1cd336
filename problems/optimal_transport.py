"""Entropic optimal transport, the paper's second case study: a plan between two marginals.

Declares the objective and all m + n marginals, solves it by `sinkhorn.py`, and keeps the paper's hand-written
backward pass (Fig. 4) as `vjp`, for comparison only. The automatic path derives the same from the
declaration.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from implicitdiff import Problem, Solution, Status
from implicitdiff.errors import InfeasibleError, InputError, SingularError

from .coefficients import name_samples, per_sample, register, require_positive, resolve
from .sinkhorn import Transport, transport


class Inputs(NamedTuple):
    """The inputs after M, told apart by their number; r and c are None if uniform, gamma if it is stored."""

    r: Tensor | None
    c: Tensor | None
    gamma: Tensor | None


class OptimalTransport(Problem):
    """minimise over P  sum M P + 1/gamma sum P (log P - log r c')   s.t.  P 1 = r,  P' 1 = c

    The inputs are M (m, n), M and gamma, M with r (m,) and c (n,), or all four: their number decides.
    Marginals left out (or None) are uniform with total 1. Nothing is normalised: r and c must be positive
    with equal totals. To let them follow a network, declare them as softmax(...) or r~ / sum(r~). A last
    input gamma () takes the place of the stored one.

    All m + n marginals are declared though one depends on the others; gradients for r and c are the
    representatives of least norm, defined up to a multiple of (1_m, -1_n). Entries of P that underflow are
    exactly 0.

    Cost per sample: O(m n) per sweep forward; backward a Schur complement of size min(m, n).
    Source: Gould et al., "Exploiting Problem Structure in Deep Declarative Networks", Problem 11, Eqns. 12 to
    27, Fig. 4.

    Args:
        gamma: The inverse strength of the entropy: a number or tensor (a buffer), an nn.Parameter, or None:
            then it must come as the last input.

    Raises:
        InputError: If gamma, r or c is not positive, or a shape is wrong.
        InfeasibleError: If the totals of r and c differ. Both name the samples.
    """

    gamma: Tensor | None

    def __init__(self, gamma: float | Tensor | None = 1.0) -> None:
        super().__init__()
        register(self, "gamma", gamma)

    def objective(self, u: Tensor, M: Tensor, *rest: Tensor) -> Tensor:
        """sum M P + 1/gamma sum P (log P - log r_i - log c_j), for P = u (m, n); P log P is 0 at P = 0."""
        r, c, gamma = _told_apart(M, rest, axes=2)
        log_r = -math.log(M.shape[0]) if r is None else r.log()[:, None]
        log_c = -math.log(M.shape[1]) if c is None else c.log()
        divergence = -torch.special.entr(u).sum() - (u * (log_r + log_c)).sum()
        return (M * u).sum() + divergence / resolve("gamma", self.gamma, gamma)

    def equality(self, u: Tensor, M: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """(P 1 - r, P' 1 - c), of shapes (m,) and (n,)."""
        r, c, _ = _told_apart(M, rest, axes=2)
        m, n = M.shape
        return u.sum(1) - (1 / m if r is None else r), u.sum(0) - (1 / n if c is None else c)

    def init(self, M: Tensor, *rest: Tensor) -> Tensor:
        """r c', the plan of gamma = 0 (m, n)."""
        r, c, _ = _told_apart(M, rest, axes=2)
        r, c = _marginals(M[None], r, c)
        return (r[..., :, None] * c[..., None, :]).reshape(M.shape)

    def solve(self, M: Tensor, *rest: Tensor) -> Solution:
        """P (batch, m, n) with the multipliers of both marginals, (batch, m) and (batch, n), of least norm.

        From log P = row_i + column_j - gamma M_ij follows D_P f = lambda_i + lambda_j with
        gamma lambda_i = row_i - log r_i + const, and likewise for the columns.
        """
        given_r, given_c, given_gamma = _told_apart(M, rest, axes=3)
        gamma = per_sample("gamma", self.gamma, given_gamma, M)
        require_positive("gamma", gamma)
        r, c = _marginals(M, given_r, given_c)
        if M.shape[0] == 0:
            return Solution(M.new_zeros(M.shape), (r, c), status=M.new_zeros(0, dtype=torch.int8))
        _require_masses(r, c)
        found = transport(gamma[..., None, None] * M, r, c)
        rows = (found.row - r.log() + 1) / gamma[..., None]
        columns = (found.column - c.log()) / gamma[..., None]
        shift = ((columns.sum(1) - rows.sum(1)) / (r.shape[1] + c.shape[1]))[:, None]
        return Solution(found.plan, (rows + shift, columns - shift), status=_status(found))

    def vjp(self, u: Tensor, v: Tensor, M: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """The paper's Fig. 4: the first marginal dropped, the Schur complement inverted by blocks.

        Args:
            u: P (batch, m, n).
            v: Its cotangent (batch, m, n).
            M: The costs (batch, m, n).
            rest: r, c, gamma, as far as they are inputs, batch axis first.

        Returns:
            One gradient per input; a tensor for M alone. The first entry of the one for r is 0. The paper has
            no gradient for gamma: None is returned in its place. Cost: O((m - 1)^2 n + (m - 1)^3), seven
            arrays of m n.

        Raises:
            SingularError: If the Schur complement is not positive definite; it names the samples.
        """
        given_r, given_c, given_gamma = _told_apart(M, rest, axes=3)
        gamma = per_sample("gamma", self.gamma, given_gamma, M)[..., None]
        r, c = _marginals(M, given_r, given_c)
        by_name = dict(zip(("M", "r", "c"), _hand_written(u, v, r, c, gamma), strict=True))
        names = {1: "M", 2: "M gamma", 3: "M r c", 4: "M r c gamma"}[1 + len(rest)].split()
        gradients = tuple(by_name.get(name) for name in names)
        return gradients if rest else by_name["M"]

    def example(self, batch: int = 3, m: int = 4, n: int = 6) -> tuple[Tensor, ...]:
        """Cost matrices of m by n with uneven marginals; gamma too if it is an input."""
        generator = torch.Generator().manual_seed(0)
        home = generator.device
        M = torch.rand(batch, m, n, generator=generator, device=home)
        r = torch.randn(batch, m, generator=generator, device=home).softmax(1)
        c = torch.randn(batch, n, generator=generator, device=home).softmax(1)
        if self.gamma is not None:
            return M, r, c
        return M, r, c, 1 + 9 * torch.rand(batch, generator=generator, device=home)


def _told_apart(M: Tensor, rest: tuple[Tensor, ...], axes: int) -> Inputs:
    """The inputs by name, with their ranks and sizes checked; `axes` is the rank of M, 3 with a batch axis.

    Raises:
        InputError: If there are more than four, or a shape does not fit M.
    """
    if len(rest) > 3:
        raise InputError(f"expected M; M, gamma; M, r, c; or M, r, c, gamma; got {1 + len(rest)} inputs")
    r, c = rest[:2] if len(rest) > 1 else (None, None)
    gamma = rest[-1] if len(rest) in (1, 3) else None
    if M.dim() != axes or 0 in M.shape[-2:]:
        wanted = "(m, n)" if axes == 2 else "(batch, m, n)"
        raise InputError(f"M must have shape {wanted} with m, n >= 1, not {tuple(M.shape)}")
    for name, marginal, size in (("r", r, M.shape[-2]), ("c", c, M.shape[-1])):
        wanted_shape = (*M.shape[:-2], size)
        if marginal is not None and marginal.shape != wanted_shape:
            raise InputError(
                f"{name} must have shape {wanted_shape} to fit M {tuple(M.shape)}, not "
                f"{tuple(marginal.shape)}; a marginal shared by the batch is declared by in_dims"
            )
    return Inputs(r, c, gamma)


def _marginals(M: Tensor, r: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """r (batch, m) and c (batch, n), uniform where they are None."""
    batch, m, n = M.shape
    uniform_r, uniform_c = M.new_full((batch, m), 1 / m), M.new_full((batch, n), 1 / n)
    return uniform_r if r is None else r, uniform_c if c is None else c


def _require_masses(r: Tensor, c: Tensor) -> None:
    for name, marginal in (("r", r), ("c", c)):
        wrong = ~((marginal > 0) & (marginal < math.inf)).all(1)
        if bool(wrong.any()):
            raise InputError(
                f"{name} has an entry that is not positive and finite{name_samples(wrong)}: "
                "remove points without mass, or declare the marginal as a softmax"
            )
    totals_r, totals_c = r.sum(1), c.sum(1)
    # A tenth of what the optimality check allows, so that a plan that passes it exists.
    allowed = 0.1 * torch.finfo(r.dtype).eps ** 0.5 * torch.maximum(r.amax(1), c.amax(1))
    unequal = (totals_r - totals_c).abs() > allowed
    if bool(unequal.any()):
        worst = int((totals_r - totals_c).abs().argmax())
        total_r, total_c = totals_r[worst].item(), totals_c[worst].item()
        raise InfeasibleError(
            f"the totals of r and c differ{name_samples(unequal)} (sample {worst}: {total_r:.6g} and "
            f"{total_c:.6g}, difference {total_r - total_c:.1e}), so no plan has both marginals: "
            f"divide each by its sum, in {str(r.dtype).removeprefix('torch.')}"
        )


def _status(found: Transport) -> Tensor:
    """OK where the contract's rule holds, NOT_CONVERGED elsewhere; int8 (batch,)."""
    reached = found.residual <= torch.finfo(found.plan.dtype).eps ** 0.5
    return torch.where(reached, Status.OK, Status.NOT_CONVERGED).to(torch.int8)


def _hand_written(P: Tensor, v: Tensor, r: Tensor, c: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for M, r and c; gamma has shape (1,) or (batch, 1)."""
    grad_M = -gamma[..., None] * P * v
    along_r, along_c = grad_M[:, 1:].sum(2), grad_M.sum(1)
    ratio = P[:, 1:] / c[:, None]
    schur = torch.diag_embed(r[:, 1:]) - P[:, 1:] @ ratio.mT
    factor, failed = torch.linalg.cholesky_ex(schur)
    if bool(failed.any()):
        raise SingularError(
            f"the Schur complement of optimal transport is not positive definite{name_samples(failed > 0)}, "
            "so the paper's backward pass does not apply there: take a smaller gamma, or float64"
        )
    del schur
    block_12 = torch.cholesky_solve(ratio, factor)
    block_22 = torch.diag_embed(1 / c) + block_12.mT @ ratio
    v1 = (
        torch.cholesky_solve(along_r[:, :, None], factor)[:, :, 0] - (block_12 @ along_c[:, :, None])[:, :, 0]
    )
    v2 = (block_22 @ along_c[:, :, None])[:, :, 0] - (block_12.mT @ along_r[:, :, None])[:, :, 0]
    grad_M[:, 1:] -= v1[:, :, None] * P[:, 1:]
    grad_M -= v2[:, None] * P
    grad_r = torch.zeros_like(r)
    grad_r[:, 1:] = -v1 / gamma
    return grad_M, grad_r, -v2 / gamma

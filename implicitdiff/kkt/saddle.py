"""KKT systems solved with numbers: where the symbols of H and A end in one matrix each.

In: a factorisation of H, or H itself, and A as tensors. Out: objects with `solve` and `status`. The range-space formula
is `formula.range_space`, shared with the symbolic route. Next file: `structured/plan.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from implicitdiff import operators, solvers
from implicitdiff.derivatives.kkt import SymmetricKKT
from implicitdiff.kkt.formula import Steps, range_space
from implicitdiff.operators import LinearOperator
from implicitdiff.operators.block import NullVectors
from implicitdiff.solvers.base import Factorization, from_columns, to_columns
from implicitdiff.solvers.cholesky import CholeskyFactorization
from implicitdiff.status import Status, all_ok, is_all_ok


def matrix(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """The last `rows + columns` axes of `tensor` as one row and one column axis."""
    lead = tensor.shape[: tensor.dim() - rows - columns]
    split = tensor.dim() - columns
    m = tensor.shape[len(lead) : split].numel()
    return tensor.reshape(*lead, m, tensor.shape[split:].numel())


def with_diagonal(dense: Tensor, diagonal: Tensor) -> Tensor:
    """dense + diag(diagonal), as a copy: `dense` may be an input itself."""
    batch = max(dense.shape[0], diagonal.shape[0])
    out = dense.expand(batch, -1, -1).clone()
    out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


def grid(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Blocks (B or 1, ., .) joined to one matrix (B, ., .)."""
    batch = max(block.shape[0] for row in rows for block in row)
    return torch.cat([torch.cat([b.expand(batch, -1, -1) for b in row], dim=-1) for row in rows], dim=-2)


def bands(diagonals: Sequence[Tensor], chains: int, inside: int) -> Tensor:
    """(B, chains, width, places, s, s) from one tensor (B or 1, *chains, places, *rows, *columns) for each diagonal.

    `chains` and `inside` are the numbers of axes that number the chains, and the rows (and columns) inside a block.
    """
    shape = torch.broadcast_shapes(*(d.shape for d in diagonals))
    places = shape[1 + chains]
    size = shape[2 + chains : 2 + chains + inside].numel()
    flat = [
        d.expand(shape).reshape(shape[0], shape[1 : 1 + chains].numel(), places, size, size)
        for d in diagonals
    ]
    return torch.stack(flat, dim=2)


def merged(*status: Tensor) -> Tensor:
    """One verdict per sample from several: the first that is not OK."""
    batch = max(s.shape[0] for s in status)
    if all(map(is_all_ok, status)):
        return all_ok(batch, status[0].device)
    out = status[0].expand(batch)
    for other in status[1:]:
        out = torch.where(out == Status.OK, other.expand(batch), out)
    return out


def divided(batch_axis: int, *answers: Tensor) -> Tensor:
    """(B,) int8: SINGULAR where an answer that came by division alone is not finite, for answers (..., B, ...)."""
    batch = max(answer.shape[batch_axis] for answer in answers)
    status = all_ok(batch, answers[0].device)
    if all(math.isfinite(float(answer.sum())) for answer in answers):
        return status
    for answer in answers:  # a sum may overflow where no term does
        finite = answer.movedim(batch_axis, 0).isfinite().reshape(answer.shape[batch_axis], -1).all(1)
        status = torch.where(finite, status, int(Status.SINGULAR))
    return status


def vanished(value: Tensor, *terms: Tensor) -> Tensor:
    """(B,) int8: SINGULAR where an entry of `value` is nothing but rounding beside the terms that cancel in it."""
    size = terms[0].abs()
    for term in terms[1:]:
        size = torch.maximum(size, term.abs())
    gone = value.abs() <= 10 * torch.finfo(value.dtype).eps * size
    return torch.where(gone.reshape(gone.shape[0], -1).any(1), int(Status.SINGULAR), int(Status.OK)).to(
        torch.int8
    )


def largest(like: Tensor, *tensors: Tensor) -> Tensor:
    """max |finite entry| of each sample over several tensors (B or 1, ...), (B,)."""
    full = [tensor for tensor in tensors if tensor.numel()]
    if not full:
        return like.new_zeros(like.shape[:1])
    batch = like.shape[0]
    sizes = [t.abs().amax(tuple(range(1, t.dim()))) if t.dim() > 1 else t.abs() for t in full]
    sizes = [size if size.shape[0] == batch else size.expand(batch) for size in sizes]
    out = sizes[0] if len(sizes) == 1 else torch.stack(sizes).amax(0)
    if math.isfinite(float(out.sum())):
        return out
    out = like.new_zeros(
        like.shape[:1]
    )  # some entry is not finite, or the sum has overflowed: entry by entry
    for tensor in tensors:
        if tensor.numel():
            finite = torch.where(torch.isfinite(tensor), tensor.abs(), 0.0)
            out = torch.maximum(out, finite.reshape(tensor.shape[0], -1).amax(1))
    return out


def symmetric_part(a: Tensor, b: Tensor) -> Tensor:
    """(a + b) / 2 of a matrix and its transpose: the matrix itself where it is symmetric, which saves its copy.

    The comparison ends at the first entries that differ. Of shapes without data the ordinary case is counted.
    """
    if a.shape == b.shape and (a.is_meta or torch.equal(a, b)):
        return a
    return torch.lerp(a, b, 0.5)


BLOCK_BYTES = 2**19
"""Squares are made and summed in pieces of about this size, which stay in the cache."""


def square_sum(tensor: Tensor, dim: int) -> Tensor:
    """The sum of squares along `dim` (not the first axis), with no tensor of all squares.

    `vector_norm` along any axis but the last takes up to five times as long on a CPU, `einsum` nine times.
    """
    pieces = _pieces(tensor, dim)
    if pieces == 1:
        return tensor.square().sum(dim)
    parts = [part.square().sum(dim) for part in tensor.chunk(pieces, dim)]
    return _added(parts)


def squared_distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """The sum of (a - b)^2 along `dim` (not the first axis), a and b broadcast, with no tensor of all differences."""
    a, b = torch.broadcast_tensors(a, b)
    pieces = _pieces(a, dim)
    parts = [
        torch.nn.functional.mse_loss(p, q, reduction="none").sum(dim)
        for p, q in zip(a.chunk(pieces, dim), b.chunk(pieces, dim), strict=True)
    ]
    return _added(parts)


def _pieces(tensor: Tensor, dim: int) -> int:
    # at least 16 rows a piece, so that adding the pieces up costs little beside making them
    return max(1, min(tensor.shape[dim] // 16, tensor.numel() * tensor.element_size() // BLOCK_BYTES))


def _added(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def anchor_weight(curvature: Tensor, slope: Tensor) -> Tensor:
    """rho of H + rho A'A from max |H| and max |A| of each sample, (B,): both parts then count; 0 where A is 0."""
    return torch.where(slope > 0, curvature / slope.square(), 0.0)


class RangeSpace:
    """K solved through S = A H^-1 A' with H factored: S is formed densely from p solves.

    Where H = L L', S = G'G with G = L^-1 A': half the solves, and symmetric as it stands. The samples in which H is not
    positive definite are a `RangeSpace` of their own.

    Attributes:
        status: (B,) int8, of both factorisations.
    """

    def __init__(
        self,
        factor: Factorization,
        jacobian: Tensor,
        null_vectors: NullVectors | tuple[Tensor, ...] = (),
        corner: Tensor | None = None,
    ) -> None:
        """Factors S + D; `null_vectors` (p,) are the proved dependences between the rows of A, `corner` (B, p) is D."""
        self.factor, self.jacobian, self.corner = factor, jacobian, corner
        self.lower: Tensor | None = None
        own = factor if isinstance(factor, CholeskyFactorization) else None
        if own is None or null_vectors or corner is not None or len(own.lower) != len(jacobian):
            own = None
            inverse = factor.solve(jacobian.transpose(0, 1))
            schur = torch.einsum("bpm,qbm->bpq", jacobian.expand(inverse.shape[1], -1, -1), inverse)
            if corner is not None:
                schur = with_diagonal(schur, corner)
            schur = (schur + schur.mT) / 2
        else:
            self.lower = own.lower
            self.half = torch.linalg.solve_triangular(own.lower, jacobian.mT, upper=False)
            schur = self.half.mT @ self.half
        whole: LinearOperator = operators.Dense(schur, symmetric=True)
        if null_vectors:
            whole = operators.Block(((whole,),), (whole.size,), null_vectors=null_vectors)
        self.schur = solvers.Cholesky().factor(whole)
        self.status = merged(factor.status, self.schur.status)
        self.rest: tuple[Tensor, RangeSpace] | None = None
        if own is not None and own.rest is not None:
            samples, others = own.rest
            self.rest = samples, RangeSpace(others, jacobian[samples])
            self.status = self.status.index_copy(0, samples, self.rest[1].status)

    @property
    def definite(self) -> Tensor | None:
        """Where H was proved positive definite, (B,)."""
        return self.factor.definite

    def solve(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(w, s) with H w - A's = a and -A w = b, for a (..., B, m), b (..., B, p)."""
        w, s = self._solve(a, b)
        if self.rest is None:
            return w, s
        samples, rest = self.rest
        own_w, own_s = rest.solve(a[..., samples, :], b[..., samples, :])
        return w.index_copy(-2, samples, own_w), s.index_copy(-2, samples, own_s)

    def _solve(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.lower is not None and a.dim() == 2 and a.shape[0] == self.lower.shape[0]:
            # S s = -(b + G'd) with d = L^-1 a, then L'w = d + G s; rows on the left of a matrix are faster
            reduced = torch.linalg.solve_triangular(self.lower, a[:, :, None], upper=False).mT
            s = self.schur.solve(torch.baddbmm(b[:, None], reduced, self.half).neg_()[:, 0])
            reduced = torch.baddbmm(reduced, s[:, None], self.half.mT)
            return torch.linalg.solve_triangular(self.lower.mT, reduced.mT, upper=True)[:, :, 0], s
        steps = Steps(
            inverse=self.factor.solve,
            constrain=lambda x: (self.jacobian @ x[..., None])[..., 0],
            spread=lambda y: (y[..., None, :] @ self.jacobian)[..., 0, :],
            schur=self.schur.solve,
            add_x=torch.add,
            add_y=torch.add,
            negate=torch.neg,
            hold=lambda x: x,
        )
        return range_space(steps, a, b)


class FullKKT:
    """K = [[H, -A'], [-A, -D]] solved as one matrix: for singular H, and for constraints that depend by their values.

    Attributes:
        status: (B,) int8, known after the first `solve`.
    """

    def __init__(
        self, hessian: Tensor, jacobian: Tensor, *, ldl: bool = False, corner: Tensor | None = None
    ) -> None:
        """Forms K, which is factored at the first `solve`; `ldl` asks for LDL' (which finds no dependent constraints)
        instead of LU; `corner` (B, p) is D.
        """
        self.batch = max(hessian.shape[0], jacobian.shape[0])
        if corner is None:
            below = hessian.new_zeros(self.batch, jacobian.shape[-2], jacobian.shape[-2])
        else:
            self.batch = max(self.batch, corner.shape[0])
            below = torch.diag_embed(-corner)
        matrix = grid([[hessian, -jacobian.mT], [-jacobian, below]])
        self.size = hessian.shape[-1]
        self.status = torch.zeros(self.batch, dtype=torch.int8, device=hessian.device)
        self._dense = None if ldl else SymmetricKKT(matrix, self.size)
        self._matrix = matrix if ldl else None
        self._ldl: Factorization | None = None

    def solve(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(w, s) with H w - A's = a and -A w = b, of minimum norm where K is singular."""
        lead = a.shape[:-1]
        rhs = torch.cat([a, b.expand(*lead, -1)], dim=-1)
        if self._dense is not None:
            # a K that all samples share is factored once: the samples are further columns
            batch = rhs.shape[-2] if self.batch == 1 else self.batch
            rhs = rhs.expand(*lead[:-1], batch, rhs.shape[-1])
            found, self.status = self._dense.solve(to_columns(rhs, self.batch))
            return self._split(from_columns(found, rhs.shape))
        if self._matrix is not None:
            self._ldl = solvers.LDL().factor(operators.Dense(self._matrix, symmetric=True))
            self._matrix = None
        assert self._ldl is not None
        self.status = self._ldl.status
        return self._split(self._ldl.solve(rhs))

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        return out[..., : self.size], out[..., self.size :]


def beside(*tensors: Tensor) -> Tensor:
    """Tensors joined along the last axis, the leading axes broadcast."""
    first = tensors[0].shape[:-1]
    if all(t.shape[:-1] == first for t in tensors):
        return torch.cat(tensors, dim=-1)
    lead = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
    return torch.cat([t.expand(*lead, t.shape[-1]) for t in tensors], dim=-1)

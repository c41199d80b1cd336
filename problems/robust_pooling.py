"""Robust vector pooling, the paper's first case study: a robust estimate of the mean of n points in R^m.

Declares the objective through a penalty from `penalties.py`, solves it by `descent.py`, and keeps the paper's
hand-written backward pass (Fig. 2) as `vjp`, for comparison only. Next: `optimal_transport.py`.
"""

import torch
from torch import Tensor

from implicitdiff import Problem, Solution, Status
from implicitdiff.errors import InputError, SingularError

from .coefficients import name_samples, per_sample, register, require_positive, resolve
from .descent import Descent, descend
from .penalties import PENALTIES, Penalty, Rho, find_penalty, slopes

POINTS_TRIED = 32


class RobustPooling(Problem):
    """minimise over u  sum_j rho(|u - x_j|^2, alpha)

    The input x (m, n) is n points in R^m, the solution u (m,). A last input alpha (), one number per sample,
    takes the place of the stored one. The convex penalties have one minimum; for "welsch",
    "truncated-quadratic" and a function of your own the best of several starts is returned, a local minimum.

    Cost per sample: O(m n) per step forward; the Hessian is (sum_j kappa_1) I plus a term of rank n.
    Source: Gould et al., "Exploiting Problem Structure in Deep Declarative Networks", Eqns. 4 to 10, Table 1,
    Fig. 2.

    Args:
        penalty: "quadratic", "pseudo-huber", "huber", "welsch", "truncated-quadratic", or a function rho(s,
            alpha) of the squared residual s, entry by entry. If it is an nn.Module, its Parameters get
            gradients too.
        alpha: The width of the penalty: a number or tensor (a buffer), an nn.Parameter, or None: then it must
            come as the last input.

    Raises:
        OptionError: If the penalty is unknown.
        InputError: If alpha is not positive, here or in a call, or x has a wrong shape.
    """

    alpha: Tensor | None

    def __init__(self, penalty: str | Rho = "pseudo-huber", alpha: float | Tensor | None = 1.0) -> None:
        super().__init__()
        found = find_penalty(penalty)
        self.penalty = found.name
        self.convex, self.concave = found.convex, found.concave
        self.rho = found.rho
        register(self, "alpha", alpha)

    def objective(self, u: Tensor, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        """sum_j rho(|u - x_j|^2, alpha), for u (m,) and x (m, n)."""
        _check_points(x, 2)
        s = ((u[:, None] - x) ** 2).sum(0)
        return self.rho(s, resolve("alpha", self.alpha, alpha)).sum()

    def init(self, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        """The mean of the points (m,)."""
        _check_points(x, 2)
        return x.mean(1)

    def solve(self, x: Tensor, alpha: Tensor | None = None) -> Solution:
        """u (batch, m) for x (batch, m, n): the mean, or reweighted means followed by Newton steps.

        Non-convex penalties start from the mean, the coordinate-wise median and the best of 32 of the points,
        and follow the lowest descent of each sample to its end.
        """
        _check_points(x, 3)
        width = per_sample("alpha", self.alpha, alpha, x)
        require_positive("alpha", width)
        width = width[..., None]
        if self.rho is PENALTIES["quadratic"].rho:
            return Solution(x.mean(2), status=x.new_zeros(x.shape[0], dtype=torch.int8))
        if x.shape[0] == 0:
            return Solution(x.new_zeros(x.shape[:2]), status=x.new_zeros(0, dtype=torch.int8))
        starts = [x.mean(2)]
        if not self.convex:
            starts += [x.median(2).values, _best_point(self.rho, x, width)]
        known = Penalty(self.penalty, self.rho, self.convex, self.concave)
        found = descend(known, x, width, torch.stack(starts))
        return Solution(found.u, status=_status(found))

    def vjp(
        self, u: Tensor, v: Tensor, x: Tensor, alpha: Tensor | None = None
    ) -> Tensor | tuple[Tensor, None]:
        """The paper's Fig. 2: w = H^-1 v by one Cholesky, then kappa_1 w + kappa_2 (w'd) d for all points at
        once.

        Args:
            u: The solution (batch, m).
            v: Its cotangent (batch, m).
            x: (batch, m, n).
            alpha: (batch,) or None. The paper has no gradient for it: None is returned in its place.

        Returns:
            The gradient for x, (batch, m, n). Cost: O(m^2 n + m^3), four arrays of m n.

        Raises:
            SingularError: If H is not positive definite; it names the samples.
        """
        width = per_sample("alpha", self.alpha, alpha, x)[..., None]
        gradient = self._hand_written(u, v, x, width)
        return gradient if alpha is None else (gradient, None)

    def _hand_written(self, u: Tensor, v: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
        difference = u[:, :, None] - x
        first, second = slopes(self.rho, difference.square().sum(1), alpha)
        kappa1, kappa2 = 2 * first, 4 * second
        total = kappa1.sum(1)
        if not bool(kappa2.any()):
            _require_definite(total > 0)
            return kappa1[:, None] * (v / total[:, None])[:, :, None]
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        hessian = total[:, None, None] * identity + difference @ (kappa2[:, None] * difference).mT
        factor, failed = torch.linalg.cholesky_ex(hessian)
        _require_definite(failed == 0)
        w = torch.cholesky_solve(v[:, :, None], factor)
        along = (w.mT @ (kappa2[:, None] * difference))[:, 0]
        return kappa1[:, None] * w + along[:, None] * difference

    def example(self, batch: int = 3, m: int = 4, n: int = 9) -> tuple[Tensor, ...]:
        """Clouds of n points in R^m, two points of each far away; alpha too if it is an input."""
        generator = torch.Generator().manual_seed(0)
        home = generator.device
        x = torch.randn(batch, m, n, generator=generator, device=home)
        far = min(2, n)
        x[:, :, :far] += 3 * torch.randn(batch, m, far, generator=generator, device=home)
        return (
            (x,) if self.alpha is not None else (x, 1 + torch.rand(batch, generator=generator, device=home))
        )


def _check_points(x: Tensor, axes: int) -> None:
    """Static checks, so that they hold while the objective is traced too."""
    if x.dim() != axes:
        wanted = "(m, n)" if axes == 2 else "(batch, m, n)"
        raise InputError(
            f"x must have shape {wanted}, n points of m entries, not {tuple(x.shape)}; "
            "pass in_dims=None for one sample, and flatten feature maps to (batch, channels, points)"
        )
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        raise InputError(f"x of shape {tuple(x.shape)} has no points, or points without entries")


def _best_point(rho: Rho, x: Tensor, alpha: Tensor) -> Tensor:
    """Of up to 32 points, evenly spaced in x (batch, m, n), the one of least objective; (batch, m)."""
    count = min(x.shape[2], POINTS_TRIED)
    places = torch.linspace(0, x.shape[2] - 1, count, device=x.device).round().long()
    points = x[:, :, places]
    squares = points.square().sum(1)[:, :, None] + x.square().sum(1)[:, None] - 2 * points.mT @ x
    value = rho(squares.clamp_min(0), alpha[..., None]).sum(2)
    return points.take_along_dim(value.argmin(1)[:, None, None], 2)[:, :, 0]


def _status(found: Descent) -> Tensor:
    """OK where the contract's rule holds at u, NOT_CONVERGED elsewhere; int8 (batch,)."""
    reached = found.residual <= torch.finfo(found.u.dtype).eps ** 0.5
    return torch.where(reached, Status.OK, Status.NOT_CONVERGED).to(torch.int8)


def _require_definite(definite: Tensor) -> None:
    if not bool(definite.all()):
        raise SingularError(
            f"the Hessian of robust pooling is not positive definite{name_samples(~definite)}, so "
            "the paper's backward pass does not apply there: no strict minimum; take a larger alpha"
        )

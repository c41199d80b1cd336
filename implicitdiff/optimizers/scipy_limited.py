"""SciPy's minimizers for problems with inequalities and bounds: one sample after the other, in float64 on the host.

A `Limited` and start points come in, points go out, polished on the active set that they suggest. Next: polish.py.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicitdiff.derivatives.lagrangian import pullback
from implicitdiff.errors import OptionError
from implicitdiff.optimizers.interior import LimitedOutcome
from implicitdiff.optimizers.iterate import pack, unpack
from implicitdiff.optimizers.limited import Limited
from implicitdiff.optimizers.polish import polished_at
from implicitdiff.torch_private import HOST

Array = np.ndarray[Any, np.dtype[np.float64]]

WITH_BOUNDS = ("L-BFGS-B", "TNC", "Nelder-Mead", "Powell")
WITH_ROWS = ("SLSQP", "trust-constr")


def minimize_samples(
    limited: Limited, start: Tensor, method: str | None, options: dict[str, Any], max_iter: int
) -> LimitedOutcome:
    """Every sample by `scipy.optimize.minimize`, then the last digits on the active set.

    Args:
        limited: the limits of the call.
        start: (B, m).
        method: by SciPy's name; None: "L-BFGS-B" with bounds alone, else "SLSQP".
        options: SciPy's own.
        max_iter: most iterations of one sample.

    Raises:
        OptionError: the method does not take what the problem declares.
    """
    constrained = bool(limited.multiplier_shapes)
    method = method or ("SLSQP" if constrained else "L-BFGS-B")
    allowed = WITH_ROWS if constrained else (*WITH_ROWS, *WITH_BOUNDS)
    if method not in allowed:
        raise OptionError(
            f"SciPy(method={method!r}) does not take the constraints of this problem: choose one of "
            f"{', '.join(allowed)}, or InteriorPoint()"
        )
    from scipy import optimize  # a third of a second, which only those who use it should wait

    rows, steps = [], []
    for index in range(start.shape[0]):
        keep = torch.tensor([index], device=start.device)
        sample = _Sample(limited.narrowed(keep), start[index : index + 1])
        lower, upper = (_array(side[0]) for side in sample.limited.bounds)
        arguments: dict[str, Any] = {"bounds": optimize.Bounds(lower, upper)}
        if constrained and method == "SLSQP":
            arguments["constraints"] = sample.dictionaries()
        elif constrained:
            p, q = limited.equalities, sample.size - limited.equalities
            arguments["constraints"] = optimize.NonlinearConstraint(
                sample.constraints, [0.0] * p + [-np.inf] * q, np.zeros(p + q), jac=sample.jacobian
            )
        if method not in ("Nelder-Mead", "Powell"):
            arguments["jac"] = sample.gradient
        limit = {"maxfun" if method == "TNC" else "maxiter": max_iter}
        tight = {"SLSQP": {"ftol": 1e-15}, "L-BFGS-B": {"ftol": 0.0, "gtol": 1e-12}}.get(method, {})
        inside = np.clip(_array(start[index]), lower, upper)
        with warnings.catch_warnings():
            # its quasi-Newton update remarks on affine constraints
            warnings.filterwarnings("ignore", message="delta_grad == 0.0", category=UserWarning)
            found = optimize.minimize(
                sample.value, inside, method=method, options={**limit, **tight, **options}, **arguments
            )
        rows.append(torch.as_tensor(np.clip(found.x, lower, upper), device=HOST).to(start))
        steps.append(int(getattr(found, "nit", -1)))
    u = torch.stack(rows)
    best = polished_at(limited, u)
    iterations = torch.tensor(steps, dtype=torch.int64, device=start.device)
    return LimitedOutcome(best.u, best.multipliers if bool(best.verified.all()) else None, iterations)


class _Sample:
    """The functions of one sample as SciPy takes them."""

    def __init__(self, limited: Limited, like: Tensor) -> None:
        self.limited, self.like = limited, like
        self.size = sum(torch.Size(shape).numel() for shape in limited.multiplier_shapes)

    def _leaves(self, x: Array) -> tuple[Tensor, ...]:
        return self.limited.leaves(torch.as_tensor(np.array(x), device=HOST).to(self.like)[None])

    def value(self, x: Array) -> float:
        """f."""
        value = float(self.limited.lagrangian.objective(self._leaves(x), self.limited.theta)[0])
        return value if np.isfinite(value) else np.inf

    def gradient(self, x: Array) -> Array:
        """D_u f."""
        leaves = self.limited.lagrangian.objective_gradient(self._leaves(x), self.limited.theta)
        return _array(pack(leaves, 1, self.like)[0])

    def _joined(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        lagrangian, trace = self.limited.lagrangian, self.limited.trace
        h = lagrangian.constraints(leaves, self.limited.theta)
        if trace.inequality is None:
            return h
        return (*h, *lagrangian.mapped(trace.inequality, leaves, self.limited.theta))

    def constraints(self, x: Array) -> Array:
        """(h, g)."""
        return _array(pack(self._joined(self._leaves(x)), 1, self.like)[0])

    def jacobian(self, x: Array) -> Array:
        """D_u (h, g)."""
        _, pull = pullback(lambda *v: self._joined(v), self._leaves(x))
        units = torch.eye(self.size, dtype=self.like.dtype, device=self.like.device)[:, None]
        rows = torch.func.vmap(pull)(unpack(units, self.limited.multiplier_shapes))
        return _array(torch.cat([leaf.reshape(self.size, -1) for leaf in rows], 1))

    def dictionaries(self) -> list[dict[str, Any]]:
        """The constraints as SLSQP takes them: h = 0, -g >= 0."""
        p = self.limited.equalities
        found: list[dict[str, Any]] = []
        if p:
            found.append(
                {
                    "type": "eq",
                    "fun": lambda x: self.constraints(x)[:p],
                    "jac": lambda x: self.jacobian(x)[:p],
                }
            )
        if self.size > p:
            found.append(
                {
                    "type": "ineq",
                    "fun": lambda x: -self.constraints(x)[p:],
                    "jac": lambda x: -self.jacobian(x)[p:],
                }
            )
        return found


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().to(HOST, torch.float64).numpy().copy()
    return found

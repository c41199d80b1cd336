"""SciPy's minimizers as optimizers: one sample after the other, in float64 on the host.

A `System` (iterate.py) and a start come in, an `Outcome` goes out; f, D_u f, h, A and H are the plan's. Next:
forward.py, which judges the points.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicitdiff.errors import OptionError
from implicitdiff.optimizers.interior import LimitedOutcome
from implicitdiff.optimizers.iterate import Outcome, Point, System, largest, unpack
from implicitdiff.optimizers.limited import Limited
from implicitdiff.optimizers.limits import Callback, Watch, check_limits, check_whole
from implicitdiff.optimizers.scipy_limited import minimize_samples
from implicitdiff.torch_private import HOST

_CONSTRAINED = ("SLSQP", "trust-constr")
_WITH_HESSIAN = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-exact", "dogleg", "trust-constr")
_WITHOUT_GRADIENT = ("Nelder-Mead", "Powell")
METHODS = ("BFGS", "CG", "L-BFGS-B", "TNC", *_WITHOUT_GRADIENT, "SLSQP", *_WITH_HESSIAN)

Array = np.ndarray[Any, np.dtype[np.float64]]


class _Finished(Exception):
    """Leaves scipy.optimize.minimize from inside an evaluation: the point is good enough, or the time is up."""


@dataclass(frozen=True)
class SciPy:
    """`scipy.optimize.minimize` per sample.

    A walk ends at the first point that the optimality rule accepts, or where the method itself gives up; a method's
    own tolerances are set far below, so that they do not end it early. Most line searches of SciPy read f alone,
    which is flat to rounding near residuals of sqrt(eps): where one gives up short of the tolerance, raise
    optimality_tol= or let `Chain((SciPy(...), Newton()))` finish. A start that is stationary is accepted as it is.
    Every sample is solved on its own, in a Python loop, so this is for small batches, comparisons and the methods
    that the library has not.

    Attributes:
        method: By SciPy's name; None: "BFGS" without constraints, "SLSQP" with, "L-BFGS-B" with bounds alone. Only
            "SLSQP" and "trust-constr" take equalities and inequalities.
        options: SciPy's own, as it documents them for the method.
        max_iter: Most iterations of one sample (SciPy's `maxiter`, unless `options` has one).
        tol: Relative tolerance of the residual; None: that of the layer, sqrt(eps) of the dtype by default.
        time_limit: Seconds for the whole batch, or None. Samples that are not done then are NOT_CONVERGED.
        callback: Called with a `Progress` before each sample, or None; active are those still to come.

    Cost: per evaluation one pass of f and of D_u L on a batch of one; methods with second derivatives form H dense.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    max_iter: int = 1000
    tol: float | None = None
    time_limit: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise OptionError(
                f"SciPy(method={self.method!r}) is not known; choose one of {', '.join(METHODS)}"
            )
        if not isinstance(self.options, Mapping):
            raise OptionError(
                f"SciPy(options=...) must be a mapping of names to values, got {self.options!r}"
            )
        check_whole("SciPy", "max_iter", self.max_iter, 1)
        check_limits("SciPy", self.tol, self.time_limit, self.callback)

    def minimize(self, system: System, start: Tensor, tol: float) -> Outcome:
        """Solve the samples one by one from `start` (B, m).

        Args:
            system: The plan with its inputs; B > 0.
            start: Start points.
            tol: The tolerance of the layer, used if `self.tol` is None.

        Returns:
            Outcome, without a judgement.

        Raises:
            OptionError: The problem has constraints and the method takes none.
        """
        method = self.method or ("SLSQP" if system.constraints else "BFGS")
        if system.constraints and method not in _CONSTRAINED:
            raise OptionError(
                f"SciPy(method={method!r}) takes no constraints, and this problem has {system.constraints}: use "
                f"method='SLSQP' or 'trust-constr', or Newton()"
            )
        tol = tol if self.tol is None else self.tol
        watch = Watch(self.time_limit, self.callback)
        begin = system.evaluate(start, system.estimate_multipliers(start))
        waiting = begin.finite.clone()
        rows: list[Point] = []
        residual, steps = begin.residual.clone(), []
        for index in range(start.shape[0]):
            goes_on = watch.goes_on(residual, waiting.clone())
            walk = _Walk(system.sample(index), start[index : index + 1], tol, watch)
            count = self._walk(walk, method) if goes_on and bool(waiting[index]) else 0
            rows.append(walk.best)
            steps.append(count)
            residual[index], waiting[index] = walk.best.residual[0], False
        watch.goes_on(residual, waiting)
        iterations = torch.tensor(steps, dtype=torch.int64, device=start.device)
        return Outcome(Point.joined(rows), iterations)

    def minimize_limited(self, limited: Limited, start: Tensor, tol: float) -> LimitedOutcome:
        """Solve the samples of a problem with inequalities or bounds one by one; see `scipy_limited.minimize_samples`.

        Args:
            limited: The limits of the call.
            start: Start points (B, m).
            tol: The tolerance of the layer; SciPy's own tolerances are set far below it.

        Returns:
            LimitedOutcome, without a judgement; time_limit and callback are not used.
        """
        return minimize_samples(limited, start, self.method, dict(self.options), self.max_iter)

    def _walk(self, walk: "_Walk", method: str) -> int:
        """Run SciPy on one sample; the steps it took."""
        # TNC counts evaluations where the others count iterations.
        limit = {"maxfun" if method == "TNC" else "maxiter": self.max_iter}
        options = {**limit, **_UNREACHED.get(method, {}), **self.options}
        from scipy import optimize  # a third of a second, which only those who use it should wait

        arguments: dict[str, Any] = {"method": method, "options": options}
        if method not in _WITHOUT_GRADIENT:
            arguments["jac"] = walk.gradient
        if method in _WITH_HESSIAN:
            arguments["hess"] = walk.hessian
        if walk.system.constraints and method == "SLSQP":
            arguments["constraints"] = {"type": "eq", "fun": walk.constraint, "jac": walk.jacobian}
        elif walk.system.constraints:
            arguments["constraints"] = optimize.NonlinearConstraint(
                walk.constraint, 0.0, 0.0, jac=walk.jacobian, hess=walk.constraint_hessian
            )
        try:
            begin = walk.start
            walk.check(begin)
            while True:
                before = float(walk.best.residual[0])
                found = optimize.minimize(walk.value, begin, callback=walk.step, **arguments)
                walk.offer(found.x)
                # Near rounding a method may give up because of what it remembers; it starts anew from there.
                if walk.steps >= self.max_iter or not float(walk.best.residual[0]) < 0.5 * before:
                    return walk.steps
                begin = _array(walk.best.u[0])
        except _Finished:
            return walk.steps


# SciPy's own tolerances, by whatever name a method has for them, out of reach.
_UNREACHED: dict[str, dict[str, float]] = {
    "BFGS": {"gtol": 0.0},
    "CG": {"gtol": 0.0},
    "L-BFGS-B": {"gtol": 0.0, "ftol": 0.0, "maxfun": 10**9},
    "TNC": {"ftol": 0.0, "gtol": 0.0, "xtol": 0.0},
    "Nelder-Mead": {"xatol": 0.0, "fatol": 0.0, "maxfev": 10**9},
    "Powell": {"xtol": 1e-15, "ftol": 1e-15, "maxfev": 10**9},
    "SLSQP": {"ftol": 1e-30},
    "Newton-CG": {"xtol": 1e-30},
    "trust-ncg": {"gtol": 0.0},
    "trust-krylov": {"gtol": 0.0},
    "trust-exact": {"gtol": 0.0},
    "dogleg": {"gtol": 0.0},
    "trust-constr": {"gtol": 1e-30, "xtol": 1e-16, "barrier_tol": 1e-30},
}


class _Walk:
    """One sample's functions for SciPy, and the best point seen."""

    def __init__(self, system: System, start: Tensor, tol: float, watch: Watch) -> None:
        """`system` and `start` of a batch of one."""
        self.system, self.tol, self.watch, self.steps = system, tol, watch, 0
        self.like = start
        self.start: Array = _array(start[0])
        self.best = self._point(self.start)
        self._at, self._last = self.start.copy(), self.best
        self._steepest = torch.zeros_like(self.best.value)

    def _tensor(self, x: Array) -> Tensor:
        return torch.as_tensor(np.array(x), device=HOST).to(self.like)[None]

    def _point(self, x: Array) -> Point:
        u = self._tensor(x)
        return self.system.evaluate(u, self.system.estimate_multipliers(u))

    def check(self, x: Array) -> Point:
        """The point at x; ends the walk where it is optimal, or the time is up."""
        if not np.array_equal(x, self._at):
            self._last, self._at = self._point(x), np.array(x)
            if self.watch.over():
                raise _Finished
        self.offer(x)
        if bool(self.best.residual[0] <= self.tol):
            raise _Finished
        return self._last

    def offer(self, x: Array) -> None:
        """Remember the point at x if its residual is the smallest so far."""
        point = self._last if np.array_equal(x, self._at) else self._point(x)
        wanted = point.finite & (point.residual > self.tol)
        # A gradient this small may be one only beside the linear part of D_u f: asked for rarely, it costs an H.
        self._steepest = torch.maximum(self._steepest, largest(point.gradient))
        small = largest(point.gradient) <= self.tol * (1 + self._steepest)
        point = self.system.with_linear_part(point, wanted & small)
        better = point.finite & ~(self.best.residual <= point.residual)
        if bool(better[0]):
            self.best = point

    def step(self, *_: Any, **__: Any) -> None:
        """SciPy's callback after each iteration."""
        self.steps += 1

    def value(self, x: Array) -> float:
        """f; infinite outside its domain, from which every line search comes back."""
        value = float(self.check(x).value[0])
        return value if np.isfinite(value) else np.inf

    def gradient(self, x: Array) -> Array:
        """D_u f."""
        point = self.check(x)
        none = torch.zeros_like(point.multipliers)
        slope = point.gradient if not none.numel() else self.system.evaluate(point.u, none).gradient
        return _array(slope[0])

    def constraint(self, x: Array) -> Array:
        """h."""
        return _array(self.check(x).constraint[0])

    def jacobian(self, x: Array) -> Array:
        """A."""
        leaves = unpack(self._tensor(x), self.system.variable_shapes)
        return _array(self.system.plan.constraint_jacobian(leaves, self.system.theta)[0])

    def hessian(self, x: Array) -> Array:
        """D_uu f."""
        return self._curvature(x, np.zeros(self.system.constraints))

    def constraint_hessian(self, x: Array, v: Array) -> Array:
        """sum of v_k D_uu h_k = D_uu f - D_uu (f - v'h)."""
        return self.hessian(x) - self._curvature(x, v)

    def _curvature(self, x: Array, lam: Array) -> Array:
        variables, leaves = self.system.leaves(self._tensor(x), self._tensor(lam))
        operator = self.system.plan.hessian(variables, leaves, self.system.theta)
        return _array(operator.to_dense()[0])


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().to(HOST, torch.float64).numpy().copy()
    return found


__all__ = ["METHODS", "SciPy"]

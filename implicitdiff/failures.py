"""What to do with the samples that have no solution: the policy `on_failure` of one forward pass.

A `Check` (optimality.py) comes in; an error, a warning or the unchanged status goes out, with one line that
names the samples, and each kind of failure is recorded (records.py). Next: optimizers/forward.py, which calls
this after each solve.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from implicitdiff.errors import (
    ConvergenceError,
    ImplicitDiffError,
    InfeasibleError,
    NotOptimalError,
    OptimalityWarning,
    OptionError,
    SingularError,
    SolutionError,
)
from implicitdiff.optimality import Check
from implicitdiff.records import emit
from implicitdiff.status import Status

OnFailure = Literal["raise", "warn", "nan", "zero", "damp"]
ON_FAILURE: tuple[str, ...] = get_args(OnFailure)

_ACCEPTED = (Status.OK, Status.WEAKLY_ACTIVE, Status.DAMPED)
_GRAVEST_FIRST = (
    Status.NONFINITE,
    Status.INFEASIBLE,
    Status.NOT_CONVERGED,
    Status.NOT_OPTIMAL,
    Status.SINGULAR,
    Status.INDEFINITE,
    Status.NOT_REGULAR,
)
_SAMPLES_NAMED = 8


def validate_policy(on_failure: str) -> OnFailure:
    """Return the policy if there is one of that name.

    Raises:
        OptionError: There is not.
    """
    for known in get_args(OnFailure):
        if on_failure == known:
            return known
    raise OptionError(f"on_failure={on_failure!r} is not known; choose one of {', '.join(ON_FAILURE)}")


def any_failed(status: Tensor) -> bool:
    """Whether some sample has no usable solution; one look where all are OK."""
    return bool(status.any()) and bool(failed(status).any())


def failed(status: Tensor) -> Tensor:
    """Which samples have no usable solution (B,) bool; OK, WEAKLY_ACTIVE and DAMPED have one."""
    good = torch.zeros_like(status, dtype=torch.bool)
    for accepted in _ACCEPTED:
        good |= status == int(accepted)
    return ~good


def enforce(found: Check, on_failure: OnFailure, source: str, hint: str = "", stacklevel: int = 3) -> Tensor:
    """Apply the failure policy to a finished forward pass.

    Args:
        found: Residuals and status.
        on_failure: "raise": an error; "warn": one OptimalityWarning; "nan", "zero": nothing here, the layer
            fills the failed samples; "damp": one OptimalityWarning, and the status of finite, feasible
            samples becomes DAMPED.
        source: What produced the solution, as it should read in the message: "solve of Portfolio", "Newton".
        hint: A remedy that only the caller knows; put before the general one.
        stacklevel: For the warning.

    Returns:
        The status (B,) int8, changed by "damp" alone. Every kind of failure is recorded as one event.

    Raises:
        SolutionError: NONFINITE from a solve. ConvergenceError: NOT_CONVERGED, or NONFINITE from an
            optimizer.
        InfeasibleError: INFEASIBLE. SingularError: SINGULAR, which only a solve says. NotOptimalError: else.
    """
    if found.all_ok:
        return found.status
    bad = failed(found.status)
    if not bool(bad.any()):
        return found.status
    lines: list[tuple[Status, str]] = []
    for kind in _GRAVEST_FIRST:
        lines += _describe(found, found.status == int(kind), kind, source, hint)
    message = "; and ".join(line for _, line in lines)
    if on_failure == "raise":
        raise _error(lines[0][0], source)(message)
    if on_failure in ("warn", "damp"):
        warnings.warn(message, OptimalityWarning, stacklevel=stacklevel)
    if on_failure == "damp":
        soft = bad & (found.status != int(Status.NONFINITE)) & (found.status != int(Status.INFEASIBLE))
        return torch.where(soft, torch.full_like(found.status, int(Status.DAMPED)), found.status)
    return found.status


def _describe(found: Check, mask: Tensor, kind: Status, source: str, hint: str) -> list[tuple[Status, str]]:
    samples = mask.nonzero()[:, 0].tolist()
    if not samples:
        return []
    line = f"{name_samples(samples, mask.shape[0])}: {_reason(found, mask, kind, source)}"
    remedy = "; ".join(part for part in (hint, _remedy(kind, source)) if part)
    line = f"{line}; {remedy}"
    emit(kind.name, "forward", samples, line)
    return [(kind, line)]


def filled(leaves: tuple[Tensor, ...], bad: Tensor, on_failure: str) -> tuple[Tensor, ...]:
    """The policy's value in the failed samples (B,) of u or lam."""
    if on_failure not in ("nan", "zero"):
        return leaves
    fill = torch.nan if on_failure == "nan" else 0.0
    return tuple(torch.where(bad.reshape(-1, *(1,) * (leaf.dim() - 1)), fill, leaf) for leaf in leaves)


def name_samples(samples: Sequence[int], batch: int) -> str:
    """'sample 3 of 32' or 'samples 3, 7 of 32'; a long list is cut after eight."""
    named = ", ".join(str(sample) for sample in samples[:_SAMPLES_NAMED])
    rest = f", ... ({len(samples)} in all)" if len(samples) > _SAMPLES_NAMED else ""
    return f"sample{'s' if len(samples) > 1 else ''} {named}{rest} of {batch}"


def _reason(found: Check, mask: Tensor, kind: Status, source: str) -> str:
    residuals, tol = found.residuals, found.tol
    if kind == Status.NONFINITE:
        places = "u or the residual" if found.square else "u, a multiplier, f, D_Y L or h"
        return f"{source} gave NaN or inf in {places}"
    # The worst sample's numbers stand for all; a NaN would win, but samples with one are NONFINITE.
    worst = int(torch.where(mask, residuals.relative, -1).argmax())
    by_constraint = bool(residuals.violation[worst] >= residuals.relative[worst])
    if kind == Status.INFEASIBLE or (by_constraint and bool(residuals.constraint[worst] > 0)):
        leaf = 0 if residuals.leaf is None else int(residuals.leaf[worst])
        where = found.names[leaf] if found.names else f"constraint leaf {leaf}"
        name = f"|residual| of output {leaf}" if found.square else f"|h| of {where}"
        size, scale = residuals.constraint[worst], residuals.constraint_scale[worst]
    else:
        size, scale, name = residuals.gradient[worst], residuals.gradient_scale[worst], "|D_Y L|"
    verdict = f"{name} = {float(size):.1e} > {tol:.1e} * {float(scale):.2g}"
    if float(size) <= tol * float(scale):
        said = Status(int(found.status[worst])).name
        verdict = (
            f"{source} reports {said}, though {name} = {float(size):.1e} <= {tol:.1e} * {float(scale):.2g}"
        )
        return verdict + (f" (sample {worst})" if int(mask.sum()) > 1 else "")
    if int(mask.sum()) > 1:
        verdict += f" (worst: sample {worst})"
    verdict += f" after {source}"
    if kind == Status.INFEASIBLE:
        alone = bool(found.clash) and not re.search(", |all", found.clash)
        clash = (
            f"{found.clash} cannot be met"
            if alone
            else f"{found.clash or 'the constraints'} contradict each other"
        )
        verdict += f", and no step reduces it: {clash} there"
    return verdict


def _remedy(kind: Status, source: str) -> str:
    if kind == Status.NONFINITE:
        return "look at these samples' inputs, or start inside the domain of the objective"
    if kind == Status.INFEASIBLE:
        return "mend or drop one of the contradicting constraints"
    if kind == Status.NOT_CONVERGED:
        return (
            "raise max_iter, start nearer (init=), or accept it with on_failure= or a larger optimality_tol="
        )
    return f"let {source} run further, or accept it with on_failure= or a larger optimality_tol="


def _error(kind: Status, source: str) -> type[ImplicitDiffError]:
    if kind == Status.NONFINITE:
        return SolutionError if source.startswith("solve") else ConvergenceError
    if kind == Status.INFEASIBLE:
        return InfeasibleError
    if kind == Status.SINGULAR:
        return SingularError
    return ConvergenceError if kind == Status.NOT_CONVERGED else NotOptimalError

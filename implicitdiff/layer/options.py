"""The layer, its options: checked once, then carried along with every call.

In: the keyword arguments of `DeclarativeLayer` and `solve`. Out: a frozen `Options`. Next file: `prepare.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from implicitdiff.autograd.options import PLAIN, KKTOptions
from implicitdiff.errors import OptionError, ProblemDefinitionError
from implicitdiff.failures import validate_policy
from implicitdiff.inputs import InDims
from implicitdiff.optimality import tolerance
from implicitdiff.plan import check_options, not_compiled
from implicitdiff.problem import Problem

TIES = ("inactive", "active", "average")


@dataclass(frozen=True)
class Options:
    """The options of a layer; `DeclarativeLayer.__init__` says what each means."""

    in_dims: InDims = 0
    optimizer: Any = None
    linear_solver: str = "auto"
    backward: str = "auto"
    on_failure: str = "raise"
    optimality_tol: float | None = None
    compile: bool = False
    tie: str = "inactive"
    kkt: KKTOptions = PLAIN

    def check(self, problem: Problem) -> None:
        """Raise for a value that does not exist, or that this problem does not support."""
        check_options(self.backward, self.linear_solver)
        validate_policy(self.on_failure)
        tolerance(torch.float64, self.optimality_tol)
        if not isinstance(self.kkt, KKTOptions):
            raise OptionError(f"kkt={self.kkt!r}: give an idf.KKTOptions, or None")
        if self.compile and self.backward != "auto":
            not_compiled(f"backward={self.backward!r} is no emitted pass; use backward='auto'")
        if not isinstance(self.kkt, KKTOptions):
            raise OptionError(f"kkt={self.kkt!r}: give an idf.KKTOptions, or None")
        if self.tie not in TIES:
            raise OptionError(f"tie={self.tie!r} does not exist; choose one of {', '.join(TIES)}")
        if self.optimizer is not None and not callable(getattr(self.optimizer, "minimize", None)):
            raise OptionError(
                f"optimizer={self.optimizer!r} is no optimizer: give one of implicitdiff.optimizers, as "
                "Newton(), or None"
            )
        if self.backward == "approximate" and problem.MAIN == "residual":
            raise OptionError(
                f"backward='approximate' ignores constraints, or takes D_u step for 0; {type(problem).__name__} is a "
                "Root, which has neither: use backward='auto'"
            )
        if problem.square and self.kkt != PLAIN:
            raise OptionError(
                f"kkt={self.kkt!r} is about the KKT matrix of a minimum, and {type(problem).__name__} is a system of "
                "equations: leave it out, or use on_failure='damp'"
            )
        if self.backward == "hand" and not problem.declares("vjp"):
            raise ProblemDefinitionError(
                f"backward='hand' needs {type(problem).__name__} to declare vjp(self, u, v, *inputs); "
                "declare it or use backward='auto'"
            )

    def shown(self) -> str:
        """`name=value` of every option that is not the default."""
        return ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default
        )

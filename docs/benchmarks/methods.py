"""What is raced on a work: the derived pass, the hand-written one, the slower rungs, and installed peers.

In: a `Work` and the name of a method. Out: a `Racer`: the pass ready to run, with its counts and its error,
or a reason why it is not. Next: race.py times them.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import implicitdiff as idf
from benchmarks import peers
from benchmarks.race import Counts, counted, saved_by
from benchmarks.work import Forward, Work
from implicitdiff.diagnostics.held import plan_of

RUNGS = ("hand", "auto", "dense", "unrolled", "matrix-free")
DENSE_BYTES = 2**30
DENSE_FLOPS = 2e11
WRONG = 1e-2


@dataclass(frozen=True)
class Racer:
    """A method on a work.

    Attributes:
        method: Its name.
        solver: The linear solver in it; "" where there is none or it is not ours.
        run: One pass; it returns the gradients.
        counts: What one pass does.
        error: Relative error against the hand-written formula in float64.
    """

    method: str
    solver: str
    run: Callable[[], Sequence[Tensor]]
    counts: Counts
    error: float

    @property
    def wrong(self) -> bool:
        """Another result, not a loss of digits; NaN is wrong too."""
        return not self.error <= WRONG


@dataclass(frozen=True)
class Absent:
    """A method that does not run on a work, and why."""

    method: str
    reason: str


def racer(
    work: Work, method: str, truth: Sequence[Tensor] | None = None, linear_solver: str = "auto"
) -> Racer | Absent:
    """Prepare a method: forward pass, counts, error.

    Args:
        work: The benchmark.
        method: One of RUNGS, "compiled", or the name of a peer.
        truth: `work.truth()`, if it is known already.
        linear_solver: The layer's option, for our own methods.
    """
    refusal = too_large(work) if method == "dense" else ""
    if refusal:
        return Absent(method, refusal)
    refused: tuple[type[Exception], ...] = (
        idf.ImplicitDiffError,
        idf.FallbackWarning,
        MemoryError,
        RuntimeError,
    )
    if method in peers.ADAPTERS:
        refused = (Exception,)  # how another library fails is a result as well
    try:
        forward = _forward(work, method, linear_solver)
        return _prepared(work, method, forward, work.truth() if truth is None else truth, linear_solver)
    except refused as error:
        return Absent(method, " ".join(f"{type(error).__name__}: {error}".split())[:200])


def _forward(work: Work, method: str, linear_solver: str) -> Forward:
    if method == "hand":
        return lambda *inputs: work.hand(work.u, *inputs)
    if method in peers.ADAPTERS:
        return peers.ADAPTERS[method].load(work)
    # An unrolled gradient belongs to its own iterations, and a whole pass solves for itself.
    problem = work.problem if work.whole or method == "unrolled" else work.held
    return idf.DeclarativeLayer(
        problem,
        backward="auto" if method == "compiled" else method,
        linear_solver=linear_solver,
        on_failure="warn",
        compile=method == "compiled",
    )


def _prepared(
    work: Work, method: str, forward: Forward, truth: Sequence[Tensor], linear_solver: str
) -> Racer:
    inputs, asked = work.leaves()
    v = work.cotangent()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "compiled":
            warnings.filterwarnings(
                "error", "compile=True", idf.FallbackWarning
            )  # an eager time is not its time
        forward(*inputs)  # traces and plans, which is no part of a call
        u, saved = saved_by(lambda: forward(*inputs))

        def backward() -> Sequence[Tensor]:
            return torch.autograd.grad(u, asked, v, retain_graph=True)

        def whole() -> Sequence[Tensor]:
            return torch.autograd.grad(forward(*inputs), asked, v)

        run = whole if work.whole else backward
        run()  # the first backward pass of a plan also probes its structure
        gradients, counts = counted(run, 0 if work.whole else saved)
    solver = _solver(work, method) if linear_solver == "auto" else linear_solver
    return Racer(method, solver, run, counts, work.error(gradients, truth))


def _solver(work: Work, method: str) -> str:
    if method not in ("auto", "dense", "matrix-free", "compiled"):
        return ""
    inputs, _ = work.leaves()
    return plan_of(
        work.problem if work.whole else work.held, inputs, 0, "auto" if method == "compiled" else method
    ).plan.analysis.solver


def too_large(work: Work) -> str:
    """Why the dense pass is not tried; "" if it is."""
    batch, m, p = work.size
    if 2 * batch * (m + p) ** 2 * work.u.element_size() > DENSE_BYTES or batch * (m + p) ** 3 > DENSE_FLOPS:
        return f"K has {m + p} x {m + p} entries a sample"
    return ""

"""Diagnostics, one round of `compare`: a fixed solution, a fixed cotangent, several backward passes.

In: a problem, inputs, names. Out: one frozen `Row` each. The error is taken against `reference.py`, the
counts by `meter.py`, the times here. Next: `compare.py`, which puts the rows together.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.active import active_of
from implicitdiff.diagnostics.declared import Declared, double, floating, normal
from implicitdiff.diagnostics.held import batch_first, fresh, hand_gradients, held_at, plan_of
from implicitdiff.diagnostics.meter import Measurement, format_bytes, measure
from implicitdiff.diagnostics.race import quartiles, quiet_thread
from implicitdiff.diagnostics.reference import Direction, Reference, relative_error
from implicitdiff.diagnostics.traffic import tensors_in
from implicitdiff.errors import ImplicitDiffError
from implicitdiff.layer import DeclarativeLayer, solve
from implicitdiff.problem import Problem, Solution
from implicitdiff.torch_private import pytree, synchronize

_WRONG = 1e-2
_SLOW_TOTAL = 20.0  # seconds that one backward may take over all rounds
_SLOW = 10.0  # seconds: above this the counted pass is also the one reading
_FAST = 2e-3  # seconds: a shorter call is repeated until a reading takes about that long


@dataclass(frozen=True)
class Row:
    """One backward pass.

    Attributes:
        backward: Its name.
        solver: The linear solver in it; "" where there is none.
        error: Relative error of the gradient, the worst over all inputs; None without a reference.
        seconds: Median time of one pass; None if it did not run (`note` says why).
        ratio: Median over the rounds of its time over that of the first backward that ran.
        ratio_low, ratio_high: The quartiles of the same.
        peak: Peak bytes allocated by the pass, and what its forward saved beyond the solution.
        bytes: Bytes read and written.
        flops: Floating point operations.
        note: What there is to say: why it did not run, what its gradient leaves out.
        rounds: Rounds it was timed in.
        exact: Whether the error is below 1 %, which tells another formula from a loss of digits (True without
            a reference).
        setting: (name, value) of a sweep.
    """

    backward: str
    solver: str
    error: float | None = None
    seconds: float | None = None
    ratio: float | None = None
    peak: int | None = None
    bytes: int | None = None
    flops: int | None = None
    note: str = ""
    rounds: int = 0
    exact: bool = True
    setting: tuple[tuple[str, Any], ...] = ()
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class _Entry:
    """A backward that runs: its row so far, the pass itself, calls per reading, seconds of the first call."""

    row: Row
    run: Callable[[], Any]
    loops: int
    first: float


@dataclass(frozen=True)
class _Setup:
    """What all rows of a contest share."""

    problem: Problem
    inputs: tuple[Any, ...]
    in_dims: Any
    flags: tuple[bool, ...]
    solution: Solution
    cotangent: Any
    unbatched: bool
    memory_limit: int
    flop_limit: float


def contest(
    problem: Problem,
    inputs: Sequence[Any],
    in_dims: Any,
    backwards: Sequence[str],
    cotangent: Any,
    rounds: int,
    memory_limit: int,
    flop_limit: float,
) -> tuple[list[Row], str]:
    """All rows for one set of inputs, and what their errors are measured against."""
    leaves = [leaf for leaf in pytree.tree_leaves(tuple(inputs)) if floating(leaf)]
    some = any(leaf.requires_grad for leaf in leaves)
    flags = tuple(leaf.requires_grad or not some for leaf in leaves)
    plain, _ = fresh(inputs, [False] * len(flags))
    with quiet_thread():
        solution = solve(problem, *plain, in_dims=in_dims)
        unbatched = plan_of(problem, plain, in_dims).bound.unbatched
        v = _draw(solution.u) if cotangent is None else cotangent
        setup = _Setup(problem, plain, in_dims, flags, solution, v, unbatched, memory_limit, flop_limit)
        truth = _truth(setup)
        rows: list[Row] = []
        entries: dict[int, _Entry] = {}
        for position, name in enumerate(backwards):
            found = _enter(setup, name, truth, rounds)
            rows.append(found.row if isinstance(found, _Entry) else found)
            if isinstance(found, _Entry):
                entries[position] = found
        readings = _alternate(entries, rounds)
    first = next(iter(entries), None)
    for position, taken in readings.items():
        base = readings[first] if first is not None else taken
        low, middle, high = quartiles([mine / theirs for mine, theirs in zip(taken, base, strict=False)])
        rows[position] = replace(
            rows[position],
            seconds=statistics.median(taken),
            ratio=middle,
            ratio_low=low,
            ratio_high=high,
            rounds=len(taken),
        )
    return rows, truth.what


def _draw(u: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pytree.tree_map(lambda leaf: normal(generator, leaf), u)


# What the errors are measured against


@dataclass(frozen=True)
class _Truth:
    gradients: list[Tensor] | None
    null: Tensor
    what: str


def _truth(setup: _Setup) -> _Truth:
    """The gradient at the common u in float64: by the dense formula, or certified by its KKT residual."""
    active = active_of(setup.problem, setup.solution, setup.unbatched)
    declared = Declared(setup.problem, setup.inputs, setup.in_dims, setup.solution.u, active)
    reference = Reference(declared)
    if reference.feasible:
        return _Truth(
            reference.vjp(setup.cotangent), reference.null_directions(), "the dense formula in float64"
        )
    try:
        directions = _structured_directions(setup, declared)
    except ImplicitDiffError as error:
        return _Truth(None, declared.u.new_zeros(0, 0), f"nothing (no reference: {error})")
    residual = reference.kkt_residual(directions, setup.cotangent)
    if not residual < 1e-9:
        return _Truth(
            None, declared.u.new_zeros(0, 0), f"nothing (KKT residual of the reference {residual:.1g})"
        )
    what = f"the structured solve in float64, its KKT residual {residual:.1g} checked by products"
    return _Truth(reference.pullback(directions), reference.null_directions(), what)


def _structured_directions(setup: _Setup, declared: Declared) -> list[Direction]:
    doubled = pytree.tree_map(lambda leaf: leaf.double() if floating(leaf) else leaf, setup.inputs)
    planned = plan_of(double(setup.problem), doubled, setup.in_dims)
    held = batch_first(setup.solution, setup.unbatched)
    u = tuple(leaf.double() for leaf in pytree.tree_leaves(held.u))
    v = pytree.tree_leaves(setup.cotangent)
    v = [leaf.double()[None] if setup.unbatched else leaf.double() for leaf in v]
    with torch.no_grad():
        lam = planned.plan.multipliers(u, planned.theta)
        zero = tuple(torch.zeros_like(leaf)[None] for leaf in lam)
        w, s, _ = planned.plan.kkt_solve(u, lam, planned.theta, tuple(-leaf[None] for leaf in v), zero)

    def flat(leaves: Sequence[Tensor], b: int) -> Tensor:
        return torch.cat([leaf[b].reshape(-1) for leaf in leaves]) if leaves else declared.u.new_zeros(0)

    first_w, first_s = [leaf[0] for leaf in w], [leaf[0] for leaf in s]
    return [Direction(flat(first_w, b), flat(first_s, b), flat(lam, b)) for b in range(declared.batch)]


# One row


def _enter(setup: _Setup, name: str, truth: _Truth, rounds: int) -> _Entry | Row:
    """Run a backward once, measure it and make it ready to be timed; a Row with the reason if it cannot."""
    try:
        return _entry(setup, name, truth, rounds)
    except (ImplicitDiffError, MemoryError, torch.OutOfMemoryError) as error:
        return Row(name, "", note=" ".join(f"not run: {type(error).__name__}: {error}".split()))


def _entry(setup: _Setup, name: str, truth: _Truth, rounds: int) -> _Entry | Row:
    refusal = _too_large(setup) if name in ("dense", "approximate") else ""
    if refusal:
        return Row(name, "", note=f"not run: {refusal}")
    # An unrolled gradient belongs to its own iterations; every other backward starts from the common
    # solution.
    own = name == "unrolled"
    held = setup.problem if own else held_at(setup.problem, batch_first(setup.solution, setup.unbatched))
    inputs, leaves = fresh(setup.inputs, setup.flags)
    wanted = [*leaves, *(p for p in setup.problem.parameters() if p.requires_grad)]
    if name == "hand":
        for leaf, has in zip(leaves, _given_by_hand(setup), strict=True):
            leaf.requires_grad_(has)
    asked = [tensor for tensor in wanted if tensor.requires_grad]
    if not asked:
        return Row(name, "", note="not run: no input is floating and no Parameter requires a gradient")
    layer = DeclarativeLayer(held, in_dims=setup.in_dims, backward=name)
    layer(*inputs)  # traces and plans, which is not part of a call
    outputs, forward = measure(lambda: pytree.tree_leaves(layer(*inputs)))
    cotangents = pytree.tree_leaves(setup.cotangent)

    def run() -> tuple[Tensor | None, ...]:
        found = iter(torch.autograd.grad(outputs, asked, cotangents, retain_graph=True, allow_unused=True))
        return tuple(next(found) if tensor.requires_grad else None for tensor in wanted)

    if name == "auto":
        run()  # the first backward of a plan also probes its structure
    start = time.perf_counter()
    found, cost = measure(run)
    counted = time.perf_counter() - start
    planned = None if name in ("hand", "unrolled") else plan_of(held, inputs, setup.in_dims, name)
    solver = "" if planned is None else planned.plan.analysis.solver
    row = _described(setup, Row(name, solver), found, leaves, truth, cost, _saved(forward, outputs))
    if counted > _SLOW:
        return _Entry(replace(row, rounds=0), run, 1, counted)
    taken = max(_time(run, 1), 1e-7)
    row = replace(row, rounds=max(1, min(rounds, int(_SLOW_TOTAL / taken))))
    return _Entry(row, run, max(1, min(50, math.ceil(_FAST / taken))), taken)


def _described(
    setup: _Setup,
    row: Row,
    found: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    truth: _Truth,
    cost: Measurement,
    saved: int,
) -> Row:
    """The row with its counts, its error, and what it leaves out."""
    row = replace(row, peak=cost.peak + saved, bytes=cost.bytes, flops=cost.flops)
    if truth.gradients is None:
        return row
    given = _given_by_hand(setup) if row.backward == "hand" else [True] * len(leaves)
    it = iter(found)
    moving: list[Tensor | None] = [next(it) if flag else None for flag in setup.flags]
    moving += [next(it) if p.requires_grad else None for p in setup.problem.parameters()]
    left_out = [k for k, has in enumerate(given) if not has]
    tested, exact = [], []
    position = -1
    for k, (gradient, right) in enumerate(zip(moving, truth.gradients, strict=True)):
        asked = k >= len(setup.flags) or setup.flags[k]
        position += asked and k < len(setup.flags)
        skipped = not asked or (k < len(setup.flags) and position in left_out)
        # What was not asked for, or what the hand leaves out, is taken from the truth: it cannot show as an
        # error.
        tested.append(right if skipped else torch.zeros_like(right) if gradient is None else gradient)
        exact.append(right)
    error = relative_error(tested, exact, truth.null)
    note = "its gradient leaves out an input that the problem's vjp has none for" if left_out else ""
    return replace(row, error=error, exact=error < _WRONG, note=note)


def _given_by_hand(setup: _Setup) -> list[bool]:
    """For each input that a gradient is asked for: whether the problem's vjp has one."""
    held = batch_first(setup.solution, setup.unbatched)
    v = pytree.tree_map(lambda leaf: leaf[None], setup.cotangent) if setup.unbatched else setup.cotangent
    given = hand_gradients(setup.problem, held.u, v, setup.inputs, setup.in_dims)
    return [part is not None for part, flag in zip(given, setup.flags, strict=True) if flag]


def _saved(forward: Measurement, outputs: Sequence[Tensor]) -> int:
    """What the forward keeps alive beyond its result."""
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors_in(outputs)
    }
    return max(0, forward.retained - sum(held.values()))


def _too_large(setup: _Setup) -> str:
    """Why a dense backward is not tried: what K and its factor need for the whole batch; "" if it is."""
    leaves = pytree.tree_leaves(batch_first(setup.solution, setup.unbatched).u)
    batch = leaves[0].shape[0]
    m = sum(leaf[0].numel() for leaf in leaves) if batch else 0
    multipliers = setup.solution.equality_multipliers
    lam = [] if multipliers is None else pytree.tree_leaves(multipliers)
    p = sum(leaf.numel() // (1 if setup.unbatched else max(batch, 1)) for leaf in lam)
    needed = 2 * batch * (m + p) ** 2 * leaves[0].element_size()
    if needed > setup.memory_limit:
        return f"it needs {format_bytes(needed)} or more; memory_limit is {format_bytes(setup.memory_limit)}"
    work = 10.0 * batch * (m + p) ** 3
    if work > setup.flop_limit:
        return f"it takes about {work:.0e} FLOPs; flop_limit is {setup.flop_limit:.0e}"
    return ""


# Time


def _time(run: Callable[[], Any], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        result = run()
    synchronize(next(tensors_in(result)).device)
    return (time.perf_counter() - start) / loops


def _alternate(entries: dict[int, _Entry], rounds: int) -> dict[int, list[float]]:
    """Readings of each backward, one per round, all of them in each round."""
    readings: dict[int, list[float]] = {position: [] for position in entries}
    for turn in range(rounds):
        for position, entry in entries.items():
            if turn < entry.row.rounds:
                readings[position].append(_time(entry.run, entry.loops))
    return {position: taken or [entries[position].first] for position, taken in readings.items()}

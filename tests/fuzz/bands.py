"""Scalar terms that couple neighbours along one axis of u: their Hessian is banded, by construction.

In: the scope, u in its layout, a `Band`. Out: the text of a scalar. Slices, torch.diff, narrow, strides, single
entries and loops; coupled along the other axes or not. Next: constraints.py.
"""

from dataclasses import dataclass

from tests.fuzz.scope import Scope, Shape
from tests.fuzz.values import Value, affine, contract, pointwise, weighted_total


@dataclass(frozen=True)
class Band:
    """The axis of u, and how far apart entries are coupled along it."""

    axis: int
    reach: int


def some_band(s: Scope, u: Value) -> Band | None:
    """An axis on which slices of at least two entries fit, with a reach; None where there is none."""
    long = [k for k, size in enumerate(u.shape) if size > 2]
    if not long:
        return None
    axis = s.rng.choice(long)
    return Band(axis, s.rng.choice([1, 1, s.rng.randint(1, min(3, u.shape[axis] - 2))]))


def neighbours(s: Scope, u: Value, band: Band) -> str:
    """phi(a combination of slices that start up to `reach` entries apart), summed over all or some axes first."""
    if s.chance(0.1) and u.shape[band.axis] - band.reach > 2:
        return _loop(s, u, band)
    v = _combination(s, u, band)
    while len(v.shape) > 1 and s.chance(0.35):
        v = contract(s, Value(s.let(v.text), v.shape, v.axes), s.rng.choice(_others(v, u, band)))
        v = Value(f"(0.5 * {v.text})", v.shape, v.axes)
        if not _others(v, u, band):
            break
    v = pointwise(s, affine(s, v) if s.chance(0.4) else v)
    return weighted_total(s, v)


def _loop(s: Scope, u: Value, band: Band) -> str:
    """phi(u_k+reach - c u_k), one term for each k."""
    t, moved = s.let(u.text), _index(band.axis, f"k + {band.reach}")
    step = f"{t}[{moved}] - {s.data(())} * {t}[{_index(band.axis, 'k')}]"
    phi = s.rng.choice(["torch.cosh({})", "({}) ** 2", "torch.nn.functional.softplus({})"]).format(step)
    return f"sum(({phi}).sum() for k in range({u.shape[band.axis] - band.reach}))"


def _others(v: Value, u: Value, band: Band) -> list[int]:
    return [k for k, axis in enumerate(v.axes) if u.axes[band.axis][0] not in axis]


def _combination(s: Scope, u: Value, band: Band) -> Value:
    t, axis = s.let(u.text), band.axis
    form = s.rng.choice(["windows"] * 4 + ["product", "diff", "stride", "narrow", "dynamics", "dynamics"])
    if form == "diff" and band.reach < u.shape[axis] - 1:
        shape = _with(u.shape, axis, u.shape[axis] - band.reach)
        return Value(f"torch.diff({t}, n={band.reach}, dim={axis})", shape, u.axes)
    if form == "stride" and u.shape[axis] > 3:
        count = u.shape[axis] // 2
        shape = _with(u.shape, axis, count)
        first, second = _index(axis, f": {2 * count} : 2"), _index(axis, f"1 : {2 * count} : 2")
        return Value(f"({t}[{first}] - {s.broadcastable(shape)} * {t}[{second}])", shape, u.axes)
    reach = s.rng.randint(1, band.reach)
    count = u.shape[axis] - reach
    shape = _with(u.shape, axis, count)
    starts = sorted({0, reach, *(s.rng.randint(0, reach) for _ in range(2))})
    if form == "narrow":
        windows = [f"{t}.narrow({axis}, {start}, {count})" for start in starts]
    else:
        windows = [f"{t}[{_index(axis, f'{start}:{start + count}')}]" for start in starts]
    values = [Value(text, shape, u.axes) for text in windows]
    if form == "product":
        parts = [pointwise(s, Value(f"(0.6 * {v.text})", shape, u.axes)).text for v in values[:2]]
        return Value(f"({parts[0]} * {parts[1]})", shape, u.axes)
    terms = [values[0].text]
    for v in values[1:]:
        moved = _mixed(s, v, axis) if form == "dynamics" else v.text
        terms.append(f"{s.broadcastable(shape)} * {moved}" if s.chance(0.5) else moved)
    return Value(f"({' - '.join(terms)})", shape, u.axes)


def _mixed(s: Scope, v: Value, axis: int) -> str:
    """The entries of the last axis, which is not the band's, mixed by a matrix: u[:-1] @ A."""
    last = len(v.shape) - 1
    if len(v.shape) < 2 or axis == last:
        return v.text
    mixed = f"({v.text} @ (0.5 * {s.data((v.shape[last], v.shape[last]))}))"
    return f"torch.tanh({mixed})" if s.chance(0.3) else mixed


def ends(s: Scope, u: Value, band: Band) -> Value:
    """The first or the last entry along the band's axis, minus data."""
    axis = band.axis
    shape = (*u.shape[:axis], *u.shape[axis + 1 :])
    where = s.rng.choice(["0", "-1"])
    entry = f"{u.text}[{_index(axis, where)}]" if s.chance(0.6) else f"{u.text}.select({axis}, {where})"
    return Value(f"({entry} - {s.broadcastable(shape)})", shape, (*u.axes[:axis], *u.axes[axis + 1 :]))


def at_the_ends(s: Scope, u: Value, band: Band) -> str:
    """phi(u[0]) or phi(u[-1])."""
    return weighted_total(s, pointwise(s, ends(s, u, band)))


def _with(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _index(axis: int, text: str) -> str:
    return ", ".join([":"] * axis + [text])

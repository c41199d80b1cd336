"""Random equality constraints: none, linear, nonlinear within the planted structure, or dependent on purpose.

In: the scope, u in its layout, the tied labels of the planted structure. Out: the outputs of `equality` as
    values.
Next: generator.py.
"""

import math

from tests.fuzz import bands, terms
from tests.fuzz.scope import Scope
from tests.fuzz.values import Value, contract


def linear(s: Scope, u: Value) -> Value:
    """A weighted sum over some axes of u, minus data."""
    v = u
    for _ in range(s.rng.randint(1, len(u.shape)) if u.shape else 0):
        axes = [k for k, axis in enumerate(v.axes) if set(axis) & u.labels]
        if axes:
            v = contract(s, v, s.rng.choice(axes))
    return _minus_data(s, v)


def _minus_data(s: Scope, v: Value) -> Value:
    if s.chance(0.2):
        return v
    x = s.broadcastable(v.shape)
    return Value(s.rng.choice([f"({v.text} - {x})", f"({x} - {v.text})"]), v.shape, v.axes)


def nonlinear(s: Scope, u: Value, planted: str, tied: frozenset[str]) -> Value:
    """A constraint whose curvature, weighted by its multipliers, has the planted structure."""
    scalar = None
    if planted == "scaled-identity":
        scalar = terms.scaled_identity(s, u)
    elif planted in ("diagonal", "banded", "sparse") or s.chance(0.3):
        scalar = terms.diagonal(s, u)
    if scalar is not None:
        return Value(f"(0.5 * ({scalar}) - {s.data(())})", (), ())
    v = terms.vector_of(s, u, tied)
    if len(v.shape) > 1:
        v = Value(f"{v.text}.sum({tuple(range(1, len(v.shape)))})", v.shape[:1], v.axes[:1])
    return _minus_data(s, v)


def banded(s: Scope, u: Value, band: bands.Band) -> Value:
    """A number whose curvature couples neighbours along the band's axis."""
    return Value(f"(0.4 * ({bands.neighbours(s, u, band)}) - {s.data(())})", (), ())


def dependent(s: Scope, u: Value) -> tuple[list[Value], int]:
    """Constraints of which some follow from others by the declaration alone, and how many do."""
    rank = len(u.shape)
    t = Value(s.let(u.text), u.shape, u.axes)
    form = s.rng.choice(["repeated"] + ["marginals", "marginals", "total"] * (rank > 1))
    if form == "repeated":
        v = contract(s, t, s.rng.randrange(rank))
        while math.prod(v.shape) * 2 > math.prod(u.shape) and v.shape:
            v = contract(s, v, 0)
        first = s.let(v.text)
        factor = s.rng.choice(["2", "-1", "0.5"])
        texts = [f"({first} - {s.number()})", f"({factor} * {first} + {s.number()})"]
        return [Value(text, v.shape, v.axes) for text in texts], math.prod(v.shape)
    outputs = []
    for k in s.rng.sample(range(rank), 2):
        others = tuple(a for a in range(rank) if a != k)
        outputs.append(
            Value(f"({t.text}.sum({others}) - {s.data((u.shape[k],))})", (u.shape[k],), (u.axes[k],))
        )
    if form == "total":
        outputs[1] = Value(f"({t.text}.sum() - {s.data(())})", (), ())
    return outputs, 1

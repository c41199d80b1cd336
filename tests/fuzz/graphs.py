"""Scalar terms that couple the entries of u which index tensors name: their Hessian is sparse, by construction.

In: the scope, u in its layout. Out: the text of a scalar. Gathers in several spellings, on one axis or on the flat
vector, differences and products, scatters; the other axes are contracted, so that none is tied. Next: constraints.py.
"""

import math

from tests.fuzz.scope import Scope
from tests.fuzz.values import Value, affine, contract, pointwise, weighted_total


def has_graph(u: Value) -> bool:
    """Whether there are three entries along some axis."""
    return any(size > 2 for size in u.shape)


def edges(s: Scope, u: Value) -> str:
    """phi(u_i - u_j) or the like over random edges, each end by an index tensor of its own."""
    flat = len(u.shape) > 1 and s.chance(0.3)
    base = Value(f"{s.let(u.text)}.reshape(-1)", (math.prod(u.shape),), (("flat",),)) if flat else u
    t = s.let(base.text)
    axis = 0 if flat else s.rng.choice([k for k, size in enumerate(u.shape) if size > 2])
    count, label = s.rng.randint(2, 7), (s.label(),)
    shape = (*base.shape[:axis], count, *base.shape[axis + 1 :])
    axes = (*base.axes[:axis], label, *base.axes[axis + 1 :])
    ends = [_gathered(s, t, base, axis, count) for _ in range(2)]
    combined = s.rng.choice(["({} - {})", "({} - {})", "({} + 0.5 * {})", "(0.6 * {} * {})"])
    v = Value(combined.format(*ends), shape, axes)
    v = affine(s, v) if s.chance(0.4) else v
    while len(v.shape) > 1:
        others = [k for k, axis_labels in enumerate(v.axes) if axis_labels != label]
        v = contract(s, Value(s.let(v.text), v.shape, v.axes), s.rng.choice(others))
        v = Value(f"(0.5 * {v.text})", v.shape, v.axes)
        if all(not set(a) & u.labels for a in v.axes):
            break
    return weighted_total(s, pointwise(s, v))


def _gathered(s: Scope, t: str, base: Value, axis: int, count: int) -> str:
    """u[..., i, ...] in one of its spellings; single entries are sliced from a longer gather at times."""
    size = base.shape[axis]
    negative = s.chance(0.3)
    index = s.index([s.rng.randrange(-size if negative else 0, size) for _ in range(count)])
    colons = ":, " * axis
    forms = [f"{t}[{colons}{index}]"] * 3
    if not negative:
        forms += [f"{t}.index_select({axis}, {index})"]
        if len(base.shape) == 1:
            forms += [f"{t}.gather(0, {index})", f"torch.flip({t}, (0,))[{index}]"]
    if s.chance(0.2):
        longer = s.index([s.rng.randrange(size) for _ in range(count + 1)])
        forms = [f"{t}[{colons}{longer}][{colons}1:]", f"{t}[{colons}{longer}[:-1]]"]
    if s.chance(0.15):
        forms = [f"{t}[{colons}({index} + 1) % {size}]"]
    return s.rng.choice(forms)


def flows(s: Scope, u: Value) -> Value:
    """What flows into each of a few nodes along the entries of u, without the first node; minus data."""
    flat = f"{s.let(u.text)}.reshape(-1)"
    size = math.prod(u.shape)
    nodes = s.rng.randint(2, max(2, min(4, size // 2)))
    into, out = (s.index([s.rng.randrange(nodes) for _ in range(size)]) for _ in range(2))
    zero = f"{flat}.new_zeros({nodes})"
    text = f"({zero}.index_add(0, {into}, {flat}) - {zero}.index_add(0, {out}, {flat}))[1:]"
    return Value(f"({text} - {s.data((nodes - 1,))})", (nodes - 1,), ((s.label(),),))

"""Scalar terms whose Hessian has a known structure, by construction.

In: the scope, a base value (u in some layout) and, for blocks, the labels that stay tied. Out: the text of a
scalar. Every term may have any curvature within its structure; a ridge elsewhere keeps the whole well
conditioned. Next: constraints.py.
"""

import math
from collections.abc import Callable

from tests.fuzz.scope import Scope
from tests.fuzz.values import (
    Label,
    Value,
    affine,
    contract,
    lift,
    permuted,
    pointwise,
    total,
    view,
    weighted_total,
)

Tied = frozenset[Label]
HOLE = "HOLE"  # stands for an expression while a recipe is written that two expressions go through


def _some_affine(s: Scope, v: Value, keep_unit: bool = False) -> Value:
    for _ in range(s.rng.choice([0, 1, 1, 2])):
        v = affine(s, v, keep_unit)
    return v


def linear(s: Scope, u: Value) -> str:
    """No curvature at all."""
    v = lift(s, u) if s.chance(0.3) else u
    v = view(s, v) if s.chance(0.3) else v
    return weighted_total(s, _some_affine(s, v), positive=False)


def ridge(s: Scope, u: Value) -> str:
    """c |u|^2 with a number, an input or a Parameter as factor."""
    t = s.let(u.text)
    flat = t if len(u.shape) == 1 else f"{t}.reshape(-1)"
    squared = s.rng.choice(
        [f"({t} * {t}).sum()", f"{t}.square().sum()", f"({t} ** 2).sum()", f"torch.dot({flat}, {flat})",
         f"torch.linalg.vector_norm({t}) ** 2", f"({flat} @ {flat})"]
    )  # fmt: skip
    return f"{_coefficient(s)} * {squared}"


def _coefficient(s: Scope) -> str:
    if s.chance(0.5):
        return s.rng.choice(["1.5", "2", "0.8"])
    return f"(0.8 + {s.data((), positive=True)})"


def scaled_identity(s: Scope, u: Value) -> str:
    """sum_j w_j |a u - x_j|^2 and the like: the weights have none of u's labels."""
    v = u
    for _ in range(s.rng.choice([0, 1, 1, 2])):
        v = lift(s, v, keep_unit=True)
    v = _some_affine(s, v, keep_unit=True)
    t = s.let(v.text)
    squared = Value(s.rng.choice([f"({t} ** 2)", f"{t}.square()", f"({t} * {t})"]), v.shape, v.axes)
    free = [k for k, axis in enumerate(squared.axes) if not set(axis) & u.labels]
    if free and s.chance(0.5):
        sizes = [size if k in free else 1 for k, size in enumerate(v.shape)]
        squared = Value(f"({s.data(tuple(sizes), positive=True)} * {squared.text})", v.shape, v.axes)
    if s.chance(0.2):
        return f"torch.nn.functional.mse_loss({t}, {s.data(v.shape)}, reduction='sum')"
    return f"{_coefficient(s)} * {total(s, squared)}"


def expanded_square(s: Scope, u: Value) -> str:
    """|u|^2 - 2 x'u + |x|^2, multiplied out."""
    t = s.let(u.text)
    x = s.let(s.data(u.shape))
    return f"(({t} * {t}).sum() - 2 * ({x} * {t}).sum() + ({x} * {x}).sum())"


def diagonal(s: Scope, u: Value) -> str:
    """Pointwise functions of u and data, summed over everything."""
    v = _entrywise(s, u)
    if s.chance(0.25):
        a, b = s.let(v.text), s.let(pointwise(s, Value(u.text, u.shape, u.axes)).text)
        if u.axes == v.axes:
            v = Value(s.rng.choice([f"({a} * {b})", f"({a} / (1.5 + {b} ** 2))"]), v.shape, v.axes)
    return weighted_total(s, view(s, v) if s.chance(0.3) else v)


def _entrywise(s: Scope, u: Value) -> Value:
    v = _start(s, u)
    if s.chance(0.4):
        v = lift(s, v)
    v = pointwise(s, _some_affine(s, v))
    if s.chance(0.3):
        v = pointwise(s, _some_affine(s, v))
    s.pool.append(v)
    return v


def _start(s: Scope, u: Value) -> Value:
    """u, or a value of an earlier term that is tied to all of u's labels: one node, used twice."""
    known = [v for v in s.pool if u.labels <= v.labels and len(v.shape) <= 3]
    return s.rng.choice(known) if known and s.chance(0.35) else u


def coupled(s: Scope, u: Value, tied: Tied) -> str:
    """A nonlinear function of contractions over every label of u that is not tied.

    Nothing tied: low rank plus diagonal. Some labels tied: blocks along them.
    """
    return weighted_total(s, vector_of(s, u, tied))


def vector_of(s: Scope, u: Value, tied: Tied) -> Value:
    """As `coupled` before the last sum: a tensor, for constraints.

    One contraction, or two that share all their axes: their Jacobians have the same labels and different
    coefficients.
    """
    if s.chance(0.65):
        return pointwise(s, _small(s, _contracted(s, u, tied)))
    start = _prepared(s, u, tied)
    recipe = _contract_all(s, Value(HOLE, start.shape, start.axes), u.labels - tied)
    other = pointwise(s, start) if s.chance(0.5) else affine(s, affine(s, start))
    a, b = (
        s.let(_small(s, Value(recipe.text.replace(HOLE, s.let(v.text)), recipe.shape, recipe.axes)).text)
        for v in (start, other)
    )
    if s.chance(0.5):
        a = pointwise(s, Value(a, recipe.shape, recipe.axes)).text
    text = s.rng.choice([f"({a} * {b})", f"({a} / (1.5 + {b} ** 2))", f"(0.5 * ({a} + {b}) ** 2)"])
    return Value(text, recipe.shape, recipe.axes)


def _small(s: Scope, v: Value) -> Value:
    # contractions add up entries: scaled, so that exponentials and fourth powers stay of order one
    return Value(f"(0.4 * {v.text})", v.shape, v.axes) if s.chance(0.8) else affine(s, v)


def _contracted(s: Scope, u: Value, tied: Tied) -> Value:
    return _contract_all(s, _prepared(s, u, tied), u.labels - tied)


def _contract_all(s: Scope, v: Value, labels: frozenset[Label]) -> Value:
    """Every axis with one of `labels` contracted, in random order."""
    while any(set(axis) & labels for axis in v.axes):
        v = contract(s, v, s.rng.choice([k for k, axis in enumerate(v.axes) if set(axis) & labels]))
    return v


def _prepared(s: Scope, u: Value, tied: Tied) -> Value:
    """An entrywise function of u and data, in some layout."""
    start = s.rng.choice(["plain", "shifted", "squared", "entrywise"])
    v = _start(s, u)
    v = lift(s, v) if s.chance(0.5) else v
    v = _some_affine(s, v) if start != "plain" else v
    if start == "squared":
        t = s.let(v.text)
        v = Value(f"({t} * {t})", v.shape, v.axes)
    if start == "entrywise":
        v = pointwise(s, v)
    v = Value(s.let(v.text), v.shape, v.axes)
    s.pool.append(v)
    if not tied and s.chance(0.3):
        return view(s, v)  # axes may be merged freely, since all of u's are summed
    return view(s, v, mergeable=False) if s.chance(0.3) else v


def normalised(s: Scope, u: Value, tied: Tied) -> str:
    """logsumexp, log-softmax, softmax or a norm over the labels that are not tied."""
    v = _some_affine(s, u)
    t = s.let(v.text)
    dims = tuple(k for k, axis in enumerate(v.axes) if set(axis) & (u.labels - tied))
    rest = [k for k in range(len(v.shape)) if k not in dims]
    shape, axes = tuple(v.shape[k] for k in rest), tuple(v.axes[k] for k in rest)
    form = s.rng.choice(["logsumexp", "logsumexp", "norm", "softmax"])
    if form == "softmax" and len(dims) == 1:
        name = s.rng.choice(["softmax", "log_softmax"])
        return weighted_total(s, Value(f"torch.{name}({t}, {dims[0]})", v.shape, v.axes), positive=False)
    if form == "norm":
        inner = s.let(f"(1 + torch.linalg.vector_norm({t}, dim={dims}) ** 2)")
        return weighted_total(s, Value(f"{inner}.sqrt()", shape, axes))
    return weighted_total(s, Value(f"torch.logsumexp({t}, dim={dims})", shape, axes))


def quadratic_form(s: Scope, u: Value, tied: Tied) -> str:
    """u'Q u over the labels that are not tied, Q dominated by its diagonal, one for all blocks or not."""
    last = [k for k, axis in enumerate(u.axes) if set(axis) <= tied]
    inner = [k for k in range(len(u.shape)) if k not in last]
    v = permuted(s, u, tuple(last + inner)) if len(u.shape) > 1 else u
    size, blocks = math.prod(u.shape[k] for k in inner), math.prod([u.shape[k] for k in last])
    t = s.let(f"{v.text}.reshape({blocks}, {size})" if (len(last), len(inner)) != (1, 1) else v.text)
    Q = s.let(f"{s.data((size, size))} + {size} * torch.eye({size}, dtype=torch.float64)")
    forms = [f"0.5 * torch.einsum('bi,ij,bj->', {t}, {Q}, {t})", f"0.5 * (({t} @ {Q}) * {t}).sum()"]
    forms += [f"0.5 * torch.einsum('bi,bij,bj->', {t}, {Q} * {s.data((blocks, 1, 1), positive=True)}, {t})"]
    return s.rng.choice(forms)


# --------------------------------------------------------------------------------------------------------
# terms without a promise: their Hessian is dense, or of a kind that is not built


def network(s: Scope, u: Value) -> str:
    """phi(W2 tanh(W1 u))."""
    flat, m, k, q = _flat(s, u), math.prod(u.shape), s.size(), s.size()
    hidden = pointwise(s, Value(f"(0.4 * ({s.data((k, m))} @ {flat}))", (k,), (("h",),)))
    outer = Value(f"(0.4 * ({s.data((q, k))} @ {hidden.text}))", (q,), (("o",),))
    return weighted_total(s, pointwise(s, outer))


def pairwise(s: Scope, u: Value) -> str:
    """phi(u_i - u_j), weighted with a matrix."""
    flat, m = _flat(s, u), math.prod(u.shape)
    forms = [f"({flat}[:, None] - {flat}[None, :])", f"({flat}.unsqueeze(0) - {flat}.unsqueeze(1))"]
    return weighted_total(s, pointwise(s, Value(f"(0.5 * {s.rng.choice(forms)})", (m, m), (("i",), ("j",)))))


def product_of_sums(s: Scope, u: Value) -> str:
    """(sum phi(u)) (sum psi(u)), or their quotient."""
    a, b = s.let(coupled(s, u, frozenset())), s.let(coupled(s, u, frozenset()))
    return s.rng.choice([f"0.3 * {a} * {b}", f"{a} / (2 + {b} ** 2)", f"0.3 * ({a} - {b}) ** 2"])


def scaled_by_sum(s: Scope, u: Value) -> str:
    """phi(u_i s(u)) or phi(u_i - mean(u)): every entry next to a function of all of them."""
    if s.chance(0.4):
        mean = s.rng.choice([f"{u.text}.mean()", f"{u.text}.sum() / {math.prod(u.shape)}"])
        return weighted_total(s, pointwise(s, Value(f"({u.text} - {mean})", u.shape, u.axes)))
    factor = s.let(f"torch.sigmoid({coupled(s, u, frozenset())})")
    return weighted_total(s, pointwise(s, Value(f"({u.text} * {factor})", u.shape, u.axes)))


def gram(s: Scope, u: Value) -> str:
    """phi(U U') or phi(U'Q U): u on both sides of a matrix product."""
    if len(u.shape) != 2:
        return product_of_sums(s, u)
    t, (n, k) = s.let(u.text), u.shape
    if s.chance(0.4):
        Q = s.data((n, n))
        return weighted_total(
            s, pointwise(s, Value(f"(0.2 * ({t}.mT @ {Q} @ {t}))", (k, k), (("i",), ("j",))))
        )
    return weighted_total(s, pointwise(s, Value(f"(0.2 * ({t} @ {t}.mT))", (n, n), (("i",), ("j",)))))


def crossed(s: Scope, u: Value) -> str:
    """Blocks along one label next to blocks along another, or next to a term over everything."""
    labels = sorted(u.labels)
    if len(labels) < 2:
        return network(s, u)
    parts = [coupled(s, u, frozenset([label])) for label in labels[:2]]
    if s.chance(0.5):
        parts.append(coupled(s, u, frozenset()))
    return " + ".join(parts)


def _flat(s: Scope, u: Value) -> str:
    return s.let(u.text if len(u.shape) == 1 else f"{u.text}.reshape(-1)")


def neighbours(s: Scope, u: Value) -> str:
    """phi(u_{i+1} - u_i) and other terms that read u through slices, flips, shifts and concatenations."""
    flat, m = _flat(s, u), math.prod(u.shape)
    forms = [(f"{flat}.flip(0)", m), (f"torch.roll({flat}, 1, 0)", m), (f"torch.cumsum({flat}, 0)", m)]
    forms += [(f"torch.cat([{flat}, 0.5 * {flat}])", 2 * m)]
    forms += [(f"torch.stack([{flat}, {flat} ** 2]).reshape(-1)", 2 * m)]
    forms += [(f"{flat}[: {m - 1}]", m - 1), (f"({flat}[1:] - {flat}[:-1])", m - 1)] * (m > 1)
    forms += [(f"torch.diff({flat})", m - 1), (f"{flat}[1::2]", m // 2)] * (m > 1)
    text, size = s.rng.choice(forms)
    return weighted_total(s, pointwise(s, Value(f"(0.5 * {text})", (size,), (("i",),))))


UNPROMISED: tuple[Callable[[Scope, Value], str], ...] = (
    network, pairwise, product_of_sums, scaled_by_sum, gram, crossed,
)  # fmt: skip

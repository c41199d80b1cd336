"""Symbolic first derivatives on the intermediate representation.

In: refs. Out: refs. `partial` differentiates a pointwise expression by one of its sources (a leaf or a sum), `tangent`
pushes directions forward, `adjoints` pulls one scalar back to its leaves. Next files: `derivatives/jacobian.py` and
`derivatives/curvature.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Ref, Unsupported, reachable

POINTWISE = ("prod", "add", "fn")
"""Operations that act entry by entry; everything else is a source of the expressions above it."""


def slope(build: Builder, ref: Ref, index: int) -> Ref:
    """Derivative of the pointwise function `ref` by its argument number `index`."""
    name, _ = ref.node.data
    args, _ = build.open(ref)
    a = args[0]
    one = build.number(1.0)
    if name == "where":
        zero = build.number(0.0)
        return (
            build.number(0.0)
            if index == 0
            else build.fn("where", [a, one, zero] if index == 1 else [a, zero, one])
        )
    if name == "exp":
        return ref
    if name == "log":
        return build.power(a, -1.0)
    if name == "log1p":
        return build.power(build.add([(1.0, a)], 1.0), -1.0)
    if name == "expm1":
        return build.fn("exp", [a])
    if name == "tanh":
        return build.add([(-1.0, build.power(ref, 2.0))], 1.0)
    if name == "sigmoid":
        return build.add([(1.0, ref), (-1.0, build.power(ref, 2.0))])
    if name == "sin":
        return build.fn("cos", [a])
    if name == "cos":
        return build.scale(-1.0, build.fn("sin", [a]))
    if name == "atan":
        return build.power(build.add([(1.0, build.power(a, 2.0))], 1.0), -1.0)
    if name == "erf":
        return build.scale(
            2.0 / math.sqrt(math.pi), build.fn("exp", [build.scale(-1.0, build.power(a, 2.0))])
        )
    if name == "softplus":
        return build.fn("sigmoid", [a])
    if name == "abs":
        return build.fn("sign", [a])
    if name == "cast":
        return one
    raise Unsupported(f"the function {name} has no derivative rule")


def partial(build: Builder, ref: Ref, source: Ref, memo: dict[Ref, Ref] | None = None) -> Ref:
    """Derivative of the pointwise expression `ref` by the use `source` of a leaf or a sum in it."""
    memo = {} if memo is None else memo
    if ref in memo:
        return memo[ref]
    node = ref.node
    if ref == source:
        result = build.number(1.0)
    elif node.op not in POINTWISE or not (source.node.leaves & node.leaves):
        result = build.number(0.0)
    else:
        args, _ = build.open(ref)
        inner = [partial(build, a, source, memo) for a in args]
        result = chain(build, ref, args, inner)
    memo[ref] = result
    return result


def chain(build: Builder, ref: Ref, args: tuple[Ref, ...], inner: list[Ref]) -> Ref:
    """Sum over the arguments of (slope of `ref` by the argument) * (its own derivative `inner`)."""
    node = ref.node
    if node.op == "add":
        _, coefficients = node.data
        return build.add(list(zip(coefficients, inner, strict=True)))
    if node.op == "prod":
        coefficient, powers = node.data
        terms: list[tuple[float, Ref]] = []
        for k, derivative in enumerate(inner):
            if build.is_zero(derivative):
                continue
            rest = [(a, p - 1.0 if j == k else p) for j, (a, p) in enumerate(zip(args, powers, strict=True))]
            terms.append((1.0, build.mul([*rest, (derivative, 1.0)], coefficient * powers[k])))
        return build.add(terms)
    name, _ = node.data
    if not node.leaves:
        return build.number(0.0)
    if name == "where":
        if build.is_zero(inner[1]) and build.is_zero(inner[2]):
            return build.number(0.0)
        # differentiate inside the branches: a NaN slope of the branch not taken must not leak
        return build.fn("where", [args[0], inner[1], inner[2]])
    terms = [(1.0, build.times(slope(build, ref, k), d)) for k, d in enumerate(inner) if not build.is_zero(d)]
    return build.add(terms)


def sources(build: Builder, body: Ref, leaves: frozenset[int]) -> list[Ref]:
    """The distinct uses of leaves and sums in a pointwise expression that depend on one of `leaves`."""
    found: dict[Ref, None] = {}
    seen: set[Ref] = set()

    def visit(ref: Ref) -> None:
        if ref in seen or not (ref.node.leaves & leaves):
            return
        seen.add(ref)
        if ref.node.op in POINTWISE:
            for a in build.open(ref)[0]:
                visit(a)
        else:
            found[ref] = None

    visit(body)
    return sorted(found, key=lambda r: (r.node.id, r.labels))


def tangent(
    build: Builder, ref: Ref, directions: Mapping[int, Ref], memo: dict[Ref, Ref] | None = None
) -> Ref:
    """Derivative of `ref` along `directions` (leaf id -> the direction over the leaf's own axes)."""
    memo = {} if memo is None else memo
    if ref in memo:
        return memo[ref]
    node = ref.node
    if node.id in directions:
        result = directions[node.id].rename(dict(zip(node.axes, ref.labels, strict=True)))
    elif not any(leaf in node.leaves for leaf in directions):
        result = build.number(0.0)
    elif node.op == "con":
        (body,), bound = build.open(ref)
        result = build.con(tangent(build, body, directions, memo), bound, over_batch=bool(node.data))
    elif node.op == "view":
        (leaf,), bound = build.open(ref)
        pushed = tangent(build, leaf, directions, memo)
        if build.is_zero(pushed):
            result = pushed
        elif set(pushed.labels) != set(leaf.labels):
            raise Unsupported("a slice of a direction that is constant along an axis")
        else:
            # the spec of each axis follows the axis, wherever the direction keeps it
            position = {label: k for k, label in enumerate(leaf.labels)}
            specs = tuple(node.data[position[label]] for label in pushed.labels)
            rows = {own: row for _, own, row in build.view_axes(ref, leaf)}
            kept = [rows[label] for label in pushed.labels]
            out = [row for row in kept if row is not None]
            result = build.make("view", specs, [pushed], out, bound)
    elif node.op in POINTWISE:
        args, _ = build.open(ref)
        result = chain(build, ref, args, [tangent(build, a, directions, memo) for a in args])
    else:
        raise Unsupported(f"{node.op} has no derivative rule")
    memo[ref] = result
    return result


def adjoints(build: Builder, root: Ref, leaves: frozenset[int]) -> dict[int, Ref]:
    """Derivative of the scalar `root` by every sum, view and leaf below it that depends on `leaves`.

    Returns node id -> derivative in that node's own labels. Nodes are visited from the root down, so that each is
    complete before it is used.
    """
    if root.labels:
        raise Unsupported("only scalars are pulled back")
    collected: dict[int, list[Ref]] = {}

    def spread(body: Ref, weight: Ref, scope: list[int]) -> None:
        for source in sources(build, body, leaves):
            inner = build.times(weight, partial(build, body, source))
            gone = [label for label in scope if label not in source.labels]
            piece = build.con(inner, gone)
            names = dict(zip(source.labels, source.node.axes, strict=True))
            collected.setdefault(source.node.id, []).append(piece.rename(names))

    spread(root, build.number(1.0), [])
    result: dict[int, Ref] = {}
    nodes = {node.id: node for node in reachable([root.node])}
    while True:
        open_ids = [key for key in collected if key not in result]
        if not open_ids:
            return result
        node = nodes[max(open_ids)]
        result[node.id] = build.plus(*collected[node.id])
        if node.op == "con":
            ref = build.self_ref(node)
            (body,), bound = build.open(ref)
            spread(body, result[node.id], [*ref.labels, *bound])
        elif node.op not in ("leaf", "view"):
            raise Unsupported(f"{node.op} has no derivative rule")

"""Problems whose minimum is one linear solve: a quadratic objective, affine constraints, both proved from the graph.

In: a structured plan. Out: `Minimum`, with the factorisation that it was found by: K is the same at every point, so the
derivatives need no other. Next: `optimizers/quadratic.py`, which holds the minimum against the optimality rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.derivatives.factor import KKTFactor
from implicitdiff.graph.build import REBUILT, Builder
from implicitdiff.graph.calls import Output
from implicitdiff.graph.ir import BATCHED, Ref, Unsupported, reachable
from implicitdiff.graph.record import LOCK
from implicitdiff.status import Status, is_all_ok
from implicitdiff.structured.arguments import Leaves
from implicitdiff.structured.outputs import Recipes
from implicitdiff.structured.plan import StructuredPlan
from implicitdiff.structured.writer import Recipe, Written

SMOOTH = ("leaf", "view", "prod", "add", "con")
"""Operations whose derivatives have no jumps: an |u| has H = 0 almost everywhere and is not affine."""


@dataclass(frozen=True)
class Minimum:
    """The stationary point of a quadratic problem with positive definite H.

    Attributes:
        u: leaves (B, *shape).
        multipliers: leaves (B, *shape).
        factor: K, factored.
        error: the leaves of D_u L and of h at this point, (B, *shape).
        ratio: (B,), the larger of |D_u L|_inf and |h|_inf, each over the largest entry of the vectors that cancel in
            it: H u, g and A'lam, or A u and h0.
        summands: how many terms an entry of these vectors has at most.
        good: the samples (B,) that this is the minimum of; None where it is of all.
    """

    u: Leaves
    multipliers: Leaves
    factor: KKTFactor
    error: tuple[Leaves, Leaves]
    ratio: Tensor
    summands: int
    good: Tensor | None


@dataclass(frozen=True)
class Formula:
    """The emitted function (theta) -> (u, H u, A'lam, g, lam, A u, h0, factorisation, status).

    Attributes:
        function: the function.
        positive: whether H > 0 is known without numbers.
        summands: the largest number of terms in an entry of H u, A'lam or A u.
    """

    function: Written
    positive: bool
    summands: int


def minimum(plan: StructuredPlan, theta: Leaves, batch: int) -> Minimum | None:
    """The minimum of every sample, by one factorisation of K and one solve.

    With D_u L = g + H u - A'lam and h = h0 + A u, linear in (u, lam), the system K (u, lam) = (-g, h0) is the condition
    F = 0 itself. g and h0 are the functions at u = 0 and lam = 0, taken in symbols: no product with H is spent on them.

    Args:
        plan: the plan.
        theta: inputs and tensors, as the plan takes them.
        batch: B.

    Returns:
        None where the problem is not proved quadratic, no sample's H is positive definite with a system that is OK, or
        the structure was contradicted; then an optimizer has to find out. The point is not yet held against any rule.
        Cost: that of `kkt_solve`, and one product with H, A and A'.
    """
    formula = proved(plan)
    if formula is None:
        return None
    declared, arguments = plan.declared, plan.arguments
    like = next(t for t in theta if t.is_floating_point())
    nothing = tuple(
        like.new_empty((batch, *leaf.placeholder.shape), dtype=leaf.placeholder.dtype)
        for leaf in declared.variables
    )
    out = formula.function(arguments.point(nothing, (), theta))
    made = dict(zip(formula.function.emitted.results, out, strict=True))
    made = {name: value for name, value in made.items() if not isinstance(value, Tensor)}
    good = _good(out[-1], () if formula.positive else made.values())
    if good is not None and not bool(good.any()):
        return None
    count, rows = len(declared.variables), len(declared.constraints)

    def on_u(start: int) -> Leaves:
        found = zip(out[start : start + count], nothing, strict=True)
        return tuple(x.expand(batch, *x.shape[1:]).reshape(t.shape) for x, t in found)

    def on_h(start: int) -> Leaves:
        return arguments.joined([y.expand(batch, *y.shape[1:]) for y in out[start : start + rows]], 1)

    u, curved, pulled, slope = (on_u(k * count) for k in range(4))
    lam, moved, offset = (on_h(4 * count + k * rows) for k in range(3))
    if plan.contradicted(u, lam, theta):
        return None
    # D_u L = H u + g - A'lam and h = A u + h0
    gradient = tuple(a + b - c for a, b, c in zip(curved, slope, pulled, strict=True))
    constraint = tuple(a + b for a, b in zip(moved, offset, strict=True))
    ratio = _ratio(gradient, (*curved, *slope, *pulled))
    if constraint:
        ratio = torch.maximum(ratio, _ratio(constraint, (*moved, *offset)))
    factor = plan.factored(u, lam, theta, made)
    good = None if good is None else good.expand(batch)
    return Minimum(u, lam, factor, (gradient, constraint), ratio, formula.summands, good)


def _ratio(errors: Leaves, terms: Leaves) -> Tensor:
    """The largest entry of the errors over that of the terms, (B,)."""
    sizes = [[leaf.reshape(leaf.shape[0], -1) for leaf in leaves] for leaves in (errors, terms)]
    flat = [leaves[0] if len(leaves) == 1 else torch.cat(leaves, 1) for leaves in sizes]
    error, size = (torch.linalg.vector_norm(leaf, torch.inf, 1) for leaf in flat)
    return error / size


def _good(status: Any, factors: Iterable[Any]) -> Tensor | None:
    """The samples (B,) whose system was solved with an H that is proved positive definite; None where all are.

    Each sample is judged by itself, so that its numbers do not depend on the others.
    """
    flags = []
    if isinstance(status, Tensor) and status.dtype == torch.int8 and not is_all_ok(status):
        flags.append(status == Status.OK)
    for factor in factors:
        known = factor.definite
        flags.append(torch.zeros_like(factor.status, dtype=torch.bool) if known is None else known)
    if all(bool(flag.all()) for flag in flags):
        return None
    return torch.stack(torch.broadcast_tensors(*flags)).all(0)


_FORMULAS: weakref.WeakKeyDictionary[StructuredPlan, Formula | None] = weakref.WeakKeyDictionary()


def proved(plan: StructuredPlan) -> Formula | None:
    """The formula of a plan, None where the problem is not proved quadratic: found out once."""
    if plan not in _FORMULAS:
        with LOCK:
            if plan not in _FORMULAS:
                _FORMULAS[plan] = _formula(plan)
    return _FORMULAS[plan]


def _formula(plan: StructuredPlan) -> Formula | None:
    recipes = plan.recipes
    if plan.trace.square:
        return None
    route = recipes.kkt.route
    if recipes.first != "route" or route.name == "full" or not _is_quadratic(recipes):
        return None
    divided = route.hessian.kind in ("diagonal", "scaled-identity")
    positive = False
    if divided:
        entries = [row[k].diagonal for k, row in enumerate(route.hessian.grid)]
        numbers = [None if entry is None else recipes.build.as_number(entry) for entry in entries]
        positive = all(number is not None and number > 0.0 for number in numbers)
        if not positive:
            return None  # the sign of the entries would have to be looked at
    try:
        function = plan.writer.function(
            "minimum", "minimum", "K (u, lam) = (-D_u L, h) at u = 0, lam = 0", lambda: _recipe(recipes)
        )
    except Unsupported:
        return None
    sizes = (recipes.declared.space.size, recipes.declared.constraint_space.size)
    return Formula(function, positive, max(sizes))


def _moving(recipes: Recipes) -> frozenset[int]:
    """The ids of u and lam."""
    declared, arguments = recipes.declared, recipes.arguments
    names = {arguments.of_constraint("lam", k) for k in range(len(declared.output_shapes))}
    nodes = reachable([declared.lagrangian.node])
    multipliers = (node.id for node in nodes if node.op == "leaf" and node.data[0] in names)
    return frozenset((*declared.ids, *multipliers))


def _is_quadratic(recipes: Recipes) -> bool:
    """Whether f is quadratic and h affine in u: H and A depend on neither u nor lam, and nothing has a kink."""
    declared, moving = recipes.declared, _moving(recipes)
    if any(declared.corner(c) is not None for c in declared.constraints):
        return False
    below = {node.id: node for node in reachable([declared.lagrangian.node])}
    moved: set[int] = set()
    for node in below.values():  # children come first
        if node.id in moving or any(arg.node.id in moved for arg in node.args):
            moved.add(node.id)
            if node.op not in SMOOTH:
                return False
            if node.op == "prod" and any(
                arg.node.id in moved and (power < 0.0 or power != int(power))
                for arg, power in zip(node.args, node.data[1], strict=True)
            ):
                return False
    matrices = [ref.node for term in declared.hessian_terms for ref in term.factors]
    matrices += [term.coefficient.node for c in declared.constraints for term in c.terms]
    return not any(node.id in moving for node in reachable(matrices))


def _recipe(recipes: Recipes) -> Recipe:
    declared, build, rows = recipes.declared, recipes.build, recipes.declared.space.rows
    moving = _moving(recipes)
    slopes = [_at_zero(build, ref, moving) for ref in declared.gradient(declared.lagrangian, rows)]
    values = [_at_zero(build, c.value, moving) for c in declared.constraints]
    w, s, status = recipes.kkt.solve([build.scale(-1.0, ref) for ref in slopes], values, BATCHED)
    curved, pulled, moved = recipes.kkt.terms(w, s, BATCHED)
    outputs = [Output(f"u{k}", ref, rows[k]) for k, ref in enumerate(w)]
    for name, refs in (("curved", curved), ("pulled", pulled), ("slope", slopes)):
        outputs += [Output(f"{name}{k}", ref, rows[k]) for k, ref in enumerate(refs)]
    for name, refs in (("lam", s), ("moved", moved), ("offset", values)):
        blocks = enumerate(zip(declared.constraints, refs, strict=True))
        outputs += [Output(f"{name}{k}", ref, c.labels) for k, (c, ref) in blocks]
    outputs += [Output(name, ref, (), prefix=-1) for name, ref in recipes.factors(recipes.kkt).items()]
    return Recipe([*outputs, recipes.verdict(status, s or w)], [*s, *w])


def _at_zero(build: Builder, ref: Ref, moving: frozenset[int]) -> Ref:
    """`ref` with u = 0 and lam = 0."""
    if ref.node.op in ("leaf", "view"):
        source = ref.node if ref.node.op == "leaf" else ref.node.args[0].node
        return build.number(0.0) if source.id in moving else ref
    if ref.node.op not in REBUILT:
        if any(node.id in moving for node in reachable([ref.node])):
            raise Unsupported(f"{ref.node.op} of u or lam at 0")
        return ref
    args, bound = build.open(ref)
    return build.rebuilt(ref.node, [_at_zero(build, arg, moving) for arg in args], bound)

"""Constructors of the intermediate representation; they return normal forms, so no simplification pass is needed.

In: refs and numbers. Out: refs. `x x^-1 = 1`, equal refs merge, powers add, constants fold, sums distribute over
additions, factors leave a sum that they do not take part in, and |a|^2 - 2 a'b + |b|^2 becomes |a - b|^2.
Next files: `maps.py`, `calculus.py`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from implicitdiff.graph import branches, onehot
from implicitdiff.graph.functions import FLAT, FOLD
from implicitdiff.graph.ir import UNBATCHED, Label, Labels, Node, Ref, Unsupported

Factor = tuple[Ref, float]
REBUILT = ("prod", "add", "fn", "con", "amax")
Spec = tuple[Any, ...]
"""What a view does to one axis: ("all",), ("slice", start, step, count) or ("index", k)."""
Term = tuple[float, Ref]


class Builder:
    """One expression graph: its labels, its table of known expressions."""

    def __init__(self) -> None:
        self.labels = Labels()
        self.table: dict[Hashable, Node] = {}
        self.alias: dict[int, Ref] = {}
        self.count = 0

    def make(
        self,
        op: str,
        data: Hashable,
        args: Sequence[Ref],
        out: Sequence[Label],
        bound: Sequence[Label] = (),
        *,
        prefix: int | None = None,
        leaves: frozenset[int] | None = None,
    ) -> Ref:
        """The node `op(args)` with axes `out`, summing over `bound`: a known one if it exists."""
        position = {label: k for k, label in enumerate([*out, *bound])}
        key = (
            op,
            data,
            len(out),
            tuple((a.node.id, tuple(position[b] for b in a.labels)) for a in args),
            tuple(self.labels.sizes[label] for label in [*out, *bound]),
        )
        node = self.table.get(key)
        if node is None:
            own = self.labels.fresh([*out, *bound])
            if prefix is None:
                prefix = max((a.node.prefix for a in args), default=UNBATCHED)
            if leaves is None:
                leaves = frozenset().union(*(a.node.leaves for a in args))
            node = Node(
                self.count,
                op,
                data,
                tuple(a.rename(own) for a in args),
                tuple(own[b] for b in out),
                tuple(own[b] for b in bound),
                tuple(self.labels.sizes[b] for b in out),
                prefix,
                leaves,
            )
            self.count += 1
            self.table[key] = node
        known = self.alias.get(node.id)
        if known is not None:
            return known.rename(dict(zip(node.axes, out, strict=True)))
        return Ref(node, tuple(out))

    def leaf(self, name: str, sizes: Sequence[int], prefix: int, *, differentiable: bool = True) -> Ref:
        """An input of the program. Leaves with equal names are one node."""
        axes = [self.labels.new(size) for size in sizes]
        ref = self.make("leaf", (name, tuple(sizes)), (), axes, prefix=prefix, leaves=frozenset())
        if differentiable and not ref.node.leaves:
            ref.node.leaves = frozenset([ref.node.id])
        return ref

    def open(self, ref: Ref) -> tuple[tuple[Ref, ...], tuple[Label, ...]]:
        """The arguments of a node in the labels of this use; bound labels come back fresh."""
        node = ref.node
        names = dict(zip(node.axes, ref.labels, strict=True))
        fresh = self.labels.fresh(node.bound)
        names.update(fresh)
        return tuple(a.rename(names) for a in node.args), tuple(fresh[b] for b in node.bound)

    def self_ref(self, node: Node) -> Ref:
        """The node in its own labels."""
        return Ref(node, node.axes)

    def replaced(self, refs: Sequence[Ref], zeros: Iterable[Ref]) -> list[Ref]:
        """`refs` built again with the expressions `zeros` taken as 0.

        For identities that hold at the values but not for derivatives: apply it to what is differentiated already.
        """
        self.alias = {ref.node.id: self.number(0.0) for ref in zeros}
        memo: dict[Ref, Ref] = {}
        try:
            return [self._again(ref, memo) for ref in refs] if self.alias else list(refs)
        finally:
            self.alias = {}

    def rebuilt(self, node: Node, args: Sequence[Ref], bound: Sequence[Label]) -> Ref:
        """The operation of `node`, one of `REBUILT`, on other arguments: normal forms apply again."""
        if node.op == "prod":
            return self.mul(list(zip(args, node.data[1], strict=True)), node.data[0])
        if node.op == "add":
            return self.add(list(zip(node.data[1], args, strict=True)), node.data[0])
        if node.op == "fn":
            return self.fn(node.data[0], args, node.data[1])
        if node.op == "amax":
            return self.amax(args[0], bound)
        return args[0] if self.is_zero(args[0]) else self.con(args[0], bound, over_batch=bool(node.data))

    def _again(self, ref: Ref, memo: dict[Ref, Ref]) -> Ref:
        if ref in memo:
            return memo[ref]
        result = ref
        if ref.node.op in REBUILT:
            args, bound = self.open(ref)
            result = self.rebuilt(ref.node, [self._again(a, memo) for a in args], bound)
        memo[ref] = result
        return result

    def union(self, refs: Iterable[Ref]) -> list[Label]:
        """The labels of all refs, in the order of the widest one (that decides the memory layout)."""
        order: list[Label] = []
        for ref in sorted(refs, key=lambda r: (-len(r.labels), r.node.id)):
            order.extend(label for label in ref.labels if label not in order)
        return order

    # ---------------------------------------------------------------- numbers

    def number(self, value: float) -> Ref:
        """A constant."""
        return self.make("prod", (float(value), ()), (), ())

    def as_number(self, ref: Ref) -> float | None:
        """The constant that `ref` is, or None."""
        return ref.node.data[0] if ref.node.op == "prod" and not ref.node.args else None

    def is_zero(self, ref: Ref) -> bool:
        """Whether `ref` is the constant 0."""
        return self.as_number(ref) == 0.0

    # ---------------------------------------------------------------- products

    def split(self, ref: Ref) -> tuple[float, list[Factor]]:
        """`ref` as coefficient and factors."""
        if ref.node.op != "prod":
            return 1.0, [(ref, 1.0)]
        coefficient, powers = ref.node.data
        args, _ = self.open(ref)
        return coefficient, list(zip(args, powers, strict=True))

    def mul(self, factors: Iterable[Factor], coefficient: float = 1.0) -> Ref:
        """coefficient * product of ref^power."""
        merged: dict[Ref, float] = {}
        for ref, power in factors:
            scale, inner = self._power(ref, power)
            coefficient *= scale
            for base, exponent in inner:
                merged[base] = merged.get(base, 0.0) + exponent
        if coefficient == 0.0:
            return self.make("prod", (0.0, ()), (), ())
        kept = [(ref, power) for ref, power in merged.items() if power != 0.0]
        if len(kept) == 1 and kept[0][1] == 1.0:
            alone = kept[0][0] if coefficient == 1.0 else branches.scaled(self, coefficient, kept[0][0])
            if alone is not None:
                return alone
        out = self.union(ref for ref, _ in kept)
        position = {label: k for k, label in enumerate(out)}
        kept.sort(key=lambda f: (f[0].node.id, [position[b] for b in f[0].labels], f[1]))
        return self.make("prod", (coefficient, tuple(p for _, p in kept)), [r for r, _ in kept], out)

    def _power(self, ref: Ref, power: float) -> tuple[float, list[Factor]]:
        """(ref)^power as coefficient and factors, as far as that is true for every sign."""
        if ref.node.op != "prod":
            return 1.0, [(ref, power)]
        coefficient, inner = self.split(ref)
        if power == 1.0:
            return coefficient, inner
        if not inner:
            value = coefficient**power
            return (value, []) if isinstance(value, float) else (1.0, [(ref, power)])
        if float(power).is_integer():
            if coefficient == 0.0:
                return 1.0, [(ref, power)]
            return coefficient**power, [(base, exponent * power) for base, exponent in inner]
        if coefficient > 0.0 and coefficient != 1.0:
            rest = self.mul(inner)
            scale, factors = self._power(rest, power)
            return scale * coefficient**power, factors
        if coefficient == 1.0 and len(inner) == 1 and inner[0][1] % 2 != 0.0:
            # (a^q)^p = a^(qp) when q is odd or fractional: a >= 0 is implied; for even q it would be |a|
            return 1.0, [(inner[0][0], inner[0][1] * power)]
        return 1.0, [(ref, power)]

    def times(self, *refs: Ref) -> Ref:
        """Product."""
        return self.mul([(ref, 1.0) for ref in refs])

    def scale(self, coefficient: float, ref: Ref) -> Ref:
        """coefficient * ref."""
        return self.mul([(ref, 1.0)], coefficient)

    def power(self, ref: Ref, exponent: float) -> Ref:
        """ref^exponent."""
        return self.mul([(ref, exponent)])

    # ---------------------------------------------------------------- sums

    def add(self, terms: Iterable[Term], constant: float = 0.0) -> Ref:
        """constant + sum of coefficient * ref."""
        merged: dict[Ref, float] = {}
        stack = list(terms)[::-1]
        while stack:
            coefficient, ref = stack.pop()
            if coefficient == 0.0:
                continue
            number = self.as_number(ref)
            if number is not None:
                constant += coefficient * number
            elif ref.node.op == "add" and abs(coefficient) == 1.0:
                inner_constant, inner = ref.node.data
                args, _ = self.open(ref)
                constant += coefficient * inner_constant
                stack.extend((coefficient * c, a) for c, a in reversed(list(zip(inner, args, strict=True))))
            else:
                scale, factors = self.split(ref)
                base = ref if scale == 1.0 else self.mul(factors)
                if base.node.op == "add" and abs(coefficient * scale) == 1.0:
                    stack.append((coefficient * scale, base))
                else:
                    merged[base] = merged.get(base, 0.0) + coefficient * scale
        merged = {ref: c for ref, c in merged.items() if c != 0.0}
        self._complete_squares(merged)
        if not merged:
            return self.number(constant)
        if len(merged) == 1 and constant == 0.0:
            ((ref, coefficient),) = merged.items()
            return self.mul([(ref, 1.0)], coefficient)
        out = self.union(merged)
        position = {label: k for k, label in enumerate(out)}
        ordered = sorted(merged.items(), key=lambda t: (t[0].node.id, [position[b] for b in t[0].labels]))
        return self.make("add", (constant, tuple(c for _, c in ordered)), [r for r, _ in ordered], out)

    def plus(self, *refs: Ref) -> Ref:
        """Sum."""
        return self.add([(1.0, ref) for ref in refs])

    def minus(self, a: Ref, b: Ref) -> Ref:
        """a - b."""
        return self.add([(1.0, a), (-1.0, b)])

    def _complete_squares(self, terms: dict[Ref, float]) -> None:
        """c a^2 +- 2c ab + c b^2 -> c (a +- b)^2, also below one sum: cheaper, and no digits cancel."""
        for ref in list(terms):
            if ref not in terms:
                continue
            inner: Ref = ref
            bound: tuple[Label, ...] = ()
            if ref.node.op == "con":
                (inner,), bound = self.open(ref)
            coefficient, factors = self.split(inner)
            if coefficient != 1.0 or len(factors) != 2 or any(power != 1.0 for _, power in factors):
                continue
            (a, _), (b, _) = factors
            # only the square of a difference can be summed over labels that one of the two lacks
            squares = [
                self.con(self.power(a, 2.0), [k for k in bound if k in a.labels]),
                self.con(self.power(b, 2.0), [k for k in bound if k in b.labels]),
            ]
            half = terms[ref] / 2.0
            c = abs(half)
            if squares[0] == squares[1] or any(terms.get(s) != c for s in squares):
                continue
            if any(k not in a.labels or k not in b.labels for k in bound):
                continue
            if set(a.labels) | set(b.labels) not in (set(a.labels), set(b.labels)):
                continue  # a_i - b_j would be larger than both: a product of matrices is leaner there
            for s in squares:
                del terms[s]
            del terms[ref]
            whole = self.con(self.power(self.add([(1.0, a), (math.copysign(1.0, half), b)]), 2.0), bound)
            terms[whole] = terms.get(whole, 0.0) + c

    # ---------------------------------------------------------------- functions and contractions

    def fn(self, name: str, args: Sequence[Ref], params: tuple[float, ...] = ()) -> Ref:
        """A pointwise function of refs; functions of constants fold."""
        numbers = [self.as_number(a) for a in args]
        if all(n is not None for n in numbers) and name in FOLD:
            return self.number(FOLD[name](*numbers, *params))
        if name == "where" and (normal := branches.where(self, args)) is not None:
            return normal
        leaves: frozenset[int] | None = frozenset() if name in FLAT else None
        return self.make("fn", (name, params), args, self.union(args), leaves=leaves)

    def con(self, body: Ref, labels: Iterable[Label], *, over_batch: bool = False) -> Ref:
        """Sum of `body` over `labels` (and over the batch); labels that `body` lacks multiply by their size."""
        labels = list(labels)
        present = [k for k in body.labels if k in labels]
        multiplicity = math.prod(self.labels.sizes[k] for k in labels if k not in body.labels)
        if over_batch and body.node.prefix == UNBATCHED:
            raise Unsupported("a sum over the batch of a value without batch")
        if not present and not over_batch:
            return self.scale(float(multiplicity), body)
        if body.node.op == "add" and not over_batch:
            constant, coefficients = body.node.data
            args, _ = self.open(body)
            summed = [(c, self.con(a, present)) for c, a in zip(coefficients, args, strict=True)]
            constant *= math.prod(self.labels.sizes[k] for k in present)
            return self.scale(float(multiplicity), self.add(summed, constant))
        coefficient, factors = self.split(body)
        inside = [f for f in factors if set(f[0].labels) & set(present) or (over_batch and f[0].node.prefix)]
        outside = [f for f in factors if f not in inside]
        spread = self._outer_sum(inside)
        if spread is not None and not over_batch:
            terms = [(c, self.con(self.mul([*rest, (term, 1.0)]), present)) for c, term, rest in spread]
            return self.mul([*outside, (self.add(terms), 1.0)], coefficient * multiplicity)
        inner = self.mul(inside)
        if inner.node.op == "add" and not over_batch:
            return self.mul([*outside, (self.con(inner, present), 1.0)], coefficient * multiplicity)
        if inner.node.op == "con" and not inner.node.data:
            (deeper,), below = self.open(inner)
            inner, present = deeper, [*present, *below]
        bound = [k for k in inner.labels if k in present]
        if onehot.is_one(inner, bound) and not over_batch:
            return self.mul(outside, coefficient * multiplicity)
        prefix = UNBATCHED if over_batch else inner.node.prefix
        out = [k for k in inner.labels if k not in bound]
        summed_ref = self.make("con", over_batch, [inner], out, bound, prefix=prefix)
        return self.mul([*outside, (summed_ref, 1.0)], coefficient * multiplicity)

    def _outer_sum(self, factors: Sequence[Factor]) -> list[tuple[float, Ref, list[Factor]]] | None:
        """A factor a_i + b_j that is larger than its terms and than all other factors, multiplied out.

        Its product with the others would be larger than any input; apart, each term is a product of matrices.
        """
        for k, (ref, power) in enumerate(factors):
            rest = [f for j, f in enumerate(factors) if j != k]
            if ref.node.op != "add" or power != 1.0 or not rest:
                continue
            constant, coefficients = ref.node.data
            args, _ = self.open(ref)
            if self._entries(ref) > max(self._entries(r) for r in [*args, *(f for f, _ in rest)]):
                terms = [(c, a, rest) for c, a in zip(coefficients, args, strict=True)]
                return [*terms, (constant, self.number(1.0), rest)] if constant else terms
        return None

    def _entries(self, ref: Ref) -> int:
        return math.prod(self.labels.sizes[k] for k in ref.labels)

    def amax(self, body: Ref, labels: Sequence[Label]) -> Ref:
        """Largest entry over `labels`, as a constant: only used where its derivative cancels identically."""
        bound = [k for k in body.labels if k in labels]
        out = [k for k in body.labels if k not in bound]
        return self.make("amax", None, [body], out, bound, leaves=frozenset()) if bound else body

    def view(self, leaf: Ref, specs: Sequence[Spec]) -> Ref:
        """Slices and single entries of a leaf, one `Spec` an axis."""
        out: list[Label] = []
        for spec, label in zip(specs, leaf.labels, strict=True):
            if spec[0] == "all":
                out.append(label)
            elif spec[0] == "slice":
                out.append(self.labels.new(int(spec[3])))
        bound = [label for label in leaf.labels if label not in out]
        return self.make("view", tuple(specs), [leaf], out, bound)

    def view_axes(self, ref: Ref, leaf: Ref | None = None) -> list[tuple[Spec, Label, Label | None]]:
        """(spec, label of the leaf's axis, label of the view's axis or None) for each axis of the leaf under a view."""
        if leaf is None:
            (leaf,), _ = self.open(ref)
        remaining = iter(ref.labels)
        specs: Sequence[Spec] = ref.node.data
        return [
            (spec, label, None if spec[0] == "index" else next(remaining))
            for spec, label in zip(specs, leaf.labels, strict=True)
        ]

    def hold(self, ref: Ref) -> Ref:
        """The same value, opaque: a constant for differentiation, and not expanded into sums above it."""
        if ref.node.op == "call" or self.as_number(ref) is not None:
            return ref
        return self.make("hold", None, [ref], ref.labels, leaves=frozenset())

    def eye(self, a: Label, b: Label, name: str | None = None) -> Ref:
        """The identity matrix over two labels of equal size; one that the user made has a name."""
        return self.make("eye", name, (), (a, b), prefix=UNBATCHED)

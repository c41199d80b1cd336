"""What Eqn. 3 needs of a translated problem, as refs: the Lagrangian, H and A as labelled terms, input gradients.

In: a `Program`. Out: `Declared`, whose methods build refs on demand. B and C never exist: the input gradients are one
pullback of psi = D_u L w - h's, a tangent of the Lagrangian followed by a reverse sweep. Next file: `kkt.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from implicitdiff.derivatives.curvature import quadratic_terms
from implicitdiff.derivatives.jacobian import Jacobians, JacobianTerm
from implicitdiff.graph.build import Builder
from implicitdiff.graph.calculus import adjoints, tangent
from implicitdiff.graph.ir import BATCHED, Label, Ref, Unsupported
from implicitdiff.graph.maps import pad
from implicitdiff.graph.translate import Block, Leaf, Program
from implicitdiff.graph.values import shape
from implicitdiff.structure.dependence import Constraint, Dependence, Row, find
from implicitdiff.structure.forms import Contribution, Space


@dataclass(frozen=True)
class Constrained:
    """One constraint block: its value over `labels`, and the terms of its row of A."""

    name: str
    block: Block
    value: Ref
    labels: tuple[Label, ...]
    terms: tuple[JacobianTerm, ...]


class Declared:
    """The derivatives of one program; everything is built in the program's own builder."""

    def __init__(
        self,
        program: Program,
        output_shapes: Sequence[tuple[int, ...]],
        corner: Sequence[int | None] = (),
    ) -> None:
        """Takes a program, the shapes of the outputs of `equality`, and `Trace.corner`."""
        self.program = program
        self._corner = tuple(corner)
        self.build: Builder = program.build
        self.output_shapes = tuple(output_shapes)
        self.variables: tuple[Leaf, ...] = tuple(
            l for l in program.leaves if l.placeholder.role == "variable"
        )
        self.theta: tuple[Leaf, ...] = tuple(l for l in program.leaves if l.placeholder.role != "variable")
        self.ids = frozenset(leaf.node.id for leaf in self.variables)
        self.jacobians = Jacobians(self.build, self.ids)
        self.constraints = tuple(self._constrained(k, b) for k, b in enumerate(program.blocks))
        self.space = self._space(
            [leaf.name for leaf in self.variables], [leaf.sizes for leaf in self.variables]
        )
        self.constraint_space = Space(
            tuple(c.name for c in self.constraints),
            tuple(c.labels for c in self.constraints),
            tuple(tuple(self.build.labels.fresh(c.labels).values()) for c in self.constraints),
            tuple(tuple(self.build.labels.sizes[k] for k in c.labels) for c in self.constraints),
        )

    def _space(self, names: Sequence[str], sizes: Sequence[tuple[int, ...]]) -> Space:
        def side() -> tuple[tuple[Label, ...], ...]:
            return tuple(tuple(self.build.labels.new(s) for s in block) for block in sizes)

        return Space(tuple(names), side(), side(), tuple(sizes))

    def _constrained(self, index: int, block: Block) -> Constrained:
        labels = tuple(k for dim in block.value.dims for k in dim)
        pieces = sum(b.output == block.output for b in self.program.blocks)
        name = f"equality[{block.output}]" if len(self.output_shapes) > 1 else "equality"
        if pieces > 1:
            size = shape(self.build, block.value)[block.dim]
            name = (
                f"{name}[{':, ' * block.dim}{block.offset}{'' if size == 1 else f':{block.offset + size}'}]"
            )
        return Constrained(
            name, block, block.value.ref, labels, tuple(self.jacobians.written(block.value.ref))
        )

    # ---------------------------------------------------------------- multiplier-shaped leaves

    def constraint_leaf(self, stem: str, constraint: Constrained, prefix: int = BATCHED) -> Ref:
        """The part of the leaf `stem` (one per output of `equality`) that belongs to a constraint, over its labels."""
        return self._part(self.constraint_leaf_name(stem, constraint.block.output), constraint, prefix, True)

    def corner(self, constraint: Constrained) -> Ref | None:
        """The part of the diagonal D of K's corner that belongs to a constraint, over its labels; None where D = 0."""
        index = self._corner[constraint.block.output] if self._corner else None
        return (
            None if index is None else self._part(self.program.leaves[index].name, constraint, BATCHED, False)
        )

    @property
    def cornered(self) -> bool:
        """Whether K has a corner."""
        return any(index is not None for index in self._corner)

    def _part(self, name: str, constraint: Constrained, prefix: int, moves: bool) -> Ref:
        """The part of a leaf shaped like an output of `equality` that belongs to a constraint."""
        block = constraint.block
        sizes = [self.build.labels.sizes[k] for k in constraint.labels]
        whole = sum(b.output == block.output for b in self.program.blocks) == 1
        if whole:
            return Ref(self.build.leaf(name, sizes, prefix, differentiable=moves).node, constraint.labels)
        if any(len(dim) > 1 for dim in block.value.dims):
            raise Unsupported("a concatenation of constraints whose dimensions are products of axes")
        output_shape = self.output_shapes[block.output]
        leaf = self.build.leaf(name, [s for s in output_shape if s != 1], prefix, differentiable=moves)
        size = shape(self.build, block.value)[block.dim]
        specs: list[tuple[object, ...]] = []
        for d, s in enumerate(output_shape):
            if s != 1 and d == block.dim:
                specs.append(("index", block.offset) if size == 1 else ("slice", block.offset, 1, size))
            elif s != 1:
                specs.append(("all",))
        return Ref(self.build.view(leaf, specs).node, constraint.labels)

    def constraint_leaf_name(self, stem: str, output: int) -> str:
        """`lam`, or `lam0`, `lam1`, ... where there are several outputs."""
        return stem if len(self.output_shapes) == 1 else f"{stem}{output}"

    # ---------------------------------------------------------------- the Lagrangian and its derivatives

    @cached_property
    def lagrangian(self) -> Ref:
        """L = f - lam'h."""
        terms = [(1.0, self.program.objective)]
        for c in self.constraints:
            weighted = self.build.times(self.constraint_leaf("lam", c), c.value)
            terms.append((-1.0, self.build.con(weighted, c.labels)))
        return self.build.add(terms)

    @cached_property
    def hessian_terms(self) -> list[Contribution]:
        """H = D_uu L as labelled terms; slices of a variable are deltas with places."""
        return self._hessian_terms(written=False)

    def written_hessian_terms(self) -> list[Contribution]:
        """H = D_uu L as labelled terms; slices of a variable are products with selection matrices."""
        return self._hessian_terms(written=True)

    def _hessian_terms(self, *, written: bool) -> list[Contribution]:
        index = {leaf.node.id: k for k, leaf in enumerate(self.variables)}
        return [
            Contribution(
                (index[t.row_leaf.id], index[t.column_leaf.id]),
                t.rows,
                t.columns,
                (t.row, t.middle, t.column),
                t.summed,
                t.row_places,
                t.column_places,
            )
            for t in quadratic_terms(self.build, self.jacobians, self.lagrangian, written=written)
        ]

    def anchor_terms(self, weight: Ref) -> list[Contribution]:
        """weight A'A as labelled terms, for one variable."""
        terms = []
        for c in self.constraints:
            for left in self.jacobians.of(c.value):
                for right in self.jacobians.of(c.value):
                    taken = {*left.columns, *right.columns}
                    terms.append(
                        Contribution(
                            (0, 0),
                            left.columns,
                            right.columns,
                            (weight, left.coefficient, right.coefficient),
                            tuple(k for k in c.labels if k not in taken),
                            left.places,
                            right.places,
                        )
                    )
        return terms

    @cached_property
    def dependent(self) -> Dependence | None:
        """The constraints that are proved to depend on each other."""
        rows = [
            Constraint(c.name, c.labels, tuple(Row(t.leaf, t.columns, t.coefficient) for t in c.terms))
            for c in self.constraints
        ]
        return find(self.build, rows) if rows else None

    def gradient(self, root: Ref, side: Sequence[tuple[Label, ...]]) -> list[Ref]:
        """D_u root, one ref a variable, in the labels `side`; slices of a variable are scattered back."""
        found = adjoints(self.build, root, self.ids)
        return [
            self.build.plus(*pieces) if pieces else self.build.number(0.0)
            for pieces in (
                self._collect(found, leaf, labels) for leaf, labels in zip(self.variables, side, strict=True)
            )
        ]

    def _collect(self, found: dict[int, Ref], leaf: Leaf, labels: Sequence[Label]) -> list[Ref]:
        """The derivatives by a leaf and by its slices, as refs over the leaf's labels."""
        build = self.build
        pieces = []
        nodes = {node.id: node for node in build.table.values() if node.id in found}
        for key, ref in sorted(found.items()):
            node = nodes[key]
            if node.id == leaf.node.id:
                pieces.append(ref.rename(dict(zip(node.axes, labels, strict=True))))
            elif node.op == "view" and node.args[0].node.id == leaf.node.id:
                names: dict[Label, Label] = {}
                axes = []
                for (spec, own, row), label in zip(
                    build.view_axes(build.self_ref(node)), labels, strict=True
                ):
                    if spec[0] == "all":
                        names[own] = label
                    else:
                        axes.append((spec, row, label))
                pieces.append(pad(build, ref.rename(names), axes, labels))
        return [p for p in pieces if not build.is_zero(p)]

    def constraint_tangent(self, constraint: Constrained, directions: Sequence[Ref]) -> Ref:
        """A w for one constraint; `directions` are over the variables' own axes."""
        return tangent(self.build, constraint.value, self._directions(directions))

    def _directions(self, directions: Sequence[Ref]) -> dict[int, Ref]:
        return {leaf.node.id: ref for leaf, ref in zip(self.variables, directions, strict=True)}

    def input_gradients(self, w: Sequence[Ref], s: Sequence[Ref]) -> dict[int, Ref]:
        """D_theta (D_u L w - h's) for every leaf of theta (leaf id -> ref in the leaf's own axes; absent: zero).

        `w` is over the variables' own axes, `s` over the constraints' labels; both are constants here.
        """
        build = self.build
        psi = [(1.0, tangent(build, self.lagrangian, self._directions(w)))]
        for c, weight in zip(self.constraints, s, strict=True):
            psi.append((-1.0, build.con(build.times(weight, c.value), c.labels)))
        leaves = frozenset(leaf.node.id for leaf in self.theta)
        found = adjoints(build, build.add(psi), leaves)
        out = {}
        for leaf in self.theta:
            pieces = self._collect(found, leaf, leaf.node.axes)
            total = build.plus(*pieces) if pieces else build.number(0.0)
            if not build.is_zero(total):
                out[leaf.node.id] = total
        return out

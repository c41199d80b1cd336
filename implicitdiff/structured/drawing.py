"""Fills a drawing from a structured plan: the labelled graph, and the patterns that the labels prove.

In: the declared derivatives and the forms of H and S. Out: a `Drawing`. Only reports ask for it, never a call of the
layer. Next file: `structured/patterns.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from implicitdiff.derivatives.declared import Declared
from implicitdiff.graph.drawing import DrawnNode
from implicitdiff.graph.ir import Label, Ref, Unsupported
from implicitdiff.structure.drawing import Drawing
from implicitdiff.structure.forms import Form
from implicitdiff.structured.describe import Notebook
from implicitdiff.structured.patterns import pattern_of_form, pattern_of_jacobian

_SIGNS = {
    "add": "+",
    "prod": "product",
    "eye": "identity",
    "shift": "shifted identity",
    "select": "selection",
}

LONGEST_TITLE = 24
"""A longer expression is named by its operation alone; the formula says the rest."""


def drawing(declared: Declared, hessian: Form, schur: Form | None, *, square: bool = False) -> Drawing:
    """The graph of f and of each constraint, and the patterns of H, A and S; of a residual, and of J, if `square`."""
    patterns = [pattern_of_form("J" if square else "H", declared.build, hessian)]
    if declared.constraints and not square:
        patterns.append(pattern_of_jacobian(declared))
    if schur is not None:
        patterns.append(pattern_of_form("S", declared.build, schur))
    return Drawing(_Graph(declared, square).nodes(), tuple(patterns))


class _Graph:
    """Walks from the results down; an expression keeps the letters of its first use."""

    def __init__(self, declared: Declared, square: bool) -> None:
        self.square = square
        self.declared, self.build = declared, declared.build
        self.roles = {leaf.node.id: leaf.placeholder.role for leaf in (*declared.variables, *declared.theta)}
        self.uses: dict[int, Ref] = {}
        self.arguments: dict[int, tuple[Ref, ...]] = {}
        self.notebook = Notebook(self.build)

    def nodes(self) -> tuple[DrawnNode, ...]:
        """Arguments before what is computed from them, results last."""
        results = [] if self.square else [("f", self.declared.program.objective)]
        results += [
            (c.name.replace("equality", "residual") if self.square else c.name, c.value)
            for c in self.declared.constraints
        ]
        for _, ref in results:
            self._visit(ref)
        drawn = [self._drawn(self.uses[key]) for key in sorted(self.uses)]
        for name, ref in results:
            drawn.append(
                DrawnNode(
                    f"result-{name}",
                    "result",
                    name,
                    f"{name}{self.notebook.indices(ref.labels)}",
                    self._axes(ref.labels),
                    "objective" if name == "f" else "= 0",
                    (_key(ref),),
                )
            )
        return tuple(drawn)

    def _visit(self, root: Ref) -> None:
        waiting = [root]
        while waiting:
            ref = waiting.pop()
            if ref.node.id in self.uses:
                continue
            self.uses[ref.node.id] = ref
            arguments, bound = self.build.open(ref)
            for label in (*ref.labels, *bound):
                self.notebook.letter(label)
            self.arguments[ref.node.id] = arguments
            waiting.extend(reversed(arguments))

    def _drawn(self, ref: Ref) -> DrawnNode:
        return DrawnNode(
            _key(ref),
            self._role(ref),
            self._title(ref),
            self._formula(ref),
            self._axes(ref.labels),
            self._structure(ref),
            tuple(_key(argument) for argument in self.arguments[ref.node.id]),
        )

    def _role(self, ref: Ref) -> str:
        if ref.node.op == "leaf":
            return self.roles.get(ref.node.id, "constant")
        return "operation" if ref.node.args else "constant"

    def _title(self, ref: Ref) -> str:
        node = ref.node
        number = self.build.as_number(ref)
        if number is not None:
            return f"{number:g}"
        if node.op == "con":
            summed = [k for k in self.arguments[node.id][0].labels if k not in ref.labels]
            return f"sum over {', '.join(map(self.notebook.letter, summed))}"
        written = self._formula(ref).partition(";")[0]
        if node.op in ("prod", "add", "view") and len(written) <= LONGEST_TITLE:
            return written
        if node.op == "prod":
            return " ".join("*" if power == 1.0 else f"^{power:g}" for power in node.data[1])
        if node.op in ("fn", "leaf"):
            return f"{node.data[0]}{self.notebook.indices(ref.labels) if node.op == 'leaf' else ''}"
        return _SIGNS.get(node.op, node.op)

    def _formula(self, ref: Ref) -> str:
        # A notebook that knows the same letters, so that each node's sums are defined beside it.
        own = Notebook(self.build)
        own.letters.update(self.notebook.letters)
        if ref.node.op == "con":
            (body,) = self.arguments[ref.node.id]
            summed = "".join(self.notebook.letter(k) for k in body.labels if k not in ref.labels)
            text = f"sum_{summed} {own.write(body, inside=True)}"
        else:
            text = own.write(ref)
        return "; ".join([text, *own.definitions()])

    def _axes(self, labels: Sequence[Label]) -> str:
        return ", ".join(f"{self.notebook.letter(k)} = {self.build.labels.sizes[k]}" for k in labels)

    def _structure(self, ref: Ref) -> str:
        """What D_u of the node is, by the labels that it shares with the variables."""
        try:
            terms = self.declared.jacobians.of(ref)
        except Unsupported as reason:
            return f"D_u not derived: {reason.reason}"
        if not terms:
            return "does not depend on the variables"
        curved = any(term.coefficient.node.leaves & self.declared.ids for term in terms)
        shapes = []
        for term in terms:
            tied = [k for k in term.columns if k in ref.labels]
            free = [k for k in term.columns if k not in ref.labels]
            if not free:
                shapes.append("diagonal" if set(tied) == set(ref.labels) else "one entry of u for each")
            elif tied:
                shapes.append(f"blocks, tied on {', '.join(map(self.notebook.letter, tied))}")
            else:
                shapes.append("full rows" if ref.labels else "one row")
        return f"{'curved' if curved else 'linear'} in u; D_u: {' + '.join(dict.fromkeys(shapes))}"


def _key(ref: Ref) -> str:
    return f"n{ref.node.id}"

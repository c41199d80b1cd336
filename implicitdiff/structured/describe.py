"""The derivation in symbols: H, A and S as a person would write them, in index notation.

In: forms and refs. Out: lines of text. Sums get names (s1, s2, ...) and are written once, after their first use.
Next file: `report.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from implicitdiff.derivatives.declared import Declared
from implicitdiff.graph import onehot
from implicitdiff.graph.build import Builder, Spec
from implicitdiff.graph.ir import Label, Node, Ref
from implicitdiff.structure.forms import Entry, Form, Position, SparseTerm

LETTERS = "ijklmnopqrst"
LONGEST = 400
"""A line longer than this is cut: the code says the rest."""


class Notebook:
    """Writes expressions; remembers the names of labels and of sums."""

    def __init__(self, build: Builder) -> None:
        self.build = build
        self.letters: dict[Label, str] = {}
        self.sums: dict[int, str] = {}
        self.pending: list[Node] = []

    def letter(self, label: Label) -> str:
        """i, j, k, ... in the order of appearance."""
        if label not in self.letters:
            count = len(self.letters)
            self.letters[label] = LETTERS[count % len(LETTERS)] + "'" * (count // len(LETTERS))
        return self.letters[label]

    def indices(self, labels: Sequence[Label]) -> str:
        """_ij, or nothing."""
        return f"_{''.join(self.letter(k) for k in labels)}" if labels else ""

    def write(self, ref: Ref, *, inside: bool = False) -> str:
        """An expression; `inside` puts a sum of terms into brackets."""
        number = self.build.as_number(ref)
        if number is not None:
            return f"{number:g}"
        node = ref.node
        if node.op == "con":
            if node.id not in self.sums:
                self.sums[node.id] = f"s{len(self.sums) + 1}"
                self.pending.append(node)
            return f"{self.sums[node.id]}{self.indices(ref.labels)}"
        args, bound = self.build.open(ref)
        if node.op == "prod":
            return self._product(ref)
        if node.op == "add":
            text = self._addition(ref)
            return f"({text})" if inside else text
        if node.op == "fn":
            return f"{node.data[0]}({', '.join(self.write(a) for a in args)})"
        if node.op == "amax":
            return f"max_{''.join(self.letter(k) for k in bound)} {self.write(args[0], inside=True)}"
        if node.op == "eye":
            return f"delta{self.indices(ref.labels)}"
        if node.op == "shift":
            return self.delta(ref.labels[0], ref.labels[1], node.data)
        if node.op == "hot":
            index = self.write(onehot.index_of(ref))
            return f"[{index} = {self.letter(ref.labels[-1])}]" if onehot.is_hot(ref) else f"[{index}]"
        if node.op == "pad":
            return self._padded(ref, args[0], bound)
        if node.op == "view":
            return (
                f"{args[0].node.data[0]}[{', '.join(map(self._range, node.data))}]{self.indices(ref.labels)}"
            )
        name = node.data[0] if node.op == "leaf" else f"selection{node.id}"
        return f"{name}{self.indices(ref.labels)}"

    def _padded(self, ref: Ref, inner: Ref, bound: Sequence[Label]) -> str:
        """[x_(i-1) for i = 1:9]: the entries of a slice at their places, 0 elsewhere."""
        hidden, ranges = iter(bound), []
        for spec, label in zip(ref.node.data, ref.labels, strict=True):
            if spec[0] == "all":
                continue
            letter, slot = self.letter(label), next(hidden)
            ranges.append(f"{letter} = {self._range(spec)}")
            if spec[0] == "slice":
                start, step, _ = spec[1:]
                index = f"({letter}-{start})" if start else letter
                self.letters[slot] = index if step == 1 else f"({index}/{step})"
        return f"[{self.write(inner)} for {', '.join(ranges)}]"

    @staticmethod
    def _range(spec: Spec) -> str:
        """1:9, 0:8:2, 3 or a colon: as in an index."""
        if spec[0] != "slice":
            return ":" if spec[0] == "all" else str(spec[1])
        start, step, count = spec[1:]
        end = start + step * count
        return f"{start}:{end if end >= 0 else ''}" + (f":{step}" if step != 1 else "")

    def _product(self, ref: Ref) -> str:
        coefficient, factors = self.build.split(ref)
        parts = []
        for factor, power in factors:
            text = self.write(factor, inside=True)
            parts.append(
                text if power == 1.0 else f"{text}^{power:g}" if power > 0.0 else f"{text}^({power:g})"
            )
        text = " ".join(parts)
        return (
            text if coefficient == 1.0 else f"-{text}" if coefficient == -1.0 else f"{coefficient:g} {text}"
        )

    def _addition(self, ref: Ref) -> str:
        constant, coefficients = ref.node.data
        args, _ = self.build.open(ref)
        terms = [self.build.scale(c, a) for c, a in zip(coefficients, args, strict=True)]
        texts = [self.write(term) for term in terms] + ([f"{constant:g}"] if constant else [])
        return " + ".join(texts).replace("+ -", "- ")

    def delta(self, row: Label, column: Label, offset: int) -> str:
        """1 where column = row + offset, else 0."""
        if offset == 0:
            return f"delta{self.indices([row, column])}"
        return f"delta_({self.letter(row)}{offset:+d},{self.letter(column)})"

    def definitions(self) -> list[str]:
        """`where s1_j = sum_i ...`, until no new sum turns up."""
        lines = []
        while self.pending:
            node = self.pending.pop(0)
            ref = self.build.self_ref(node)
            (body,), bound = self.build.open(ref)
            over = "".join(self.letter(k) for k in bound) + ("b" if node.data else "")
            lines.append(
                f"where {self.sums[node.id]}{self.indices(ref.labels)} = sum_{over} {self.write(body, inside=True)}"
            )
        return [_cut(line) for line in lines]

    def entry(self, entry: Entry, rows: Sequence[Label], columns: Sequence[Label]) -> str:
        """One block of a matrix: its parts added."""
        parts = []
        if entry.diagonal is not None:
            delta = "".join(f"delta{self.indices([a, b])} " for a, b in zip(rows, columns, strict=True))
            parts.append(f"{delta}{self.write(entry.diagonal, inside=True)}")
        for axes, ref in entry.partial:
            delta = "".join(f"delta{self.indices([rows[k], columns[k]])} " for k in sorted(axes))
            parts.append(f"{delta}{self.write(ref, inside=True)}")
        for band in entry.bands:
            tied = zip(rows, columns, band.offsets, strict=True)
            delta = "".join(f"{self.delta(a, b, offset)} " for a, b, offset in tied if offset is not None)
            parts.append(f"{delta}{self.write(band.value, inside=True)}")
        for term in entry.low_rank:
            product = self.write(self.build.times(term.left, term.weights, term.right))
            over = "".join(self.letter(k) for k in term.rank)
            parts.append(f"sum_{over} {product}" if over else product)
        parts += [self.write(ref, inside=True) for ref in entry.dense]
        return " + ".join(parts).replace("+ -", "- ") if parts else "0"

    def pattern(self, terms: Sequence[SparseTerm]) -> list[str]:
        """A line for each sparse term: H[i_e, j_e] += value."""

        def place(p: Position) -> str:
            if p.index is not None:
                return self.write(p.index)
            if p.label is None:
                return str(p.start)
            letter = self.letter(p.label)
            moved = f"{p.step}{letter}" if p.step != 1 else letter
            return f"{moved}{p.start:+d}" if p.start else moved

        lines = []
        for term in terms:
            rows, columns = (" ".join(map(place, side)) for side in (term.rows, term.columns))
            lines.append(f"H[{rows}, {columns}] += {self.write(term.value)}")
        return lines


def derivation(declared: Declared, hessian: Form, schur: Form | None, common: str = "") -> tuple[str, ...]:
    """The lines: H, A, S by blocks, then the sums they name."""
    notebook = Notebook(declared.build)
    lines = []
    space = hessian.space
    if hessian.kind == "sparse":
        lines += notebook.pattern(hessian.pattern)
    for k, row in enumerate(() if hessian.kind == "sparse" else hessian.grid):
        for j, entry in enumerate(row):
            if j < k or (entry.empty and j != k):
                continue
            where = "" if len(space.names) == 1 else f"[{space.names[k]}, {space.names[j]}]"
            text = notebook.entry(entry, space.rows[k], space.columns[j])
            lines.append(
                f"H{where}{notebook.indices(space.rows[k])}{_comma(notebook, space.columns[j])} = {text}"
            )
    for c in declared.constraints:
        for term in c.terms:
            value = notebook.write(term.coefficient)
            variable = next(leaf.name for leaf in declared.variables if leaf.node.id == term.leaf.id)
            lines.append(
                f"d {c.name}{notebook.indices(c.labels)} / d {variable}{notebook.indices(term.columns)} = {value}"
            )
    if schur is not None:
        labels = schur.space
        for k, row in enumerate(schur.grid):
            for j, entry in enumerate(row):
                if j < k or entry.empty:
                    continue
                where = "" if len(labels.names) == 1 else f"[{k}, {j}]"
                text = notebook.entry(entry, labels.rows[k], labels.columns[j])
                lines.append(
                    f"S{where}{notebook.indices(labels.rows[k])}{_comma(notebook, labels.columns[j])} = {common}{text}"
                )
    return tuple([_cut(line) for line in lines] + notebook.definitions())


def jacobian_derivation(declared: Declared, form: Form) -> tuple[str, ...]:
    """The lines for a system of equations: J by blocks, then the sums it names."""
    notebook, space, lines = Notebook(declared.build), form.space, []
    for k, row in enumerate(form.grid):
        for j, entry in enumerate(row):
            if entry.empty and j != k:
                continue
            where = "" if len(space.names) == 1 else f"[{space.names[k]}, {space.names[j]}]"
            text = notebook.entry(entry, space.rows[k], space.columns[j])
            lines.append(
                f"J{where}{notebook.indices(space.rows[k])}{_comma(notebook, space.columns[j])} = {text}"
            )
    return tuple([_cut(line) for line in lines] + notebook.definitions())


def _comma(notebook: Notebook, labels: Sequence[Label]) -> str:
    return f",{''.join(notebook.letter(k) for k in labels)}" if labels else ""


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else line[: LONGEST - 4] + " ..."

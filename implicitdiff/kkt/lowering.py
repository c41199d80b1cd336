"""Symbolic forms as calls in the emitted code: pack, build the operator, factor, solve, unpack.

In: forms and refs. Out: refs of calls (`graph.emit.call`). Vectors are flat (..., B, m) inside solvers, and
have the variable's own axes outside. Next file: `route.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from implicitdiff.graph.build import Builder
from implicitdiff.graph.calls import call
from implicitdiff.graph.ir import BATCHED, UNBATCHED, Label, Ref
from implicitdiff.graph.maps import shift
from implicitdiff.kkt import patterns
from implicitdiff.structure.forms import Band, Entry, Form, LowRankTerm, Space

Arguments = list[tuple[Ref, Sequence[Label], int]]
"""Of a call: refs, the order of their axes, the least number of leading axes."""


def flat_text(sizes: Sequence[Sequence[int]]) -> str:
    """Template that joins blocks with the given axes to one flat vector."""
    parts = []
    for k, axes in enumerate(sizes):
        end = {0: "[..., None]", 1: ""}.get(len(axes), f".flatten(-{len(axes)})")
        parts.append(f"{{{k}}}{end}")
    return parts[0] if len(parts) == 1 else f"saddle.beside({', '.join(parts)})"


def renumbered(text: str, count: int, start: int) -> str:
    """A template whose arguments {0}, {1}, ... become {start}, {start + 1}, ...: to join argument lists."""
    return text.format(*(f"{{{start + k}}}" for k in range(count)))


def pack(
    build: Builder, space: Space, refs: Sequence[Ref], side: Sequence[Sequence[Label]], prefix: int
) -> Ref:
    """The blocks joined to a flat vector, over one label."""
    out = build.labels.new(space.size)
    args = [(ref, tuple(labels), prefix) for ref, labels in zip(refs, side, strict=True)]
    vector = len(args) == 1 and len(space.sizes[0]) == 1
    if vector and set(refs[0].labels) == set(side[0]) and refs[0].node.prefix >= prefix:
        return refs[0].rename({side[0][0]: out})
    prefix = max([prefix, *(ref.node.prefix for ref in refs)])
    return call(build, flat_text(space.sizes), [(r, labels, prefix) for r, labels, _ in args], (out,), prefix)


def unpack(
    build: Builder, space: Space, flat: Ref, side: Sequence[Sequence[Label]], names: Sequence[str | None]
) -> list[Ref]:
    """A flat vector as the blocks with their own axes."""
    if len(space.sizes) == 1 and len(space.sizes[0]) == 1:
        return [flat.rename({flat.labels[0]: side[0][0]})]
    refs, start = [], 0
    for k, axes in enumerate(space.sizes):
        end = start + space.entries(k)
        text = "{0}" if len(space.sizes) == 1 else f"{{0}}[..., {start}:{end}]"
        if len(axes) != 1:
            text = f"{text}[..., 0]" if not axes else f"{text}.unflatten(-1, ({', '.join(map(str, axes))}))"
        refs.append(
            call(build, text, [(flat, flat.labels, flat.node.prefix)], side[k], flat.node.prefix, names[k])
        )
        start = end
    return refs


def solve(build: Builder, factor: Ref, rhs: Ref, name: str | None = None) -> Ref:
    """factor.solve(rhs) for a flat right-hand side."""
    return call(
        build,
        "{0}.solve({1})",
        [(factor, (), -1), (rhs, rhs.labels, max(rhs.node.prefix, BATCHED))],
        rhs.labels,
        max(rhs.node.prefix, BATCHED),
        name,
    )


def factorised(build: Builder, operator: Ref, solver: str, name: str) -> Ref:
    """The factorisation object; `solver` is the class name."""
    return call(build, f"solvers.{solver}().factor({{0}})", [(operator, (), -1)], (), BATCHED, name)


def status_of(build: Builder, factor: Ref) -> Ref:
    """factor.status, (B,)."""
    return call(build, "{0}.status", [(factor, (), -1)], (), BATCHED, "status")


# -------------------------------------------------------------------- dense matrices


def product(build: Builder, term: LowRankTerm) -> Ref:
    """left diag(weights) right' written out."""
    return build.con(build.times(term.left, term.weights, term.right), term.rank)


def written_out(build: Builder, entry: Entry, rows: Sequence[Label], columns: Sequence[Label]) -> Ref | None:
    """Everything of an entry but its diagonal, over rows and columns; None where there is nothing."""
    pieces = [*entry.dense, *(product(build, t) for t in entry.low_rank)]
    for axes, ref in entry.partial:
        pieces.append(build.times(ref, *(build.eye(rows[k], columns[k]) for k in sorted(axes))))
    pieces += [deltas(build, band, rows, columns, range(len(rows))) for band in entry.bands]
    total = build.plus(*pieces) if pieces else None
    return None if total is None or build.is_zero(total) else total


def deltas(
    build: Builder, band: Band, rows: Sequence[Label], columns: Sequence[Label], axes: Iterable[int]
) -> Ref:
    """The value of a term, its ties along `axes` written out as matrices."""
    ties = [(rows[k], columns[k], offset) for k in axes if (offset := band.offsets[k]) is not None]
    return build.times(band.value, *(shift(build, *tie) for tie in ties))


def dense_block(
    build: Builder, entry: Entry, rows: Sequence[Label], columns: Sequence[Label], sizes: tuple[int, int]
) -> tuple[str, list[tuple[Ref, Sequence[Label], int]]]:
    """Template (with {0}, {1}) and arguments of one block as a matrix (B, rows, columns)."""
    whole = written_out(build, entry, rows, columns)
    args: list[tuple[Ref, Sequence[Label], int]] = []
    if whole is None:
        text = f"{{0}}.new_zeros(1, {sizes[0]}, {sizes[1]})"
        args.append((like(build), (), UNBATCHED))
    else:
        simple = len(rows) == 1 and len(columns) == 1
        text = "{0}" if simple else f"saddle.matrix({{0}}, {len(rows)}, {len(columns)})"
        args.append((whole, (*rows, *columns), BATCHED))
    if entry.diagonal is not None:
        if entry.diagonal.labels:
            text = f"saddle.with_diagonal({text}, {flat_text([rows]).replace('{0}', '{1}')})"
            args.append((entry.diagonal, rows, BATCHED))
        else:
            text = f"saddle.with_diagonal({text}, {{1}}[:, None])"
            args.append((entry.diagonal, (), BATCHED))
    return text, args


def like(build: Builder) -> Ref:
    """Any tensor of the right dtype and device: the first leaf of the variables."""
    node = next(node for node in build.table.values() if node.op == "leaf")
    return call(build, "{0}", [(build.self_ref(node), node.axes, UNBATCHED)], (), node.prefix)


def dense_matrix(build: Builder, form: Form) -> Ref:
    """The whole matrix (B, m, m), over two labels."""
    space = form.space
    if form.kind in ("banded", "sparse", "sum"):
        out = (build.labels.new(space.size), build.labels.new(space.size))
        return call(build, "{0}.to_dense()", [(operator(build, form), (), -1)], out, BATCHED)
    return joined(
        build,
        [
            [
                (form.grid[a][b], space.rows[a], space.columns[b], (space.entries(a), space.entries(b)))
                for b in range(len(space.names))
            ]
            for a in range(len(space.names))
        ],
    )


def joined(
    build: Builder, cells: Sequence[Sequence[tuple[Entry, Sequence[Label], Sequence[Label], tuple[int, int]]]]
) -> Ref:
    """A grid of entries as one matrix over two labels."""
    out = (
        build.labels.new(sum(row[0][3][0] for row in cells)),
        build.labels.new(sum(c[3][1] for c in cells[0])),
    )
    args: list[tuple[Ref, Sequence[Label], int]] = []
    rows = []
    for row in cells:
        texts = []
        for entry, labels, columns, sizes in row:
            text, own = dense_block(build, entry, labels, columns, sizes)
            texts.append(renumbered(text, len(own), len(args)))
            args += own
        rows.append(f"[{', '.join(texts)}]")
    text = rows[0][1:-1] if len(cells) == 1 and len(cells[0]) == 1 else f"saddle.grid([{', '.join(rows)}])"
    return call(build, text, args, out, BATCHED)


# -------------------------------------------------------------------- operators


def operator(build: Builder, form: Form, kind: str | None = None) -> Ref:
    """The operator object of a form (or its dense twin, `kind="dense"`)."""
    kind = form.kind if kind is None else kind
    space = form.space
    if kind == "zero":
        return call(
            build,
            f"operators.ScaledIdentity({{0}}.new_zeros(1), {space.size})",
            [(like(build), (), UNBATCHED)],
            (),
            BATCHED,
        )
    if kind == "scaled-identity":
        scale = form.entry.diagonal
        assert scale is not None
        return call(
            build, f"operators.ScaledIdentity({{0}}, {space.size})", [(scale, (), BATCHED)], (), BATCHED
        )
    if kind == "diagonal":
        refs = [form.grid[k][k].diagonal for k in range(len(space.names))]
        args = [(ref, space.rows[k], BATCHED) for k, ref in enumerate(refs) if ref is not None]
        return call(build, f"operators.Diagonal({flat_text(space.sizes)})", args, (), BATCHED)
    if kind == "sparse":
        return patterns.operator(build, form)
    if kind == "block-diagonal":
        return _block_diagonal(build, form)
    if kind == "grouped":
        return _grouped(build, form)
    if kind == "banded":
        return _banded(build, form)
    if kind == "kronecker":
        return _kronecker(build, form)
    if kind == "low-rank-plus-diagonal":
        return _low_rank(build, form)
    if kind == "sum" and form.base is not None:
        summands: Arguments = [(operator(build, form.base), (), -1)]
        sides = ", ".join(_factors(form, summands))
        return call(build, f"operators.LowRankUpdate({{0}}, {sides})", summands, (), BATCHED)
    whole = dense_matrix(build, form)
    return call(build, "operators.Dense({0}, symmetric=True)", [(whole, whole.labels, BATCHED)], (), BATCHED)


def _block_diagonal(build: Builder, form: Form) -> Ref:
    rows, columns = form.space.rows[0], form.space.columns[0]
    shared = sorted(form.shared)
    inside = [k for k in range(len(rows)) if k not in form.shared]
    pieces = [deltas(build, band, rows, columns, inside) for band in form.entry.tied(len(rows))]
    order = [*(rows[k] for k in shared), *(rows[k] for k in inside), *(columns[k] for k in inside)]
    text = "{0}" if len(shared) == 1 else f"{{0}}.flatten(1, {len(shared)})"
    if len(inside) > 1:
        text = f"saddle.matrix({text}, {len(inside)}, {len(inside)})"
    sizes = form.space.sizes[0]
    return call(
        build,
        f"operators.BlockDiagonal({text}, {tuple(sizes)}, {tuple(shared)})",
        [(build.plus(*pieces), order, BATCHED)],
        (),
        BATCHED,
    )


def _grouped(build: Builder, form: Form) -> Ref:
    """Blocks of low rank plus diagonal: the axes that number the blocks come first on every factor."""
    rows, columns = form.space.rows[0], form.space.columns[0]
    shared = sorted(form.shared)
    blocks, own = ([rows[k] for k in shared], [k for k in range(len(rows)) if k not in form.shared])
    diagonal = form.entry.diagonal
    assert diagonal is not None
    joined = "" if len(shared) == 1 else f".flatten(1, {len(shared)})"
    inner = "" if len(own) == 1 else f".flatten(2, {1 + len(own)})"
    args: Arguments = [(diagonal, [*blocks, *(rows[k] for k in own)], BATCHED)]
    parts = [f"{{0}}{joined}{inner}"]
    symmetric = all(is_symmetric(t, rows, columns) for t in form.grouped)
    sides: list[list[str]] = [[], [], []]
    for term in form.grouped:
        chosen = [(term.left, rows, sides[0]), (term.weights, (), sides[1])]
        chosen += [] if symmetric else [(term.right, columns, sides[2])]
        for ref, labels, texts in chosen:
            text = f"{{{len(args)}}}{joined}{inner if labels else ''}"
            end = (
                "[..., None]"
                if not term.rank
                else f".flatten(-{len(term.rank)})"
                if len(term.rank) > 1
                else ""
            )
            texts.append(f"{text}{end}")
            args.append((ref, [*blocks, *(labels[k] for k in own if labels), *term.rank], BATCHED))
    texts = [side[0] if len(side) == 1 else f"saddle.beside({', '.join(side)})" for side in sides if side]
    parts += [*texts, *(["None"] if symmetric else [])]
    where = f"{tuple(form.space.sizes[0])}, {tuple(shared)}"
    return call(build, f"operators.GroupedLowRank({', '.join(parts)}, {where})", args, (), BATCHED)


def _kronecker(build: Builder, form: Form) -> Ref:
    """One matrix for each group of axes."""
    rows, columns = form.space.rows[0], form.space.columns[0]
    args, texts = [], []
    for number, factor in enumerate(form.factors):
        value = build.plus(*(deltas(build, term, rows, columns, factor.axes) for term in factor.terms))
        order = [*(rows[k] for k in factor.axes), *(columns[k] for k in factor.axes)]
        args.append((value, order, BATCHED))
        count = len(factor.axes)
        texts.append(f"{{{number}}}" if count == 1 else f"saddle.matrix({{{number}}}, {count}, {count})")
    groups = tuple(factor.axes for factor in form.factors)
    return call(
        build,
        f"operators.Kronecker(({', '.join(texts)},), {tuple(form.space.sizes[0])}, {groups})",
        args,
        (),
        BATCHED,
    )


def _banded(build: Builder, form: Form) -> Ref:
    """One tensor for each place of the band, over (chains, rows along it, rows and columns inside a block)."""
    rows, columns, chain = form.space.rows[0], form.space.columns[0], form.chain
    assert chain is not None
    chains, inside = sorted(form.shared), inner_axes(form)
    places: list[list[Ref]] = [[] for _ in range(2 * chain.reach + 1)]
    for band in form.entry.tied(len(rows)):
        offset = band.offsets[chain.axis]
        assert offset is not None
        places[chain.reach + offset].append(deltas(build, band, rows, columns, inside))
    order = [
        *(rows[k] for k in (*chains, chain.axis, *inside)),
        *(columns[k] for k in inside),
    ]
    bands = ", ".join(f"{{{k}}}" for k in range(len(places)))
    return call(
        build,
        f"operators.Banded(saddle.bands(({bands}), {len(chains)}, {len(inside)}), {tuple(form.space.sizes[0])}, "
        f"{chain.axis}, {tuple(chains)}, {chain.reach}, {chain.reach})",
        [(build.plus(*refs), order, BATCHED) for refs in places],
        (),
        BATCHED,
    )


def inner_axes(form: Form) -> list[int]:
    """The axes inside the blocks of a banded form."""
    axis = form.chain.axis if form.chain is not None else -1
    return [k for k in range(len(form.space.sizes[0])) if k != axis and k not in form.shared]


def _low_rank(build: Builder, form: Form) -> Ref:
    rows, diagonal = form.space.rows[0], form.entry.diagonal
    assert diagonal is not None
    args: Arguments = []
    if diagonal.labels:
        args.append((diagonal, rows, BATCHED))
        parts = [flat_text([rows])]
    else:
        args.append((diagonal, (), BATCHED))
        parts = ["{0}[:, None]"]
    parts += _factors(form, args)
    return call(build, f"operators.LowRankPlusDiagonal({', '.join(parts)})", args, (), BATCHED)


def _factors(form: Form, args: Arguments) -> list[str]:
    """Templates of the joined sides and weights of the low-rank terms; arguments are appended to `args`."""
    entry, rows, columns = form.entry, form.space.rows[0], form.space.columns[0]
    lefts, weights, rights = [], [], []
    symmetric = all(is_symmetric(t, rows, columns) for t in entry.low_rank)
    for term in entry.low_rank:
        lefts.append(_side(len(args), len(rows), len(term.rank)))
        args.append((term.left, (*rows, *term.rank), BATCHED))
        weights.append(_side(len(args), 0, len(term.rank)))
        args.append((term.weights, term.rank, BATCHED))
        if not symmetric:
            rights.append(_side(len(args), len(columns), len(term.rank)))
            args.append((term.right, (*columns, *term.rank), BATCHED))
    sides = (lefts, weights, *([rights] if rights else []))
    return [side[0] if len(side) == 1 else f"saddle.beside({', '.join(side)})" for side in sides]


def _side(index: int, axes: int, rank: int) -> str:
    """Template of a factor (B, m, k) (or of weights (B, k), axes = 0) from its labelled axes."""
    text = f"{{{index}}}"
    if rank == 0:
        text = f"{text}[..., None]"
    elif rank > 1:
        text = f"{text}.flatten(-{rank})"
    return text if axes < 2 else f"{text}.flatten(1, {axes})"


def is_symmetric(term: LowRankTerm, rows: Sequence[Label], columns: Sequence[Label]) -> bool:
    """Whether the right side is the left one."""
    return term.right.rename(dict(zip(columns, rows, strict=True))) == term.left

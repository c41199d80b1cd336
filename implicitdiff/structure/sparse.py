"""Sparse matrices: terms whose entries lie at places that index tensors, slices and deltas name.

In: `Contribution`s. Out: `SparseTerm`s: a value over a few labels, and for each side the place of an entry as a
function of these labels. The pattern is proved from the graph; the numbers in it (which node an edge ends at) are data.
A term with a label that rows and columns share has as many entries as its labels, not m^2. Next file: `sums.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from implicitdiff.graph import onehot
from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Label, Ref
from implicitdiff.graph.maps import Place, pad, selection, start_and_step
from implicitdiff.structure.forms import Band, Contribution, Entry, Form, Position, Space, SparseTerm

MOST_PRODUCTS = 64
"""A coefficient that is a sum over more one-hot products than this is not multiplied out."""


def indexed(build: Builder, term: Contribution) -> bool:
    """Whether a term is more than equal labels: slices, index tensors or a tie of two different axes are in it."""
    crossed = any(k in term.columns and term.columns[n] != k for n, k in enumerate(term.rows))
    return crossed or term.has_places or any(_mentions(build, f) for f in term.factors)


def _mentions(build: Builder, ref: Ref) -> bool:
    if ref.node.op == "add":
        return any(_mentions(build, a) for a in build.open(ref)[0])
    return onehot.has_hot(build, ref)


def terms_of(build: Builder, term: Contribution, *, loose: bool = False) -> list[SparseTerm] | None:
    """A contribution as sparse terms; None where nothing ties its rows to its columns (unless `loose`)."""
    products = _products(build, build.times(*term.factors))
    if products is None:
        return None
    found = []
    for product in products:
        made = _sparse(build, term, product, loose)
        if made is None:
            return None
        found.append(made)
    return found


def _products(build: Builder, product: Ref) -> list[Ref] | None:
    """Multiplied out wherever an addition has one-hot matrices in it."""
    done, work = [], [product]
    while work:
        ref = work.pop()
        coefficient, factors = build.split(ref)
        at = next(
            (
                k
                for k, (f, p) in enumerate(factors)
                if f.node.op == "add" and p == 1.0 and _mentions(build, f)
            ),
            None,
        )
        if at is None:
            done.append(ref)
            continue
        rest = [f for k, f in enumerate(factors) if k != at]
        constant, weights = factors[at][0].node.data
        args, _ = build.open(factors[at][0])
        work += [build.mul([*rest, (a, 1.0)], coefficient * c) for c, a in zip(weights, args, strict=True)]
        work += [build.mul(rest, coefficient * constant)] if constant else []
        if len(done) + len(work) > MOST_PRODUCTS:
            return None
    return done


def _sparse(build: Builder, term: Contribution, product: Ref, loose: bool) -> SparseTerm | None:
    coefficient, factors = build.split(product)
    tied = set(term.rows) & set(term.columns)
    used: list[Ref] = []

    def position(label: Label, place: Place | None) -> Position | None:
        own = [ref for ref, _ in factors if onehot.is_hot(ref) and onehot.column_of(ref) == label]
        if label in tied or not own:
            if place is not None and place[0] == "index":
                return Position(None, int(place[1]), 0)
            return Position(label, *start_and_step(place))
        if len(own) > 1 or place is not None:
            return None
        used.append(own[0])
        return Position(None, 0, 1, onehot.index_of(own[0]), own[0].node.data)

    sides = []
    for labels, places in ((term.rows, term.row_places), (term.columns, term.column_places)):
        side = [position(k, p) for k, p in zip(labels, places or (None,) * len(labels), strict=True)]
        if any(p is None for p in side):
            return None
        sides.append(tuple(p for p in side if p is not None))
    rows, columns = sides
    on_rows, on_columns = labels_of(rows), labels_of(columns)
    if not loose and on_rows and on_columns and not set(on_rows) & set(on_columns):
        return None
    labels = tuple(dict.fromkeys((*on_rows, *on_columns)))
    rest = [(ref, power) for ref, power in factors if ref not in used]
    value = build.con(build.mul(rest, coefficient), [k for k in term.summed if k not in labels])
    return SparseTerm(term.block, labels, value, rows, columns)


def labels_of(side: Iterable[Position]) -> list[Label]:
    """The labels that the places of a side are functions of."""
    found: list[Label] = []
    for p in side:
        own = (() if p.index is None else p.index.labels) if p.label is None else (p.label,)
        found += [k for k in own if k not in found]
    return found


def merged(build: Builder, terms: Sequence[SparseTerm]) -> tuple[SparseTerm, ...]:
    """Terms of equal places become one; what is zero vanishes."""
    known: dict[object, SparseTerm] = {}
    for term in terms:
        where = {k: n for n, k in enumerate(term.labels)}
        key = (
            term.block,
            tuple(build.labels.sizes[k] for k in term.labels),
            tuple(tuple(_key(p, where) for p in side) for side in (term.rows, term.columns)),
        )
        first = known.get(key)
        if first is not None:
            names = dict(zip(term.labels, first.labels, strict=True))
            term = replace(first, value=build.plus(first.value, term.value.rename(names)))
        known[key] = term
    return tuple(t for t in known.values() if not build.is_zero(t.value))


def _key(position: Position, where: dict[Label, int]) -> object:
    index = position.index
    ends = None if index is None else (index.node.id, tuple(where[k] for k in index.labels))
    label = None if position.label is None else where[position.label]
    return (label, position.start, position.step, ends, position.where)


def collected(build: Builder, terms: Sequence[Contribution]) -> tuple[SparseTerm, ...] | None:
    """All terms as sparse ones; None where one is not."""
    found: list[SparseTerm] = []
    for term in terms:
        own = terms_of(build, term)
        if own is None:
            return None
        found += own
    return merged(build, found)


def form_of(build: Builder, space: Space, terms: Sequence[Contribution]) -> Form | None:
    """The form of a matrix over one variable all of whose terms are sparse: diagonal, block-diagonal or sparse."""
    pattern = collected(build, terms)
    if pattern is None or len(space.names) != 1:
        return None
    empty = ((Entry(),),)
    if not pattern:
        return Form(space, empty, "zero", "no term depends on two derivatives by the variables")
    rows, columns = space.rows[0], space.columns[0]
    if all(t.rows == t.columns for t in pattern) and any(_covers(build, t, space) for t in pattern):
        diagonal = build.plus(*(_written(build, t, rows, rows, range(len(rows))) for t in pattern))
        reason = "every term ties all axes of the variable to themselves"
        return Form(space, ((Entry(diagonal=diagonal),),), "diagonal", reason)
    shared = frozenset(k for k in range(len(rows)) if all(_plain(build, t, k, space) for t in pattern))
    if shared:
        refs = [_written(build, t, rows, columns, shared) for t in pattern]
        entry = Entry(partial=((shared, build.plus(*refs)),))
        reason = f"every term ties axis {', '.join(map(str, sorted(shared)))} of the variable to itself"
        return Form(space, ((entry,),), "block-diagonal", reason, shared, pattern=pattern)
    if not any(t.labels for t in pattern if t.rows != t.columns):
        return None  # products of a few single entries: of low rank, whatever the sizes
    sides = [p for t in pattern for p in (*t.rows, *t.columns)]
    names = dict.fromkeys(
        p.index.node.data[0] for p in sides if p.index is not None and p.index.node.op == "leaf"
    )
    by = f"index tensors ({', '.join(map(str, names))})" if names else "slices"
    entries = sum(_entries(build, t.labels) for t in pattern)
    return Form(
        space,
        empty,
        "sparse",
        f"every term ties rows to columns, by {by}: at most {entries} of {space.size**2} entries",
        pattern=pattern,
    )


def _entries(build: Builder, labels: Iterable[Label]) -> int:
    out = 1
    for label in labels:
        out *= build.labels.sizes[label]
    return out


def _covers(build: Builder, term: SparseTerm, space: Space) -> bool:
    """Whether a term has an entry in every row for every value of the inputs."""
    return all(_plain(build, term, k, space) for k in range(len(term.rows)))


def _plain(build: Builder, term: SparseTerm, axis: int, space: Space) -> bool:
    """Whether a term ties an axis to itself, along the whole of it."""
    row = term.rows[axis]
    whole = row.label is not None and (row.start, row.step) == (0, 1)
    return (
        whole
        and row == term.columns[axis]
        and build.labels.sizes[row.label] == space.sizes[0][axis]  # type: ignore[index]
        and labels_of(p for k, p in enumerate(term.rows) if k != axis).count(row.label) == 0  # type: ignore[arg-type]
    )


def _written(
    build: Builder, term: SparseTerm, rows: Sequence[Label], columns: Sequence[Label], tied: Iterable[int]
) -> Ref:
    """A term over the space's own labels; the axes `tied` have a row label only."""
    sizes = build.labels.sizes
    ends = list(zip(term.rows, rows, strict=True))
    ends += [(p, columns[k]) for k, p in enumerate(term.columns) if k not in tied]
    names: dict[Label, Label] = {}
    factors: list[Ref] = []
    placed: list[tuple[Place | None, Label | None, Label]] = []
    for position, outer in ends:
        label = position.label
        if position.index is not None and position.where is not None:
            factors.append(onehot.hot(build, position.index, position.where, outer))
        elif label is None:
            placed.append((("index", position.start), None, outer))
        elif label not in names and (position.start, position.step, sizes[label]) == (0, 1, sizes[outer]):
            names[label] = outer
        elif sum(label in labels_of([p]) for p, _ in ends) == 1:
            placed.append((("slice", position.start, position.step, sizes[label]), label, outer))
        else:
            factors.append(
                selection(build, ("slice", position.start, position.step, sizes[label]), label, outer)
            )
    body = build.times(term.value, *factors).rename(names)
    inner = pad(build, body, placed)
    return build.con(inner, [k for k in term.labels if k not in names and k in inner.labels])


def of_bands(build: Builder, space: Space, bands: Sequence[Band]) -> tuple[SparseTerm, ...]:
    """Terms with offsets along tied axes as sparse ones, for a matrix over one variable."""
    found = []
    rows, columns = space.rows[0], space.columns[0]
    for band in bands:
        sides: tuple[list[Position], list[Position]] = ([], [])
        for axis, offset in enumerate(band.offsets):
            sides[0].append(Position(rows[axis], 0, 1))
            sides[1].append(
                Position(columns[axis], 0, 1) if offset is None else Position(rows[axis], offset, 1)
            )
        labels = tuple(dict.fromkeys([*labels_of(sides[0]), *labels_of(sides[1])]))
        found.append(SparseTerm((0, 0), labels, band.value, tuple(sides[0]), tuple(sides[1])))
    return merged(build, found)


def with_pattern(build: Builder, form: Form) -> Form:
    """A band whose blocks have several entries, which may be sparse themselves: differences along two axes."""
    inside = [k for k in range(len(form.space.rows[0])) if k not in form.shared]
    if form.chain is None or len(inside) < 2:
        return form
    return replace(form, pattern=of_bands(build, form.space, form.entry.tied(len(form.space.rows[0]))))


def lifted(space: Space, block: int, value: Ref) -> SparseTerm:
    """value on the diagonal of a block."""
    side = tuple(Position(k, 0, 1) for k in space.rows[block])
    return SparseTerm((block, block), space.rows[block], value, side, side)

"""From labelled terms to a kind of matrix: a statement about the declared functions, never about sizes.

In: `Contribution`s (a term of H or S: labels of its rows and columns, factors, summed labels). Out: a `Form`. A label
that rows and columns share is a delta: all shared is diagonal, the same axes shared by every term is block-diagonal,
factors that split into a row side and a column side are a low-rank term. Next file: `banded.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Label, Ref
from implicitdiff.structure import banded, kronecker, sparse, sums
from implicitdiff.structure.forms import Contribution, Entry, Form, LowRankTerm, Space


@dataclass
class _Parts:
    diagonal: list[Ref]
    partial: dict[frozenset[int], list[Ref]]
    low_rank: list[LowRankTerm]
    dense: list[Ref]


def entry_of(build: Builder, space: Space, block: tuple[int, int], terms: Sequence[Contribution]) -> Entry:
    """Sorts the terms of one block into its parts, in the space's own labels."""
    parts = _Parts([], {}, [], [])
    for term in terms:
        _place(build, space, block, term, parts)
    diagonal = build.plus(*parts.diagonal) if parts.diagonal else None
    if diagonal is not None and build.is_zero(diagonal):
        diagonal = None
    partial = tuple(
        (axes, build.plus(*refs)) for axes, refs in sorted(parts.partial.items(), key=lambda p: sorted(p[0]))
    )
    dense = build.plus(*parts.dense) if parts.dense else None
    return Entry(
        diagonal,
        tuple(p for p in partial if not build.is_zero(p[1])),
        _merged(build, parts.low_rank),
        () if dense is None or build.is_zero(dense) else (dense,),
    )


def _place(build: Builder, space: Space, block: tuple[int, int], term: Contribution, parts: _Parts) -> None:
    rows, columns = space.rows[block[0]], space.columns[block[1]]
    names: dict[Label, Label] = dict(zip(term.rows, rows, strict=True))
    shared: set[int] = set()
    extra: list[Ref] = []
    for position, label in enumerate(term.columns):
        if label not in term.rows:
            names[label] = columns[position]
        elif block[0] == block[1] and term.rows.index(label) == position:
            shared.add(position)
        else:
            # a delta between different axes: written out as an identity matrix
            extra.append(build.eye(names[label], columns[position]))
    product = build.times(*(f.rename(names) for f in term.factors))
    if build.is_zero(product):
        return
    if not extra and len(shared) == len(columns) and block[0] == block[1]:
        parts.diagonal.append(build.con(product, term.summed))
    elif extra:
        parts.dense.append(
            _with_deltas(build, build.times(build.con(product, term.summed), *extra), rows, columns, shared)
        )
    elif shared:
        parts.partial.setdefault(frozenset(shared), []).append(build.con(product, term.summed))
    else:
        found = _separate(build, product, set(rows), set(columns), term.summed)
        if found is None:
            parts.dense.append(build.con(product, term.summed))
        else:
            parts.low_rank.append(found)


def _with_deltas(
    build: Builder, ref: Ref, rows: Sequence[Label], columns: Sequence[Label], shared: set[int]
) -> Ref:
    return build.times(ref, *(build.eye(rows[k], columns[k]) for k in sorted(shared)))


def _separate(
    build: Builder, product: Ref, rows: set[Label], columns: set[Label], summed: Sequence[Label]
) -> LowRankTerm | None:
    """product = left * weights * right with no factor on both sides, or None."""
    coefficient, factors = build.split(product)
    left = [f for f in factors if rows & set(f[0].labels)]
    right = [f for f in factors if columns & set(f[0].labels)]
    if any(f in right for f in left):
        return None
    middle = [f for f in factors if f not in left and f not in right]
    sides = [{k for f in side for k in f[0].labels} for side in (left, right)]
    rank = [k for k in summed if k in sides[0] and k in sides[1]]
    inner = {k for f in middle for k in f[0].labels}
    for k in summed:
        # a label on one side and in the weights ties them together: it counts for the rank as well
        if k not in rank and k in inner and (k in sides[0] or k in sides[1]):
            rank.append(k)
    left_ref = build.con(build.mul(left), [k for k in summed if k in sides[0] and k not in rank])
    right_ref = build.con(build.mul(right), [k for k in summed if k in sides[1] and k not in rank])
    nowhere = [k for k in summed if k not in sides[0] and k not in sides[1]]
    weights = build.con(build.mul(middle, coefficient), nowhere)
    # coefficients that the sums gave to a side belong to the weights, so that the sides stay plain inputs
    for_weights = []
    sides_out = []
    for ref in (left_ref, right_ref):
        scale, inside = build.split(ref)
        labelled = [f for f in inside if f[0].labels]
        for_weights.append(build.mul([f for f in inside if not f[0].labels], scale))
        sides_out.append(build.mul(labelled))
    return LowRankTerm(sides_out[0], build.times(weights, *for_weights), sides_out[1], tuple(rank))


def _merged(build: Builder, terms: Sequence[LowRankTerm]) -> tuple[LowRankTerm, ...]:
    """Terms with the same sides become one."""
    out: list[LowRankTerm] = []
    for term in terms:
        for k, known in enumerate(out):
            names = dict(zip(term.rank, known.rank, strict=False))
            if (
                len(term.rank) == len(known.rank)
                and [build.labels.sizes[a] for a in term.rank] == [build.labels.sizes[a] for a in known.rank]
                and term.left.rename(names) == known.left
                and term.right.rename(names) == known.right
            ):
                weights = build.plus(known.weights, term.weights.rename(names))
                out[k] = LowRankTerm(known.left, weights, known.right, known.rank)
                break
        else:
            out.append(term)
    return tuple(t for t in out if not build.is_zero(t.weights))


def grouped_terms(build: Builder, form: Form, terms: Sequence[Contribution]) -> tuple[LowRankTerm, ...]:
    """The blocks of a block-diagonal form as terms of low rank, where all of them split; none otherwise."""
    rows, columns = form.space.rows[0], form.space.columns[0]
    inside = [k for k in range(len(rows)) if k not in form.shared]
    if form.entry.diagonal is None:
        return ()
    found = []
    for term in terms:
        tied = {k for k, label in enumerate(term.columns) if label in term.rows}
        if len(tied) == len(rows):
            continue
        if tied != form.shared:
            return ()
        names: dict[Label, Label] = dict(zip(term.rows, rows, strict=True))
        names |= {term.columns[k]: columns[k] for k in inside}
        product = build.times(*(f.rename(names) for f in term.factors))
        sides = {rows[k] for k in inside}, {columns[k] for k in inside}
        split = _separate(build, product, *sides, term.summed)
        if split is None:
            return ()
        found.append(split)
    return _merged(build, found)


def classify(
    build: Builder,
    space: Space,
    terms: Sequence[Contribution],
    written: Callable[[], Sequence[Contribution]] | None = None,
) -> Form:
    """The kind of the symmetric matrix that the terms make, the first true one in the contract's order.

    Args:
        build: the builder.
        space: the coordinates of both sides.
        terms: the matrix as a sum.
        written: the same without places, for terms whose places make no band: slices as selection matrices.
    """
    count, given = len(space.names), terms
    if written is not None and any(t.has_places for t in terms):
        form = banded.form_of(build, space, terms)
        if form is not None:
            return sparse.with_pattern(build, form)
    if written is not None and any(sparse.indexed(build, t) for t in terms):
        form = sparse.form_of(build, space, terms) or sums.form_of(build, space, terms, classify, entry_of)
        if form is not None:
            return form
        terms = written()
    grid = tuple(
        tuple(entry_of(build, space, (a, b), [t for t in terms if t.block == (a, b)]) for b in range(count))
        for a in range(count)
    )
    if all(e.empty for row in grid for e in row):
        return Form(space, grid, "zero", "no term depends on two derivatives by the variables")
    coupled = any(not grid[a][b].empty for a in range(count) for b in range(count) if a != b)
    if not coupled and all(grid[k][k].is_diagonal for k in range(count)):
        scalars = {d for k in range(count) if (d := grid[k][k].diagonal) is not None}
        if len(scalars) == 1 and not next(iter(scalars)).labels:
            return Form(
                space,
                grid,
                "scaled-identity",
                "every term ties all axes, with one coefficient for all entries",
            )
        return Form(space, grid, "diagonal", "every term ties all axes of the variable to themselves")
    if count > 1:
        reason = (
            "several variables, coupled" if coupled else "several variables, not coupled: one matrix each"
        )
        pattern = None if written is None else sparse.collected(build, given)
        return Form(space, grid, "block", reason, pattern=pattern or ())
    form = _single(build, space, grid)
    if form.kind == "block-diagonal" and written is not None:
        return replace(form, grouped=grouped_terms(build, form, terms))
    mixed = written is not None and form.kind == "dense" and grid[0][0].partial and not grid[0][0].dense
    return (mixed and sums.form_of(build, space, given, classify, entry_of)) or form


def _single(build: Builder, space: Space, grid: tuple[tuple[Entry, ...], ...]) -> Form:
    entry = grid[0][0]
    factors = kronecker.factors_of(build, entry, space.rows[0], space.columns[0])
    if factors:
        parts = ", ".join(f"axis {'*'.join(map(str, factor.axes))}" for factor in factors)
        rest = len(space.rows[0]) - sum(len(factor.axes) for factor in factors)
        return Form(
            space,
            grid,
            "kronecker",
            f"one factor for {parts}" + (", the same for every entry of the other axes" if rest else ""),
            factors=factors,
        )
    ties = [axes for axes, _ in entry.partial]
    if ties and not entry.low_rank and not entry.dense:
        common = frozenset.intersection(*ties)
        if common:
            return Form(
                space,
                grid,
                "block-diagonal",
                f"every term ties axis {', '.join(map(str, sorted(common)))} of the variable to itself",
                common,
            )
    if entry.dense:
        return Form(space, grid, "dense", "a factor depends on rows and columns at once")
    if entry.partial:
        reason = "terms tie different axes"
        pattern = () if entry.low_rank else sparse.of_bands(build, space, entry.tied(len(space.rows[0])))
        return Form(space, grid, "sparse" if pattern else "dense", reason, pattern=pattern)
    rank = " + ".join(
        "1" if not t.rank else "*".join(str(build.labels.sizes[k]) for k in t.rank) for t in entry.low_rank
    )
    if entry.diagonal is None:
        return Form(space, grid, "dense", f"a product form of rank {rank} without a diagonal part")
    return Form(
        space,
        grid,
        "low-rank-plus-diagonal",
        f"a diagonal part, and terms that split into a row and a column side: rank {rank}",
    )

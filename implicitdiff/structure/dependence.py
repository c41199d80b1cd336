"""Constraints that depend on each other for every value of the inputs: found as equal expressions.

In: the labelled Jacobian of each constraint. Out: vectors z with z'A = 0, and a sentence about each. A constraint's
rows are summed over every subset of its own axes; two such sums that are the same expression up to a factor are
dependent (a failing pivot does not find them: a Cholesky factorisation succeeds on most singular Schur complements).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.graph.build import Builder
from implicitdiff.graph.ir import Label, Node, Ref
from implicitdiff.torch_private import HOST


@dataclass(frozen=True)
class Row:
    """One term of a constraint's Jacobian: d constraint / d leaf = coefficient, its leaf's axes called `columns`."""

    leaf: Node
    columns: tuple[Label, ...]
    coefficient: Ref


@dataclass(frozen=True)
class Constraint:
    """A constraint block: its name, the labels of its axes, its Jacobian."""

    name: str
    labels: tuple[Label, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Dependence:
    """Proved dependences: `vectors` (p, count), orthonormal columns z with z'A = 0, and how to say it."""

    vectors: Tensor
    sentences: tuple[str, ...]


Member = tuple[int, tuple[int, ...], float]
"""A constraint, the axes that its rows are summed over, and a factor that was divided out."""
NOTHING: tuple[object, float] = ((), 0.0)
"""The signature of rows that add up to zero: what flows out of one node flows into another."""
MOST = 64
"""More null vectors than this are left to the rank-revealing solver."""


def find(build: Builder, constraints: Sequence[Constraint]) -> Dependence | None:
    """All dependences between sums of whole constraints, or None."""
    canonical: dict[tuple[str, int, int], Label] = {}
    groups: dict[object, list[Member]] = {}
    own: list[Member] = []
    for index, constraint in enumerate(constraints):
        for count in range(len(constraint.labels) + 1):
            for subset in itertools.combinations(range(len(constraint.labels)), count):
                found = _signature(build, constraint, subset, canonical)
                if found == NOTHING and subset:
                    own.append((index, subset, 1.0))
                elif found is not None and found != NOTHING:
                    key, scale = found
                    groups.setdefault(key, []).append((index, subset, scale))
    sizes = [[build.labels.sizes[k] for k in c.labels] for c in constraints]
    vectors, sentences = [], []
    for alone in own:
        new = _vectors(sizes, alone, None)
        if len(new) <= MOST:
            vectors += new
            sentences.append(f"{_part(constraints, alone)} does not depend on the variables")
    for members in groups.values():
        first = members[0]
        for other in members[1:]:
            if other[0] == first[0]:
                continue
            new = _vectors(sizes, first, other)
            if len(new) > MOST:
                continue
            vectors += new
            sentences.append(_sentence(constraints, first, other))
    if not vectors:
        return None
    stacked = torch.stack(vectors, dim=1)
    if len(vectors) == 1:  # entries that are equal stay so, bit by bit: they are shown as one number
        return Dependence(stacked / torch.linalg.vector_norm(stacked), tuple(sentences))
    basis, singular, _ = torch.linalg.svd(stacked, full_matrices=False)
    kept = singular > 1e-10 * singular.max()
    return Dependence(basis[:, kept], tuple(dict.fromkeys(sentences)))


def _signature(
    build: Builder,
    constraint: Constraint,
    subset: tuple[int, ...],
    canonical: dict[tuple[str, int, int], Label],
) -> tuple[object, float] | None:
    """The Jacobian summed over the axes `subset`, as something comparable, and the factor divided out."""
    summed = [constraint.labels[k] for k in subset]
    names: dict[Label, Label] = {}
    remaining = [k for k in constraint.labels if k not in summed]
    for position, label in enumerate(remaining):
        key = ("axis", position, build.labels.sizes[label])
        names[label] = canonical.setdefault(key, build.labels.new(build.labels.sizes[label]))
    pieces: dict[tuple[int, tuple[Label, ...], Ref], float] = {}
    for row in constraint.rows:
        inner = build.con(row.coefficient, [k for k in summed if k not in row.columns])
        local = dict(names)
        columns = []
        for position, label in enumerate(row.columns):
            if label not in local:
                key = (f"column {row.leaf.id}", position, row.leaf.sizes[position])
                local[label] = canonical.setdefault(key, build.labels.new(row.leaf.sizes[position]))
            columns.append(local[label])
        scale, factors = build.split(inner.rename(local))
        pieces[(row.leaf.id, tuple(columns), build.mul(factors))] = scale
    if not pieces:
        return None
    pieces = {key: scale for key, scale in pieces.items() if scale != 0.0}
    if not pieces:
        return NOTHING
    ordered = sorted(pieces.items(), key=lambda p: (p[0][0], p[0][1], p[0][2].node.id, p[0][2].labels))
    first = ordered[0][1]
    sizes = tuple(build.labels.sizes[k] for k in remaining)
    return (sizes, tuple((piece, round(scale / first, 12)) for piece, scale in ordered)), first


def _vectors(sizes: Sequence[Sequence[int]], first: Member, other: Member | None) -> list[Tensor]:
    """z over all constraints joined: 1 / factor on the first block, -1 / factor on the other; one per free entry."""
    pairs = [(first, 1.0), *([] if other is None else [(other, -1.0)])]
    remaining = [s for k, s in enumerate(sizes[first[0]]) if k not in first[1]]
    out: list[Tensor] = []
    for entry in itertools.product(*(range(s) for s in remaining)):
        if len(out) > MOST:
            break
        blocks = []
        for index, block in enumerate(sizes):
            z = torch.zeros(tuple(block), dtype=torch.float64, device=HOST)
            for member, sign in pairs:
                if member[0] == index:
                    position = iter(entry)
                    where = tuple(
                        slice(None) if k in member[1] else next(position) for k in range(len(block))
                    )
                    z[where] += sign / member[2]
            blocks.append(z.reshape(-1))
        out.append(torch.cat(blocks))
    return out


def _sentence(constraints: Sequence[Constraint], first: Member, other: Member) -> str:
    parts = _part(constraints, first), _part(constraints, other)
    return f"{parts[0]} and {parts[1]} have the same derivative by the variables"


def _part(constraints: Sequence[Constraint], member: Member) -> str:
    name = constraints[member[0]].name
    if member[1]:
        name = f"the sum of {name} over axis {', '.join(map(str, member[1]))}"
    return name if member[2] == 1.0 else f"{name} divided by {member[2]:g}"

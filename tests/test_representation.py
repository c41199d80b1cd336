"""The representation's normal forms, derivatives and emission, on expressions small enough to check by hand."""

import ast
import itertools
from typing import Any

import pytest
import torch

from implicitdiff.graph.build import Builder
from implicitdiff.graph.calculus import adjoints, partial, tangent
from implicitdiff.graph.calls import Output
from implicitdiff.graph.emit import Emitter
from implicitdiff.graph.ir import BATCHED, UNBATCHED, Ref, Unsupported
from implicitdiff.graph.maps import Place, pad, selection, shift
from implicitdiff.graph.text import wrapped


def leaf(build: Builder, name: str, *sizes: int, prefix: int = BATCHED) -> Ref:
    return build.self_ref(build.leaf(name, sizes, prefix).node)


def along(ref: Ref, *labels: int) -> Ref:
    """A use of a leaf under given labels."""
    return Ref(ref.node, labels)


def evaluate(build: Builder, ref: Ref, order: tuple[int, ...], **tensors: torch.Tensor) -> torch.Tensor:
    emitter = Emitter(build, next(iter(tensors)))
    output = Output("out", ref, order, prefix=ref.node.prefix)
    return emitter.function("f", list(tensors), [output], {"torch": torch}).call(*tensors.values())[0]


def test_powers_cancel_and_merge() -> None:
    build = Builder()
    x = leaf(build, "x", 3)
    assert build.as_number(build.times(x, build.power(x, -1.0))) == 1.0
    assert build.times(x, x) == build.power(x, 2.0)
    assert build.power(build.power(x, 0.5), 2.0) == x
    assert build.is_zero(build.minus(x, x))
    assert build.mul([(x, 1.0)], 0.0) == build.number(0.0)


def test_the_root_of_a_square_is_not_the_value() -> None:
    build = Builder()
    x = leaf(build, "x", 2)
    root = build.power(build.power(x, 2.0), 0.5)
    assert root != x
    values = torch.tensor([[-2.0, 3.0]], dtype=torch.float64)
    assert torch.equal(evaluate(build, root, x.labels, x=values), values.abs())


def test_equal_expressions_are_one_node_whatever_their_labels() -> None:
    build = Builder()
    x = leaf(build, "x", 4)
    i, j = build.labels.new(4), build.labels.new(4)
    first, second = build.fn("exp", [along(x, i)]), build.fn("exp", [along(x, j)])
    assert first.node is second.node
    assert first != second
    difference = build.minus(first, second)
    assert set(difference.labels) == {i, j}


def test_a_sum_over_one_axis_and_over_two_are_different_nodes() -> None:
    build = Builder()
    x = leaf(build, "x", 2, 3)
    rows = build.con(x, x.labels[1:])
    everything = build.con(x, x.labels)
    assert rows.node is not everything.node
    assert everything.labels == ()


def test_factors_leave_a_sum_and_missing_labels_multiply() -> None:
    build = Builder()
    a, b = leaf(build, "a", 2), leaf(build, "b", 3)
    product = build.con(build.times(a, b), b.labels)
    assert product == build.times(a, build.con(b, b.labels))
    assert build.con(a, b.labels) == build.scale(3.0, a)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_squares_are_completed_under_a_sum(sign: float) -> None:
    build = Builder()
    u, x = leaf(build, "u", 3), leaf(build, "x", 3, 4)
    i, j = x.labels
    mine = along(u, i)
    expanded = build.add([
        (1.0, build.con(build.power(mine, 2.0), [i])),
        (2.0 * sign, build.con(build.times(mine, x), [i])),
        (1.0, build.con(build.power(x, 2.0), [i])),
    ])  # fmt: skip
    assert expanded == build.con(build.power(build.add([(1.0, mine), (sign, x)]), 2.0), [i])
    assert expanded.labels == (j,)


def test_a_half_completed_square_is_left_alone() -> None:
    build = Builder()
    a, b = leaf(build, "a", 3), leaf(build, "b", 3)
    b = along(b, *a.labels)
    sum_ = build.add([(1.0, build.power(a, 2.0)), (-3.0, build.times(a, b)), (1.0, build.power(b, 2.0))])
    values = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    got = evaluate(build, sum_, a.labels, a=values[0], b=values[1])
    torch.testing.assert_close(got, values[0] ** 2 - 3 * values[0] * values[1] + values[1] ** 2)


def test_a_diagonal_is_refused() -> None:
    build = Builder()
    x = leaf(build, "x", 3, 3)
    with pytest.raises(Unsupported, match="diagonal"):
        x.rename({x.labels[1]: x.labels[0]})


def test_partial_of_where_stays_inside_the_branch() -> None:
    """The branch not taken has an infinite slope; it must not reach the result."""
    build = Builder()
    u = leaf(build, "u", 3)
    zero = build.number(0.0)
    safe = build.fn("where", [build.fn("gt", [u, zero]), build.power(u, 0.5), zero])
    slope = partial(build, safe, u)
    values = torch.tensor([[-1.0, 0.0, 4.0]], dtype=torch.float64)
    assert torch.equal(
        evaluate(build, slope, u.labels, u=values), torch.tensor([[0.0, 0.0, 0.25]], dtype=torch.float64)
    )


def test_reverse_and_tangent_are_transposed() -> None:
    """<D f, w> computed both ways, on a two-level sum that uses one input three times."""
    build = Builder()
    u, x = leaf(build, "u", 3), leaf(build, "x", 3, 4)
    w = leaf(build, "w", 3)
    i, j = x.labels
    k = build.labels.new(3)
    inner = build.con(build.fn("tanh", [build.times(along(u, i), x)]), [i])
    f = build.con(build.times(inner, build.fn("exp", [along(u, k)])), [j, k])
    f = build.plus(f, build.con(build.power(u, 3.0), u.labels))
    pushed = tangent(build, f, {u.node.id: Ref(w.node, u.node.axes)})
    slope = adjoints(build, f, frozenset([u.node.id]))[u.node.id]
    data = {"u": torch.randn(2, 3), "x": torch.randn(2, 3, 4), "w": torch.randn(2, 3)}
    data = {name: value.double() for name, value in data.items()}
    forward = evaluate(build, pushed, (), **data)
    reverse = (evaluate(build, slope, u.node.axes, **data) * data["w"]).sum(1)
    torch.testing.assert_close(forward, reverse)

    def written(u: torch.Tensor) -> torch.Tensor:
        rows = torch.tanh(u[:, :, None] * data["x"]).sum(1).sum(1)
        return rows * u.exp().sum(1) + (u**3).sum(1)

    expected = torch.func.jvp(written, (data["u"],), (data["w"],))[1]
    torch.testing.assert_close(forward, expected)


def test_identities_are_used_after_differentiation_only() -> None:
    """A w = 0 as a value does not make its derivative by A zero: only what is already differentiated is replaced."""
    build = Builder()
    a, w = leaf(build, "a", 3), leaf(build, "w", 3)
    w = along(w, *a.labels)
    row = build.con(build.times(a, w), a.labels)
    slope = adjoints(build, row, frozenset([a.node.id]))[a.node.id]
    (kept, gone) = build.replaced([slope, build.scale(2.0, row)], [row])
    assert kept == slope
    assert build.is_zero(gone)
    assert build.con(build.times(a, w), a.labels) == row, "the replacement must not outlive the call"


def test_sum_over_the_batch_of_a_product() -> None:
    build = Builder()
    a, b = leaf(build, "a", 3, 4), leaf(build, "b", 4)
    b = along(b, a.labels[1])
    total = build.con(build.times(a, b), [a.labels[1]], over_batch=True)
    assert total.node.prefix == UNBATCHED
    data = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    got = evaluate(build, total, a.labels[:1], a=data[0], b=data[1])
    torch.testing.assert_close(got, torch.einsum("bij,bj->i", *data))


@pytest.mark.parametrize("sizes", list(itertools.product([2, 3], [3, 4])))
def test_contractions_equal_einsum(sizes: tuple[int, int]) -> None:
    """Three factors, one shared by the batch; equal and unequal sizes, every choice of summed axes."""
    m, n = sizes
    for count in range(4):
        for summed in itertools.combinations("ijk", count):
            build = Builder()
            i, j, k = (build.labels.new(s) for s in (m, n, 2))
            names = {"i": i, "j": j, "k": k}
            a = along(leaf(build, "a", m, n), i, j)
            b = along(leaf(build, "b", n, 2, prefix=UNBATCHED), j, k)
            c = along(leaf(build, "c", 2, m), k, i)
            ref = build.con(build.times(a, b, c), [names[s] for s in summed])
            kept = [s for s in "ijk" if s not in summed]
            data = [torch.randn(3, m, n), torch.randn(n, 2), torch.randn(3, 2, m)]
            data = [t.double() for t in data]
            got = evaluate(build, ref, tuple(names[s] for s in kept), a=data[0], b=data[1], c=data[2])
            torch.testing.assert_close(got, torch.einsum(f"zij,jk,zki->z{''.join(kept)}", *data))


PLACES: list[tuple[Place, Any]] = [
    (("slice", 1, 1, 3), slice(1, 4)),
    (("slice", 0, 1, 3), slice(0, 3)),
    (("slice", 2, 1, 3), slice(2, 5)),
    (("slice", 0, 2, 3), slice(0, 5, 2)),
    (("slice", 3, -1, 3), [3, 2, 1]),
    (("slice", 4, -2, 3), [4, 2, 0]),
    (("index", 2), 2),
    (("index", 4), 4),
]


@pytest.mark.parametrize(("place", "where"), PLACES)
@pytest.mark.parametrize("prefix", [BATCHED, UNBATCHED])
def test_a_padded_slice_lies_at_its_place(place: Place, where: Any, prefix: int) -> None:
    """Along the first, the last and both axes; also a number, which is constant along the slice."""
    lead, count = (2,) if prefix else (), 3 if place[0] == "slice" else 1
    for axes in ([0], [1], [0, 1]):
        build = Builder()
        outer = [build.labels.new(5), build.labels.new(5)]
        inner = [build.labels.new(count) if k in axes else outer[k] for k in range(2)]
        kept = [k for k in range(2) if count > 1 or k not in axes]
        own = leaf(build, "x", *(build.labels.sizes[inner[k]] for k in kept), prefix=prefix)
        value = along(own, *(inner[k] for k in kept))
        whole = [(place, inner[k] if count > 1 else None, outer[k]) for k in axes]
        data = torch.randn((*lead, *(build.labels.sizes[k] for k in value.labels)), dtype=torch.float64)
        rows, columns = (
            torch.eye(5, dtype=torch.float64)[where if k in axes else slice(None)].reshape(-1, 5)
            for k in range(2)
        )
        matrix = data.reshape(*lead, len(rows), len(columns))
        padded = pad(build, build.scale(3.0, value), whole, outer)
        got = evaluate(build, padded, tuple(outer), x=data)
        torch.testing.assert_close(got, rows.mT @ (3.0 * matrix) @ columns, rtol=0, atol=1e-15)
        number = pad(build, build.number(3.0), [whole[0]], outer)
        got = evaluate(build, number, (outer[axes[0]],), x=data)
        assert torch.equal(got, 3.0 * (columns if axes == [1] else rows).sum(0))


@pytest.mark.parametrize(("place", "where"), PLACES)
def test_a_selection_matrix_is_rows_of_the_identity(place: Place, where: Any) -> None:
    build = Builder()
    column = build.labels.new(5)
    row = build.labels.new(3) if place[0] == "slice" else None
    made = selection(build, place, row, column)
    order = (column,) if row is None else (row, column)
    assert torch.equal(evaluate(build, made, order, x=torch.ones(2)), torch.eye(5)[where])


@pytest.mark.parametrize("offset", [-2, -1, 0, 3])
def test_a_shift_has_ones_where_the_column_is_the_row_plus_the_offset(offset: int) -> None:
    build = Builder()
    row, column = build.labels.new(4), build.labels.new(4)
    made = shift(build, row, column, offset)
    assert torch.equal(
        evaluate(build, made, (row, column), x=torch.ones(2)), torch.ones(4 - abs(offset)).diag(offset)
    )


def test_what_is_padded_is_not_differentiated_silently() -> None:
    """Pads stand in derivatives only; a derivative through one is refused, not taken for 0."""
    build = Builder()
    x = leaf(build, "x", 3)
    outer = build.labels.new(4)
    padded = pad(build, x, [(("slice", 1, 1, 3), x.labels[0], outer)])
    total = build.con(build.power(padded, 2.0), [outer])
    with pytest.raises(Unsupported, match="pad has no derivative rule"):
        adjoints(build, total, frozenset([x.node.id]))
    with pytest.raises(Unsupported, match="pad has no derivative rule"):
        tangent(build, total, {x.node.id: Ref(leaf(build, "w", 3).node, x.node.axes)})


@pytest.mark.parametrize("head", ["", "return ", "total = "])
def test_a_long_statement_without_brackets_is_still_one_statement(head: str) -> None:
    """`a.add_(b).add_(c) ...` has no space inside a bracket to break at, and need not be an assignment."""
    chain = "value" + ".add_(another_long_name)" * 12
    line = f"{head}{chain}" if head != "return " else f"return {' + '.join([chain, 'rest'])}"
    lines = wrapped(line, 60)
    source = "\n".join(["def f():", *(f"    {piece}" for piece in lines)])
    (statement,) = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    (expected,) = ast.parse(f"def f():\n    {line}").body[0].body  # type: ignore[attr-defined]
    assert ast.dump(statement) == ast.dump(expected)


def test_a_branch_knows_its_own_condition() -> None:
    build = Builder()
    x, y = leaf(build, "x", 3), leaf(build, "y", 3)
    y = along(y, *x.labels)
    near = build.fn("le", [x, build.number(0.5)])
    mask = build.fn("where", [near, build.number(1.0), build.number(0.0)])
    far = build.add([(-1.0, mask)], 1.0)
    found = build.fn("where", [near, build.times(mask, y), build.times(far, far, x)])
    assert found == build.fn("where", [near, y, x])
    other = build.fn("le", [y, build.number(0.5)])
    assert build.fn("where", [other, build.times(mask, y), x]) != build.fn("where", [other, y, x])
    nested = build.fn("where", [near, build.number(0.25), build.number(0.75)])
    assert build.fn("where", [near, build.times(nested, y), x]) == build.fn(
        "where", [near, build.scale(0.25, y), x]
    )


def test_numbers_leave_a_branch_beside_zero_and_meet_one_beside_a_number() -> None:
    build = Builder()
    x = leaf(build, "x", 3)
    near = build.fn("le", [x, build.number(0.5)])
    zero, half = build.number(0.0), build.number(0.5)
    beside_zero = build.fn("where", [near, zero, build.scale(-4.0, x)])
    assert beside_zero == build.scale(-4.0, build.fn("where", [near, zero, x]))
    beside_half = build.scale(2.0, build.fn("where", [near, half, build.scale(0.5, x)]))
    assert beside_half == build.fn("where", [near, build.number(1.0), x])
    values = torch.tensor([[0.25, 0.5, 2.0]], dtype=torch.float64)
    for ref, expected in ((beside_zero, [0.0, 0.0, -8.0]), (beside_half, [1.0, 1.0, 2.0])):
        assert evaluate(build, ref, x.labels, x=values).tolist() == [expected]


def test_a_branch_not_taken_stays_finite_where_it_is_not_taken() -> None:
    """The user's second where() is kept: its value may be multiplied by zero in a derivative of the emitted code."""
    build = Builder()
    x = leaf(build, "x", 3)
    near = build.fn("le", [x, build.number(0.5)])
    safe = build.fn("where", [near, build.number(1.0), x])
    root = build.power(safe, -0.5)
    assert build.fn("where", [near, build.number(1.0), root]).node.args[2].node is root.node

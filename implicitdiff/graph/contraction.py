"""How a sum of products is written in torch: one matmul, one product and a sum, or a chain of pairs.

In: operands with labels. Out: one expression. Vectors stand on the left of a matrix, an entrywise product is summed and
never sent through einsum, more than two operands are contracted in the order that opt_einsum plans (these choices were
measured on a CPU: einsum of an entrywise product is 10 to 30 times slower than product and sum).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import opt_einsum

from implicitdiff.graph.ir import Label
from implicitdiff.graph.text import Operand, axis_list, bracket

BATCH: Label = -1


def contract(
    operands: Sequence[Operand],
    out: Sequence[Label],
    bound: Sequence[Label],
    over_batch: bool,
    sizes: Mapping[Label, int],
    temporary: Callable[[str], str],
) -> tuple[str, tuple[Label, ...]]:
    """sum over `bound` (and the batch) of the product of `operands`: expression, and its axes."""
    work = list(operands)
    summed = [*bound, *([BATCH] if over_batch else [])]
    while len(work) > 2:
        first, second = _next_pair(work, out, sizes)
        a, b = work[first], work[second]
        rest = [o for k, o in enumerate(work) if k not in (first, second)]
        alive = {label for o in rest for label in _labels(o)} | set(out)
        gone = [k for k in summed if k not in alive and (k in _labels(a) or k in _labels(b))]
        text, layout = _pair(a, b, [k for k in gone if k != BATCH], BATCH in gone, sizes)
        prefix = max(a.prefix, b.prefix) - (BATCH in gone)
        summed = [k for k in summed if k not in gone]
        work = [*rest, Operand(temporary(text), layout, prefix)]
    labels = [k for k in summed if k != BATCH]
    if len(work) == 1:
        return _reduce(work[0], labels, BATCH in summed)
    return _pair(work[0], work[1], labels, BATCH in summed, sizes)


def _labels(operand: Operand) -> set[Label]:
    return set(operand.labels) | ({BATCH} if operand.prefix else set())


def _next_pair(work: Sequence[Operand], out: Sequence[Label], sizes: Mapping[Label, int]) -> tuple[int, int]:
    letters: dict[Label, str] = {}
    for operand in work:
        for label in operand.labels:
            letters.setdefault(label, opt_einsum.get_symbol(len(letters)))
    text = ",".join("".join(letters[k] for k in o.labels) for o in work)
    result = "".join(letters[k] for k in out if k in letters)
    shapes = [tuple(sizes[k] for k in o.labels) for o in work]
    path, _ = opt_einsum.contract_path(f"{text}->{result}", *shapes, shapes=True, optimize="auto")
    first, second = sorted(path[0])[:2]
    return first, second


def _reduce(operand: Operand, bound: Sequence[Label], over_batch: bool) -> tuple[str, tuple[Label, ...]]:
    dims = [operand.labels.index(k) - len(operand.labels) for k in operand.labels if k in bound]
    layout = tuple(k for k in operand.labels if k not in bound)
    text = bracket(operand.text)
    if over_batch:
        dims = [0, *dims]
    if not dims:
        return operand.text, layout
    return f"{text}.sum({axis_list(dims)})", layout


def _pair(
    a: Operand, b: Operand, bound: Sequence[Label], over_batch: bool, sizes: Mapping[Label, int]
) -> tuple[str, tuple[Label, ...]]:
    """sum over `bound` of a * b."""
    shared = [k for k in a.labels if k in b.labels]
    alone = [k for k in bound if k not in shared]
    if alone and not over_batch:
        a, b = _summed_alone(a, alone), _summed_alone(b, alone)
        bound = [k for k in bound if k not in alone]
    kept_shared = [k for k in shared if k not in bound]
    a_only = [k for k in a.labels if k not in shared]
    b_only = [k for k in b.labels if k not in shared]
    if over_batch:
        if a.prefix and b.prefix:
            return _einsum(a, b, bound, True)
        a, b = (_reduce_batch(a), b) if a.prefix else (a, _reduce_batch(b))
        return _pair(a, b, bound, False, sizes)
    if bound and not kept_shared and (a_only or b_only):
        return _matmul(a, b, list(bound), a_only, b_only)
    if bound and (a_only or b_only):
        return _einsum(a, b, bound, False)
    order = a.labels if len(a.labels) >= len(b.labels) else b.labels
    order = (*order, *(k for k in (*a.labels, *b.labels) if k not in order))
    product = f"{bracket(a.aligned(order))} * {bracket(b.aligned(order))}"
    return _reduce(Operand(product, order, max(a.prefix, b.prefix)), bound, False)


def _summed_alone(operand: Operand, alone: Sequence[Label]) -> Operand:
    text, layout = _reduce(operand, [k for k in operand.labels if k in alone], False)
    return Operand(text, layout, operand.prefix)


def _reduce_batch(operand: Operand) -> Operand:
    return Operand(f"{bracket(operand.text)}.sum(0)", operand.labels, operand.prefix - 1)


def _matmul(
    a: Operand, b: Operand, bound: list[Label], a_only: list[Label], b_only: list[Label]
) -> tuple[str, tuple[Label, ...]]:
    if len(bound) > 1 or len(a_only) > 1 or len(b_only) > 1:
        return _einsum(a, b, bound, False)
    if not b_only and a_only:
        a, b, a_only, b_only = b, a, b_only, a_only
    right = bracket(b.aligned([*bound, *b_only]))
    if not a_only:
        row = f"{bracket(a.text)}[..., None, :]"
        if a.prefix == b.prefix == 1 and a.certain and b.certain:
            # a third of the time of @ where the matrices are small
            return f"torch.bmm({row}, {right}).squeeze(-2)", tuple(b_only)
        return f"({row} @ {right}).squeeze(-2)", tuple(b_only)
    left = bracket(a.aligned([*a_only, *bound]))
    return f"{left} @ {right}", (*a_only, *b_only)


def _einsum(
    a: Operand, b: Operand, bound: Sequence[Label], over_batch: bool
) -> tuple[str, tuple[Label, ...]]:
    letters: dict[Label, str] = {}
    for label in (*a.labels, *b.labels):
        letters.setdefault(label, opt_einsum.get_symbol(len(letters)))
    lead = ["", "Z", "YZ"]
    layout = tuple(k for k in letters if k not in bound)
    result = lead[max(a.prefix, b.prefix)].replace("Z", "") if over_batch else lead[max(a.prefix, b.prefix)]
    spec = ",".join(lead[o.prefix] + "".join(letters[k] for k in o.labels) for o in (a, b))
    return (
        f'torch.einsum("{spec}->{result}{"".join(letters[k] for k in layout)}", {a.text}, {b.text})',
        layout,
    )

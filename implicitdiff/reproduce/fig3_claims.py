"""Fig. 3, the claims: what the paper says of optimal transport, held against the rows.

In: rows of `fig3.py`. Out: claims. Next: `fig3_plot.py`.
"""

from collections.abc import Sequence
from typing import Any

from implicitdiff.diagnostics.meter import format_bytes
from implicitdiff.diagnostics.tables import number, seconds
from implicitdiff.reproduce.base import Claim

MUCH = 2.0
"""Much faster: at least this many times."""
SAME = 1.5
"""About the same: within this factor."""
CLOSE = 0.9
"""Close to the exact gradient: a cosine of at least this, and a length within a tenth."""
FEW = 4
"""A small number of Sinkhorn iterations: the paper's own number where it compares memory."""


def claims(rows: Sequence[Any], near: Sequence[Any]) -> list[Claim]:
    """All claims about Fig. 3."""
    sizes = sorted({row.n for row in rows if row.swept == "n"})
    by_size = {(row.method, row.n): row for row in rows if row.swept == "n"}
    by_count = {(row.method, row.iterations): row for row in rows if row.swept == "iterations"}
    return [
        _block_against_full(by_size, sizes),
        _same_time(by_size, sizes),
        _memory(by_count, "unrolled", "block inverse"),
        _memory(by_count, "unrolled", "ours"),
        _scaling_form(by_count),
        _ours_against_block(by_size, sizes),
        *(_close(near, loss) for loss in dict.fromkeys(row.loss for row in near)),
    ]


def _block_against_full(by_size: dict[tuple[str, int], Any], sizes: Sequence[int]) -> Claim:
    large = sizes[len(sizes) // 2 :]
    ratios = [by_size["full inverse", n].backward / by_size["block inverse", n].backward for n in large]
    return Claim(
        "Block inverse is much faster than full inverse",
        min(ratios) >= MUCH,
        f"its backward pass takes 1/{number(max(ratios))} to 1/{number(min(ratios))} of the time from n = {large[0]} "
        f"on; much means 1/{MUCH:g} or less",
    )


def _same_time(by_size: dict[tuple[str, int], Any], sizes: Sequence[int]) -> Claim:
    large = sizes[len(sizes) // 2 :]
    ratios = {n: by_size["unrolled", n].seconds / by_size["block inverse", n].seconds for n in large}
    told = ", ".join(f"{number(ratio)} at {n}" for n, ratio in ratios.items())
    return Claim(
        "Unrolled and block inverse take approximately the same time",
        all(1 / SAME <= ratio <= SAME for ratio in ratios.values()),
        f"unrolled over block inverse, both passes: {told}; the same means within a factor of {SAME:g}",
    )


def _memory(by_count: dict[tuple[str, int], Any], unrolled: str, implicit: str) -> Claim:
    counts = sorted({count for _, count in by_count})
    n = by_count[implicit, counts[0]].n
    more = [k for k in counts if by_count[unrolled, k].peak > by_count[implicit, k].peak]
    beyond = min((k for k in counts if all(j in more for j in counts if j >= k)), default=None)
    last = counts[-1]
    peaks = (
        f"{format_bytes(by_count[unrolled, last].peak)} against {format_bytes(by_count[implicit, last].peak)}"
    )
    crossing = f"unrolling needs more from {beyond} iterations on" if beyond else "unrolling never needs more"
    return Claim(
        f"{'The derived pass' if implicit == 'ours' else 'Implicit, block inverse,'} uses less memory than unrolling "
        f"beyond four iterations at {n} x {n}",
        beyond is not None and beyond <= 5,
        f"{crossing}; at {last} iterations {peaks}",
    )


def _scaling_form(by_count: dict[tuple[str, int], Any]) -> Claim:
    counts = sorted({count for _, count in by_count})
    last = counts[-1]
    strong, ours = by_count["unrolled, scaling form", last], by_count["ours", last]
    return Claim(
        f"The derived pass uses less memory than unrolling in scaling form (not in the paper), {last} iterations",
        ours.peak < strong.peak,
        f"{format_bytes(ours.peak)} against {format_bytes(strong.peak)}; backward {seconds(ours.backward)} against "
        f"{seconds(strong.backward)}",
    )


def _ours_against_block(by_size: dict[tuple[str, int], Any], sizes: Sequence[int]) -> Claim:
    times = [by_size["ours", n].backward / by_size["block inverse", n].backward for n in sizes]
    last = sizes[-1]
    peak = by_size["ours", last].backward_peak / by_size["block inverse", last].backward_peak
    told = ", ".join(f"{number(ratio)} at {n}" for ratio, n in zip(times, sizes, strict=True))
    return Claim(
        "The derived backward pass is as fast as the paper's block inverse at the largest size (not in the paper)",
        times[-1] <= 1,
        f"its time over that of block inverse: {told}; its peak at {last}: {number(peak)}",
    )


def _close(near: Sequence[Any], loss: str) -> Claim:
    mine = [row for row in near if row.method == "approximate" and row.loss == loss]
    few = [row for row in mine if row.iterations <= FEW]

    def told(rows: Sequence[Any]) -> str:
        if not rows:
            return "no such plan"
        cosines, lengths = [row.cosine for row in rows], [row.norm for row in rows]
        spread = f"length {number(min(lengths))} to {number(max(lengths))}"
        return f"cosine {min(cosines):.2f} to {max(cosines):.2f}, {spread}"

    return Claim(
        f"The approximate gradient is close to the true one when few Sinkhorn iterations are needed (loss: {loss})",
        bool(few) and all(row.cosine >= CLOSE and abs(row.norm - 1) <= 0.1 for row in few),
        f"up to {FEW} iterations {told(few)}; beyond {told([row for row in mine if row not in few])}; close means a "
        f"cosine of at least {CLOSE:g} and a length within a tenth",
    )

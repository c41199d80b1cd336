"""The command `demo`: the library's main job on real input, step by step.

Nothing comes in. Out: reports of `explain` and `compare`, and the accuracies of classifiers, with and without outliers.
"""

import time

import click
import torch

from implicitdiff.cli import output
from implicitdiff.cli.tool import tool
from implicitdiff.demo import comparison
from implicitdiff.demo.main import OUTLIERS, POOLINGS, Accuracy, classify
from implicitdiff.diagnostics.tables import table


@tool("demo")
@click.option(
    "--epochs", type=click.IntRange(1), default=30, show_default=True, help="Passes over the digits."
)
@click.option("--seed", default=0, show_default=True, help="Of points, weights and batches.")
def demo(epochs: int, seed: int, as_json: bool) -> None:
    """Explain, compare, and train on digits with outliers.

    Takes less than three minutes on two cores; the digits come with scikit-learn.
    """
    start = time.perf_counter()
    # These tensors are small: sharing one between threads costs more than it gains.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reports = []
        for case in comparison.cases():
            found = comparison.explained(case), comparison.compared(case)
            reports.append({"title": case.title, "explain": found[0], "compare": found[1]})
            if not as_json:
                for text in (case.title, *(item.text(output.width()) for item in found)):
                    output.report(text)
                    output.console().print()
        with output.progress("train") as advance:
            accuracies = classify(epochs, seed, advance)
    finally:
        torch.set_num_threads(threads)
    if as_json:
        output.print_json({"reports": reports, "accuracies": accuracies})
        return
    output.report(
        f"Digits as point sets: test accuracy, outliers in training and test\n\n{_table(accuracies)}"
    )
    output.note(f"{time.perf_counter() - start:.0f} s, imports not counted")


def _table(accuracies: list[Accuracy]) -> str:
    header = ("pooling", *(f"{outliers:.0%} outliers" for outliers in OUTLIERS))
    known = {(item.pooling, item.outliers): f"{item.accuracy:.1%}" for item in accuracies}
    rows = [(name, *(known[name, outliers] for outliers in OUTLIERS)) for name in POOLINGS]
    return table(header, rows, header[1:], output.width())

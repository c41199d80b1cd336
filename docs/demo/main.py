"""The main job on real input: explain two problems, compare four backward passes, train on digits.

Run it with `make demo`, or `python docs/demo/main.py`. It takes less than three minutes on two cores. Reading
order: digits.py, comparison.py, training.py.
"""

import argparse
import time

import comparison
import digits
import torch
import training
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

OUTLIERS = (0.0, 0.4)
POOLINGS = {"mean": training.MeanPooling, "Welsch, through the layer": training.WelschPooling}


def explain_and_compare(console: Console) -> None:
    """Print both reports for both built-in problems; "hand" is the backward pass printed in the paper."""
    console.print(
        'Backward passes: "hand" is the one printed in the paper (Fig. 2, Fig. 4), "auto" the derived one.'
    )
    for case in comparison.cases():
        console.rule(case.title)
        console.print(comparison.explained(case), markup=False, highlight=False, soft_wrap=True)
        console.print()
        console.print(comparison.compared(case), markup=False, highlight=False, soft_wrap=True)
        console.print()


def classify(console: Console, epochs: int, seed: int) -> None:
    """Train a classifier for each pooling and each fraction of outliers; print the test accuracies."""
    console.rule("Digits as point sets")
    accuracies: dict[tuple[str, float], float] = {}
    bar = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
    )
    with Progress(*bar, console=console) as progress:
        for outliers in OUTLIERS:
            sets = digits.load(outliers, seed)
            for name, pooling in POOLINGS.items():
                task = progress.add_task(f"{outliers:.0%} outliers, {name}", total=epochs)
                accuracies[name, outliers] = training.train(
                    pooling, *sets, epochs, seed, advance=lambda task=task: progress.advance(task)
                )
    table = Table(title="test accuracy; outliers in training and test")
    table.add_column("pooling")
    for outliers in OUTLIERS:
        table.add_column(f"{outliers:.0%} outliers", justify="right")
    for name in POOLINGS:
        table.add_row(name, *(f"{accuracies[name, outliers]:.1%}" for outliers in OUTLIERS))
    console.print(table)


def main() -> None:
    """Parse the options, do the three steps, and print how long they took."""
    parser = argparse.ArgumentParser(description="explain, compare, and train on digits with outliers")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training set (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of points, weights and batches (default: 0)")
    options = parser.parse_args()
    start = time.perf_counter()
    # These tensors are small: sharing one between threads costs more than it gains, and ratios of times mean
    # something with one thread only.
    torch.set_num_threads(1)
    console = Console()
    explain_and_compare(console)
    classify(console, options.epochs, options.seed)
    console.print(f"wall time: {time.perf_counter() - start:.0f} s, imports not counted")


if __name__ == "__main__":
    main()

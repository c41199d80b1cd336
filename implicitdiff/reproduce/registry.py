"""Experiments by name. A new one needs a line in `_KNOWN`, or a call of `register`, and nothing else.

In: a name. Out: an `Experiment`; its module is imported when it is asked for. Used by the command line.
"""

import importlib

from implicitdiff.errors import OptionError
from implicitdiff.reproduce.base import Experiment

# (summary, module that has an Experiment named EXPERIMENT). Only the one that is asked for is imported.
_KNOWN: dict[str, tuple[str, str]] = {
    "fig1": ("Fig. 1: time and memory of robust pooling", "implicitdiff.reproduce.fig1"),
    "fig3": ("Fig. 3: time and memory of optimal transport", "implicitdiff.reproduce.fig3"),
    "table1": ("Table 1: kappa_1 and kappa_2, derived from the penalties", "implicitdiff.reproduce.table1"),
    "identity": ("identity with projection (Sahoo et al. 2023)", "implicitdiff.reproduce.identity"),
    "operations": ("operations without a rule, named with their line", "implicitdiff.reproduce.operations"),
}
_REGISTERED: dict[str, Experiment] = {}


def register(experiment: Experiment) -> None:
    """Make an experiment known to `implicitdiff reproduce`.

    Raises:
        OptionError: There is another one of that name.
    """
    if experiment.name in _KNOWN or _REGISTERED.get(experiment.name, experiment) is not experiment:
        raise OptionError(f"there is an experiment named {experiment.name!r} already")
    _REGISTERED[experiment.name] = experiment


def names() -> dict[str, str]:
    """All experiments, each with its summary."""
    known = {name: summary for name, (summary, _) in _KNOWN.items()}
    return known | {name: experiment.summary for name, experiment in _REGISTERED.items()}


def experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        OptionError: There is none.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _KNOWN:
        raise OptionError(f"there is no experiment {name!r}: choose from {', '.join(names())}")
    summary, module = _KNOWN[name]
    found: Experiment = importlib.import_module(module).EXPERIMENT
    assert (found.name, found.summary) == (name, summary)
    return found

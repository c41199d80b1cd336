"""The paper's experiments on this machine: `implicitdiff reproduce fig1`, one command for each.

In: the name of an experiment. Out: `Findings`: tables, figures, and for each claim whether it holds here. `registry.py`
knows all experiments, `base.py` says what one is, `writing.py` makes files of it. Next: `fig1.py`.
"""

from implicitdiff.reproduce.base import Claim, Experiment, Findings, Settings, Table
from implicitdiff.reproduce.registry import experiment, names, register
from implicitdiff.reproduce.writing import write

__all__ = ["Claim", "Experiment", "Findings", "Settings", "Table", "experiment", "names", "register", "write"]

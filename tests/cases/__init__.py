"""The table of cases: every problem whose gradient, structure and solver are checked, one family per file.

`CASES` is the whole table, `BY_NAME` finds a row, `STRANGERS` are the rows that must be treated as a built-in
is. A new family is one file and one line here. Next: base.py (what a row is), tests/test_cases.py (what is
checked).
"""

from tests.cases import (
    bands,
    constrained,
    graphs,
    inputs,
    matrix_variable,
    networks,
    pairwise,
    pooling,
    pytrees,
    quadratic,
    redundant,
    regression,
    simplex,
    strangers_pooling,
    strangers_transport,
    transport,
)
from tests.cases.base import Case, Draw, Sizes

CASES: tuple[Case, ...] = (
    *pooling.CASES,
    *regression.CASES,
    *simplex.CASES,
    *networks.CASES,
    *pairwise.CASES,
    *quadratic.CASES,
    *constrained.CASES,
    *matrix_variable.CASES,
    *bands.CASES,
    *graphs.CASES,
    *transport.CASES,
    *redundant.CASES,
    *pytrees.CASES,
    *inputs.CASES,
    *strangers_pooling.CASES,
    *strangers_transport.CASES,
)
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
STRANGERS: tuple[Case, ...] = tuple(case for case in CASES if case.built_in is not None)

__all__ = ["BY_NAME", "CASES", "STRANGERS", "Case", "Draw", "Sizes"]

"""The command `list`: everything that has a name.

In: perhaps one family. Out: names with the first line of their documentation.
"""

import inspect
from collections.abc import Callable

import click

from implicitdiff import combinatorial, optimizers
from implicitdiff.cli import output
from implicitdiff.cli.target import builtin_problems
from implicitdiff.cli.tool import tool
from implicitdiff.diagnostics.tables import first_sentence, pairs
from implicitdiff.plan import BACKWARDS
from implicitdiff.problems import PENALTIES
from implicitdiff.reproduce import names as experiments
from implicitdiff.solvers import SOLVERS

Names = dict[str, str]
_BACKWARDS = {
    "auto": "derived from the graph, structured; the default",
    "dense": "the formula, Eqn. 3, by dense matrices",
    "matrix-free": "products with H only, an iterative solve",
    "unrolled": "the solver's own steps are differentiated",
    "hand": "the problem's own vjp",
    "approximate": "-v'H^-1 B, constraints ignored: not the gradient",
}


def _problems() -> Names:
    return {name: first_sentence(kind) for name, kind in builtin_problems().items()}


def _penalties() -> Names:
    return {name: first_sentence(penalty.rho) for name, penalty in PENALTIES.items()}


def _backwards() -> Names:
    return {name: _BACKWARDS.get(name, "") for name in BACKWARDS}


def _linear_solvers() -> Names:
    return {name: first_sentence(type(solver)) for name, solver in SOLVERS.items()}


def _optimizers() -> Names:
    classes = (getattr(optimizers, name) for name in optimizers.__all__)
    return {c.__name__: first_sentence(c) for c in classes if isinstance(c, type) and hasattr(c, "__dataclass_fields__")
            and c.__name__ not in ("Progress", "Wolfe")}  # fmt: skip


def estimator_names() -> Names:
    """The estimators of discrete layers."""
    return _subclasses(combinatorial.Estimator)


def _discrete_solvers() -> Names:
    return _subclasses(combinatorial.Solver)


def _subclasses(base: type) -> Names:
    classes = (getattr(combinatorial, name) for name in combinatorial.__all__)
    return {
        c.__name__: first_sentence(c)
        for c in classes
        if isinstance(c, type) and issubclass(c, base) and c is not base and not inspect.isabstract(c)
    }


FAMILIES: dict[str, tuple[str, Callable[[], Names]]] = {
    "problems": ("PROBLEM of the commands; implicitdiff.problems", _problems),
    "penalties": ("RobustPooling(penalty=...)", _penalties),
    "backwards": ("DeclarativeLayer(backward=...)", _backwards),
    "solvers": ("DeclarativeLayer(linear_solver=...)", _linear_solvers),
    "optimizers": ("DeclarativeLayer(optimizer=...); implicitdiff.optimizers", _optimizers),
    "estimators": ("DiscreteLayer(estimator=...); implicitdiff.combinatorial", estimator_names),
    "experiments": ("implicitdiff reproduce NAME", experiments),
    "discrete-solvers": ("DiscreteLayer(solver=...); implicitdiff.combinatorial", _discrete_solvers),
}


@tool("list")
@click.argument("family", required=False, metavar="[FAMILY]", type=click.Choice(list(FAMILIES)))
def list_names(family: str | None, as_json: bool) -> None:
    """List everything that has a name.

    \b
    FAMILY: problems, penalties, backwards, solvers, optimizers, estimators,
    experiments, discrete-solvers; all of them if it is left out.
    """
    wanted = [family] if family else list(FAMILIES)
    if as_json:
        output.print_json({name: FAMILIES[name][1]() for name in wanted})
        return
    for position, name in enumerate(wanted):
        where, names = FAMILIES[name]
        if position:
            output.console().print()
        output.report(f"{name}: {where}")
        output.console().print(pairs([(f"  {key}", text) for key, text in names().items()], output.width()))

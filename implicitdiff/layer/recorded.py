"""A layer inside torch.compile or torch.export: one node of the graph, with the problem's tensors as its inputs.

In: a problem, options and the recorder's tensors. Out: a `Solution` of the recorder's tensors. What the recorder runs
itself is `solution_in_graph`, which only follows attributes; everything else is behind `_node`, which it does not
look into. Next: `layer/run.py`, and `autograd/opaque.py` for the operators that end up in the graph.
"""

from __future__ import annotations

import ast
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from implicitdiff.attributes import plain_values, scan
from implicitdiff.autograd.handles import Handles
from implicitdiff.autograd.options import KKTOptions
from implicitdiff.errors import NotSupportedYetError, StaleGraphError, TraceError
from implicitdiff.layer.options import Options
from implicitdiff.layer.prepare import prepare
from implicitdiff.layer.run import run
from implicitdiff.problem import Problem, Solution, problem_of
from implicitdiff.pytrees import flatten, unflatten

Path = tuple[tuple[bool, Any], ...]
Nested = tuple[str, tuple[Any, ...], tuple[Any, ...]]  # kind, keys of a dict, parts
Layout = tuple[Nested, int, Nested | None, bool]

_LAYERS: Handles[tuple[Problem, Options]] = Handles()
_LAYOUTS = threading.local()


def solution_in_graph(
    problem: Problem, options: Options, inputs: tuple[Any, ...], init: Any, with_value: bool
) -> Solution:
    """One call of a layer while a recorder runs the Python around it.

    torch.compile keeps a guard for everything that is read here: the identity of the problem, its plain attributes and
    the options. With another problem or a changed attribute it compiles anew.

    Raises:
        TraceError: a tensor of the problem is out of reach of a recorder.
        ImplicitDiffError: as a call outside of a recorder does; what concerns values is raised when the graph runs.
    """
    which = id(problem)
    for path, value in _plain_values(which):
        if _follow(problem, path) != value:
            raise StaleGraphError("an attribute of the problem changed while the graph was being recorded")
    tensors = tuple([_follow(problem, path) for path in _paths(which)])
    number = _number(
        which,
        options.in_dims,
        options.optimizer,
        options.linear_solver,
        options.backward,
        options.on_failure,
        options.optimality_tol,
        options.tie,
        options.kkt,
    )
    leaves = _node(number, with_value, tensors, inputs, init)
    return _assembled(leaves, _layout(number))


def _follow(owner: Any, path: Path) -> Any:
    for is_item, step in path:
        owner = owner[step] if is_item else getattr(owner, step)
    return owner


def _assembled(leaves: tuple[Tensor, ...], layout: Layout) -> Solution:
    """The solution of the leaves: u, the multipliers, the value if there is one, then what is known per sample."""
    u, u_count, multipliers, has_value = layout
    rest = leaves[-4:] if has_value else leaves[-3:]
    between = leaves[u_count : len(leaves) - len(rest)]
    return Solution(
        u=_built(u, leaves, 0)[0],
        equality_multipliers=None if multipliers is None else _built(multipliers, between, 0)[0],
        value=rest[0] if has_value else None,
        status=rest[-3],
        iterations=rest[-2],
        residual=rest[-1],
    )


def _built(shape: Nested, leaves: tuple[Tensor, ...], start: int) -> tuple[Any, int]:
    """The pytree of a shape, from the leaves that begin at `start`; and where the next one begins."""
    kind, keys, parts = shape
    if kind == "leaf":
        return leaves[start], start + 1
    values = []
    for part in parts:
        value, start = _built(part, leaves, start)
        values.append(value)
    if kind == "dict":
        return dict(zip(keys, values, strict=True)), start
    return (tuple(values) if kind == "tuple" else values), start


@torch.compiler.allow_in_graph
def _node(
    number: int, with_value: bool, tensors: tuple[Tensor, ...], inputs: tuple[Any, ...], init: Any
) -> tuple[Tensor, ...]:
    """The call, as one node of the recorder's graph: leaves of the solution, see `_assembled`."""
    problem, options = _LAYERS.value(number)
    found = run(prepare(problem, _fixed(inputs), options, init, tensors), with_value=with_value)
    u, multipliers = flatten(found.u)[0], ()
    if found.equality_multipliers is not None:
        multipliers = flatten(found.equality_multipliers)[0]
    value = () if found.value is None else (found.value,)
    _LAYOUTS.latest = (
        _shape(found.u),
        len(u),
        None if found.equality_multipliers is None else _shape(found.equality_multipliers),
        bool(value),
    )
    leaves = (*u, *multipliers, *value, found.status, found.iterations, found.residual)
    return tuple(leaf for leaf in leaves if leaf is not None)


def _shape(tree: Any) -> Nested:
    """The structure of a pytree in terms that a recorder can rebuild it from."""
    if isinstance(tree, Tensor):
        return "leaf", (), ()
    if type(tree) is dict:
        return "dict", tuple(tree), tuple(map(_shape, tree.values()))
    if type(tree) in (tuple, list):
        return type(tree).__name__, (), tuple(map(_shape, tree))
    raise NotSupportedYetError(
        f"u or a constraint is a {type(tree).__name__}: in torch.compile and torch.export use tensors, tuples, "
        "lists and dicts"
    )


def _fixed(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with Python's own numbers: which number a constant is belongs to the signature of a plan."""
    leaves, spec = flatten(inputs)
    kinds = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    fixed: tuple[Any, ...] = unflatten([kinds.get(type(leaf), _same)(leaf) for leaf in leaves], spec)
    return fixed


def _same(value: Any) -> Any:
    return value


# torch.compile calls these once while it compiles, and keeps what they return. They take the id of the problem, which
# it guards; modules themselves it cannot pass in all versions.


@torch.compiler.assume_constant_result
def _plain_values(which: int) -> tuple[tuple[Path, Any], ...]:
    return tuple((_path(name), value) for name, value in plain_values(problem_of(which)))


@torch.compiler.assume_constant_result
def _paths(which: int) -> tuple[Path, ...]:
    """How to reach each tensor of the problem, in the order of `scan`."""
    problem = problem_of(which)
    found = scan(problem)
    paths = tuple(_path(name) for name in found.names)
    for name, path, tensor in zip(found.names, paths, found.tensors, strict=True):
        if _follow(problem, path) is not tensor:
            raise TraceError(
                f"{name} of {type(problem).__name__} cannot be reached by attributes and items alone, which is all "
                "that torch.compile and torch.export follow: make it a parameter, a buffer or an attribute"
            )
    return paths


@torch.compiler.assume_constant_result
def _number(
    which: int,
    in_dims: Any,
    optimizer: Any,
    linear_solver: str,
    backward: str,
    on_failure: str,
    optimality_tol: float | None,
    tie: str,
    kkt: KKTOptions,
) -> int:
    problem = problem_of(which)
    options = Options(
        in_dims, optimizer, linear_solver, backward, on_failure, optimality_tol, tie=tie, kkt=kkt
    )
    options.check(problem)
    owner = weakref.ref(problem)

    def make() -> tuple[Problem, Options]:
        found = owner()
        if found is None:
            raise AssertionError("numbers are dropped with their owner")
        return found, options

    return _LAYERS.number(problem, repr(options), make)


@torch.compiler.assume_constant_result
def _layout(_: int) -> Layout:
    """The layout of the node that this thread recorded last."""
    layout: Layout = _LAYOUTS.latest
    return layout


def _path(name: str) -> Path:
    """`self.layers[0].weight` as steps (is an item, key): ((False, 'layers'), (True, 0), (False, 'weight'))."""
    steps: list[tuple[bool, Any]] = []
    node: ast.expr = ast.parse(name, mode="eval").body
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            steps.append((False, node.attr))
            node = node.value
        elif isinstance(node, ast.Subscript):
            steps.append((True, ast.literal_eval(node.slice)))
            node = node.value
        else:
            raise TraceError(
                f"{name} cannot be followed by torch.compile: its keys have to be strings or numbers"
            )
    return tuple(reversed(steps))

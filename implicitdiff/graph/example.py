"""What the variables look like: structure, shapes and dtype of u for one sample.

Comes in: a Problem and its bound inputs, or the u that its ``solve`` returned. Goes out: an ``Example``.
Next file to read: ``trace.py``.
"""

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from implicitdiff.errors import ImplicitDiffError, InputError, ProblemDefinitionError, SolutionError
from implicitdiff.graph.arguments import arguments_of
from implicitdiff.graph.checks import describe_value
from implicitdiff.graph.record import LOCK, explain, run_on_shapes
from implicitdiff.inputs import Bound, variable_name
from implicitdiff.problem import Problem
from implicitdiff.pytrees import Spec, flatten, leaf_names
from implicitdiff.torch_private import clean_context, is_fake, is_wrapped

KEPT = 32


class Example(NamedTuple):
    """The variables of one sample without data: meta tensors and their structure."""

    leaves: tuple[torch.Tensor, ...]
    spec: Spec


def variable_example(problem: Problem, bound: Bound) -> Example:
    """Structure, shapes and dtype of the variables, from ``init``.

    ``init`` is run on fake tensors of one sample. It may read values, which fake tensors do not have: then it
    is run on the first sample instead, if there is one. What came from shapes alone is remembered by
    signature.

    Args:
        problem: The Problem.
        bound: Its inputs.

    Returns:
        The example.

    Raises:
        ProblemDefinitionError: There is no ``init`` (use ``solution_example``), it failed, or returned no
            tensors.
        InputError: It returned integers, or another dtype than that of the inputs.
        TraceError: It reads values, and there are none to read.
    """
    name = type(problem).__name__
    if not problem.declares("init"):
        raise ProblemDefinitionError(f"{name} declares no init: the variables follow from what solve returns")
    signature = bound.signature
    with LOCK:
        known = _KNOWN.setdefault(problem, OrderedDict())
        if signature in known:
            return known[signature]
    arguments = arguments_of(problem, (), None, bound)
    lasting = True
    try:
        with LOCK:
            result = run_on_shapes(problem, "init", arguments)
    except ImplicitDiffError as error:
        if bound.batch == 0 or any(is_fake(x) or is_wrapped(x) for x in (*bound.leaves, *bound.tensors)):
            raise
        lasting = False
        try:
            with torch.no_grad():
                result = problem.init(*bound.sample(0))
        except Exception as second:
            raise explain(f"{name}.init", arguments, second) from error
    leaves, spec = flatten(result)
    labels = leaf_names(spec, variable_name(problem))
    example = _example(leaves, spec, f"{name}.init", labels, bound, InputError)
    if lasting:
        with LOCK:
            known[signature] = example
            while len(known) > KEPT:
                known.popitem(last=False)
    return example


def solution_example(problem: Problem, solution: Any, bound: Bound) -> Example:
    """Structure, shapes and dtype of the variables, from what ``solve`` returned for the whole batch.

    Args:
        problem: The Problem.
        solution: u with the batch axis first (not a ``Solution``).
        bound: The inputs it was computed from.

    Returns:
        The example.

    Raises:
        SolutionError: A leaf is no floating tensor of the inputs' dtype, or has another batch size.
        ProblemDefinitionError: It holds no tensors.
    """
    name = f"{type(problem).__name__}.solve"
    leaves, spec = flatten(solution)
    labels = leaf_names(spec, variable_name(problem))
    for label, leaf in zip(labels, leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and (leaf.dim() == 0 or leaf.shape[0] != bound.batch):
            raise SolutionError(
                f"{name} returned {label} of shape {tuple(leaf.shape)}: its first axis has to be the batch "
                f"axis, of size {bound.batch}"
            )
    one = [_without_batch(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return _example(one, spec, name, labels, bound, SolutionError)


_KNOWN: weakref.WeakKeyDictionary[Problem, OrderedDict[Hashable, Example]] = weakref.WeakKeyDictionary()


def _example(
    leaves: Sequence[Any],
    spec: Spec,
    source: str,
    names: Sequence[str],
    bound: Bound,
    error: type[ImplicitDiffError],
) -> Example:
    """Check the leaves of one sample and strip them of their data."""
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            raise ProblemDefinitionError(
                f"{source} returned {describe_value(leaf)} for {name}: return a tensor or a pytree of tensors"
            )
        if not leaf.is_floating_point():
            raise error(
                f"{source} returned {leaf.dtype} for {name}: variables are real floating tensors, use "
                f".to({bound.dtype})"
            )
        if leaf.dtype != bound.dtype:
            raise error(
                f"{source} returned {leaf.dtype} for {name}, but the inputs are {bound.dtype}: make it with "
                "that dtype, as in torch.zeros_like(x) or torch.zeros(3, dtype=x.dtype)"
            )
    if not any(leaf.numel() for leaf in leaves):
        raise ProblemDefinitionError(
            f"{source} returned a variable without entries: there is nothing to optimise"
        )
    return Example(tuple(_on_meta(leaf) for leaf in leaves), spec)


def _without_batch(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty(leaf.shape[1:], dtype=leaf.dtype, device="meta")


def _on_meta(leaf: torch.Tensor) -> torch.Tensor:
    with clean_context():
        return torch.empty(tuple(leaf.shape), dtype=leaf.dtype, device="meta")

"""What `bounds` returned, as one tensor for each bound that is there.

Comes in: (lower, upper), each None, a number, or tensors in the structure of u. Goes out: tensors that broadcast to
the leaves of u, and which leaf has which bound. Used by ``checks.py`` while the hook is being traced.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch

from implicitdiff.errors import ProblemDefinitionError
from implicitdiff.graph.arguments import Arguments, Fact
from implicitdiff.pytrees import Spec, flatten_like, leaf_names

_RETURN = "return (lower, upper), each None, a number, or what fits u: a tensor that broadcasts to it"


def bounds_of(
    name: str, result: Any, arguments: Arguments
) -> tuple[list[torch.Tensor], tuple[tuple[bool, bool], ...]]:
    """The bounds that are there, and which they are.

    Args:
        name: The hook, for messages.
        result: What it returned: a pair; each part None, one number or tensor for every leaf of u, or the structure
            of u with None, numbers and tensors in it.
        arguments: Its variables.

    Returns:
        Tensors, lower and upper of the first leaf of u, then of the next, left out where there is none; for each leaf
        (has a lower bound, has an upper one).

    Raises:
        ProblemDefinitionError: It is no pair, or a part does not fit u.
    """
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ProblemDefinitionError(f"{name} returned {type(result).__name__}, no pair: {_RETURN}")
    spec = arguments.variable_spec
    assert spec is not None  # the bounds are those of a variable
    sides = [
        _side(f"{side} of {name}", value, spec)
        for side, value in zip(("lower", "upper"), result, strict=True)
    ]
    names, facts = leaf_names(spec, "u"), arguments.facts[: arguments.variables]
    found, bounded = [], []
    for leaf, fact, *pair in zip(names, facts, *sides, strict=True):
        for side, value in zip(("lower", "upper"), pair, strict=True):
            if value is not None:
                found.append(_tensor(f"{side} bound of {leaf} in {name}", value, fact))
        bounded.append((pair[0] is not None, pair[1] is not None))
    return found, tuple(bounded)


def _side(what: str, value: Any, spec: Spec) -> list[Any]:
    """One part of the pair, an entry for each leaf of u."""
    if value is None or isinstance(value, numbers.Real | torch.Tensor):
        return [value] * spec.num_leaves
    return list(flatten_like(value, spec, what, ProblemDefinitionError))


def _tensor(what: str, value: Any, fact: Fact) -> torch.Tensor:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return torch.full((), float(value), dtype=fact.dtype, device=fact.device)
    if not isinstance(value, torch.Tensor):
        raise ProblemDefinitionError(f"{what} is a {type(value).__name__}: {_RETURN}")
    if not value.is_floating_point():
        raise ProblemDefinitionError(f"{what} has dtype {value.dtype}: return a floating tensor")
    try:
        fits = torch.broadcast_shapes(value.shape, fact.shape) == torch.Size(fact.shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ProblemDefinitionError(
            f"{what} has shape {tuple(value.shape)}, which does not broadcast to {fact.shape} (one sample)"
        )
    return value

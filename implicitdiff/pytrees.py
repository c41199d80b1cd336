"""Pytrees (nested tuples, lists and dicts) of variables, inputs and constraints, taken apart and put
together.

Comes in: what the user passes or returns. Goes out: tuples of leaves in the order of ``torch.utils._pytree``,
names such as ``x['cost']`` for messages, and a structure to put leaves back into. Next file to read:
``attributes.py``.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from implicitdiff.errors import ImplicitDiffError, SolutionError
from implicitdiff.torch_private import pytree

Spec: TypeAlias = pytree.TreeSpec


def flatten(tree: Any) -> tuple[tuple[Any, ...], Spec]:
    """The leaves of a pytree and its structure; a tensor, a number or None is a leaf."""
    if isinstance(tree, torch.Tensor):
        return (tree,), _ONE  # by far the most frequent tree
    leaves, spec = pytree.tree_flatten(tree)
    return tuple(leaves), spec


_ONE: Spec = pytree.tree_flatten(0)[1]


@functools.lru_cache
def flat_spec(length: int) -> Spec:
    """The structure of a tuple of that many leaves."""
    return flatten((0,) * length)[1]


def unflatten(leaves: Sequence[Any], spec: Spec) -> Any:
    """The pytree of structure ``spec`` with these leaves."""
    if spec is _ONE:
        (leaf,) = leaves
        return leaf
    return pytree.tree_unflatten(list(leaves), spec)


def leaf_names(spec: Spec, base: str) -> tuple[str, ...]:
    """One name per leaf, in leaf order: ``u`` for a single leaf, ``u['a']``, ``u[0]`` inside containers."""
    if spec.is_leaf():
        return (base,)
    numbered = unflatten(range(spec.num_leaves), spec)
    return tuple(base + pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(numbered)[0])


def flatten_like(
    tree: Any, spec: Spec, what: str, error: type[ImplicitDiffError] = SolutionError
) -> tuple[Any, ...]:
    """The leaves of ``tree`` in the order of ``spec``, whatever order its dict keys were written in.

    Args:
        tree: A pytree that should have the structure ``spec``.
        spec: The structure that counts, for instance that of ``init``.
        what: What the tree is, for the message: "solve of OptimalTransport".
        error: The class to raise.

    Returns:
        The leaves.

    Raises:
        error: The structure is another one.
    """
    if spec is _ONE and isinstance(tree, torch.Tensor):
        return (tree,)
    try:
        leaves = tuple(spec.flatten_up_to(tree))
    except ValueError as mismatch:
        raise _wrong_structure(tree, spec, what, error) from mismatch
    if not all(pytree.tree_structure(leaf).is_leaf() for leaf in leaves):
        raise _wrong_structure(tree, spec, what, error)
    return leaves


def describe(spec: Spec) -> str:
    """The structure in a line, a star for each leaf: ``{'a': *, 'b': (*, *)}``; one text, one structure."""
    if spec is _ONE:
        return "*"
    return _describe_flat(spec.num_leaves) if spec is flat_spec(spec.num_leaves) else _describe(spec)


def _describe(spec: Spec) -> str:
    return repr(unflatten([_Star()] * spec.num_leaves, spec))


@functools.lru_cache
def _describe_flat(length: int) -> str:
    return _describe(flat_spec(length))


class _Star:
    def __repr__(self) -> str:
        return "*"


def _wrong_structure(tree: Any, spec: Spec, what: str, error: type[ImplicitDiffError]) -> ImplicitDiffError:
    own = describe(pytree.tree_structure(tree))
    return error(f"{what} has the structure {own}, expected {describe(spec)} (a star stands for a tensor)")

"""Pytrees: names of leaves, and trees that have to have another one's structure."""

from collections import namedtuple
from typing import Any

import pytest
import torch

import implicitdiff as idf
from implicitdiff.pytrees import describe, flat_spec, flatten, flatten_like, leaf_names, unflatten

Pair = namedtuple("Pair", ["left", "right"])


def test_names_follow_the_leaves() -> None:
    tree = {"b": (1, [2]), "a": Pair(3, None)}
    leaves, spec = flatten(tree)
    assert leaves == (1, 2, 3, None)
    assert leaf_names(spec, "u") == ("u['b'][0]", "u['b'][1][0]", "u['a'].left", "u['a'].right")
    assert unflatten(leaves, spec) == tree
    assert leaf_names(flatten(torch.zeros(2))[1], "u") == ("u",)
    assert flat_spec(2) == flatten((1, 2))[1]


def test_description_tells_structures_apart() -> None:
    trees: list[Any] = [
        0,
        (0,),
        [0],
        {"a": 0},
        {"b": 0},
        {"a": (0,)},
        (0, 0),
        Pair(0, 0),
        ((0,), 0),
        {1: 0},
        {"1": 0},
    ]
    assert len({describe(flatten(tree)[1]) for tree in trees}) == len(trees)
    assert describe(flatten({"a": (1.0, None)})[1]) == "{'a': (*, *)}"


def test_order_of_dict_keys_does_not_matter() -> None:
    spec = flatten({"a": 0, "b": (0, 0)})[1]
    assert flatten_like({"b": (2, 3), "a": 1}, spec, "solve") == (1, 2, 3)
    nested = flatten(({"a": 0, "b": 0}, 0))[1]
    assert flatten_like(({"b": 2, "a": 1}, 3), nested, "solve") == (1, 2, 3)


@pytest.mark.parametrize(
    "tree", [{"a": 0}, {"a": 0, "b": 0}, {"a": (0,), "b": (0, 0)}, {"a": 0, "b": (0, 0, 0)}, (0, 0), 0, None]
)
def test_another_structure_is_named(tree: Any) -> None:
    spec = flatten({"a": 0, "b": (0, 0)})[1]
    with pytest.raises(
        idf.SolutionError, match=r"solve of P has the structure .*expected \{'a': \*, 'b': \(\*, \*\)\}"
    ):
        flatten_like(tree, spec, "solve of P")
    with pytest.raises(idf.InputError):
        flatten_like(tree, spec, "init=", idf.InputError)

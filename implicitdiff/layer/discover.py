"""The structure of u where only `solve` knows it: run once, look, remember.

In: a problem without `init`, and its inputs. Out: an `Example` of its variables. Next: `layer/prepare.py`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

import torch

from implicitdiff.errors import SolutionError
from implicitdiff.graph.record import LOCK
from implicitdiff.graph.skeleton import skeleton
from implicitdiff.graph.trace import Example, solution_example
from implicitdiff.inputs import Bound
from implicitdiff.problem import Problem, Solution
from implicitdiff.torch_private import clean_context, first_entry, is_fake, is_wrapped

REMEMBERED = 32

_FOUND: weakref.WeakKeyDictionary[Problem, OrderedDict[Hashable, Example]] = weakref.WeakKeyDictionary()


def solved_example(problem: Problem, bound: Bound) -> Example:
    """Structure, shapes and dtype of u, from what `solve` returns; asked once per signature.

    Inside vmap or grad the first entry of each transformed axis stands for all. A batch of 0 samples is shown to
    `solve` as it is.

    Raises:
        SolutionError: `solve` returned something else than tensors of the inputs' dtype, or the inputs have no data.
    """
    with LOCK:
        known = _FOUND.setdefault(problem, OrderedDict())
        if bound.signature in known:
            known.move_to_end(bound.signature)
            return known[bound.signature]
    name = type(problem).__name__
    if any(is_fake(tensor) for tensor in (*bound.leaves, *bound.tensors)):
        raise SolutionError(
            f"{name} declares no init, so the shape of u is known only after a solve, which needs data: "
            "declare init, or call the layer once on real tensors of these shapes"
        )
    plain = problem
    leaves, tensors = tuple(map(first_entry, bound.leaves)), tuple(map(first_entry, bound.tensors))
    with torch.no_grad(), clean_context():
        if any(is_wrapped(tensor) for tensor in bound.tensors):
            plain = skeleton(problem, {id(old): new for old, new in zip(bound.tensors, tensors, strict=True)})
        try:
            found = plain.solve(*replace(bound, leaves=leaves, tensors=tensors).expanded())
        except Exception as error:
            if bound.batch:
                raise
            raise SolutionError(
                f"{name} declares no init, so the shape of u is known only after a solve, which fails on "
                f"a batch of 0 samples ({type(error).__name__}): declare init, or call the layer on a "
                "batch that is not empty first"
            ) from error
    tree = found.u if isinstance(found, Solution) else found
    example = solution_example(problem, tree, bound)
    with LOCK:
        known[bound.signature] = example
        while len(known) > REMEMBERED:
            known.popitem(last=False)
    return example

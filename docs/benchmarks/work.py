"""What one benchmark is: a problem at a size, its solution, and the same gradient written by hand.

In: a problem and float64 inputs. Out: a frozen `Work`, solved once, so that every method starts from one u.
Next: works.py, the list.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics.held import held_at

Forward = Callable[..., Tensor]
"""(*inputs) -> u with autograd's graph behind it."""
Gradients = Sequence[Tensor]


def as_they_are(gradients: Gradients) -> Gradients:
    """The gradients as they are: nothing is left undetermined."""
    return gradients


@dataclass(frozen=True)
class Work:
    """One benchmark.

    Attributes:
        name: The family, as "pooling".
        setting: What is special about it, as "b8 m128 n1024".
        problem: The declaration, in the dtype of the inputs.
        inputs: Tensors, batch axis first.
        needs: Which inputs get a gradient.
        hand: (u, *inputs) -> u with the hand-written backward pass behind it.
        solution: The common solution; its multipliers are the solver's own.
        whole: Forward and backward are timed together, and every method solves for itself.
        note: What to know about the hand-written pass.
        determined: Removes from gradients what no method determines (marginals of transport: a constant).
    """

    name: str
    setting: str
    problem: idf.Problem
    inputs: tuple[Tensor, ...]
    needs: tuple[bool, ...]
    hand: Forward
    solution: idf.Solution
    whole: bool = False
    note: str = ""
    determined: Callable[[Gradients], Gradients] = as_they_are

    @property
    def u(self) -> Tensor:
        return self.solution.u

    @property
    def size(self) -> tuple[int, int, int]:
        """(batch, variables, constraints)."""
        batch = self.u.shape[0]
        multipliers = torch.utils._pytree.tree_leaves(self.solution.equality_multipliers)
        p = sum(leaf.numel() for leaf in multipliers if isinstance(leaf, Tensor)) // max(batch, 1)
        return batch, self.u[0].numel(), p

    @functools.cached_property
    def held(self) -> idf.Problem:
        """The problem with a `solve` that returns the common solution; one object, so that plans are found again."""
        return held_at(self.problem, self.solution)

    def cotangent(self) -> Tensor:
        """Standard normal numbers in the shape of u, always the same ones."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.u.shape, generator=generator, dtype=torch.float64).to(self.u.dtype)

    def leaves(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(copies of the inputs, those of them that require a gradient)."""
        copies = tuple(
            x.detach().clone().requires_grad_(need) for x, need in zip(self.inputs, self.needs, strict=True)
        )
        return copies, tuple(x for x in copies if x.requires_grad)

    def truth(self) -> list[Tensor]:
        """The gradients by hand in float64, at the same u and inputs."""
        double = replace(
            self, inputs=tuple(x.double() for x in self.inputs), solution=idf.Solution(self.u.double())
        )
        inputs, asked = double.leaves()
        u = self.hand(double.u, *inputs)
        return list(self.determined(torch.autograd.grad(u, asked, self.cotangent().double())))

    def error(self, gradients: Gradients, truth: Gradients) -> float:
        """The largest |g - truth|_inf / |truth|_inf over the inputs; NaN where an entry is not finite.

        A gradient whose truth is (almost) zero is measured against the largest of all.
        """
        found = self.determined([g.detach().double() for g in gradients])
        floor = 1e-9 * max(float(t.abs().max()) for t in truth)
        errors = [
            float((g - t).abs().max()) / (max(float(t.abs().max()), floor) or 1.0)
            for g, t in zip(found, truth, strict=True)
        ]
        return max(errors, key=lambda e: (e != e, e))


def solve_work(
    name: str,
    setting: str,
    problem: idf.Problem,
    inputs: tuple[Tensor, ...],
    needs: tuple[bool, ...],
    hand: Forward,
    dtype: torch.dtype = torch.float32,
    **about: Any,
) -> Work:
    """A Work at the solution found in float64 and rounded to `dtype`: no solver's tolerance is measured."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", idf.errors.ImplicitDiffWarning)
        found = idf.solve(copy.deepcopy(problem).double(), *(x.double() for x in inputs), on_failure="warn")
    multipliers = torch.utils._pytree.tree_map(
        lambda leaf: leaf.detach().to(dtype) if isinstance(leaf, Tensor) else leaf, found.equality_multipliers
    )
    solution = idf.Solution(found.u.detach().to(dtype), equality_multipliers=multipliers)
    plain = tuple(x.to(dtype) for x in inputs)
    return Work(name, setting, problem.to(dtype), plain, needs, hand, solution, **about)

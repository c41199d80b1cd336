"""Eqn. 3 for whole batches, sample after sample: the gradients that every backward pass is held against.

In: a Problem, a solution (or any point), a cotangent, inputs. Out: one gradient per input and Parameter.
Next: compare.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, _broadcast_to_and_flatten, tree_flatten, tree_map, tree_unflatten

from implicitdiff import Problem
from tests.oracles.linalg import join, null_space, pseudo_inverse, rank
from tests.oracles.sample import Derivatives, Sample


@dataclass(frozen=True)
class Gradients:
    """What a backward pass returns: a pytree like the inputs (None for constants), a tensor per Parameter."""

    inputs: tuple[Any, ...]
    parameters: dict[str, Tensor]

    def leaves(self) -> list[Tensor]:
        """All gradients as a list: the differentiable leaves of the inputs, then the Parameters by name."""
        of_inputs = [leaf for leaf in tree_flatten(self.inputs)[0] if leaf is not None]
        return [*of_inputs, *self.parameters.values()]


def eqn3(d: Derivatives) -> Tensor:
    """Dy (m, n) by the paper's Eqn. 3 as printed: H and A H^-1 A' must be non-singular.

    Dy = H^-1 A' (A H^-1 A')^-1 (A H^-1 B - C) - H^-1 B
    """
    inverse = torch.linalg.inv(d.H)
    if d.A.shape[0] == 0:
        return -inverse @ d.B
    schur = torch.linalg.inv(d.A @ inverse @ d.A.mT)
    return inverse @ d.A.mT @ schur @ (d.A @ inverse @ d.B - d.C) - inverse @ d.B


def kkt_matrix(d: Derivatives) -> Tensor:
    """K = [[H, -A'], [-A, 0]], the derivative of F = (D_u L, -h) with respect to (u, lam)."""
    p = d.A.shape[0]
    return torch.cat([torch.cat([d.H, -d.A.mT], 1), torch.cat([-d.A, d.A.new_zeros(p, p)], 1)], 0)


def kkt_solution(d: Derivatives, v_u: Tensor, v_lam: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(w, s) of minimum norm with K (w, s) = -(v_u, v_lam): s is unique only modulo the null space of A'."""
    m, p = d.H.shape[0], d.A.shape[0]
    rhs = torch.cat([v_u, v_u.new_zeros(p) if v_lam is None else v_lam])
    solution = -(pseudo_inverse(kkt_matrix(d)) @ rhs)
    return solution[:m], solution[m:]


def pullback(d: Derivatives, v_u: Tensor, v_lam: Tensor | None = None) -> Tensor:
    """The gradient (n,) of <v_u, u> + <v_lam, lam> with respect to theta: B'w - C's.

    Where H and S are safely invertible and the multipliers carry no cotangent this is v' Dy with Eqn. 3
    itself; else the KKT system by its pseudo-inverse, which also covers singular H and dependent constraints
    (minimum norm).
    """
    if v_lam is None and _safely_invertible(d):
        return v_u @ eqn3(d)
    w, s = kkt_solution(d, v_u, v_lam)
    return w @ d.B - s @ d.C


def _safely_invertible(d: Derivatives) -> bool:
    if torch.linalg.cond(d.H) > 1e4 or rank(d.A) < d.A.shape[0]:
        return False
    return d.A.shape[0] == 0 or bool(torch.linalg.cond(d.A @ torch.linalg.inv(d.H) @ d.A.mT) < 1e4)


def dense_vjp(problem: Problem, u: Any, v: Any, inputs: Sequence[Any], in_dims: Any = 0) -> Gradients:
    """The gradient of <v, u(inputs)> for every input and Parameter at the solution u, sample after sample.

    Args:
        u: The solution, a pytree whose leaves are (batch, *shape), or (*shape) when `in_dims` is None.
        v: The cotangent, like u.
        inputs: The layer's inputs; `in_dims` as for the layer.

    Returns:
        Gradients; for a shared input and for a Parameter the sum over the batch.
    """
    return dense_vjp_at(problem, u, None, v, inputs, in_dims)


def dense_vjp_at(
    problem: Problem,
    u: Any,
    lam: Any,
    v: Any,
    inputs: Sequence[Any],
    in_dims: Any = 0,
    v_lam: Any = None,
) -> Gradients:
    """As `dense_vjp` at any point (u, lam), solution or not: B'w - C's with K (w, s) = -(v, v_lam) there.

    `lam` and `v_lam` are pytrees like the output of `equality`, with the batch axis first; None: least
    squares, zero.
    """
    samples = split_batch(inputs, in_dims)
    unbatched = samples.unbatched
    leaf_sums: list[list[Tensor | None]] = []
    parameter_sums: dict[str, Tensor] = {}
    for b, sample_inputs in enumerate(samples.inputs):
        sample = Sample(problem, _at(u, b, unbatched), sample_inputs)
        d = sample.derivatives(sample.u, _joined_at(lam, b, unbatched))
        flat_v = _joined_at(v, b, unbatched)
        assert flat_v is not None
        flat = pullback(d, flat_v, _joined_at(v_lam, b, unbatched))
        leaves, parameters = sample.unflatten_gradient(flat)
        leaf_sums.append(leaves)
        for name, g in parameters.items():
            parameter_sums[name] = parameter_sums[name] + g if name in parameter_sums else g
    return Gradients(samples.join(leaf_sums), parameter_sums)


def dense_hessian(
    problem: Problem, u: Any, inputs: Sequence[Any], in_dims: Any = 0, lam: Any = None
) -> Tensor:
    """H = D_uu L (batch, m, m), (m, m) when `in_dims` is None; `lam` None: least-squares multipliers."""

    def one(sample: Sample, flat_lam: Tensor | None) -> Tensor:
        return sample.hessian(
            sample.u, sample.least_squares_multipliers(sample.u) if flat_lam is None else flat_lam
        )

    return _over_batch(problem, u, inputs, in_dims, lam, one)


def dense_constraint_jacobian(problem: Problem, u: Any, inputs: Sequence[Any], in_dims: Any = 0) -> Tensor:
    """A = D_u h (batch, p, m), or (p, m) when `in_dims` is None."""
    return _over_batch(
        problem, u, inputs, in_dims, None, lambda sample, _: sample.constraint_jacobian(sample.u)
    )


def gradient_null_vectors(
    problem: Problem, u: Any, inputs: Sequence[Any], in_dims: Any = 0
) -> list[list[Tensor]]:
    """The directions the gradient is defined modulo: C'c for each c with A'c = 0, for each sample.

    Dependent constraints (OT: all m + n marginals) can be met only by inputs that move along consistent
    directions, so s of the KKT system, and with it B'w - C's, is defined up to these vectors ((1_m, -1_n) for
    the gradients of r, c).

    Returns:
        One list of tensors per direction, each like `Gradients.leaves()`.
    """
    samples = split_batch(inputs, in_dims)
    vectors = []
    for b, sample_inputs in enumerate(samples.inputs):
        sample = Sample(problem, _at(u, b, samples.unbatched), sample_inputs)
        d = sample.derivatives(sample.u)
        for c in null_space(d.A.mT).mT:
            leaves, parameters = sample.unflatten_gradient(c @ d.C)
            per_sample = [
                [None if leaf is None else torch.zeros_like(leaf) for leaf in leaves]
                for _ in range(len(samples.inputs))
            ]
            per_sample[b] = leaves
            vectors.append(Gradients(samples.join(per_sample), parameters).leaves())
    return vectors


@dataclass(frozen=True)
class _Samples:
    inputs: list[tuple[Any, ...]]
    dims: list[int | None]
    spec: TreeSpec
    unbatched: bool

    def join(self, leaves: list[list[Tensor | None]]) -> tuple[Any, ...]:
        """Per-sample gradients as gradients of the inputs: stacked where batched, summed where shared."""
        joined: list[Tensor | None] = []
        for k, dim in enumerate(self.dims):
            pieces = [leaf for sample in leaves if (leaf := sample[k]) is not None]
            if not pieces:
                joined.append(None)
            else:
                joined.append(torch.stack(pieces).sum(0) if dim is None else torch.stack(pieces, dim))
        return tree_unflatten(joined, self.spec)


def split_batch(inputs: Sequence[Any], in_dims: Any = 0) -> _Samples:
    """The inputs of each sample, `in_dims` as in torch.vmap; leaves that are no tensors are shared."""
    leaves, spec = tree_flatten(tuple(inputs))
    flat = _broadcast_to_and_flatten(in_dims, spec)
    assert flat is not None, f"in_dims {in_dims} does not fit the inputs"
    dims = [dim if isinstance(leaf, Tensor) else None for dim, leaf in zip(flat, leaves, strict=True)]
    sizes = {leaf.shape[dim] for dim, leaf in zip(dims, leaves, strict=True) if dim is not None}
    assert len(sizes) <= 1, f"batch sizes {sizes} differ"
    samples = [
        tree_unflatten(
            [leaf if dim is None else leaf.select(dim, b) for dim, leaf in zip(dims, leaves, strict=True)],
            spec,
        )
        for b in range(sizes.pop() if sizes else 1)
    ]
    detached = [tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, sample) for sample in samples]
    return _Samples(detached, dims, spec, unbatched=all(dim is None for dim in dims))


def _over_batch(
    problem: Problem, u: Any, inputs: Sequence[Any], in_dims: Any, lam: Any, function: Callable[..., Tensor]
) -> Tensor:
    samples = split_batch(inputs, in_dims)
    results = [
        function(Sample(problem, _at(u, b, samples.unbatched), one), _joined_at(lam, b, samples.unbatched))
        for b, one in enumerate(samples.inputs)
    ]
    return results[0] if samples.unbatched else torch.stack(results)


def _at(tree: Any, b: int, unbatched: bool) -> Any:
    return tree_map(lambda leaf: leaf.detach() if unbatched else leaf.detach()[b], tree)


def _joined_at(tree: Any, b: int, unbatched: bool) -> Tensor | None:
    return None if tree is None else join(tree_flatten(_at(tree, b, unbatched))[0])

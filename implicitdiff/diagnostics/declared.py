"""Diagnostics, the declared functions of each sample in float64, as functions of one flat vector.

In: a Problem, its inputs, a point u. Out: f and h of sample b, their derivatives by torch's autograd, and the
tensors that gradients are wanted for. Nothing of the library is used but the declared hooks. Next:
`reference.py`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicitdiff.diagnostics.limits import ActiveRows, active_residuals
from implicitdiff.inputs import parameter_names
from implicitdiff.problem import Problem
from implicitdiff.pytrees import flatten, leaf_names
from implicitdiff.torch_private import broadcast_prefix, pytree

_CHUNK = 256
_CHUNK_ENTRIES = 2**24
_MODULE_STATE = frozenset(vars(torch.nn.Module()))


class Declared:
    """One batch at one point.

    Attributes:
        problem: A float64 copy of the problem.
        moving: The tensors that get gradients: floating inputs in their order, then Parameters.
        u: The point, flat, (batch, m).
        batch, size, constraints: B, m and p.
    """

    def __init__(
        self,
        problem: Problem,
        inputs: Sequence[Any],
        in_dims: Any,
        u: Any,
        active: ActiveRows | None = None,
    ) -> None:
        """`active` are the inequalities and bounds that count as equalities."""
        self.problem, self.active = double(problem), active
        leaves, self._spec = pytree.tree_flatten(tuple(inputs))
        self._dims = flat_dims(inputs, in_dims)
        self._leaves = [to_double(leaf) for leaf in leaves]
        self.moving = [leaf.requires_grad_() for leaf in self._leaves if floating(leaf)]
        self.moving += list(self.problem.parameters())
        u_leaves, self._u_spec = pytree.tree_flatten(u)
        self._unbatched = all(dim is None for dim in self._dims)
        self._shapes = [leaf.shape if self._unbatched else leaf.shape[1:] for leaf in u_leaves]
        self.u = self.flat(u)
        self.batch, self.size = (int(size) for size in self.u.shape)
        with torch.no_grad():
            held = 0 if active is None else active.most()
            self.constraints = held + int(self._equality(0, self.u[0]).numel()) if self.batch else 0

    def flat(self, tree: Any) -> Tensor:
        """A pytree like u (u itself, a cotangent) as (batch, m) in float64."""
        leaves = [to_double(leaf) for leaf in pytree.tree_leaves(tree)]
        leaves = [leaf[None] for leaf in leaves] if self._unbatched else leaves
        return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1)

    def tree(self, flat: Tensor) -> Any:
        """(batch, m) as the pytree of u that the layer returns; no batch axis where there was none."""
        pieces = flat.split([shape.numel() for shape in self._shapes], 1)
        batch = () if self._unbatched else (self.batch,)
        shaped = [piece.reshape(*batch, *shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        return pytree.tree_unflatten(shaped, self._u_spec)

    def objective(self, b: int, u: Tensor) -> Tensor:
        """f of sample b at u (m,), 0-dim."""
        return self.problem.objective(*self._arguments(b, u)).reshape(())

    def equality(self, b: int, u: Tensor) -> Tensor:
        """h (p,) of sample b, all outputs joined, then what is active; empty where there is neither."""
        if self.active is None:
            return self._equality(b, u)
        arguments = self._arguments(b, u)
        held = active_residuals(self.problem, self.active, b, u, arguments, self._shapes)
        return torch.cat([self._equality(b, u), *held])

    def _equality(self, b: int, u: Tensor) -> Tensor:
        if not self.problem.declares("equality"):
            return u.new_zeros(0)
        outputs = pytree.tree_leaves(self.problem.equality(*self._arguments(b, u)))
        return torch.cat([output.reshape(-1) for output in outputs])

    def _arguments(self, b: int, u: Tensor) -> tuple[Any, ...]:
        pieces = u.split([shape.numel() for shape in self._shapes])
        variables = [piece.reshape(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        pairs = zip(self._leaves, self._dims, strict=True)
        inputs = [leaf if dim is None else leaf.select(dim, b) for leaf, dim in pairs]
        return (
            pytree.tree_unflatten(variables, self._u_spec),
            *pytree.tree_unflatten(inputs, self._spec),
        )

    def edge(self, b: int) -> Tensor:
        """Entries of u that underflowed to 0 where D_u f is not finite (m,): they carry no gradient."""
        zeros = self.u[b] == 0
        if not bool(zeros.any()):
            return zeros
        with torch.enable_grad():
            u = self.u[b].clone().requires_grad_()
            return zeros & ~torch.isfinite(gradient(self.objective(b, u), u))

    def point(self, b: int) -> Tensor:
        """u of sample b (m,), ready to be differentiated; entries at the edge are moved inside the domain."""
        inside = torch.where(self.edge(b), torch.finfo(torch.float64).tiny, self.u[b])
        return inside.detach().requires_grad_()


def double(problem: Problem) -> Problem:
    """A copy of the problem with all floating tensors that it holds in float64, plain attributes included."""
    twin = copy.deepcopy(problem).double()
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            if name not in _MODULE_STATE and isinstance(value, Tensor | list | tuple | dict):
                setattr(module, name, pytree.tree_map(to_double, value))
    return twin


def to_double(leaf: Any) -> Any:
    """A floating tensor detached and in float64; anything else as it is."""
    return leaf.detach().double() if floating(leaf) else leaf


def floating(leaf: object) -> bool:
    """Whether a leaf of the inputs can have a gradient."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def normal(generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, drawn where the generator is: the same for every dtype and device."""
    draw = torch.randn(like.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return draw.to(like)


def flat_dims(inputs: Sequence[Any], in_dims: Any) -> list[int | None]:
    """The batch axis of each leaf of the inputs; None for shared leaves and leaves that are no tensors."""
    leaves, spec = pytree.tree_flatten(tuple(inputs))
    dims = broadcast_prefix(in_dims, spec) or [None] * len(leaves)
    return [
        int(dim) % leaf.dim() if dim is not None and isinstance(leaf, Tensor) else None
        for dim, leaf in zip(dims, leaves, strict=True)
    ]


def moving_names(problem: Problem, inputs: Sequence[Any]) -> tuple[str, ...]:
    """A name for each member of `Declared.moving`: an argument of `objective` with its path, a Parameter."""
    names = []
    for base, value in zip(parameter_names(problem, inputs), inputs, strict=True):
        leaves, spec = flatten(value)
        names += [name for name, leaf in zip(leaf_names(spec, base), leaves, strict=True) if floating(leaf)]
    return (*names, *(f"Parameter {name}" for name, _ in problem.named_parameters()))


def gradient(value: Tensor, of: Tensor, create_graph: bool = False) -> Tensor:
    """D value, zeros where `value` does not depend on `of`."""
    return gradients(value, [of], create_graph)[0]


def gradients(value: Tensor, of: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """D value for each tensor, zeros where `value` does not depend on it."""
    wanted = [tensor for tensor in of if tensor.requires_grad]
    if not value.requires_grad or not wanted:
        return [torch.zeros_like(tensor) for tensor in of]
    every = torch.autograd.grad(
        value, wanted, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    found = iter(every)
    all_found = [next(found) if tensor.requires_grad else None for tensor in of]
    return [torch.zeros_like(t) if g is None else g for g, t in zip(all_found, of, strict=True)]


def jacobian(values: Tensor, of: Tensor) -> Tensor:
    """(k, m) derivative of values (k,), by backward passes batched in chunks."""
    matrix = of.new_zeros(values.numel(), of.numel())
    if values.requires_grad:
        start = 0
        for units in unit_rows(values, of.numel()):
            (part,) = torch.autograd.grad(
                values, of, units, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            if part is not None:
                matrix[start : start + units.shape[0]] = part.detach()
            start += units.shape[0]
    return matrix


def unit_rows(values: Tensor, width: int) -> tuple[Tensor, ...]:
    """The identity of the size of `values`, in chunks of rows that keep products of that width small."""
    chunk = max(1, min(_CHUNK, _CHUNK_ENTRIES // max(width, 1)))
    return torch.eye(values.numel(), dtype=values.dtype, device=values.device).split(chunk)

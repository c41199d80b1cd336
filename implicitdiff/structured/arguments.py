"""The arguments of emitted functions: what they are called and with which shape they arrive.

In: `Declared`. Out: names, shapes, and the dictionary from names to tensors of one call. Next file: `writer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitdiff.derivatives.declared import Declared

Leaves = tuple[Tensor, ...]


@dataclass(frozen=True)
class Arguments:
    """Names and shapes. The stems are v, v_lam (cotangents), rhs_u, rhs_h (right-hand sides), lam (multipliers)."""

    declared: Declared

    def of_variable(self, stem: str, index: int) -> str:
        """`v`, or `v0`, `v1`, ... where there are several variables."""
        return stem if len(self.declared.variables) == 1 else f"{stem}{index}"

    def of_constraint(self, stem: str, output: int) -> str:
        """`lam`, or `lam0`, `lam1`, ... where `equality` has several outputs."""
        return self.declared.constraint_leaf_name(stem, output)

    def order(self) -> list[str]:
        """All possible arguments, in the order in which a function lists those it uses."""
        variables, outputs = range(len(self.declared.variables)), range(len(self.declared.output_shapes))
        names: list[str] = []
        for on_variables, on_constraints in (("v", "v_lam"), ("rhs_u", "rhs_h")):
            names += [self.of_variable(on_variables, k) for k in variables]
            names += [self.of_constraint(on_constraints, k) for k in outputs]
        names += [leaf.name for leaf in self.declared.variables]
        names += [self.of_constraint("lam", k) for k in outputs]
        return [*names, *(leaf.name for leaf in self.declared.theta), "shift"]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an argument without its leading axes."""
        for leaf in (*self.declared.variables, *self.declared.theta):
            if leaf.name == name:
                return leaf.placeholder.shape
        for k, leaf in enumerate(self.declared.variables):
            if name in (self.of_variable("v", k), self.of_variable("rhs_u", k)):
                return leaf.placeholder.shape
        for k, shape in enumerate(self.declared.output_shapes):
            if name in [self.of_constraint(stem, k) for stem in ("lam", "v_lam", "rhs_h")]:
                return shape
        return ()

    def point(self, u: Leaves, lam: Leaves, theta: Leaves) -> dict[str, Tensor]:
        """The tensors of a point by name."""
        values = {leaf.name: t for leaf, t in zip(self.declared.variables, u, strict=True)}
        values.update({leaf.name: t for leaf, t in zip(self.declared.theta, theta, strict=True)})
        values.update({self.of_constraint("lam", k): t for k, t in enumerate(lam)})
        return values

    def sides(self, stem: str, constraint_stem: str, on_u: Leaves, on_h: Leaves) -> dict[str, Tensor]:
        """Cotangents or right-hand sides by name."""
        values = {self.of_variable(stem, k): t for k, t in enumerate(on_u)}
        values.update({self.of_constraint(constraint_stem, k): t for k, t in enumerate(on_h)})
        return values

    def sources(self, stem: str, constraint_stem: str) -> dict[str, tuple[int, int]]:
        """Where the tensors of a name are among (u, lam, theta, sides of the variables, sides of the constraints)."""
        variables, outputs = self.declared.variables, range(len(self.declared.output_shapes))
        found = {leaf.name: (0, k) for k, leaf in enumerate(variables)}
        found |= {leaf.name: (2, k) for k, leaf in enumerate(self.declared.theta)}
        found |= {self.of_variable(stem, k): (3, k) for k in range(len(variables))}
        for k in outputs:
            found[self.of_constraint("lam", k)] = (1, k)
            found[self.of_constraint(constraint_stem, k)] = (4, k)
        return found

    def pair(self, out: Sequence[Tensor], lead: torch.Size) -> Leaves:
        """(*w, *s) with their leading axes (R, B), from the results of `kkt_solve`."""
        variables, count = self.declared.variables, len(self.declared.variables)
        w = tuple(
            x.expand(*lead, *x.shape[2:]).reshape(*lead, *leaf.placeholder.shape)
            for x, leaf in zip(out[:count], variables, strict=True)
        )
        blocks = out[count : count + len(self.declared.constraints)]
        return (*w, *self.joined([block.expand(*lead, *block.shape[2:]) for block in blocks], 2))

    def constraint_order(self, device: torch.device) -> Tensor:
        """Where each entry of the joined outputs of `equality` stands among the rows of the constraint blocks, (p,)."""
        space, numbers, start = self.declared.constraint_space, [], 0
        for k in range(len(space.names)):
            numbers.append(torch.arange(start, start + space.entries(k), device=device)[None])
            start += space.entries(k)
        return torch.cat([t.reshape(-1) for t in self.joined(numbers, 1)])

    def joined(self, blocks: Sequence[Tensor], lead: int) -> Leaves:
        """Constraint blocks (lead axes first) as the outputs of `equality`: reshaped, concatenations put together."""
        sizes = self.declared.build.labels.sizes
        pieces: dict[int, list[tuple[Tensor, int]]] = {}
        for block, c in zip(blocks, self.declared.constraints, strict=True):
            shape = [torch.Size(sizes[k] for k in dim).numel() for dim in c.block.value.dims]
            pieces.setdefault(c.block.output, []).append(
                (block.reshape(*block.shape[:lead], *shape), c.block.dim)
            )
        return tuple(
            pieces[k][0][0]
            if len(pieces[k]) == 1
            else torch.cat([t for t, _ in pieces[k]], dim=pieces[k][0][1] + lead)
            for k in range(len(self.declared.output_shapes))
        )

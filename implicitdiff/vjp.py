"""The derivatives of one problem as matrices: the Jacobian of its solution, and A, B, C, H of the seed paper's Eqn. 3.

In: a problem and its inputs. Out: dense tensors, for lessons, for tests and for people who need the whole Jacobian.
Next: `layer/module.py`, which never forms B or C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicitdiff.autograd import Call
from implicitdiff.autograd.call import undisturbed
from implicitdiff.autograd.kkt import solve as kkt_solve
from implicitdiff.derivatives import eqn3, flat
from implicitdiff.derivatives.equations import lagrangian_of
from implicitdiff.derivatives.lagrangian import Lagrangian
from implicitdiff.errors import InputError, SolutionError
from implicitdiff.graph.trace import Example, variable_example
from implicitdiff.inputs import Bound, InDims, bind
from implicitdiff.layer.inequalities import known_call, located
from implicitdiff.layer.options import Options
from implicitdiff.layer.prepare import Prepared, prepare
from implicitdiff.operators import LinearOperator
from implicitdiff.optimizers.limited_forward import active_at
from implicitdiff.plan import plan_for
from implicitdiff.problem import Problem, require_problem
from implicitdiff.pytrees import flatten, flatten_like, unflatten
from implicitdiff.structure.report import Analysis
from implicitdiff.torch_private import is_fake, is_wrapped

Leaves = tuple[Tensor, ...]
CHUNK_ENTRIES = 2**21


def jacobian(problem: Problem, *inputs: Any, in_dims: InDims = 0) -> Any:
    """D_x u of every sample, by one factorisation of K and as many right-hand sides as there are variables or inputs.

    Row by row (K z = -e_i, then a pullback) where u is the smaller side, column by column (K z = -F_x e_j) otherwise.

    Args:
        problem: the declaration.
        inputs: as its functions take them after u; plain tensors. Inside a torch.func transform take
            `torch.func.jacrev` of the layer instead.
        in_dims: see `DeclarativeLayer`.

    Returns:
        (batch, *shape of u, *shape of x) for one variable tensor and one input tensor; without the batch axis if none
        came in. With several: a pytree like u, in which each leaf is a tuple of the inputs (the input itself if there
        is one), as from torch.func.jacrev of one sample. A shared input's is the Jacobian of each sample, not summed.
        None stands for inputs that are not floating.

    Raises:
        InputError: something is wrong with an input. SingularError: the solution of a sample is not locally unique.
    """
    options = Options(in_dims=in_dims)
    prepared = prepare(require_problem(problem), inputs, options)
    if any(is_wrapped(tensor) or is_fake(tensor) for tensor in prepared.theta):
        raise InputError(
            "jacobian needs tensors with data: inside torch.func transforms take jacrev of the layer instead"
        )
    with torch.no_grad(), undisturbed(prepared.theta[0]):
        theta = tuple(tensor.detach() for tensor in prepared.theta)
        count = len(prepared.bound.leaves)
        if prepared.plan.trace.limited:
            matrices = _limited_jacobians(replace(prepared, theta=theta), count)
        else:
            call = prepared.call()
            solved = call.solve(call, theta, None)
            lam = solved.multipliers or ()
            if solved.factor is not None:
                call.factors.keep(call.plan, solved.u, lam, theta, solved.factor)
            matrices = _jacobians(call, solved.u, lam, theta, count)
    return _arranged(prepared, matrices)


def _limited_jacobians(prepared: Prepared, count: int) -> list[list[Tensor | None]]:
    """The same with inequalities or bounds: on the active set of each sample."""
    sides = []
    for side in located(prepared):
        call = known_call(side)
        solved = call.solve(call, side.theta, side.known)
        sides.append(_jacobians(call, solved.u, solved.multipliers or (), side.theta, count))
    return sides[0]


def _jacobians(call: Call, u: Leaves, lam: Leaves, theta: Leaves, count: int) -> list[list[Tensor | None]]:
    """For each leaf of u and of the first `count` theta, the Jacobian (B, *u, *x)."""
    batch, floating = call.batch, [tensor.is_floating_point() for tensor in theta]
    active = [index for index in range(count) if floating[index]]
    # Every input gets a batch axis of its own, so that shared ones have a Jacobian for each sample.
    own = tuple(
        t.expand(batch, *t.shape) if i < count and not f else t
        for i, (t, f) in enumerate(zip(theta, call.batched, strict=True))
    )
    flags = tuple(flag or index < count for index, flag in enumerate(call.batched))
    lagrangian = replace(call.lagrangian, batched=flags)
    u_shapes = [tuple(leaf.shape[1:]) for leaf in u]
    x_shapes = [tuple(own[index].shape[1:]) for index in active]
    rows, columns = sum(flat.sizes(u_shapes)), sum(flat.sizes(x_shapes))
    found: list[list[Tensor | None]] = [[None] * count for _ in u]
    if not active or batch == 0:
        for i, shape in enumerate(u_shapes):
            for j, x_shape in zip(active, x_shapes, strict=True):
                found[i][j] = u[0].new_zeros((batch, *shape, *x_shape))
        return found
    inside, _ = lagrangian.inside(u, lam, own)
    if rows <= columns:
        units = flat.basis(u_shapes, 0, rows, batch, u[0])
        zeros = tuple(leaf.new_zeros((rows, *leaf.shape)) for leaf in lam)
        w, s = kkt_solve(call, u, lam, theta, tuple(-leaf for leaf in units), zeros)
        pulled = _chunked_pull(lagrangian, inside, lam, own, w, s, active)
        dense = flat.join(pulled, 2).movedim(0, 1)  # (B, rows, columns)
    else:
        units = flat.basis(x_shapes, 0, columns, batch, u[0])

        def push(*directions: Tensor) -> tuple[Leaves, Leaves]:
            given = dict(zip(active, directions, strict=True))
            return lagrangian.input_tangent(inside, lam, own, [given.get(index) for index in range(len(own))])

        towards_u, towards_h = torch.func.vmap(push)(*units)
        rhs = tuple(-leaf for leaf in towards_u), tuple(-leaf for leaf in towards_h)
        w, _ = kkt_solve(call, u, lam, theta, *rhs)
        dense = flat.join(w, 2).permute(1, 2, 0)
    for i, block in enumerate(torch.split(dense, flat.sizes(u_shapes), dim=1)):
        for j, part in zip(active, torch.split(block, flat.sizes(x_shapes), dim=2), strict=True):
            found[i][j] = part.reshape(batch, *u_shapes[i], *own[j].shape[1:])
    return found


def _chunked_pull(
    lagrangian: Lagrangian, u: Leaves, lam: Leaves, theta: Leaves, w: Leaves, s: Leaves, active: Sequence[int]
) -> list[Tensor]:
    """The gradients in the active theta of <D_u L, w_r> - <h, s_r> for every r: leaves (R, B, *shape)."""
    needs = [index in active for index in range(len(theta))]
    live = sum(tensor.numel() for tensor in (*u, *theta)) + 1
    size = max(1, min(w[0].shape[0], CHUNK_ENTRIES // live))

    def pull(w_row: Leaves, s_row: Leaves) -> Leaves:
        grads = lagrangian.pull_inputs(u, lam, theta, w_row, s_row, needs)
        return tuple(grad for grad in grads if grad is not None)

    parts = []
    for start in range(0, w[0].shape[0], size):
        rows = slice(start, start + size)
        parts.append(torch.func.vmap(pull)(tuple(leaf[rows] for leaf in w), tuple(leaf[rows] for leaf in s)))
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _arranged(prepared: Prepared, matrices: list[list[Tensor | None]]) -> Any:
    """The nested pytree: like u, each leaf like the inputs."""
    bound = prepared.bound
    nothing = tuple((position, None) for position, _ in bound.constants)

    def back(value: Tensor | None) -> Tensor | None:
        return value[0] if bound.unbatched and value is not None else value

    leaves = []
    for row in matrices:
        tree = replace(bound, constants=nothing).unflatten([back(value) for value in row])
        leaves.append(tree[0] if len(tree) == 1 else tree)
    return unflatten(leaves, prepared.plan.trace.variable_spec)


@dataclass(frozen=True)
class Structured:
    """What the library itself works with in place of the dense matrices.

    Attributes:
        hessian: H as an operator that stores only its parameters (batch of 1).
        analysis: what is known about H, A and S.
    """

    hessian: LinearOperator
    analysis: Analysis


@dataclass(frozen=True)
class Derivatives:
    """The matrices of Eqn. 3 at one point, over flattened and joined variables (m), inputs (n) and constraints (p).

    For a system of equations H is D_u of the residual, B is D_x of it, and A, C and the multipliers are empty.

    With L = f - lambda'h, H = D_uu L, B = D_xu L, A = D_u h, C = D_x h, and H regular:

        D_x u = H^-1 A' (A H^-1 A')^-1 (A H^-1 B - C) - H^-1 B.

    Attributes:
        A: (p, m).
        B: (m, n).
        C: (p, n).
        H: (m, m).
        multipliers: (p,), the least-squares solution of lambda'A = D_u f.
        B_by_input: the columns of B by the name of the input, (m, size of the input).
        C_by_input: the columns of C likewise.
        structured: the operators used in place of these.
        square: whether this is a system of equations.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    H: Tensor
    multipliers: Tensor
    B_by_input: dict[str, Tensor]
    C_by_input: dict[str, Tensor]
    structured: Structured
    square: bool = False

    @property
    def Dy(self) -> Tensor:
        """D_x u (m, n) by Eqn. 3, multiplied out: O((m + p)^3), for lessons; `jacobian` is the fast way."""
        return eqn3.walk(self.A, self.B, self.C, self.H).Dy

    def __str__(self) -> str:
        lines = [self._sizes(), ""]
        for name, meaning, value in self._given():
            lines += [f"{name} = {meaning} {eqn3.shape(value)}", eqn3.matrix_text(value)]
        return "\n".join(lines)

    def show(self) -> None:
        """Print Eqn. 3 factor by factor, with the matrices of this point."""
        walked = eqn3.walk(self.A, self.B, self.C, self.H)
        lines = [f"Eqn. 3: {walked.equation}", "", str(self), "", "factor by factor"]
        for factor in walked.factors:
            lines.append(f"{factor.formula} {eqn3.shape(factor.value)}")
            lines += [f"    ({factor.remark})"] if factor.remark else []
            lines.append(eqn3.matrix_text(factor.value))
        if walked.left_over is not None:
            lines += ["", f"Dy keeps the constraints: |A Dy + C| = {walked.left_over:.1e}"]
        print("\n".join(lines))

    def _sizes(self) -> str:
        inputs = ", ".join(f"{name} {value.shape[1]}" for name, value in self.B_by_input.items())
        counts = f"m = {self.H.shape[0]} variables, n = {self.B.shape[1]} inputs ({inputs})"
        return f"{counts}, p = {self.A.shape[0]} constraint{'s' * (self.A.shape[0] != 1)}"

    def _given(self) -> list[tuple[str, str, Tensor]]:
        constrained = [
            ("A", "D_Y h", self.A),
            ("C", "D_X h", self.C),
            ("λ", "from λ'A = D_Y f", self.multipliers),
        ]
        meanings = ("D_X r", "D_Y r") if self.square else ("D_XY L", "D_YY L")
        free = [("B", meanings[0], self.B), ("H", meanings[1], self.H)]
        return [*free, *constrained] if self.A.shape[0] else free


def derivatives(problem: Problem, u: Any, *inputs: Any) -> Derivatives:
    """A, B, C, H and the multipliers at a point of one sample, by automatic differentiation.

    Args:
        problem: the declaration.
        u: the point, without batch axis; normally a solution, but nothing is checked.
        inputs: the inputs of one sample, without batch axis.

    Returns:
        Derivatives. Inequalities that are active at u are rows of A and C after the equalities, the others are no rows;
        a variable on its bound has the row of the identity in H, and B holds how it follows the bound. Integer inputs
        have no columns. Costs m + p gradients and (m + p) (m + n) numbers.

    Raises:
        InputError: something is wrong with an input. SolutionError: u does not have the structure or shape of `init`.
    """
    require_problem(problem)
    bound = bind(problem, inputs, None)
    example = _example(problem, u, bound)
    dense = plan_for(problem, bound, example.leaves, example.spec, backward="dense")
    best = plan_for(problem, bound, example.leaves, example.spec)
    with torch.no_grad(), undisturbed(dense.trace.theta(bound)[0]):
        theta = tuple(tensor.detach() for tensor in dense.trace.theta(bound))
        point = tuple(leaf.detach()[None] for leaf in flatten_like(u, example.spec, "u", SolutionError))
        masks, lam, kept = active_at(dense, point, theta)
        lagrangian = lagrangian_of(dense.trace, (*(False,) * len(theta), *(True,) * len(masks)))
        theta = (*theta, *masks)
        active = [i for i in range(len(bound.leaves)) if theta[i].is_floating_point()]
        first = point[0]
        u_shapes, h_shapes = (
            [tuple(leaf.shape[1:]) for leaf in point],
            [tuple(leaf.shape[1:]) for leaf in lam],
        )
        m, p = sum(flat.sizes(u_shapes)), sum(flat.sizes(h_shapes))
        units = flat.basis((*u_shapes, *h_shapes), 0, m + p, 1, first)
        pulled = _chunked_pull(
            lagrangian, point, lam, theta, units[: len(point)], units[len(point) :], active
        )  # shared inputs, batch of 1: leaves (m + p, *shape), the rows of (B, -C)
        names = [bound.names[i] for i in active]
        columns = {name: flat.join([value], 1) for name, value in zip(names, pulled, strict=True)}
        joined = torch.cat(list(columns.values()), 1) if columns else first.new_zeros((m + p, 0))
        jacobian = dense.constraint_jacobian(point, theta)[0]
        if problem.square:
            # D_x u = -H^-1 B: the residual is what stands in the place of D_u L, and nothing is constrained.
            columns = {name: -value[m:] for name, value in columns.items()}
            joined, jacobian, lam, kept = -joined[m:], jacobian[:0], (), kept[:0]
        return Derivatives(
            A=jacobian[kept],
            B=joined[:m],
            C=-joined[m:][kept],
            H=dense.hessian(point, lam, theta).to_dense()[0],
            multipliers=flat.join(lam, 1)[0][kept] if lam else first.new_zeros(0),
            B_by_input={name: value[:m] for name, value in columns.items()},
            C_by_input={name: -value[m:][kept] for name, value in columns.items()},
            structured=Structured(
                best.hessian(point, best.multipliers(point, theta) if problem.square else lam, theta),
                best.analysis,
            ),
            square=problem.square,
        )


def _example(problem: Problem, u: Any, bound: Bound) -> Example:
    leaves, spec = flatten(u)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise SolutionError(f"u contains a {type(leaf).__name__}; give tensors")
    if not problem.declares("init"):
        return Example(tuple(leaf.to("meta") for leaf in leaves), spec)
    example = variable_example(problem, bound)
    given = flatten_like(u, example.spec, "u", SolutionError)
    for leaf, like in zip(given, example.leaves, strict=True):
        if leaf.shape != like.shape or leaf.dtype != like.dtype:
            raise SolutionError(
                f"u has a leaf of shape {tuple(leaf.shape)} and {leaf.dtype}, expected {tuple(like.shape)} "
                f"and {like.dtype} (one sample, without batch axis)"
            )
    return example

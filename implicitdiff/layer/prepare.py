"""One call of a layer, prepared: options checked, inputs bound, the plan found, everything that autograd's function
needs.

In: a problem, its inputs and the options. Out: a `Prepared`, which runs the call and puts the leaves back into the
user's structures. Next: `autograd/implicit.py`, which it applies.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from implicitdiff.attributes import Reachable, scan
from implicitdiff.autograd import Call, ImplicitFunction
from implicitdiff.autograd.call import Solved
from implicitdiff.autograd.opaque import CALLS, CAPTURED
from implicitdiff.errors import (
    InputError,
    OptionError,
    ProblemDefinitionError,
    SolutionError,
    StaleGraphError,
)
from implicitdiff.failures import validate_policy
from implicitdiff.graph.skeleton import skeleton
from implicitdiff.graph.trace import Example, variable_example
from implicitdiff.inputs import Bound, InDims, bind, check_finite
from implicitdiff.layer.discover import solved_example
from implicitdiff.layer.hand import hand_vjp
from implicitdiff.optimality import tolerance
from implicitdiff.optimizers.forward import ForwardResult, solve_forward
from implicitdiff.plan import Plan, check_options, plan_for, with_batched
from implicitdiff.problem import Problem, Solution
from implicitdiff.pytrees import flatten_like, unflatten
from implicitdiff.records import open_records
from implicitdiff.torch_private import autocast_enabled, is_recorded, pytree, without_saved_tensor_hooks

Leaves = tuple[Tensor, ...]
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """The options of a layer; `DeclarativeLayer.__init__` says what each means."""

    in_dims: InDims = 0
    optimizer: Any = None
    linear_solver: str = "auto"
    backward: str = "auto"
    on_failure: str = "raise"
    optimality_tol: float | None = None

    def check(self, problem: Problem) -> None:
        """Raise for a value that does not exist, or that this problem does not support."""
        check_options(self.backward, self.linear_solver)
        validate_policy(self.on_failure)
        tolerance(torch.float64, self.optimality_tol)
        if self.optimizer is not None and not callable(getattr(self.optimizer, "minimize", None)):
            raise OptionError(
                f"optimizer={self.optimizer!r} is no optimizer: give one of implicitdiff.optimizers, as "
                "Newton(), or None"
            )
        if self.backward == "approximate" and problem.MAIN == "residual":
            raise OptionError(
                f"backward='approximate' ignores constraints, or takes D_u step for 0; {type(problem).__name__} is a "
                "Root, which has neither: use backward='auto'"
            )
        if self.backward == "hand" and not problem.declares("vjp"):
            raise ProblemDefinitionError(
                f"backward='hand' needs {type(problem).__name__} to declare vjp(self, u, v, *inputs); "
                "declare it or use backward='auto'"
            )

    def shown(self) -> str:
        """`name=value` of every option that is not the default."""
        return ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default
        )


@dataclass(frozen=True)
class Outputs:
    """The leaves of one run: u and lam (B, *shape), and per sample (B,) status, iterations and residual."""

    u: Leaves
    multipliers: Leaves
    status: Tensor
    iterations: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Forward:
    """The forward pass of one call, for autograd's function.

    Attributes:
        problem: the declaration, for its hooks.
        bound: structure and names of the inputs; without the inputs themselves.
        options: the layer's.
        plan: the plan of the forward, for the flags that the call had when it was made.
        stale: for a call out of a recorded graph, whether the problem has changed since it was recorded.
    """

    problem: Problem
    bound: Bound
    options: Options
    plan: Plan
    stale: bool = False

    def __call__(self, call: Call, theta: Leaves, start: Leaves | None) -> Solved:
        """Solve on plain tensors, for the flags of `call` (a vmapped axis may have been folded into the batch)."""
        if self.stale:
            raise StaleGraphError(
                f"an attribute of {type(self.problem).__name__} has changed since this graph was compiled or "
                "exported, and the graph has its old value inside: compile it anew after torch.compiler.reset(), or "
                "make the attribute a tensor, whose values are never kept"
            )
        if not self.bound.checked:
            count = len(self.bound.names)
            check_finite(self.bound.names, theta[:count], call.batched[:count])
        options = self.options
        name = "auto" if options.backward == "approximate" else options.backward
        plan = with_batched(self.plan, call.batched, backward=name, linear_solver=options.linear_solver)
        found = solve_forward(
            self.problem,
            plan,
            self.bound,
            theta,
            init=start,
            optimizer=options.optimizer,
            tol=options.optimality_tol,
            on_failure=options.on_failure,
        )
        return _filled(found, options.on_failure)

    def handle(self, call: Call) -> int:
        """The number of the call; its entry holds no more of the problem than a weak reference."""
        owner, options = weakref.ref(self.problem), self.options
        # What a recorder had in the place of tensors and sizes is of no use when the graph runs.
        bound = replace(self.bound, tensors=(), batch=0)
        plan, forward_plan, batched = call.plan, self.plan, call.batched

        def make() -> Call:
            problem = owner()
            if problem is None:
                raise AssertionError("numbers are dropped with their owner")
            return _call(problem, bound, options, plan, forward_plan, batched, scan(problem))

        return CALLS.number(self.problem, (id(plan), id(forward_plan), repr(options)), make)


@dataclass(frozen=True)
class Prepared:
    """One call, ready to run.

    Attributes:
        problem: the declaration.
        bound: its inputs; they may be functorch wrappers.
        options: the layer's.
        plan: the plan of the backward.
        forward_plan: the plan of the forward (another one only for backward="approximate").
        theta: inputs, tensors of the problem, captured tensors.
        start: leaves (B, *shape) of a warm start, or None.
        restore: the dtype that outputs are cast back to (under autocast), or None.
        twin: while a graph is recorded, the problem with the graph's tensors in it: for hooks whose operations are
            recorded too.
    """

    problem: Problem
    bound: Bound
    options: Options
    plan: Plan
    forward_plan: Plan
    theta: Leaves
    start: Leaves | None
    restore: torch.dtype | None
    twin: Problem | None = None

    @property
    def hooks(self) -> Problem:
        """The problem whose hooks autograd may look into."""
        return self.problem if self.twin is None else self.twin

    @property
    def batched(self) -> tuple[bool, ...]:
        """For each theta, whether it carries the batch axis."""
        return (*self.bound.batched, *(False,) * (len(self.theta) - len(self.bound.batched)))

    def call(self) -> Call:
        """What autograd's functions need to know."""
        return _call(self.problem, self.bound, self.options, self.plan, self.forward_plan, self.batched)

    def apply(self) -> Outputs:
        """Run the call through autograd's function."""
        outputs = ImplicitFunction.apply(self.call(), *self.theta, *(self.start or ()))
        count = len(self.plan.trace.variables)
        return Outputs(tuple(outputs[:count]), tuple(outputs[count:-3]), *outputs[-3:])

    def value(self, u: Leaves) -> Tensor:
        """The objective at u, (B,), differentiable: the traced function on the differentiable solution."""
        if self.bound.batch == 0:
            return u[0].new_zeros(0)
        return self.call().lagrangian.objective(u, self.theta)

    def solution(self, outputs: Outputs, value: Tensor | None) -> Solution:
        """The leaves in the user's structures, without batch axis if none came in."""
        trace = self.plan.trace
        multipliers = None
        if trace.equality_spec is not None:
            multipliers = unflatten([self._back(leaf) for leaf in outputs.multipliers], trace.equality_spec)
        return Solution(
            u=unflatten([self._back(leaf) for leaf in outputs.u], trace.variable_spec),
            equality_multipliers=multipliers,
            value=None if value is None else self._back(value),
            status=self._back(outputs.status),
            iterations=self._back(outputs.iterations),
            residual=self._back(outputs.residual),
        )

    def _back(self, leaf: Tensor) -> Tensor:
        if self.restore is not None and leaf.is_floating_point():
            leaf = leaf.to(self.restore)
        return leaf[0] if self.bound.unbatched else leaf


def _call(
    problem: Problem,
    bound: Bound,
    options: Options,
    plan: Plan,
    forward_plan: Plan,
    batched: tuple[bool, ...],
    now: Reachable | None = None,
) -> Call:
    """The call of a plan; `now` is what the problem holds now, where that may differ from what was bound."""
    # Autograd keeps the call. It must not keep the inputs too: those go through save_for_backward alone, so that
    # checkpointing and the like can drop them.
    bound = replace(bound, leaves=(), tensors=bound.tensors if now is None else now.tensors)
    stale = now is not None and now.signature != bound.problem_signature
    return Call(
        plan=plan,
        batched=batched,
        batch=bound.batch,
        solve=Forward(problem, bound, options, forward_plan, stale),
        on_failure=options.on_failure,
        name=type(problem).__name__,
        backward=options.backward,
        linear_solver=options.linear_solver,
        records=open_records(),
        vjp=hand_vjp(problem, bound, plan.trace) if options.backward == "hand" else None,
    )


def prepare(
    problem: Problem,
    inputs: Sequence[Any],
    options: Options,
    init: Any = None,
    tensors: Leaves | None = None,
) -> Prepared:
    """Bind the inputs of one call and find its plan.

    Args:
        problem: the declaration.
        inputs: the user's inputs.
        options: checked options.
        init: the user's warm start, or None.
        tensors: what stands for the tensors of the problem in the graph that is being recorded, or None.

    Returns:
        The prepared call. Costs what binding costs; the plan comes from the cache after the first call of a signature.

    Raises:
        InputError: something is wrong with an input.
        TraceError: the declared functions cannot be traced.
        ProblemDefinitionError: under backward="hand", when a tensor of the problem needs a gradient.
    """
    inputs, restore = _full_precision(inputs)
    bound = bind(problem, inputs, options.in_dims)
    if bound.dtype in LOW_PRECISION:
        raise InputError(
            f"the inputs of {type(problem).__name__} are {bound.dtype}, in which nothing can be solved: convert "
            "them with .float(), or call the layer under torch.autocast, which does so and converts u back"
        )
    if options.backward == "hand":
        _refuse_parameters(problem, bound)
    with (
        without_saved_tensor_hooks()
    ):  # the declared functions may use torch.func, which refuses to run under them
        look = variable_example if problem.declares("init") else solved_example
        example = look(problem, bound)
        plan = forward_plan = _plan(problem, bound, example, options, options.backward)
        if options.backward == "approximate":
            forward_plan = _plan(problem, bound, example, options, "auto")
    twin = None
    if tensors is not None:
        twin = skeleton(problem, {id(a): b for a, b in zip(bound.tensors, tensors, strict=True)})
        bound = replace(bound, tensors=tensors)
    start = None if init is None else _start(init, example, bound, type(problem).__name__)
    prepared = Prepared(
        problem, bound, options, plan, forward_plan, plan.trace.theta(bound), start, restore, twin
    )
    captured = len(plan.trace.captured)
    if not captured or not is_recorded(bound.leaves):
        return prepared
    constants = CAPTURED(prepared.call(), (), bound.leaves[:1])
    return replace(prepared, theta=(*prepared.theta[:-captured], *constants))


def _plan(problem: Problem, bound: Bound, example: Example, options: Options, backward: str) -> Plan:
    return plan_for(
        problem, bound, example.leaves, example.spec, backward=backward, linear_solver=options.linear_solver
    )


def _full_precision(inputs: Sequence[Any]) -> tuple[tuple[Any, ...], torch.dtype | None]:
    """Under autocast, floating inputs in float32 together, and the dtype in which the caller expects u.

    Inputs that are all float64 stay, as torch's own casts leave them. u goes back to the inputs' common half
    precision; where they differ it stays float32.
    """
    leaves, spec = pytree.tree_flatten(tuple(inputs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors or not autocast_enabled(tensors[0].device.type):
        return tuple(inputs), None
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes == {torch.float64}:
        return tuple(inputs), None
    restore = tensors[0].dtype if len(dtypes) == 1 and tensors[0].dtype in LOW_PRECISION else None
    cast = [
        leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves
    ]
    return tuple(pytree.tree_unflatten(cast, spec)), restore


def _start(init: Any, example: Example, bound: Bound, name: str) -> Leaves:
    """The leaves (B, *shape) of a warm start, detached."""
    leaves = flatten_like(init, example.spec, f"init= of {name}", SolutionError)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise SolutionError(f"init= of {name} contains a {type(leaf).__name__}; give tensors like u")
    leaves = tuple(leaf.detach()[None] if bound.unbatched else leaf.detach() for leaf in leaves)
    return tuple(
        leaf.to(like.dtype) if leaf.dtype in LOW_PRECISION else leaf
        for leaf, like in zip(leaves, example.leaves, strict=True)
    )


def _refuse_parameters(problem: Problem, bound: Bound) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in zip(bound.tensor_names, bound.tensors, strict=True):
        if tensor.requires_grad:
            raise ProblemDefinitionError(
                f"backward='hand' gives gradients for the inputs only, but {name} of "
                f"{type(problem).__name__} requires one: use backward='auto', or freeze it with "
                "requires_grad_(False)"
            )


def _filled(found: ForwardResult, on_failure: str) -> ForwardResult:
    """The policy's value in the failed samples of u and lam."""
    if on_failure not in ("nan", "zero"):
        return found
    fill = torch.nan if on_failure == "nan" else 0.0

    def mend(leaf: Tensor) -> Tensor:
        return torch.where(found.failed.reshape(-1, *(1,) * (leaf.dim() - 1)), fill, leaf)

    return ForwardResult(
        tuple(mend(leaf) for leaf in found.u),
        tuple(mend(leaf) for leaf in found.multipliers),
        found.status,
        found.iterations,
        found.residual,
        found.failed,
    )

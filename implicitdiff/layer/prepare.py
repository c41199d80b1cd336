"""One call of a layer, prepared: options checked, inputs bound, the plan found, everything that autograd's function
needs.

In: a problem, its inputs and the options. Out: a `Prepared`, which runs the call and puts the leaves back into the
user's structures. Next: `autograd/implicit.py`, which it applies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
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
    ProblemDefinitionError,
    SolutionError,
    StaleGraphError,
)
from implicitdiff.failures import filled
from implicitdiff.graph.skeleton import skeleton
from implicitdiff.graph.trace import Example, variable_example
from implicitdiff.inputs import Bound, bind, check_finite
from implicitdiff.layer.discover import solved_example
from implicitdiff.layer.hand import hand_vjp
from implicitdiff.layer.options import Options
from implicitdiff.optimizers.forward import solve_forward
from implicitdiff.plan import Plan, plan_for, with_batched
from implicitdiff.problem import Problem, Solution
from implicitdiff.pytrees import Spec, flatten_like, unflatten
from implicitdiff.records import open_records
from implicitdiff.torch_private import (
    autocast_anywhere,
    autocast_enabled,
    is_recorded,
    pytree,
    without_saved_tensor_hooks,
)

Leaves = tuple[Tensor, ...]
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Outputs:
    """The leaves of one run: u and lam (B, *shape), and per sample (B,) status, iterations and residual."""

    u: Leaves
    multipliers: Leaves
    status: Tensor
    iterations: Tensor
    residual: Tensor
    margin: Tensor | None = None
    call: Prepared | None = None
    """The call that gave them, for a problem with inequalities or bounds: with its masks."""


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
        self.refuse_stale()
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
        return replace(
            found,
            u=filled(found.u, found.failed, options.on_failure),
            multipliers=filled(found.multipliers, found.failed, options.on_failure),
            # "approximate" has another K than the problem that was solved
            factor=None if options.backward == "approximate" else found.factor,
        )

    def refuse_stale(self) -> None:
        """Raise if the call comes out of a recorded graph and the problem has changed since."""
        if self.stale:
            raise StaleGraphError(
                f"an attribute of {type(self.problem).__name__} has changed since this graph was compiled or "
                "exported, and the graph has its old value inside: compile it anew after torch.compiler.reset(), or "
                "make the attribute a tensor, whose values are never kept"
            )

    def handle(self, call: Call) -> int:
        """The number of the call; its entry holds no more of the problem than a weak reference."""
        return self.number(call, "solve", lambda forward: forward)

    def number(self, call: Call, role: str, of: Callable[[Forward], Any]) -> int:
        """The number of a call whose forward is made from this one by `of`."""
        owner, options = weakref.ref(self.problem), self.options
        # What a recorder had in the place of tensors and sizes is of no use when the graph runs.
        bound = replace(self.bound, tensors=(), batch=0)
        plan, forward_plan, batched = call.plan, self.plan, call.batched

        def make() -> Call:
            problem = owner()
            if problem is None:
                raise AssertionError("numbers are dropped with their owner")
            again = make_call(problem, bound, options, plan, forward_plan, batched, scan(problem))
            assert isinstance(again.solve, Forward)
            return replace(again, solve=of(again.solve)) if kind is Call else kind(**_fields(again))

        kind = type(call)
        return CALLS.number(self.problem, (role, id(plan), id(forward_plan), repr(options)), make)


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
        known: of a problem with inequalities or bounds, once they are found: u, the multipliers, status, iterations,
            residual; the masks are then the last of theta.
        margin: likewise, strict complementarity (B,).
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
    known: Leaves | None = None
    margin: Tensor | None = None

    @property
    def hooks(self) -> Problem:
        """The problem whose hooks autograd may look into."""
        return self.problem if self.twin is None else self.twin

    @property
    def batched(self) -> tuple[bool, ...]:
        """For each theta, whether it carries the batch axis."""
        masks = len(self.plan.trace.masks)
        count = len(self.plan.trace.placeholders) - len(self.plan.trace.variables)
        shared = count - masks - len(self.bound.batched)
        return (*self.bound.batched, *(False,) * shared, *(True,) * masks)

    def call(self) -> Call:
        """What autograd's functions need to know."""
        return make_call(self.problem, self.bound, self.options, self.plan, self.forward_plan, self.batched)

    def forward(self) -> Forward:
        """The forward pass of the call."""
        return Forward(self.problem, replace(self.bound, leaves=()), self.options, self.forward_plan)

    def apply(self) -> Outputs:
        """Run the call through autograd's function."""
        outputs = ImplicitFunction.apply(self.call(), *self.theta, *(self.start or ()))
        count = len(self.plan.trace.variables)
        return Outputs(tuple(outputs[:count]), tuple(outputs[count:-3]), *outputs[-3:])

    def solution(self, outputs: Outputs, value: Tensor | None) -> Solution:
        """The leaves in the user's structures, without batch axis if none came in."""
        trace = self.plan.trace
        count = 0 if trace.equality_spec is None else trace.equality_spec.num_leaves
        return Solution(
            u=unflatten([self.back(leaf) for leaf in outputs.u], trace.variable_spec),
            equality_multipliers=self._tree(outputs.multipliers[:count], trace.equality_spec),
            inequality_multipliers=self._tree(outputs.multipliers[count:], trace.inequality_spec),
            value=None if value is None else self.back(value),
            status=self.back(outputs.status),
            iterations=self.back(outputs.iterations),
            residual=self.back(outputs.residual),
        )

    def _tree(self, leaves: Leaves, spec: Spec | None) -> Any:
        return None if spec is None else unflatten([self.back(leaf) for leaf in leaves], spec)

    def back(self, leaf: Tensor) -> Tensor:
        """A result as the caller expects it: in its dtype, without batch axis if none came in."""
        if self.restore is not None and leaf.is_floating_point():
            leaf = leaf.to(self.restore)
        return leaf[0] if self.bound.unbatched else leaf


def _fields(call: Call) -> dict[str, Any]:
    return {field.name: getattr(call, field.name) for field in fields(call)}


def make_call(
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
        kkt=options.kkt,
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
        problem,
        bound,
        example.leaves,
        example.spec,
        backward=backward,
        linear_solver=options.linear_solver,
        compiled=options.compile,
    )


def _full_precision(inputs: Sequence[Any]) -> tuple[tuple[Any, ...], torch.dtype | None]:
    """Under autocast, floating inputs in float32 together, and the dtype in which the caller expects u.

    Inputs that are all float64 stay, as torch's own casts leave them. u goes back to the inputs' common half
    precision; where they differ it stays float32.
    """
    if not autocast_anywhere():
        return tuple(inputs), None
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

"""Holds the plan of one random program against the dense formula, at one random point.

In: a `Program`. Out: an `Outcome`: the error of every quantity a plan returns, the kind found, what fell
    back. The
point (u, lam) is arbitrary, no solution: what a plan computes is a function of (u, lam, theta) like any
other. Next: worker.py.
"""

import dataclasses
import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from implicitdiff import Problem
from implicitdiff.errors import OptionError
from implicitdiff.inputs import Bound, bind
from implicitdiff.plan import Plan, plan_for
from tests.fuzz.generator import Program
from tests.oracles import (
    Derivatives,
    Sample,
    compare_modulo,
    dense_vjp_at,
    gradient_null_vectors,
    kkt_matrix,
    kkt_solution,
    relative_error,
)
from tests.oracles.dense import split_batch
from tests.oracles.linalg import join, null_space, rank

TOLERANCE = 1e-7
WORST_CONDITION = 1e6
# The contract's order: where several kinds are true, the first one is reported.
ORDER = (
    "zero", "scaled-identity", "diagonal", "kronecker", "banded", "block-diagonal", "low-rank-plus-diagonal",
    "block", "sparse", "sum", "dense", "matrix-free",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of one program; plain data, so that it can cross a process border as JSON."""

    planted: str
    constraints: str
    rejected: str = ""  # why the program is no test: an ill-conditioned point, more dependences than planted
    found: str = ""
    solver: str = ""
    fallbacks: tuple[str, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    crash: str = ""

    @property
    def wrong(self) -> bool:
        """Something differs from the dense formula, or an error was raised."""
        return bool(self.crash) or any(error > TOLERANCE for error in self.errors.values())

    @property
    def structure_found(self) -> bool:
        """The kind found is the planted one, or one that comes before it (with sizes of 1 it may be true)."""
        return self.found in ORDER and ORDER.index(self.found) <= ORDER.index(self.planted)


class Point:
    """A random point of a program: u, multipliers and cotangents as leaves with the batch axis first."""

    def __init__(self, program: Program, problem: Problem) -> None:
        self.problem, self.inputs, self.in_dims = problem, program.make_inputs(), program.in_dims
        self._generator = torch.Generator().manual_seed(program.data_seed)
        self.batch = program.batch
        self.u = self._normal(program.variables, 0.7)
        self.samples: list[Sample] = []
        shapes: list[tuple[int, ...]] = []
        for b, one in enumerate(split_batch(self.inputs, self.in_dims).inputs):
            u = self._tree([leaf[b] for leaf in self.u])
            self.samples.append(Sample(problem, u, one))
            if problem.declares("equality"):
                shapes = [tuple(leaf.shape) for leaf in tree_flatten(problem.equality(u, *one))[0]]
        self.lam = self._normal(shapes, 0.4)
        self.v = self._normal(program.variables, 1.0)
        self.v_lam = self._normal(shapes, 1.0)

    def _normal(self, shapes: Sequence[tuple[int, ...]], scale: float) -> tuple[Tensor, ...]:
        return tuple(
            scale * torch.randn(self.batch, *shape, generator=self._generator, dtype=torch.float64)
            for shape in shapes
        )

    def _tree(self, leaves: Sequence[Tensor]) -> Any:
        # a program's variable is one tensor or a tuple of two
        return leaves[0] if len(leaves) == 1 else tuple(leaves)

    @property
    def u_tree(self) -> Any:
        """u as the problem declares it, batch axis first."""
        return self._tree(self.u)

    def flat(self, leaves: Sequence[Tensor], b: int) -> Tensor:
        """One sample of leaves as one vector."""
        return join([leaf[b] for leaf in leaves])

    def least_squares(self) -> list[Tensor]:
        """The multipliers of minimum norm of every sample."""
        return [sample.least_squares_multipliers(sample.u) for sample in self.samples]

    def derivatives(self) -> list[Derivatives]:
        """Eqn. 3's matrices of every sample."""
        return [sample.derivatives(sample.u, self.flat(self.lam, b)) for b, sample in enumerate(self.samples)]


def check(program: Program) -> Outcome:
    """Compares everything the plan returns with the oracle; errors are recorded, not raised."""
    problem = program.problem()
    point = Point(program, problem)
    d = point.derivatives()
    outcome = Outcome(program.planted, program.constraints)
    reason = _unfit(program, d)
    if reason:
        return dataclasses.replace(outcome, rejected=reason)
    try:
        bound = bind(problem, [x.clone().requires_grad_() for x in point.inputs], point.in_dims)
        leaves, spec = tree_flatten(problem.init(*bound.sample(0)))
        plan = _plan(program, problem, bound, leaves, spec)
        found = plan.analysis
        fallbacks = tuple(f"{f.operation} | {f.reason}" for f in found.fallbacks)
        errors = _errors(program, point, plan, bound, d)
    except Exception:  # any error is a finding: it is counted as wrong and shown with the program's text
        return dataclasses.replace(outcome, crash=traceback.format_exc(limit=-4))
    return dataclasses.replace(
        outcome, found=found.hessian.kind, solver=found.solver, fallbacks=fallbacks, errors=errors
    )


ASKED = {"sparse": "sparse-lu", "sum": "woodbury", "banded": "sparse-lu"}
"""At these sizes a dense solver is chosen, so half of the programs ask for that of their kind."""


def _plan(program: Program, problem: Problem, bound: Bound, leaves: list[Tensor], spec: Any) -> Plan:
    if program.data_seed % 2 == 0 and program.planted in ASKED:
        try:
            return plan_for(problem, bound, leaves, spec, linear_solver=ASKED[program.planted])
        except OptionError:
            pass  # it does not fit, as a rank that is not smaller than the size
    return plan_for(problem, bound, leaves, spec)


def _unfit(program: Program, samples: list[Derivatives]) -> str:
    for d in samples:
        K = kkt_matrix(d)
        if not all(torch.isfinite(x).all() for x in (K, d.B, d.C)) or d.B.abs().max() > 1e4:
            return "values out of range"
        if rank(d.A) != d.A.shape[0] - program.dependences:
            return "constraints depend on each other in another way than planted"
        singular = torch.linalg.svdvals(K)
        if singular[0] > WORST_CONDITION * singular[-1 - program.dependences]:
            return "ill-conditioned"
        if program.dependences and singular[-program.dependences] > 1e-10 * singular[0]:
            return "dependent constraints, but K is regular"
    return ""


def _errors(
    program: Program, point: Point, plan: Plan, bound: Bound, samples: list[Derivatives]
) -> dict[str, float]:
    theta = tuple(x.detach() for x in plan.trace.theta(bound))  # plans are called with plain tensors
    u, lam = point.u, point.lam
    arguments = [*u, *lam, *theta, *point.v, *point.v_lam]
    before = [x.clone() for x in arguments]
    state = plan.stationarity(u, lam, theta)
    H, A = plan.hessian(u, lam, theta).to_dense(), plan.constraint_jacobian(u, theta)
    errors = {
        "objective": relative_error(
            plan.value(u, theta), torch.stack([s.objective(s.u, s.theta) for s in point.samples])
        ),
        "hessian": relative_error(H.expand(point.batch, *H.shape[1:]), torch.stack([d.H for d in samples])),
        "constraint_jacobian": relative_error(
            A.expand(point.batch, *A.shape[1:]), torch.stack([d.A for d in samples])
        ),
    }
    for name, leaves, expected in (
        ("stationarity", state.gradient, [d.stationarity for d in samples]),
        ("constraint", state.constraint, [d.constraint for d in samples]),
        ("multipliers", plan.multipliers(u, theta), point.least_squares()),
    ):
        flat = [point.flat(leaves, b) for b in range(point.batch)]
        errors[name] = max(relative_error(f, e) for f, e in zip(flat, expected, strict=True))
    errors |= _solve_errors(program, point, plan, theta, samples)
    errors |= _gradient_errors(program, point, plan, theta)
    changed = [not torch.equal(a, b) for a, b in zip(arguments, before, strict=True)]
    return errors | {"arguments written to": float(sum(changed))}


def _solve_errors(
    program: Program, point: Point, plan: Plan, theta: Sequence[Tensor], samples: list[Derivatives]
) -> dict[str, float]:
    """K (w, s) = (rhs_u, rhs_h), two right-hand sides at once; the status must be 0."""
    rhs_u = tuple(torch.stack([v, 0.5 - v]) for v in point.v)
    # dependent constraints: only a right-hand side without their components has a solution
    zero = 0.0 if program.dependences else 1.0
    rhs_h = tuple(zero * torch.stack([v, 0.3 + v]) for v in point.v_lam)
    w, s, status = plan.kkt_solve(point.u, point.lam, tuple(theta), rhs_u, rhs_h)
    error = float(torch.count_nonzero(status))
    for b, d in enumerate(samples):
        for r in range(2):
            expected = kkt_solution(d, -join([x[r, b] for x in rhs_u]), -join([x[r, b] for x in rhs_h]))
            actual = join([x[r, b] for x in w]), join([x[r, b] for x in s])
            free = [[n] for n in null_space(d.A.mT).mT]
            error = max(error, relative_error(actual[0], expected[0]))
            error = max(error, compare_modulo([actual[1]], [expected[1]], free))
    return {"kkt_solve": error}


def _gradient_errors(program: Program, point: Point, plan: Plan, theta: Sequence[Tensor]) -> dict[str, float]:
    """Gradients for all of theta, for a random part of it, and with a cotangent of the multipliers."""
    problem, u = point.problem, point.u_tree
    names = [placeholder.name for placeholder in (*plan.trace.inputs, *plan.trace.tensors)]
    order = [source.name for source in program.inputs]
    order += [f"self.{name}" for name, _ in problem.named_parameters()]
    vectors = gradient_null_vectors(problem, u, point.inputs, point.in_dims) if program.dependences else []
    some = random.Random(program.data_seed)
    floating = [t.is_floating_point() for t in theta]  # index tensors have no gradient
    runs: dict[str, tuple[tuple[Tensor, ...] | None, list[bool]]] = {
        "vjp": (None, floating),
        "vjp of a part": (None, [some.random() < 0.5 and needed for needed in floating]),
    }
    if point.v_lam and not program.dependences:
        runs["vjp with multipliers"] = (point.v_lam, floating)
    errors = {}
    for run, (v_lam, needs) in runs.items():
        gradients, status = plan.vjp(point.u, point.lam, tuple(theta), point.v, v_lam, needs)
        expected = dense_vjp_at(
            problem, u, list(point.lam), point.v, point.inputs, point.in_dims,
            None if v_lam is None else list(v_lam),
        ).leaves()  # fmt: skip
        by_name = dict(zip(names, gradients, strict=True))
        for name, needed in zip(names, needs, strict=True):
            assert needed or by_name[name] is None, f"a gradient of {name} that nobody asked for"
            assert not needed or by_name[name] is not None, f"no gradient of {name}"
        errors[f"{run}: status"] = float(torch.count_nonzero(status))
        if needs == floating:
            actual = [g for name in order if (g := by_name[name]) is not None]
            errors[run] = compare_modulo(actual, expected, vectors)
        elif not program.dependences:  # a part of the gradients has no null vectors of its own
            pairs = [(by_name[name], e) for name, e in zip(order, expected, strict=True)]
            errors[run] = max((relative_error(a, e) for a, e in pairs if a is not None), default=0.0)
    return errors

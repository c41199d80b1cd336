"""The structured plan: every question about a problem answered by code emitted from its proved structure.

In: a `Trace`. Out: `StructuredPlan`, which satisfies `plan.Plan`. Translation, derivatives, classification and the choice of
the solver happen once, in `build`; each answer is one emitted function, written on first use. Where a factorisation fails
the whole KKT matrix is taken, and after that the dense plan. Next file: `plan.py`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitdiff import lowering, operators, saddle, solvers
from implicitdiff.derivatives.autodiff import AutodiffPlan
from implicitdiff.derivatives.declared import Declared
from implicitdiff.derivatives.stationarity import Stationarity
from implicitdiff.errors import StructureMismatchWarning
from implicitdiff.graph import rules
from implicitdiff.graph.emit import Emitted, Emitter, Output, call
from implicitdiff.graph.ir import BATCHED, STACKED, Label, Ref, reachable
from implicitdiff.graph.trace import Trace
from implicitdiff.graph.translate import translate
from implicitdiff.operators import LinearOperator
from implicitdiff.status import Status
from implicitdiff.structure.analyze import classify
from implicitdiff.structure.forms import Entry, Form
from implicitdiff.structure.probe import agree, direction
from implicitdiff.structure.report import Analysis
from implicitdiff.structured_report import report
from implicitdiff.symbolic_kkt import SymbolicKKT, jacobian_matrix
from implicitdiff.structure.scale import cancelling

Leaves = tuple[Tensor, ...]

assert rules  # importing the package registers the translation rules


class StructuredPlan:
    """One problem's plan. Immutable after `build` but for the emitted functions, which are written on first use."""

    def __init__(self, trace: Trace, linear_solver: str, dense: AutodiffPlan) -> None:
        self.trace = trace
        self.linear_solver = linear_solver
        self.dense = dense
        self.dtype = next(p.dtype for p in trace.placeholders if p.dtype.is_floating_point)
        program = translate(trace)
        self.constants = program.constants
        shapes = () if trace.equality is None else trace.equality.output_shapes
        self.declared = Declared(program, [tuple(s) for s in shapes])
        self.hessian_form = classify(program.build, self.declared.space, self.declared.hessian_terms)
        self.kkt = SymbolicKKT(self.declared, self.hessian_form, linear_solver, self.dtype)
        self._emitted: dict[Any, Emitted] = {}
        self._arguments: dict[Any, tuple[str, ...]] = {}
        self._lock = threading.RLock()
        self._verdict: bool | None = None
        everything = tuple(p.dtype.is_floating_point for p in (*trace.inputs, *trace.tensors))
        self._vjp(everything, False, False)
        used = set(self._arguments["vjp", everything, False, False])
        self.needs_multipliers = any(self.declared.constraint_leaf_name("lam", k) in used for k in range(len(shapes)))
        self.analysis: Analysis = report(self.declared, self.hessian_form, self.kkt.route,
                                         self._emitted["vjp", everything, False, False].source)

    @classmethod
    def build(cls, trace: Trace, linear_solver: str, dense: AutodiffPlan) -> StructuredPlan:
        """Derives the plan.

        Args:
            trace: the traced functions.
            linear_solver: the layer's option.
            dense: the plan to fall back on for samples whose factorisations fail.

        Raises:
            Unsupported: something is not covered; it names the operation, the user's line and the reason.
        """
        return cls(trace, linear_solver, dense)

    # ---------------------------------------------------------------- emission

    def _emit(self, key: Any, name: str, outputs: Callable[[], tuple[list[Output], list[Ref]]], document: str) -> Emitted:
        with self._lock:
            if key not in self._emitted:
                build = self.declared.build
                made, first = outputs()
                nodes = reachable([*(o.ref.node for o in made), *(r.node for r in first)])
                leaves = {n.data[0]: n for n in nodes if n.op == "leaf"}  # type: ignore[index]
                like = self.declared.variables[0].name
                order = self._argument_order()
                names = tuple(n for n in order if n in leaves or n == like)
                preamble = [line for n in names if n in leaves for line in self._reshape(n, leaves[n].sizes, leaves[n].prefix)]
                emitted = Emitter(build, like).function(
                    name, names, made, self._namespace(), preamble, document, first)
                self._emitted[key], self._arguments[key] = emitted, names
            return self._emitted[key]

    def _argument_order(self) -> list[str]:
        outputs = range(len(self.declared.output_shapes))
        def stems(stem: str) -> list[str]:
            return [self.declared.constraint_leaf_name(stem, k) for k in outputs]

        v = [self._variable_name("v", k) for k in range(len(self.declared.variables))]
        rhs = [self._variable_name("rhs_u", k) for k in range(len(self.declared.variables))]
        return [*v, *stems("v_lam"), *rhs, *stems("rhs_h"), *(leaf.name for leaf in self.declared.variables), *stems("lam"),
                *(leaf.name for leaf in self.declared.theta), "shift"]

    def _variable_name(self, stem: str, index: int) -> str:
        return stem if len(self.declared.variables) == 1 else f"{stem}{index}"

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """The shape with which an argument arrives, without its leading axes."""
        for leaf in (*self.declared.variables, *self.declared.theta):
            if leaf.name == name:
                return leaf.placeholder.shape
        for k, leaf in enumerate(self.declared.variables):
            if name in (self._variable_name("v", k), self._variable_name("rhs_u", k)):
                return leaf.placeholder.shape
        for k, shape in enumerate(self.declared.output_shapes):
            if name in [self.declared.constraint_leaf_name(stem, k) for stem in ("lam", "v_lam", "rhs_h")]:
                return shape
        return ()

    def _reshape(self, name: str, sizes: tuple[int, ...], prefix: int) -> list[str]:
        if tuple(self._shape_of(name)) == tuple(sizes):
            return []
        lead = f"*{name}.shape[:{prefix}], " if prefix else ""
        body = ", ".join(map(str, sizes))
        return [f"{name} = {name}.reshape({lead}{body})" if (lead or body) else f"{name} = {name}.reshape(())"]

    def _namespace(self) -> dict[str, Any]:
        space: dict[str, Any] = {"torch": torch, "operators": operators, "solvers": solvers, "saddle": saddle}
        space.update(self.constants)
        dependent = self.kkt.route.dependent
        if dependent is not None:
            space["null_vectors"] = tuple(dependent.vectors.to(self.dtype).unbind(1))
        return space

    def _run(self, key: Any, values: dict[str, Tensor]) -> tuple[Any, ...]:
        emitted = self._emitted[key]
        return emitted.call(*(values[name] for name in self._arguments[key]))  # type: ignore[no-any-return]

    def _values(self, u: Leaves, lam: Leaves, theta: Leaves) -> dict[str, Tensor]:
        values = {leaf.name: t for leaf, t in zip(self.declared.variables, u, strict=True)}
        values.update({leaf.name: t for leaf, t in zip(self.declared.theta, theta, strict=True)})
        values.update({self.declared.constraint_leaf_name("lam", k): t for k, t in enumerate(lam)})
        return values

    # ---------------------------------------------------------------- the point

    def value(self, u: Leaves, theta: Leaves) -> Tensor:
        """The objective of each sample, (B,)."""
        self._emit("value", "value", lambda: ([Output("value", self.declared.program.objective, ())], []), "f")
        found: Tensor = self._run("value", self._values(u, (), theta))[0]
        if not bool(torch.isfinite(found).all()):
            found = self._run("value", self._values(_off_zero(u), (), theta))[0]
        return found.expand(u[0].shape[0])

    def stationarity(self, u: Leaves, lam: Leaves, theta: Leaves) -> Stationarity:
        """D_u L and h, with the largest of the terms that cancel in each."""
        self._emit("stationarity", "stationarity", self._stationarity_outputs, "D_u L, h and their scales")
        out = self._run("stationarity", self._values(u, lam, theta))
        count, batch = len(self.declared.variables), u[0].shape[0]
        gradient = tuple(g.expand(batch, *leaf.sizes).reshape(t.shape)
                         for g, leaf, t in zip(out, self.declared.variables, u, strict=False))
        constraint = self._outputs([c.expand(batch, *c.shape[1:]) for c in out[count:-2]], 1)
        return Stationarity(gradient, out[-2].expand(batch), constraint, out[-1].expand(batch))

    def _stationarity_outputs(self) -> tuple[list[Output], list[Ref]]:
        declared, build = self.declared, self.declared.build
        rows = declared.space.rows
        refs = declared.gradient(declared.lagrangian, rows)
        outputs = [Output(f"g{k}", ref, rows[k]) for k, ref in enumerate(refs)]
        outputs += [Output(c.name, c.value, c.labels) for c in declared.constraints]
        outputs.append(Output("gradient_scale", self._largest([t for ref in refs for t in cancelling(build, ref)]), ()))
        outputs.append(Output("constraint_scale", self._largest([t for c in declared.constraints for t in cancelling(build, c.value)]), ()))
        return outputs, []

    def _largest(self, terms: Sequence[Ref]) -> Ref:
        """max |entry| of each sample over all terms."""
        build, like = self.declared.build, self.declared.variables[0]
        args: list[tuple[Ref, Sequence[Label], int]] = [(build.self_ref(like.node), like.node.axes, BATCHED)]
        args += [(t, t.labels, BATCHED) for t in terms]
        text = ", ".join(f"{{{k}}}" for k in range(len(args)))
        return call(build, f"saddle.largest({text})", args, (), BATCHED)

    def _outputs(self, blocks: Sequence[Tensor], lead: int) -> Leaves:
        """Constraint blocks as the outputs of `equality`: reshaped, and concatenations put together."""
        pieces: dict[int, list[tuple[Tensor, int]]] = {}
        for block, c in zip(blocks, self.declared.constraints, strict=True):
            shape = tuple(int(torch.Size(self.declared.build.labels.sizes[k] for k in dim).numel()) for dim in c.block.value.dims)
            pieces.setdefault(c.block.output, []).append((block.reshape(*block.shape[:lead], *shape), c.block.dim))
        return tuple(
            pieces[k][0][0] if len(pieces[k]) == 1 else torch.cat([t for t, _ in pieces[k]], dim=pieces[k][0][1] + lead)
            for k in range(len(self.declared.output_shapes))
        )

    def multipliers(self, u: Leaves, theta: Leaves) -> Leaves:
        """The least-squares solution of A'lam = D_u f through A A', by the same structured Schur solver."""
        if not self.declared.constraints:
            return ()
        self._emit("multipliers", "multipliers", self._multiplier_outputs, "A A' lam = A D_u f")
        out = self._run("multipliers", self._values(u, (), theta))
        if bool((out[-1] != Status.OK).any()):
            return self.dense.multipliers(u, theta)
        batch = u[0].shape[0]
        return self._outputs([b.expand(batch, *b.shape[1:]) for b in out[:-1]], 1)

    def _multiplier_outputs(self) -> tuple[list[Output], list[Ref]]:
        declared, build = self.declared, self.declared.build
        ones = tuple(
            tuple(Entry(diagonal=build.number(1.0)) if a == b else Entry() for b in range(len(declared.variables)))
            for a in range(len(declared.variables))
        )
        form = Form(declared.space, ones, "scaled-identity", "the identity")
        solver = SymbolicKKT(declared, form, "auto", self.dtype, identity=True)
        slope = declared.gradient(declared.program.objective, declared.space.rows)
        lam, status = solver.least_squares(slope)
        outputs = [Output(c.name, ref, c.labels) for c, ref in zip(declared.constraints, lam, strict=True)]
        return [*outputs, Output("status", status, ())], lam

    # ---------------------------------------------------------------- the KKT system

    def kkt_solve(
        self, u: Leaves, lam: Leaves, theta: Leaves, rhs_u: Leaves, rhs_h: Leaves, shift: Tensor | None = None
    ) -> tuple[Leaves, Leaves, Tensor]:
        """(w, s, status) for right-hand sides (R, B, *shape): one factorisation."""
        if self._contradicted(u, lam, theta):
            return self.dense.kkt_solve(u, lam, theta, rhs_u, rhs_h, shift)
        values = self._values(u, lam, theta)
        values.update({self._variable_name("rhs_u", k): t for k, t in enumerate(rhs_u)})
        values.update({self.declared.constraint_leaf_name("rhs_h", k): t for k, t in enumerate(rhs_h)})
        if shift is not None:
            values["shift"] = shift
        shifted = shift is not None
        for full in (False, True) if self.declared.constraints and self.kkt.route.name != "full" else (False,):
            key = ("kkt", shifted, full)
            self._emit(key, "kkt_solve", lambda full=full: self._kkt_outputs(shifted, full), "K (w, s) = (rhs_u, rhs_h)")  # type: ignore[misc]
            out = self._run(key, values)
            status = self._status(out[-1], u)
            if not bool((status == Status.SINGULAR).any()):
                break
        lead, count = rhs_u[0].shape[:2], len(self.declared.variables)
        w = tuple(x.expand(*lead, *x.shape[2:]).reshape(*lead, *leaf.placeholder.shape)
                  for x, leaf in zip(out[:count], self.declared.variables, strict=True))
        s = self._outputs([b.expand(*lead, *b.shape[2:]) for b in out[count:-1]], 2)
        return w, s, status

    def _status(self, status: Any, u: Leaves) -> Tensor:
        batch = u[0].shape[0]
        if isinstance(status, Tensor) and status.dtype == torch.int8:
            return status.expand(batch)
        return torch.zeros(batch, dtype=torch.int8, device=u[0].device)

    def _kkt_outputs(self, shifted: bool, full: bool) -> tuple[list[Output], list[Ref]]:
        declared, build = self.declared, self.declared.build
        form = self._shifted() if shifted else self.hessian_form
        kkt = self.kkt if not (shifted or full) else SymbolicKKT(declared, form, self.linear_solver, self.dtype, full=full)
        rows = declared.space.rows
        a = [Ref(build.leaf(self._variable_name("rhs_u", k), leaf.sizes, STACKED).node, rows[k])
             for k, leaf in enumerate(declared.variables)]
        b = [declared.constraint_leaf("rhs_h", c, STACKED) for c in declared.constraints]
        w, s, status = kkt.solve(a, b, STACKED)
        outputs = [Output(f"w{k}", ref, rows[k], prefix=STACKED) for k, ref in enumerate(w)]
        outputs += [Output(c.name, ref, c.labels, prefix=STACKED) for c, ref in zip(declared.constraints, s, strict=True)]
        return [*outputs, self._status_output(status)], [*s, *w]

    def _status_output(self, status: Sequence[Ref]) -> Output:
        build = self.declared.build
        if not status:
            return Output("status", build.number(0.0), ())
        if len(status) == 1:
            return Output("status", status[0], (), prefix=-1)
        text = ", ".join(f"{{{k}}}" for k in range(len(status)))
        merged = call(build, f"saddle.merged({text})", [(ref, (), -1) for ref in status], (), BATCHED)
        return Output("status", merged, (), prefix=-1)

    def _shifted(self) -> Form:
        """H + shift I."""
        build, form = self.declared.build, self.hessian_form
        shift = build.self_ref(build.leaf("shift", (), BATCHED, differentiable=False).node)
        grid = tuple(
            tuple(
                Entry(shift if e.diagonal is None else build.plus(e.diagonal, shift), e.partial, e.low_rank, e.dense)
                if a == b else e for b, e in enumerate(row)
            )
            for a, row in enumerate(form.grid)
        )
        kind = "scaled-identity" if form.kind == "zero" else form.kind
        return Form(form.space, grid, kind, form.reason, form.shared)

    # ---------------------------------------------------------------- the backward pass

    def vjp(
        self, u: Leaves, lam: Leaves, theta: Leaves, v_u: Leaves, v_lam: Leaves | None, needs: Sequence[bool]
    ) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """A gradient per theta that needs one, and the status of each sample."""
        if self._contradicted(u, lam, theta):
            return self.dense.vjp(u, lam, theta, v_u, v_lam, needs)
        values = self._values(u, lam, theta)
        values.update({self._variable_name("v", k): t for k, t in enumerate(v_u)})
        with_lam = v_lam is not None
        if v_lam is not None:
            values.update({self.declared.constraint_leaf_name("v_lam", k): t for k, t in enumerate(v_lam)})
        wanted = tuple(n and leaf.placeholder.dtype.is_floating_point for n, leaf in zip(needs, self.declared.theta, strict=True))
        for full in (False, True) if self.declared.constraints and self.kkt.route.name != "full" else (False,):
            key = ("vjp", wanted, with_lam, full)
            self._vjp(wanted, with_lam, full)
            out = self._run(key, values)
            if self._lost(out[:-1], u):
                out = self._run(key, {**values, **self._values(_off_zero(u), lam, theta)})
            status = self._status(out[-1], u)
            if not bool((status == Status.SINGULAR).any()):
                break
        names = self._emitted[key].results
        found = dict(zip(names, out, strict=True))
        grads = tuple(
            (found[leaf.name].reshape(t.shape) if leaf.name in found else torch.zeros_like(t)) if need else None
            for need, leaf, t in zip(wanted, self.declared.theta, theta, strict=True)
        )
        return grads, status

    # ---------------------------------------------------------------- the probe

    def _contradicted(self, u: Leaves, lam: Leaves, theta: Leaves) -> bool:
        """Whether the one product that is tested, on the first call with data, differs from automatic differentiation."""
        if self._verdict is None and u[0].shape[0] and not u[0].is_meta:
            claimed, reference = self._probe(u, lam, theta)
            self._verdict = not agree(claimed, reference)
            if self._verdict:
                warnings.warn(
                    f"the structure found ({self.analysis.hessian.kind}) contradicts a Hessian-vector product by automatic "
                    "differentiation; the dense path is taken instead. Please report this as a bug, with the problem.",
                    StructureMismatchWarning, stacklevel=2,
                )
        return bool(self._verdict)

    def _probe(self, u: Leaves, lam: Leaves, theta: Leaves) -> tuple[Leaves, Leaves]:
        """K z for the first sample and a fixed z: by the forms, and by automatic differentiation."""
        one_u, one_lam = tuple(t[:1] for t in u), tuple(t[:1] for t in lam)
        placeholders = (*self.trace.inputs, *self.trace.tensors)
        one_theta = tuple(t[:1] if p.batched else t for t, p in zip(theta, placeholders, strict=True))
        if self.declared.constraints and not lam:
            one_lam = tuple(u[0].new_zeros(1, *shape) for shape in self.declared.output_shapes)
        w = tuple(direction(t, 1.0 + k) for k, t in enumerate(one_u))
        s = tuple(direction(t, 2.0 + k) for k, t in enumerate(one_lam))
        values = self._values(one_u, one_lam, one_theta)
        values.update({self._variable_name("rhs_u", k): t[None] for k, t in enumerate(w)})
        values.update({self.declared.constraint_leaf_name("rhs_h", k): t[None] for k, t in enumerate(s)})
        self._emit("probe", "kkt_product", self._probe_outputs, "K (w, s)")
        out = self._run("probe", values)
        count = len(one_u)
        claimed = (*(x.expand(1, 1, *x.shape[2:]).reshape(t.shape) for x, t in zip(out, one_u, strict=False)),
                   *(t[0] for t in self._outputs(out[count:], 2)))
        product_u, product_h = self.dense.lagrangian.kkt_product(one_u, one_lam, one_theta, w, s)
        return claimed, (*product_u, *product_h)

    def _probe_outputs(self) -> tuple[list[Output], list[Ref]]:
        declared, build = self.declared, self.declared.build
        rows = declared.space.rows
        w = [Ref(build.leaf(self._variable_name("rhs_u", k), leaf.sizes, STACKED).node, rows[k])
             for k, leaf in enumerate(declared.variables)]
        s = [declared.constraint_leaf("rhs_h", c, STACKED) for c in declared.constraints]
        product_u, product_h = self.kkt.product(w, s)
        outputs = [Output(f"w{k}", ref, rows[k], prefix=STACKED) for k, ref in enumerate(product_u)]
        outputs += [Output(c.name, ref, c.labels, prefix=STACKED) for c, ref in zip(declared.constraints, product_h, strict=True)]
        return outputs, []

    def _lost(self, grads: Sequence[Tensor], u: Leaves) -> bool:
        """Whether a small gradient is not finite: u log u at an entry of u that underflowed to 0, most likely.

        The large gradients are not read again: they have the pattern of w, which is 0 there.
        """
        return any(not bool(torch.isfinite(g).all()) for g in grads if g.numel() < u[0].numel())

    def _vjp(self, wanted: tuple[bool, ...], with_lam: bool, full: bool) -> Emitted:
        return self._emit(("vjp", wanted, with_lam, full), "backward", lambda: self._vjp_outputs(wanted, with_lam, full),
                          "The gradients D_theta (D_u L w - h's) with K (w, s) = -(v, 0).")

    def _vjp_outputs(self, wanted: tuple[bool, ...], with_lam: bool, full: bool) -> tuple[list[Output], list[Ref]]:
        declared, build = self.declared, self.declared.build
        rows = declared.space.rows
        kkt = self.kkt if not full else SymbolicKKT(declared, self.hessian_form, self.linear_solver, self.dtype, full=True)
        a = [build.scale(-1.0, Ref(build.leaf(self._variable_name("v", k), leaf.sizes, BATCHED).node, rows[k]))
             for k, leaf in enumerate(declared.variables)]
        b = [build.scale(-1.0, declared.constraint_leaf("v_lam", c)) if with_lam else build.number(0.0)
             for c in declared.constraints]
        w, s, status = kkt.solve(a, b, BATCHED)
        w_own = [build.hold(ref.rename(dict(zip(rows[k], leaf.node.axes, strict=True))))
                 for k, (ref, leaf) in enumerate(zip(w, declared.variables, strict=True))]
        s_own = [build.hold(ref) for ref in s]
        gradients = declared.input_gradients(w_own, s_own)
        outputs = []
        zeros = [] if with_lam else self._feasible_sums(w_own)
        for need, leaf in zip(wanted, declared.theta, strict=True):
            ref = gradients.get(leaf.node.id)
            if not need or ref is None:
                continue
            (ref,) = build.replaced([ref], zeros)
            if build.is_zero(ref):
                continue
            if not leaf.placeholder.batched:
                ref = build.con(ref, (), over_batch=True)
            outputs.append(Output(leaf.name, ref, leaf.node.axes, prefix=int(leaf.placeholder.batched)))
        outputs.sort(key=lambda o: len(o.order))
        return [*outputs, self._status_output(status)], [*s_own, *w_own, *status]

    def _feasible_sums(self, w: Sequence[Ref]) -> list[Ref]:
        """Sums of w that are exactly a row of A w: they are 0 (in the gradients, which hold w fixed, not before)."""
        build = self.declared.build
        out = []
        for c in self.declared.constraints:
            _, factors = build.split(self.declared.constraint_tangent(c, w))
            sums = [ref for ref, power in factors if ref.node.op == "con" and power == 1.0]
            if len(sums) == 1 and len(factors) == 1:
                out.append(sums[0])
        return out

    # ---------------------------------------------------------------- the matrices

    def hessian(self, u: Leaves, lam: Leaves, theta: Leaves) -> LinearOperator:
        """H = D_uu L, of the kind that was proved."""
        def outputs() -> tuple[list[Output], list[Ref]]:
            operator = lowering.operator(self.declared.build, self.hessian_form)
            return [Output("hessian", operator, (), prefix=-1)], []

        self._emit("hessian", "hessian", outputs, "H = D_uu L")
        found = self._run("hessian", self._values(u, lam, theta))[0]
        assert isinstance(found, LinearOperator)
        return found

    def constraint_jacobian(self, u: Leaves, theta: Leaves) -> Tensor:
        """A, (B, p, m)."""
        batch, m = u[0].shape[0], self.declared.space.size
        if not self.declared.constraints:
            return u[0].new_zeros((batch, 0, m))

        def outputs() -> tuple[list[Output], list[Ref]]:
            ref = jacobian_matrix(self.declared, self.declared.space.columns)
            return [Output("jacobian", ref, ref.labels)], []

        self._emit("jacobian", "constraint_jacobian", outputs, "A = D_u h")
        out = self._run("jacobian", self._values(u, (), theta))[0].expand(batch, -1, -1)
        return self._in_output_order(out)

    def _in_output_order(self, rows: Tensor) -> Tensor:
        """Rows of A from the order of the blocks to that of the joined outputs of `equality`."""
        index, start = [], 0
        for c in self.declared.constraints:
            size = int(torch.Size(self.declared.build.labels.sizes[k] for k in c.labels).numel())
            index.append(torch.arange(start, start + size, device=rows.device))
            start += size
        positions = self._outputs([i[None] for i in index], 1)
        order = torch.cat([p.reshape(-1) for p in positions])
        return rows[:, order]


def _off_zero(u: Leaves) -> Leaves:
    """u with its zeros at the smallest normal number: such entries carry no gradient, and their logarithm is finite."""
    return tuple(torch.where(t == 0.0, torch.finfo(t.dtype).tiny, t) for t in u)

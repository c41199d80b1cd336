"""The hook `hessian` as graphs: the tensors of the operator it returns, and the products of its autodiff terms.

In: a Problem that declares it, its trace and inputs. Out: `DeclaredHessian`, which gives H of a whole batch as an
operator without calling user code again. Next file: `hybrid.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitdiff.errors import ProblemDefinitionError
from implicitdiff.graph.arguments import Arguments, Fact, arguments_of, call_hook
from implicitdiff.graph.checks import describe_value
from implicitdiff.graph.clean import Captured, finish, lift_attributes
from implicitdiff.graph.record import LOCK, record
from implicitdiff.graph.skeleton import skeleton
from implicitdiff.graph.trace import Trace
from implicitdiff.inputs import Bound
from implicitdiff.operators import Autodiff, LinearOperator, MatrixFree, Sum
from implicitdiff.problem import Problem
from implicitdiff.pytrees import Spec, unflatten
from implicitdiff.torch_private import clean_context

Leaves = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class HookArguments(Arguments):
    """The arguments of the hook: u, the multipliers, then the inputs; and, for products, a vector behind all of them.

    Attributes:
        multipliers: how many of the variables are multipliers; they come after those of u.
        multiplier_spec: their structure; None without constraints.
    """

    multipliers: int = 0
    multiplier_spec: Spec | None = None

    def call(self, problem: Problem, hook: str, values: Sequence[Tensor], recorder: Any = None) -> Any:
        """Call the hook of the Problem's skeleton on these values."""
        end = self.variables + len(self.bound.leaves)
        last = end + len(self.bound.tensors)
        twin = skeleton(
            problem, {id(t): v for t, v in zip(self.bound.tensors, values[end:last], strict=True)}
        )
        own = self.variables - self.multipliers
        assert self.variable_spec is not None
        lam = None
        if self.multiplier_spec is not None:
            lam = unflatten(values[own : self.variables], self.multiplier_spec)
        u = unflatten(values[:own], self.variable_spec)
        arguments = [u, lam, *self.bound.unflatten(values[self.variables : end])]
        if recorder is None:
            return self._products(call_hook(twin, hook, arguments), values[last:])
        with recorder:
            return self._products(call_hook(twin, hook, arguments), values[last:])

    @staticmethod
    def _products(found: Any, vector: Sequence[Tensor]) -> Any:
        """The products of the autodiff terms with the vector, where there is one; else what the hook returned."""
        if not vector:
            return found
        return [term.matvec(vector[0]) for term in _autodiff_terms(found)]


def _autodiff_terms(operator: Any) -> Iterator[Autodiff]:
    if isinstance(operator, Autodiff):
        yield operator
    elif isinstance(operator, Sum):
        for term in operator.terms:
            yield from _autodiff_terms(term)


@dataclass(frozen=True, eq=False)
class DeclaredHessian:
    """H as the user declares it, for a whole batch.

    Attributes:
        name: of the hook, for messages.
        module: (*u, *lam, *theta of one sample) -> the tensors of the operator, each with a leading axis of 1.
        products: (*u, *lam, *theta, vector) -> one product for each autodiff term; None where there is none.
        template: the operator of one sample, with meta tensors for its tensors.
        captured: further tensors that the hook reads.
    """

    name: str
    module: torch.fx.GraphModule
    products: torch.fx.GraphModule | None
    template: LinearOperator
    captured: Leaves
    product_captured: Leaves

    def operator(self, u: Leaves, lam: Leaves, theta: Leaves, batched: Sequence[bool]) -> LinearOperator:
        """H at a point, (B, m, m)."""
        batch = u[0].shape[0]
        point = (*u, *lam, *theta)
        dims = (*(0 for _ in (*u, *lam)), *(0 if flag else None for flag in batched))
        found = torch.func.vmap(self.module, in_dims=(*dims, *(None for _ in self.captured)))(
            *point, *self.captured
        )
        tensors = iter([tensor[:, 0] for tensor in found])

        def product(number: int) -> Callable[[Tensor], Tensor]:
            assert self.products is not None
            extra = self.product_captured
            sample = torch.func.vmap(self.products, in_dims=(*dims, 0, *(None for _ in extra)))

            def of(x: Tensor) -> Tensor:
                rows = x.reshape(-1, batch, x.shape[-1])
                images = torch.func.vmap(lambda row: sample(*point, row, *extra)[number])(rows)
                return images.reshape(x.shape)

            return of

        numbers = iter(range(len(list(_autodiff_terms(self.template)))))
        size = self.template.size

        def by_product(term: Autodiff) -> MatrixFree:
            return MatrixFree(product(next(numbers)), size, batch, u[0].dtype, u[0].device)

        return rebuilt(self.template, lambda _: next(tensors), by_product)


def rebuilt(
    operator: Any, tensor: Callable[[Tensor], Tensor], autodiff: Callable[[Autodiff], LinearOperator]
) -> Any:
    """The operator with each of its tensors, and each autodiff term, replaced; always visited in the same order."""
    if isinstance(operator, Autodiff):
        return autodiff(operator)
    if isinstance(operator, Tensor):
        return tensor(operator)
    if isinstance(operator, tuple):
        return tuple([rebuilt(item, tensor, autodiff) for item in operator])
    if not isinstance(operator, LinearOperator):
        return operator
    values = {f.name: getattr(operator, f.name) for f in dataclasses.fields(operator)}  # type: ignore[arg-type]
    return type(operator)(**{name: rebuilt(value, tensor, autodiff) for name, value in values.items()})


def declared_hessian(
    problem: Problem, trace: Trace, bound: Bound, variables: Sequence[Tensor]
) -> DeclaredHessian:
    """Record the hook.

    Args:
        problem: it declares `hessian`.
        trace: its trace.
        bound: its inputs.
        variables: one sample's leaves of u, of which shapes, dtypes and devices count.

    Raises:
        ProblemDefinitionError: the hook returns no operator of the size of u for one sample.
        TraceError: it cannot be traced.
    """
    name = f"{type(problem).__name__}.hessian"
    size = sum(leaf.numel() for leaf in variables)
    with LOCK, clean_context():
        plain = arguments_of(problem, variables, trace.variable_spec, bound)
        count, shapes = len(variables), () if trace.equality is None else trace.equality.output_shapes
        first = plain.facts[0]
        lam = tuple(
            Fact(f"multipliers[{k}]", tuple(s), first.dtype, first.device) for k, s in enumerate(shapes)
        )
        facts = (*plain.facts[:count], *lam, *plain.facts[count:])
        arguments = HookArguments(
            facts, count + len(lam), trace.variable_spec, bound, len(lam), trace.equality_spec
        )
        templates: list[LinearOperator] = []

        def check(found: Any) -> list[Tensor]:
            templates[:] = [_checked(name, found, size, first.dtype)]
            parts: list[Tensor] = []
            rebuilt(found, lambda t: parts.append(t) or t, lambda term: term)  # type: ignore[func-returns-value]
            return parts or [arguments.fakes()[0].new_zeros(1)]

        module, captured = _recorded(problem, name, arguments, bound, check)
        template = rebuilt(templates[0], _on_meta, lambda term: term)
        products: torch.fx.GraphModule | None = None
        product_captured: Leaves = ()
        if any(True for _ in _autodiff_terms(template)):
            vector = Fact("vector", (size,), first.dtype, first.device)
            wider = dataclasses.replace(arguments, facts=(*facts, vector))
            products, product_captured = _recorded(problem, name, wider, bound, list)
        return DeclaredHessian(name, module, products, _bare(template), captured, product_captured)


def _bare(template: Any) -> Any:
    """The template with autodiff terms that hold no tensors of the recorder."""

    def bare(term: Autodiff) -> Autodiff:
        return Autodiff(_nothing, torch.empty(term.size, dtype=term.dtype, device="meta"))

    return rebuilt(template, lambda tensor: tensor, bare)


def _nothing(u: Tensor) -> Tensor:
    return u.sum()


def _recorded(
    problem: Problem, name: str, arguments: HookArguments, bound: Bound, check: Callable[[Any], list[Tensor]]
) -> tuple[torch.fx.GraphModule, Leaves]:
    start = arguments.variables + len(bound.leaves)
    captured = Captured(list(enumerate(bound.tensors, start=start)))
    raw = record(problem, "hessian", arguments, check)
    lift_attributes(name, raw, captured)
    return finish(raw, len(arguments.facts), captured), tuple(captured.tensors)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")


def _checked(name: str, found: Any, size: int, dtype: torch.dtype) -> LinearOperator:
    if not isinstance(found, LinearOperator):
        raise ProblemDefinitionError(
            f"{name} returned {'a tensor' if isinstance(found, Tensor) else describe_value(found)}: return one of "
            "idf.operators, as idf.operators.Diagonal(d[None])"
        )
    if found.size != size or found.batch != 1 or found.dtype != dtype or not found.symmetric:
        raise ProblemDefinitionError(
            f"{name} returned a {found.kind} operator of size {found.size}, batch {found.batch}, {found.dtype}"
            f"{'' if found.symmetric else ', not symmetric'}; expected a symmetric one of size {size}, {dtype}, for "
            "one sample: its tensors have a leading batch axis of 1, as in idf.operators.Diagonal(d[None])"
        )
    if any(isinstance(term, MatrixFree) for term in _terms(found)):
        raise ProblemDefinitionError(
            f"{name} returned an operator known by a product: give idf.operators.Autodiff(function, u) for terms that "
            "are to be differentiated automatically"
        )
    return found


def _terms(operator: LinearOperator) -> Iterator[LinearOperator]:
    if isinstance(operator, Sum):
        for term in operator.terms:
            yield from _terms(term)
    else:
        yield operator

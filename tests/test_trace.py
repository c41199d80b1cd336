"""The graphs of declared functions: values and derivatives are the functions', on data not traced with."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import implicitdiff as idf
from implicitdiff.graph.trace import Trace, trace_problem, variable_example
from implicitdiff.inputs import bind
from tests.tracing import data, declare, targets, traced

X = data(5, 3)  # five samples of shape (3,)


COMPILED = torch.compile(lambda u: (u.sin() ** 2).sum(), backend="eager")


class GeometricMedian(idf.Problem):
    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(eps, dtype=torch.float64))

    def objective(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        squared = ((u[:, None] - x) ** 2).sum(0)
        return torch.sqrt(squared + self.eps).sum()

    def init(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def same_function(trace: Trace, function: Any, *leaves: torch.Tensor) -> None:
    """The graph has the values, gradients and Hessian of the function in every floating leaf."""
    got = trace.objective.module
    torch.testing.assert_close(got(*leaves), function(*leaves), rtol=1e-13, atol=1e-13)
    for position, leaf in enumerate(leaves):
        if leaf.is_floating_point():
            for transform in (torch.func.grad, torch.func.hessian):
                expected = transform(function, position)(*leaves)
                torch.testing.assert_close(
                    transform(got, position)(*leaves), expected, rtol=1e-12, atol=1e-12
                )


def test_graph_is_the_function_on_other_data() -> None:
    problem = GeometricMedian(0.25)
    trace = traced(problem, data(5, 3, 4))
    assert [(p.name, p.role, p.shape, p.batched) for p in trace.placeholders] == [
        ("u", "variable", (3,), True),
        ("x", "input", (3, 4), True),
        ("self.eps", "tensor", (), False),
    ]
    assert trace.equality is None
    assert trace.objective.output_shapes == ((),)

    def function(u: torch.Tensor, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(((u[:, None] - x) ** 2).sum(0) + eps).sum()

    same_function(
        trace, function, data(3, seed=1), data(3, 4, seed=2), torch.tensor(0.7, dtype=torch.float64)
    )


def test_roles_partition_the_placeholders_and_theta_follows_them() -> None:
    problem = GeometricMedian()
    bound = bind(problem, (data(5, 3, 4),))
    trace = trace_problem(problem, variable_example(problem, bound), bound)
    assert (*trace.variables, *trace.inputs, *trace.tensors) == trace.placeholders
    theta = trace.theta(bound)
    assert theta[0] is bound.leaves[0]
    assert theta[1] is problem.eps


def test_every_operation_names_the_users_line() -> None:
    trace = traced(GeometricMedian(), data(5, 3, 4))
    nodes = [node for node in trace.objective.module.graph.nodes if node.op == "call_function"]
    lines = {str(node.target): trace.objective.line(node) for node in nodes}
    assert lines["aten.sqrt.default"].startswith("test_trace.py:")
    assert lines["aten.sqrt.default"].endswith("return torch.sqrt(squared + self.eps).sum()")
    assert lines["aten.sub.Tensor"].endswith("squared = ((u[:, None] - x) ** 2).sum(0)")
    assert all(lines.values())


def test_line_of_a_helper_is_the_helpers_line() -> None:
    def helper(u: torch.Tensor) -> torch.Tensor:
        return u.tanh()

    trace = traced(declare(lambda u, x: torch.nn.functional.softplus(helper(u) - x).sum()), X)
    nodes = [node for node in trace.objective.module.graph.nodes if node.op == "call_function"]
    lines = {str(node.target): trace.objective.line(node) for node in nodes}
    assert lines["aten.tanh.default"].endswith("return u.tanh()")
    assert "softplus" in lines["aten.softplus.default"], "a line inside torch is not the user's"


class Tree(idf.Problem):
    """Pytrees of variables and inputs, constants inside, 0-dim tensors, several constraints."""

    def objective(self, u: Any, data: Any, scale: float, mode: str | None) -> torch.Tensor:
        assert mode is None
        q = u["rows"] @ data["Q"] @ u["rows"] + data["pair"][0] * u["level"] ** 2
        return scale * q + (data["index"] * u["rows"]).sum() + data["power"] * u["level"]

    def equality(self, u: Any, data: Any, scale: float, mode: str | None) -> Any:
        return {"sum": u["rows"].sum() - u["level"], "rows": (u["rows"] * data["pair"][1],)}

    def init(self, data: Any, scale: float, mode: str | None) -> Any:
        return {"rows": torch.zeros_like(data["pair"][1]), "level": torch.zeros_like(data["pair"][0])}


def test_pytrees_constants_and_integer_leaves() -> None:
    inputs = {
        "Q": data(3, 3), "pair": (data(5), data(5, 3)), "index": torch.arange(3), "power": 2,
    }  # fmt: skip
    in_dims = ({"Q": None, "pair": 0, "index": None, "power": None}, None, None)
    trace = traced(Tree(), inputs, 1.5, None, in_dims=in_dims)
    assert [p.name for p in trace.placeholders] == [
        "u['rows']", "u['level']", "data['Q']", "data['pair'][0]", "data['pair'][1]", "data['index']",
    ]  # fmt: skip
    assert [p.shape for p in trace.placeholders] == [(3,), (), (3, 3), (), (3,), (3,)]
    assert [p.batched for p in trace.placeholders] == [True, True, False, True, True, False]
    assert [value for _, value in trace.constants] == [2, 1.5, None]
    rows, level = data(3, seed=1), data(seed=2)
    leaves = (rows, level, data(3, 3, seed=3), data(seed=4), data(3, seed=5), torch.arange(3))
    one = {"Q": leaves[2], "pair": leaves[3:5], "index": leaves[5], "power": 2}
    torch.testing.assert_close(
        trace.objective.module(*leaves), Tree().objective({"rows": rows, "level": level}, one, 1.5, None)
    )
    assert trace.equality is not None
    assert trace.equality.output_shapes == ((), (3,))
    outputs = trace.equality.module(*leaves)
    torch.testing.assert_close(outputs[0], rows.sum() - level)
    torch.testing.assert_close(outputs[1], rows * leaves[4])


def test_operations_in_place_become_functional_and_keep_their_lines() -> None:
    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        t = torch.zeros_like(u)
        t[1:] = u[:-1] * x[1:]
        t.mul_(3).add_(u)
        return (t**3).sum()

    trace = traced(declare(objective), X)
    for node in trace.objective.module.graph.nodes:
        assert node.op != "call_function" or not node.target._schema.is_mutable
    same_function(trace, objective, data(3, seed=1), data(3, seed=2))
    lines = [
        trace.objective.line(node) for node in trace.objective.module.graph.nodes if "pow" in str(node.target)
    ]
    assert lines[0].endswith("return (t**3).sum()")


@pytest.mark.parametrize(
    "function",
    [
        lambda u, x: torch.func.grad(lambda w: (w**3 * x).sum())(u).square().sum(),
        lambda u, x: torch.func.vmap(lambda w, y: w.sin() * y)(u, x).prod(),
        lambda u, x: torch.func.jvp(torch.sin, (u,), (x,))[1].square().sum(),
        lambda u, x: torch.func.hessian(lambda w: (w**3).sum() * w[0])(u).square().sum() + x.sum(),
        lambda u, x: torch.einsum("i,ij,j->", u, torch.outer(x, x), u.exp()),
        lambda u, x: torch.stack([row * 2 for row in u]).square().sum() * x[0],
        lambda u, x: torch.logsumexp(u * x, 0) + torch.nn.functional.softplus(u).sum() + u.norm(),
        lambda u, x: torch.where(u > x, u**2, u.abs() * x).sum(),
        lambda u, x: torch.tensordot(torch.outer(u, x)[None], u.exp(), ([2], [0])).square().sum(),
        lambda u, x: (u * x).unsqueeze_(0).t_().squeeze_(1).transpose_(0, 0).exp().sum(),
        lambda u, x: torch.fft.rfft(u * x).abs().square().sum(),
        lambda u, x: COMPILED(u) * x.sum(),
    ],
)
def test_derivatives_agree_with_the_function(function: Any) -> None:
    trace = traced(declare(function), X)
    same_function(trace, function, data(3, seed=8), data(3, seed=9))
    assert "aten.detach.default" not in targets(trace), "nobody has stopped a gradient here"


@pytest.mark.parametrize(
    "write",
    [
        lambda t, u: t[0].zero_(),
        lambda t, u: t[0].fill_(3.0),
        lambda t, u: t.__setitem__(0, u[1] * u[2]),
        lambda t, u: t.__setitem__(slice(None), u[1]),
        lambda t, u: t.__setitem__(torch.tensor([0, 2]), u[:2] * u[1]),
        lambda t, u: t.__setitem__(u > 0, u[0]),
        lambda t, u: t[::2].mul_(u[:2]),
        lambda t, u: t.copy_(u.float()),
        lambda t, u: t.view(3, 1).t_().add_(u),
    ],
    ids=["zero", "fill", "entry", "broadcast", "indices", "mask", "strided", "copy", "view"],
)
def test_writes_have_the_derivatives_of_the_function(write: Any) -> None:
    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        t = u * x
        write(t, u)
        return (t**3).sum()

    trace = traced(declare(objective), X)
    u, x = data(3, seed=1).requires_grad_(), data(3, seed=2)

    def module(u: torch.Tensor) -> torch.Tensor:
        return trace.objective.module(u, x, *trace.captured)

    torch.testing.assert_close(module(u), objective(u, x))
    expected = torch.autograd.functional.hessian(lambda w: objective(w, x), u)
    torch.testing.assert_close(torch.func.hessian(module)(u.detach()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["no_grad", "set_grad_enabled", "detach", "decorator"])
def test_stopped_gradients_stay_stopped(how: str) -> None:
    @torch.no_grad()
    def frozen(u: torch.Tensor) -> torch.Tensor:
        return u.exp() * 2

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if how == "no_grad":
            with torch.no_grad():
                weight = u.exp() * 2
        elif how == "set_grad_enabled":
            with torch.set_grad_enabled(False):
                weight = u.exp() * 2
        else:
            weight = frozen(u) if how == "decorator" else (u.exp() * 2).detach()
        return (weight * (u - x) ** 2).sum()

    trace = traced(declare(objective), X)
    assert targets(trace).count("aten.detach.default") == 1
    u, x = data(3, seed=1), data(3, seed=2)
    # Reverse over reverse: forward mode walks through a no_grad of eager code.
    for transform in (torch.func.grad, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        expected = transform(objective)(u, x)
        torch.testing.assert_close(transform(trace.objective.module)(u, x), expected, rtol=1e-12, atol=1e-12)


def test_runs_on_any_strides() -> None:
    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        diagonal = torch.as_strided(x, (3,), (5,))
        return (x.reshape(-1)[:3] * u + x.flatten().sum() * u**2).sum() + (diagonal * u).sum()

    trace = traced(declare(objective, init=lambda x: x[:3, 0].clone()), data(2, 4, 4))
    x, u = data(4, 4, seed=3), data(3, seed=4)
    expected = objective(u, x)
    torch.testing.assert_close(trace.objective.module(u, x.T.contiguous().T), expected)
    torch.testing.assert_close(trace.objective.module(u, torch.stack([x, x], -1)[..., 1]), expected)


def test_modules_can_be_vmapped_and_copied() -> None:
    problem = GeometricMedian(0.5)
    trace = traced(problem, data(5, 3, 4))
    function = copy.deepcopy(trace.objective)
    u, x, eps = data(5, 3, seed=1), data(5, 3, 4, seed=2), torch.tensor(0.5, dtype=torch.float64)
    got = torch.func.vmap(function.module, in_dims=(0, 0, None))(u, x, eps)
    expected = torch.stack([problem.objective(u[i], x[i]) for i in range(5)])
    torch.testing.assert_close(got, expected.detach())
    nodes = [node for node in function.module.graph.nodes if node.op == "call_function"]
    assert all(function.line(node) for node in nodes)
    assert all(node.meta["val"].is_meta for node in nodes)


def test_literals_are_numbers_or_captured() -> None:
    trace = traced(declare(lambda u, x: ((u - x) ** 2 * torch.tensor(2.5)).sum()), X)
    assert trace.captured == ()
    assert targets(trace).count("aten.full.default") == 1
    torch.testing.assert_close(trace.objective.module(X[0], X[1]), 2.5 * ((X[0] - X[1]) ** 2).sum())
    trace = traced(declare(lambda u, x: ((u - x) ** 2 * torch.tensor([1.0, 2.0, 4.0])).sum()), X)
    assert [c.tolist() for c in trace.captured] == [[1.0, 2.0, 4.0]]
    assert trace.placeholders[-1].name == "captured[0]"


def test_captured_tensor_is_one_more_argument_and_follows_changes() -> None:
    weight, other = data(3, seed=7), data(3, seed=8)
    problem = declare(
        lambda u, x: (weight * (u - x) ** 2).sum(), lambda u, x: ((weight * u).sum(), (other * u).sum())
    )
    bound = bind(problem, (X,))
    trace = trace_problem(problem, variable_example(problem, bound), bound)
    assert trace.equality is not None
    assert trace.captured[0] is weight
    assert trace.captured[1] is other
    assert [p.role for p in trace.placeholders] == ["variable", "input", "tensor", "tensor"]
    weight.mul_(2)
    u, x = data(3, seed=1), data(3, seed=2)
    theta = trace.theta(bound)[1:]
    torch.testing.assert_close(trace.objective.module(u, x, *theta), (weight * (u - x) ** 2).sum())
    torch.testing.assert_close(trace.equality.module(u, x, *theta)[1], (other * u).sum())


@dataclasses.dataclass
class Settings:
    weight: torch.Tensor
    power: int = 2


class Nested(idf.Problem):
    """Tensors in every place that a Problem can hold one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()).double()
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
        self.parts = [data(3, seed=1), {"deep": (data(3, seed=2),)}]
        self.settings = Settings(data(3, seed=3))
        self.space = SimpleNamespace(shift=data(3, seed=4))
        self.tied = self.parts[0]
        self.again = self.value  # bound to the live module
        self.closure = lambda u: self.value(u)

    def value(self, u: torch.Tensor) -> torch.Tensor:
        return (u * self.scale * self.tied).sum()

    def objective(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rest = (u * self.parts[0] * self.parts[1]["deep"][0]).sum() + (u - self.space.shift).square().sum()
        weighted = (self.settings.weight * u**self.settings.power * x).sum()
        return self.net(u).sum() + rest + weighted + self.again(u) + self.closure(u)

    def init(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_every_tensor_of_the_problem_is_an_argument() -> None:
    problem = Nested()
    bound = bind(problem, (X,))
    trace = trace_problem(problem, variable_example(problem, bound), bound)
    assert [p.name for p in trace.tensors] == [
        "self.scale", "self.parts[0]", "self.parts[1]['deep'][0]", "self.settings.weight", "self.space.shift",
        "self.net.0.weight", "self.net.0.bias",
    ]  # fmt: skip
    assert trace.captured == ()
    fresh = [torch.randn_like(t) for t in bound.tensors]
    got = trace.objective.module(X[0], X[1], *fresh)
    with torch.no_grad():
        for tensor, value in zip(bound.tensors, fresh, strict=True):
            tensor.copy_(value)
    torch.testing.assert_close(got, problem.objective(X[0], X[1]))


class Counting(idf.Problem):
    """Writes onto itself while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.history: list[Any] = []
        self.weight = torch.nn.Parameter(data(3, seed=1))

    def objective(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.history.append(u)
        self.last = u
        return (self.weight * (u - x) ** 2).sum()

    def init(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.zeros_like(x)


def test_tracing_leaves_the_live_problem_alone() -> None:
    problem = Counting()
    before = {name: id(tensor) for name, tensor in problem.named_parameters()}
    traced(problem, X)
    assert problem.calls == 0
    assert problem.history == []
    assert not hasattr(problem, "last")
    assert {name: id(tensor) for name, tensor in problem.named_parameters()} == before
    assert isinstance(problem.weight, torch.nn.Parameter)

"""Tracing gives the same graph inside transforms, modes and threads of the caller, and leaves them alone."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import implicitdiff as idf
from implicitdiff.graph.trace import Trace
from tests.tracing import data, declare, traced

X = data(5, 3)


def code(trace: Trace) -> str:
    return str(trace.objective.module.code)


def trace_inside(context: str, problem: idf.Problem, x: torch.Tensor) -> Trace:
    """Trace while a transform or a mode of the caller is active."""
    found: list[Trace] = []

    def function(inner: torch.Tensor) -> torch.Tensor:
        found.append(traced(problem, inner))
        return inner.sum()

    if context == "vmap":
        torch.func.vmap(function)(torch.stack([x, x]))
    elif context == "grad":
        torch.func.grad(function)(x)
    elif context == "jvp":
        torch.func.jvp(function, (x,), (x,))
    elif context == "vmap of grad":
        torch.func.vmap(torch.func.grad(function))(torch.stack([x, x]))
    elif context == "dual numbers":
        with torch.autograd.forward_ad.dual_level():
            function(torch.autograd.forward_ad.make_dual(x, x))
    elif context == "fake mode":
        with FakeTensorMode() as mode:
            function(mode.from_tensor(x))
    elif context == "make_fx":
        outer = make_fx(function)(x)
        assert [n.op for n in outer.graph.nodes] == ["placeholder", "call_function", "output"]
    elif context == "inference mode":
        with torch.inference_mode():
            function(x)
    elif context == "no_grad":
        with torch.no_grad():
            function(x)
    elif context == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            function(x)
    return found[0]


CONTEXTS = [
    "vmap", "grad", "jvp", "vmap of grad", "dual numbers", "fake mode", "make_fx", "inference mode",
    "no_grad", "autocast",
]  # fmt: skip


@pytest.mark.parametrize("context", CONTEXTS)
def test_same_graph_wherever_it_is_traced(context: str) -> None:
    problem = declare(lambda u, x: (torch.outer(u, x) @ u.tanh()).sum(), lambda u, x: u.sum() - x[0])
    assert code(trace_inside(context, problem, X)) == code(traced(problem, X))


class Weighted(idf.Problem):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(data(3))

    def objective(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * (u - x).tanh() ** 2).sum()

    def init(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def test_threads_do_not_disturb_each_other() -> None:
    problem = Weighted()
    expected = code(traced(problem, X))
    codes: list[str] = []

    def work() -> None:
        for _ in range(5):
            codes.append(code(traced(problem, X)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [expected] * 20
    assert isinstance(problem.weight, torch.nn.Parameter)


def test_meta_inputs_give_the_same_graph() -> None:
    weight = data(3)

    def objective(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (
            (weight * (u - x) ** 2).sum() + torch.tensor(2.0) * u.exp().sum() + u @ torch.eye(3).double() @ u
        )

    problem = declare(objective)
    assert code(traced(problem, X.to("meta"))) == code(traced(problem, X))

"""What cannot be traced faithfully is a named error with the user's line; what a hook returns is checked."""

import random
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import implicitdiff as idf
from tests.tracing import data, declare, traced

X = data(5, 3)


def branch(u, x):
    return u.sum() if u.sum() > 0 else -u.sum()  # the line


def loop(u, x):
    while u.sum() > 1:  # the line
        u = u / 2
    return u.sum()


def as_float(u, x):
    return u.sum() * float(x[0])  # the line


def item(u, x):
    return u.sum() * x.sum().item()  # the line


def tolist(u, x):
    return u.sum() * sum(u.tolist())  # the line


def python_max(u, x):
    return max(u[0], u[1]) + x.sum()  # the line


def assertion(u, x):
    assert torch.isfinite(u).all()  # the line
    return u.sum()


def argmax_index(u, x):
    return u[int(u.argmax())]  # the line


def equal(u, x):
    return u.sum() if torch.equal(u, x) else x.sum()  # the line


def allclose(u, x):
    return u.sum() if torch.allclose(u, x) else x.sum()  # the line


def formatted(u, x):
    return u.sum() * len(f"{u.sum():.3f}")  # the line


def mask(u, x):
    return u[u > 0].sum()  # the line


def nonzero(u, x):
    return u[x.nonzero()[:, 0]].sum()  # the line


def unique(u, x):
    return u.sum() + torch.unique(x).sum()  # the line


VALUES = [
    branch, loop, as_float, item, tolist, python_max, assertion, argmax_index, equal, allclose, formatted,
]  # fmt: skip


def at_the_line(message: str) -> bool:
    return re.search(r"at test_trace_errors.py:\d+: .*# the line", message) is not None


@pytest.mark.parametrize("function", VALUES)
def test_reading_a_value_is_a_control_flow_error(function: Any) -> None:
    with pytest.raises(idf.ControlFlowError, match="reads the value of a tensor in Python") as caught:
        traced(declare(function), X)
    assert at_the_line(str(caught.value))
    assert "torch.where" in str(caught.value)


@pytest.mark.parametrize("function", [mask, nonzero, unique])
def test_shapes_that_depend_on_values_are_control_flow_errors(function: Any) -> None:
    with pytest.raises(idf.ControlFlowError, match="shape depends on values") as caught:
        traced(declare(function), X)
    assert at_the_line(str(caught.value))


def test_control_flow_operators_are_refused() -> None:
    def conditional(u, x):
        return torch.cond(u.sum() > 0, lambda a: a.sum(), lambda a: a.square().sum(), (u,))  # the line

    with pytest.raises(idf.ControlFlowError, match=r"control flow operator \(cond\)") as caught:
        traced(declare(conditional), X)
    assert at_the_line(str(caught.value))


def test_values_of_attributes_and_captured_tensors_are_not_baked_in_either() -> None:
    class Reads(idf.Problem):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.tensor(2.0)

        def objective(self, u, x):
            return u.sum() * float(self.scale)

        def init(self, x):
            return x.clone()

    with pytest.raises(idf.ControlFlowError, match=r"float\(self\.scale\)"):
        traced(Reads(), X)
    scale = torch.tensor(2.0)
    with pytest.raises(idf.ControlFlowError, match=r"float\(scale\)"):
        traced(declare(lambda u, x: u.sum() * float(scale)), X)
    # A number in the source is one, however it is wrapped.
    traced(declare(lambda u, x: (u - x).square().sum() * torch.tensor(2.0).item()), X)


def to_numpy(u, x):
    return u.sum() * u.detach().numpy().sum()  # the line


def numpy_function(u, x):
    return torch.as_tensor(np.sin(u)).sum()  # the line


def tensor_of_tensors(u, x):
    return torch.tensor([u[0], u[1]]).sum()  # the line


@pytest.mark.parametrize("function", [to_numpy, numpy_function, tensor_of_tensors])
def test_taking_the_data_out_is_a_trace_error(function: Any) -> None:
    with pytest.raises(idf.TraceError, match="takes the data out of a tensor") as caught:
        traced(declare(function), X)
    assert at_the_line(str(caught.value))
    assert caught.value.__cause__ is not None


GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize(
    "function",
    [
        lambda u, x: (u * torch.rand(3)).sum(),
        lambda u, x: (u + torch.randn_like(u)).sum(),
        lambda u, x: torch.nn.functional.dropout(u).sum(),
        lambda u, x: u[torch.randperm(3)][0],
        lambda u, x: (u * torch.bernoulli(torch.full((3,), 0.5))).sum(),
        lambda u, x: (u * torch.empty(3).uniform_()).sum(),
        lambda u, x: u.sum() * random.random(),
        lambda u, x: u.sum() if random.random() < 0.5 else u.square().sum(),
        lambda u, x: u.sum() * np.random.rand(),
        lambda u, x: (u * torch.as_tensor(np.random.rand(3))).sum(),
        lambda u, x: (u * torch.as_tensor(GENERATOR.random(3))).sum(),
        lambda u, x: u.sum() * GENERATOR.random(),
        lambda u, x: u.sum() * time.perf_counter_ns(),
    ],
)
def test_randomness_is_an_error(function: Any) -> None:
    with pytest.raises(idf.RandomnessError, match="pass the result as an input"):
        traced(declare(function), X)


class Dropping(idf.Problem):
    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def objective(self, u, x):
        return (self.drop(u) - x).square().sum()

    def init(self, x):
        return torch.rand_like(x)  # a random start is no random function


def test_dropout_is_refused_in_training_only() -> None:
    problem = Dropping()
    with pytest.raises(idf.RandomnessError, match=r"self\.drop\(u\)"):
        traced(problem, X)
    traced(problem.eval(), X)


def test_attention_without_dropout_is_not_random() -> None:
    def objective(u, x):
        return torch.nn.functional.scaled_dot_product_attention(
            u[None, None], x[None, None], x[None, None]
        ).sum()

    traced(declare(objective), data(2, 4, 3))


def test_captured_tensor_that_requires_grad() -> None:
    weight = torch.nn.Parameter(data(3))
    with pytest.raises(
        idf.CapturedTensorError, match=r"shape \(3,\) that requires grad at .*weight \* u"
    ) as caught:
        traced(declare(lambda u, x: (weight * u).sum()), X)
    assert "attribute" in str(caught.value)
    with pytest.raises(idf.CapturedTensorError, match=r"Declared\.equality"):
        traced(declare(lambda u, x: (u - x).square().sum(), lambda u, x: (weight * u).sum()), X)
    traced(declare(lambda u, x: (weight.detach() * u).sum()), X)


def test_captured_tensor_of_a_surrounding_transform() -> None:
    def outer(w: torch.Tensor) -> torch.Tensor:
        traced(declare(lambda u, x: (w * (u - x) ** 2).sum()), X)
        return w.sum()

    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(idf.CapturedTensorError, match="neither an input nor reachable"):
            transform(outer)(data(3))


class Writing(idf.Problem):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3, dtype=torch.float64))

    def objective(self, u, x):
        self.total.add_(x)
        return ((u - self.total) ** 2).sum()

    def init(self, x):
        return x.clone()


def test_lasting_writes_are_refused() -> None:
    def into_input(u, x):
        x[0] = 1.0
        return (u - x).square().sum()

    with pytest.raises(idf.TraceError, match=r"changes x in place at .*x\[0\] = 1.0"):
        traced(declare(into_input), X)
    with pytest.raises(idf.TraceError, match=r"changes u in place at .*add_"):
        traced(declare(lambda u, x: u.add_(x).square().sum()), X)
    problem = Writing()
    with pytest.raises(idf.TraceError, match=r"changes self\.total in place at .*self\.total\.add_\(x\)"):
        traced(problem, X)
    assert not problem.total.any()
    outside = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(idf.TraceError, match="changes a captured tensor in place"):
        traced(declare(lambda u, x: (u - outside.add_(1)).square().sum()), X)
    assert not outside.any()


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return u * 1.0

    @staticmethod
    def backward(ctx, v):
        return 2 * v


def test_a_backward_of_the_users_own_is_refused_rather_than_ignored() -> None:
    with pytest.raises(idf.TraceError, match=r"autograd\.Function Doubling at "):
        traced(declare(lambda u, x: Doubling.apply(u).square().sum()), X)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda u, x: None, r"objective returned None \(is the return statement missing\?\)"),
        (lambda u, x: 1.5, "objective returned the float 1.5"),
        (lambda u, x: (u.sum(),), "objective returned an object of type tuple"),
        (lambda u, x: u[:1] ** 2, r"shape \(1,\), but the objective of one sample is a scalar.*squeeze"),
        (lambda u, x: u**2, r"shape \(3,\).*\.sum\(\)"),
        (lambda u, x: (u > 0).sum(), "dtype torch.int64"),
        (lambda u, x: torch.complex(u, x).sum(), "dtype torch.complex128"),
        (lambda u, x: x.sum(), "objective does not depend on u"),
        (lambda u, x: u.detach().sum() + x.sum(), "objective does not depend on u"),
        (lambda u, x: (u > 0).sum().double(), "objective does not depend on u"),
        (lambda u, x: torch.zeros((), dtype=u.dtype), "objective does not depend on u"),
        (lambda u, x: (u @ x[:2]).sum(), r"raised RuntimeError at .*u @ x\[:2\].*u \(3,\), x \(3,\)"),
        (lambda u, x: u.nothing, "raised AttributeError"),
        (lambda u, x: {}["key"], "raised KeyError"),
    ],
)
def test_wrong_objectives(function: Any, message: str) -> None:
    with pytest.raises(idf.ProblemDefinitionError, match=message):
        traced(declare(function), X)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda u, x: None, "equality returned None"),
        (lambda u, x: 0.0, "equality returned the float 0.0"),
        (lambda u, x: (), "holds no tensors"),
        (lambda u, x: (u.sum(), None), r"equality returned None for output\[1\]"),
        (lambda u, x: {"a": u.sum(), "b": 1}, r"the int 1 for output\['b'\]"),
        (lambda u, x: (u > 0).sum(), "dtype torch.int64"),
        (lambda u, x: x.sum() - 1, "equality does not depend on u"),
        (lambda u, x: (u.sum(), x.sum()), r"equality \(output 1\) does not depend on u"),
    ],
)
def test_wrong_constraints(function: Any, message: str) -> None:
    with pytest.raises(idf.ProblemDefinitionError, match=message):
        traced(declare(lambda u, x: (u - x).square().sum(), function), X)


def test_constraints_without_entries_are_none() -> None:
    trace = traced(declare(lambda u, x: (u - x).square().sum(), lambda u, x: u[:0]), X)
    assert trace.equality is None
    assert trace.equality_spec is None


def test_an_unused_variable_is_named() -> None:
    problem = declare(
        lambda u, x: (u["a"] - x).square().sum(), init=lambda x: {"a": x.clone(), "b": x[0].clone()}
    )
    with pytest.raises(idf.ProblemDefinitionError, match=r"depends on the variable u\['b'\]"):
        traced(problem, X)


def test_the_users_exception_is_the_cause() -> None:
    def objective(u, x):
        raise KeyError("mine")

    with pytest.raises(
        idf.ProblemDefinitionError, match=r"raised KeyError at .*raise KeyError\(.mine.\)"
    ) as caught:
        traced(declare(objective), X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_devices_are_named() -> None:
    class OnAnotherDevice(idf.Problem):
        def __init__(self) -> None:
            super().__init__()
            with FakeTensorMode():
                self.weight = torch.ones(3, device="cuda")

        def objective(self, u, x):
            return (self.weight * (u - x) ** 2).sum()

        def init(self, x):
            return x.clone()

    with pytest.raises(idf.InputError, match=r"\(x\) are on cpu, .*self\.weight on cuda:0: move"):
        traced(OnAnotherDevice(), X)


def test_devices_of_integer_inputs_are_named() -> None:
    with FakeTensorMode():
        power = torch.ones(5, 3, device="cuda", dtype=torch.int64)
    problem = declare(lambda u, x, power: (power * (u - x) ** 2).sum(), init=lambda x, power: x.clone())
    with pytest.raises(idf.InputError, match=r"mixes devices .*x cpu, power cuda:0"):
        traced(problem, X, power)

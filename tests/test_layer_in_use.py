"""The layer in use: precision, autograd.functional, checkpoints, copies, caches, threads."""

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call, grad, vmap

import implicitdiff as idf
from implicitdiff import plan as plans
from implicitdiff.layer import DeclarativeLayer
from tests.small_problems import BY_NAME, GeometricMedian, Quartic, Sphere, draw


def test_autocast_casts_to_float32_and_back() -> None:
    x = draw(3, 2, 5, seed=1).detach()
    layer = DeclarativeLayer(GeometricMedian().float())
    exact = layer(x.float())
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            u = layer(leaf)
            (u.float() ** 2).sum().backward()
        assert u.dtype == dtype
        assert leaf.grad.dtype == dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(u.float(), exact, rtol=tolerance, atol=tolerance)
    solution = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = layer.solve(x.to(torch.bfloat16), init=exact.to(torch.bfloat16).detach())
    assert solution.value.dtype == solution.u.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outside_of_autocast_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(idf.InputError, match="autocast"):
        DeclarativeLayer(Sphere())(torch.ones(2, 3, dtype=dtype))


def test_integer_inputs_are_constants() -> None:
    class Classes(idf.Problem):
        def objective(self, u, x, labels):
            return torch.nn.functional.cross_entropy(x @ u, labels) + (u * u).sum() / 2

        def init(self, x, labels):
            return torch.zeros(x.shape[1], 3, dtype=x.dtype)

    x, labels = draw(2, 6, 2, seed=3), torch.tensor([[0, 1, 2, 0, 1, 1], [2, 2, 0, 1, 0, 2]])
    layer = DeclarativeLayer(Classes())
    assert gradcheck(lambda x: layer(x, labels), (x,), check_forward_ad=True, fast_mode=True)
    one = DeclarativeLayer(Classes(), in_dims=None)
    found = vmap(grad(lambda x, labels: (one(x, labels) ** 2).sum()))(x.detach(), labels)
    torch.testing.assert_close(found, torch.autograd.grad((layer(x, labels) ** 2).sum(), x)[0])


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_the_vectorised_transforms_of_autograd_functional(strategy: str) -> None:
    """They batch cotangents and tangents by an older vmap than torch.func's."""
    layer, x = DeclarativeLayer(Sphere()), draw(2, 3, seed=1, shift=0.3)
    one_by_one = torch.autograd.functional.jacobian(layer, x)
    vectorised = torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy=strategy)
    torch.testing.assert_close(vectorised, one_by_one)

    def scalar(x: Tensor) -> Tensor:
        return (layer(x) ** 3).sum()

    curved = torch.autograd.functional.hessian(scalar, x, vectorize=True, outer_jacobian_strategy=strategy)
    torch.testing.assert_close(curved, torch.autograd.functional.hessian(scalar, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    layer, x = DeclarativeLayer(GeometricMedian()), draw(2, 2, 4, seed=1)
    loss = torch.utils.checkpoint.checkpoint(lambda x: layer(x).square().sum(), x, use_reentrant=reentrant)
    found = torch.autograd.grad(loss, layer.problem.eps)[0] if not reentrant else None
    if reentrant:
        loss.backward()
        found = layer.problem.eps.grad
    expected = torch.autograd.grad(layer(x).square().sum(), layer.problem.eps)[0]
    torch.testing.assert_close(found, expected)


def test_the_graph_holds_its_inputs_through_saved_tensors_alone() -> None:
    """With hooks that replace what is saved by something else, nothing else keeps the input alive."""
    layer = DeclarativeLayer(GeometricMedian())

    def run() -> tuple[Tensor, weakref.ref[Tensor]]:
        x = draw(2, 2, 4, seed=1) * 1.0
        return layer(x), weakref.ref(x)

    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach().numpy().copy(), torch.from_numpy
    ):
        u, inner = run()
    gc.collect()
    assert inner() is None
    u.square().sum().backward()
    assert layer.problem.eps.grad is not None


def test_inference_mode() -> None:
    x = draw(2, 3, seed=1).detach()
    with torch.inference_mode():
        u = DeclarativeLayer(Sphere())(x)
    torch.testing.assert_close(u.clone(), DeclarativeLayer(Sphere())(x))


def test_float32() -> None:
    x = draw(3, 2, 5, seed=1)
    single = x.detach().float().requires_grad_()
    layer = DeclarativeLayer(GeometricMedian())
    expected = torch.autograd.grad((layer(x) ** 2).sum(), x)[0]
    layer.float()
    u = layer(single)
    assert u.dtype == torch.float32
    found = torch.autograd.grad((u**2).sum(), single)[0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


# Copies, threads, caches


def test_deepcopy_pickle_and_state_dict() -> None:
    layer = DeclarativeLayer(GeometricMedian(), on_failure="warn")
    x = draw(2, 2, 4, seed=1)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
    for twin in copies:
        assert twin.options == layer.options
        assert twin.problem is not layer.problem
        torch.testing.assert_close(torch.autograd.grad(twin(x).sum(), x)[0], expected)
    assert list(layer.state_dict()) == ["problem.eps"]
    with torch.no_grad():
        copies[0].problem.eps.mul_(4)
    assert not torch.allclose(copies[0](x), layer(x))


def test_plans_are_made_once_and_die_with_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = plans._build
    monkeypatch.setattr(plans, "_build", lambda *args, **options: made.append(1) or build(*args, **options))
    problem = GeometricMedian()
    layer = DeclarativeLayer(problem)
    for batch in (2, 2, 5, 1):
        layer(draw(batch, 2, 4, seed=batch)).sum().backward()
    assert len(made) == 1, "the batch size is no part of the signature"
    layer(draw(2, 3, 4, seed=1))
    assert len(made) == 2, "shapes are"
    layer(draw(2, 3, 4, seed=1).detach())
    assert len(made) == 3, "and so is what needs a gradient"
    gone = weakref.ref(problem)
    del problem, layer
    gc.collect()
    assert gone() is None


class Switch(idf.Problem):
    """Python attributes, a buffer and the training flag all count."""

    def __init__(self) -> None:
        super().__init__()
        self.power = 1.0
        self.register_buffer("shift", torch.tensor(0.0, dtype=torch.float64))

    def objective(self, u, x):
        target = x * self.power + self.shift + (1.0 if self.training else 0.0)
        return ((u - target) ** 2).sum()

    def init(self, x):
        return torch.zeros_like(x)


def test_changes_of_the_problem_between_calls_are_seen() -> None:
    layer = DeclarativeLayer(Switch())
    x = draw(2, 3, seed=1)

    def run() -> tuple[Tensor, Tensor]:
        u = layer(x)
        return u.detach(), torch.autograd.grad(u.sum(), x)[0]

    one = torch.ones_like(x)
    for change, expected, slope in (
        (lambda: None, x + 1, one),
        (lambda: setattr(layer.problem, "power", 3.0), 3 * x + 1, 3 * one),
        (lambda: layer.problem.shift.fill_(2.0), 3 * x + 3, 3 * one),
        (layer.eval, 3 * x + 2, 3 * one),
        (
            lambda: layer.problem.register_buffer("shift", torch.tensor(5.0, dtype=torch.float64)),
            3 * x + 5,
            3 * one,
        ),
    ):
        change()
        u, found = run()
        torch.testing.assert_close(u, expected.detach())
        torch.testing.assert_close(found, slope)


def test_threads_share_a_layer() -> None:
    layer = DeclarativeLayer(Quartic(), in_dims=(0, None))
    draws = [BY_NAME["quartic"].inputs(2, seed) for seed in range(4)]
    expected = [torch.autograd.grad((layer(*inputs) ** 2).sum(), inputs) for inputs in draws]
    own = {name: value.detach() for name, value in layer.named_parameters()}
    wrong: list[Any] = []

    def work(index: int) -> None:
        x, a = (tensor.detach() for tensor in draws[index])
        for _ in range(5):
            plain = torch.autograd.grad((layer(*draws[index]) ** 2).sum(), draws[index])
            func = grad(lambda x, a: (layer(x, a) ** 2).sum(), (0, 1))(x, a)
            for result in (plain, func):
                if not all(torch.allclose(f, e) for f, e in zip(result, expected[index], strict=True)):
                    wrong.append((index, result))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    torch.testing.assert_close(functional_call(layer, own, draws[0]), layer(*draws[0]))


def test_a_solve_that_returns_its_input_or_a_view() -> None:
    class Identity(idf.Problem):
        def objective(self, u, x):
            return ((u - x[0]) ** 2).sum()

        def solve(self, x):
            return x[:, 0]

    class Same(Identity):
        def objective(self, u, x):
            return ((u - x) ** 2).sum()

        def solve(self, x):
            return x

    x = draw(2, 3, 4, seed=1)
    for problem, expected in ((Identity(), x[:, 0]), (Same(), x)):
        u = DeclarativeLayer(problem)(x)
        torch.testing.assert_close(u, expected)
        weight = draw(*u.shape, seed=2).detach()
        found = torch.autograd.grad((u * weight).sum(), x)[0]
        torch.testing.assert_close(found, torch.autograd.grad((expected * weight).sum(), x)[0])
        u.add_(1.0)  # an output may be changed in place without changing the input
        assert not torch.equal(u.detach(), expected.detach())


def test_a_problem_without_init_under_transforms_and_with_a_fresh_cache() -> None:
    class NoInit(Sphere):
        init = idf.Problem.init

    x = draw(4, 2, 3, seed=1, shift=0.3).detach()
    expected = vmap(grad(lambda x: (DeclarativeLayer(Sphere())(x) ** 3).sum()))(x)
    torch.testing.assert_close(vmap(grad(lambda x: (DeclarativeLayer(NoInit())(x) ** 3).sum()))(x), expected)


def test_no_grad_records_nothing() -> None:
    with torch.no_grad():
        assert not DeclarativeLayer(GeometricMedian())(draw(2, 2, 4, seed=1)).requires_grad

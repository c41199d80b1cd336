"""The layer's door: shapes, options, warm starts, precision, copies, threads and caches."""

import copy
import gc
import inspect
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
from implicitdiff.layer import DeclarativeLayer, solve
from implicitdiff.optimizers import Newton
from implicitdiff.status import Status
from tests.oracles import dense_vjp, relative_error
from tests.small_problems import (
    BY_NAME,
    GeometricMedian,
    Point,
    Portfolio,
    Quartic,
    Small,
    Sphere,
    Torch,
    Tree,
    draw,
)


def reference(small: Small, layer: DeclarativeLayer, inputs: tuple[Any, ...], u: Tensor) -> list[Tensor]:
    """The gradient of sum(u^2) by the dense formula."""
    return dense_vjp(layer.problem, u.detach(), 2 * u.detach(), inputs, small.in_dims).leaves()


# The contract's first examples


def test_geometric_median_of_the_contract() -> None:
    layer = DeclarativeLayer(GeometricMedian(), in_dims=0)
    x = draw(3, 2, 5, seed=1)
    u = layer(x)
    assert u.shape == (3, 2)
    u.square().sum().backward()
    expected = reference(BY_NAME["median"], layer, (x,), u)
    assert relative_error(x.grad, expected[0]) < 1e-10
    assert relative_error(layer.problem.eps.grad, expected[1]) < 1e-10
    again = layer.solve(x, init=u)
    torch.testing.assert_close(again.u, u)
    assert (again.iterations <= 1).all()
    assert again.status.dtype == torch.int8
    assert (again.status == Status.OK).all()
    assert again.equality_multipliers is None
    assert again.inequality_multipliers is None


def test_portfolio_of_the_contract_in_closed_form() -> None:
    Q, mu = BY_NAME["portfolio"].inputs(3, 1)
    solution = solve(Portfolio(), Q, mu, in_dims=(None, 0))
    inverse = torch.linalg.inv(Q.detach())
    one = torch.ones(4, dtype=torch.float64)
    # Q u - mu = lambda 1 with 1'u = 1, and lambda'A = D_u f
    lam = (1 - mu.detach() @ inverse @ one) / (one @ inverse @ one)
    expected = (mu.detach() + lam[:, None]) @ inverse
    torch.testing.assert_close(solution.u.detach(), expected)
    torch.testing.assert_close(solution.equality_multipliers.detach(), lam)
    value = 0.5 * torch.einsum("bi,ij,bj->b", expected, Q.detach(), expected) - (mu.detach() * expected).sum(
        1
    )
    torch.testing.assert_close(solution.value.detach(), value)
    # The envelope theorem: the value moves with mu by -u.
    torch.testing.assert_close(torch.autograd.grad(solution.value.sum(), mu, retain_graph=True)[0], -expected)
    # The multiplier is the price of the constraint: d lambda / d mu = -Q^-1 1 / (1'Q^-1 1).
    slope = torch.autograd.grad(solution.equality_multipliers.sum(), mu)[0]
    torch.testing.assert_close(slope, (-inverse @ one / (one @ inverse @ one)).expand(3, 4))


# Shapes


def test_one_sample_has_no_batch_axis() -> None:
    x = draw(2, 5, seed=1)
    layer = DeclarativeLayer(GeometricMedian(), in_dims=None)
    solution = layer.solve(x)
    assert solution.u.shape == (2,)
    assert (
        solution.value.shape
        == solution.status.shape
        == solution.iterations.shape
        == solution.residual.shape
        == ()
    )
    batched = DeclarativeLayer(GeometricMedian())(x[None])
    torch.testing.assert_close(solution.u, batched[0])
    torch.testing.assert_close(layer(x, init=solution.u), solution.u)
    gradient = torch.autograd.grad(solution.u.sum(), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(batched.sum(), x)[0])


def test_batch_axis_elsewhere() -> None:
    x = draw(2, 3, 5, seed=1)
    u = DeclarativeLayer(GeometricMedian(), in_dims=1)(x)
    torch.testing.assert_close(u, DeclarativeLayer(GeometricMedian())(x.movedim(1, 0)))
    gradient = torch.autograd.grad(u[2].sum(), x)[0]
    assert gradient.shape == x.shape
    assert (gradient[:, :2] == 0).all()
    assert (gradient[:, 2] != 0).any()


def test_pytrees_and_tensors_without_axes() -> None:
    inputs = BY_NAME["tree"].inputs(2, 1)
    solution = DeclarativeLayer(Tree()).solve(*inputs)
    assert {name: tuple(leaf.shape) for name, leaf in solution.u.items()} == {"a": (2, 3), "t": (2,)}
    assert [tuple(leaf.shape) for leaf in solution.equality_multipliers] == [(2,), (2, 1)]
    assert DeclarativeLayer(Point())(draw(4, seed=1)).shape == (4,)
    assert DeclarativeLayer(Point(), in_dims=None)(draw(seed=1)).shape == ()


def test_in_dims_of_a_pytree_of_inputs() -> None:
    """p batched, s shared: the gradient of s is the sum over the batch."""
    (x, scale) = BY_NAME["tree"].inputs(2, 1)
    shared = {"p": x["p"], "s": x["s"][0].detach().requires_grad_()}
    layer = DeclarativeLayer(Tree(), in_dims=({"p": 0, "s": None}, None))
    u = layer(shared, scale)
    expanded = {"p": x["p"], "s": shared["s"].detach().expand(2).clone().requires_grad_()}
    other = DeclarativeLayer(Tree())(expanded, scale)
    torch.testing.assert_close(u["a"], other["a"])
    found = torch.autograd.grad((u["a"] ** 2).sum(), shared["s"])[0]
    torch.testing.assert_close(found, torch.autograd.grad((other["a"] ** 2).sum(), expanded["s"])[0].sum())


@pytest.mark.parametrize("backward", ["auto", "dense", "matrix-free", "approximate", "unrolled"])
def test_an_empty_batch_has_an_empty_solution_and_zero_gradients(backward: str) -> None:
    layer = DeclarativeLayer(Quartic(), in_dims=(0, None), backward=backward)
    x, a = draw(0, 3, seed=1), draw(3, seed=2)
    solution = layer.solve(x, a)
    assert solution.u.shape == (0, 3)
    assert solution.equality_multipliers["plane"].shape == (0,)
    assert solution.value.shape == solution.status.shape == (0,)
    found = torch.autograd.grad(
        solution.u.sum() + solution.value.sum(), (x, a, layer.problem.theta), allow_unused=True
    )
    assert found[0].shape == (0, 3)
    assert torch.equal(found[1], torch.zeros(3, dtype=torch.float64))
    assert found[2] == 0


# Options at the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward": "adjoint"}, "auto, dense, matrix-free, unrolled, hand, approximate"),
        ({"linear_solver": "magic"}, "woodbury"),
        ({"on_failure": "ignore"}, "raise, warn, nan, zero, damp"),
        ({"optimality_tol": -1.0}, "optimality_tol"),
        ({"optimizer": "newton"}, "Newton"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(idf.OptionError, match=message):
        DeclarativeLayer(Sphere(), **options)
    with pytest.raises(idf.OptionError, match=message):
        solve(Sphere(), draw(2, 3, seed=1), **options)


def test_things_that_are_not_problems_or_not_yet_possible() -> None:
    for thing in (torch.nn.Linear(2, 2), Sphere, None):
        with pytest.raises(idf.ProblemDefinitionError):
            DeclarativeLayer(thing)
    with pytest.raises(idf.ProblemDefinitionError, match="vjp"):
        DeclarativeLayer(Sphere(), backward="hand")
    with pytest.raises(idf.NotSupportedYetError, match="compile"):
        DeclarativeLayer(Sphere(), compile=True)
    with pytest.raises(idf.NotSupportedYetError, match="compile"):
        solve(Sphere(), draw(2, 3, seed=1), compile=True)


def test_the_function_takes_the_layer_s_options_and_no_others() -> None:
    names = set(inspect.signature(DeclarativeLayer).parameters) - {"problem"}
    assert names == set(inspect.signature(solve).parameters) - {"problem", "inputs", "init"}
    for callable_ in (DeclarativeLayer, solve):
        kinds = {parameter.kind for parameter in inspect.signature(callable_).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_compile_method_of_modules_is_left_alone() -> None:
    assert callable(DeclarativeLayer(Sphere()).compile)


def test_repr_names_the_options_that_were_set() -> None:
    text = repr(DeclarativeLayer(Sphere(), in_dims=None, backward="dense"))
    assert "in_dims=None" in text
    assert "backward='dense'" in text
    assert "on_failure" not in text


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_optimality_tol_and_optimizer_reach_the_forward(tol: float | None) -> None:
    class Rough(Torch):
        def solve(self, x):
            return 1.001 * Torch.solve(self, x)

    x = draw(2, 3, seed=1, scale=0.5)
    layer = DeclarativeLayer(Rough(), optimality_tol=tol)
    if tol is None:
        with pytest.raises(idf.NotOptimalError, match="of 2"):
            layer(x)
    else:
        assert (layer.solve(x).status == Status.OK).all()
    exact = DeclarativeLayer(Rough(), optimizer=Newton()).solve(x)
    torch.testing.assert_close(exact.u**3 + exact.u, x)


@pytest.mark.parametrize("init", [torch.zeros(2, 4, dtype=torch.float64), {"u": torch.zeros(2, 3)}, "zeros"])
def test_a_warm_start_of_the_wrong_kind(init: Any) -> None:
    with pytest.raises(idf.SolutionError):
        DeclarativeLayer(Quartic(), in_dims=(0, None))(*BY_NAME["quartic"].inputs(2, 1), init=init)


def test_a_warm_start_under_vmap_and_grad() -> None:
    x, a = (tensor.detach() for tensor in BY_NAME["quartic"].inputs(2, 1))
    layer = DeclarativeLayer(Quartic(), in_dims=(0, None))
    wide = torch.stack([x, x + 0.1, x - 0.1])
    start = vmap(lambda x: layer(x, a))(wide)
    again = vmap(lambda x, s: layer.solve(x, a, init=s).iterations)(wide, start)
    assert (again <= 1).all()
    found = vmap(lambda x, s: grad(lambda x: layer(x, a, init=s).sum())(x))(wide, start)
    torch.testing.assert_close(found[1], grad(lambda x: layer(x, a).sum())(wide[1]))
    # A start is no input: it has no gradient.
    leaf = start[0].clone().requires_grad_()
    assert not layer.requires_grad_(False)(x, a, init=leaf).requires_grad


# Precision


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
    monkeypatch.setattr(plans, "_build", lambda *args: made.append(1) or build(*args))
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

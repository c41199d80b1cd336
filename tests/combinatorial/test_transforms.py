"""The layer under torch.func, in every dtype and batch shape, and among PyTorch's other tools."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import implicitdiff.combinatorial as co
from implicitdiff import NotSupportedYetError

SOLVERS = {"assignment": (co.Assignment(), (3, 3)), "grid": (co.GridShortestPath(3, 4), (3, 4))}
ESTIMATORS = {
    "none": co.Identity("none"),
    "auto": co.Identity(),
    "norm": co.Identity("norm"),
    "softmax": co.StraightThrough(0.7),
    "blackbox": co.Blackbox(0.8),
    "lpgd": co.LPGD(0.8),
    "imle": co.IMLE(0.8),
    "adaptive": co.AdaptiveIMLE(),
}
SMOOTH = ["none", "auto", "norm", "softmax"]
CASES = [(solver, estimator) for solver in SOLVERS for estimator in ESTIMATORS]


def made(solver: str, estimator: str) -> tuple[co.DiscreteLayer, Tensor]:
    """A layer that can be called again with the same result, and costs (4, *shape)."""
    kind, shape = SOLVERS[solver]
    layer = co.DiscreteLayer(kind, copy.deepcopy(ESTIMATORS[estimator]), domain="clamp").eval()
    costs = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return layer, costs.abs() + 0.1 if solver == "grid" else costs


def loss(y: Tensor) -> Tensor:
    weights = torch.arange(1.0, 1 + y[0].numel(), dtype=y.dtype).reshape(y.shape[1:])
    return ((y - 0.3).pow(3) * weights).flatten(1).sum(1)


def by_autograd(layer: co.DiscreteLayer, w: Tensor) -> Tensor:
    x = w.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(layer(x)).sum(), x)
    return found


@pytest.mark.parametrize(("solver", "estimator"), CASES)
def test_grad_and_vmap_are_a_loop(solver: str, estimator: str) -> None:
    layer, w = made(solver, estimator)
    expected = torch.stack([by_autograd(layer, one[None])[0] for one in w])
    assert expected.abs().max() > 1e-3
    batched = by_autograd(layer, w)
    torch.testing.assert_close(batched, expected)

    def one(x: Tensor) -> Tensor:
        return loss(layer(x[None]))[0]

    torch.testing.assert_close(grad(lambda x: loss(layer(x)).sum())(w), expected)
    torch.testing.assert_close(vmap(grad(one))(w), expected)
    torch.testing.assert_close(vmap(grad(one), in_dims=2)(w.movedim(0, 2)), expected)
    pairs = w.unflatten(0, (2, 2))
    torch.testing.assert_close(vmap(vmap(grad(one)))(pairs).flatten(0, 1), expected)
    torch.testing.assert_close(grad(lambda x: vmap(one)(x).sum())(w), expected)
    torch.testing.assert_close(vmap(layer)(w), layer(w))


@pytest.mark.parametrize(("solver", "estimator"), CASES)
def test_jacrev_is_a_loop_over_cotangents(solver: str, estimator: str) -> None:
    layer, w = made(solver, estimator)
    found = jacrev(layer)(w[0])
    y, pull = vjp(layer, w[0])
    eye = torch.eye(y.numel(), dtype=w.dtype).reshape(-1, *y.shape)
    expected = torch.stack([pull(v)[0] for v in eye]).reshape(*y.shape, *w.shape[1:])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(vmap(jacrev(layer))(w)[0], expected)


@pytest.mark.parametrize(("solver", "estimator"), [case for case in CASES if case[1] in SMOOTH])
def test_forward_mode_and_higher_orders(solver: str, estimator: str) -> None:
    layer, w = made(solver, estimator)
    x, t = w[0], w[1] - w[2]
    jacobian = jacrev(layer)(x)
    torch.testing.assert_close(jacfwd(layer)(x), jacobian)
    _, moved = jvp(layer, (x,), (t,))
    torch.testing.assert_close(moved, (jacobian * t).flatten(2).sum(2))

    def one(x: Tensor) -> Tensor:
        return loss(layer(x[None]))[0]

    second = jacrev(jacrev(one))(x)
    assert second.abs().max() > 1e-3
    for found in (hessian(one)(x), jacfwd(jacfwd(one))(x), jacrev(jacfwd(one))(x), vmap(hessian(one))(w)[0]):
        torch.testing.assert_close(found, second)
    z = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(one(z), z, create_graph=True)
    (product,) = torch.autograd.grad((first * t).sum(), z)
    torch.testing.assert_close(product, (second * t).flatten(2).sum(2))


@pytest.mark.parametrize("estimator", ["blackbox", "lpgd", "imle", "adaptive"])
def test_forward_mode_of_differences_is_an_error(estimator: str) -> None:
    layer, w = made("assignment", estimator)
    with pytest.raises(NotSupportedYetError, match="not linear in the cotangent"):
        jacfwd(layer)(w[0])


@pytest.mark.parametrize(("solver", "estimator"), CASES)
def test_vectorised_jacobians_of_autograd(solver: str, estimator: str) -> None:
    layer, w = made(solver, estimator)
    found = torch.autograd.functional.jacobian(layer, w[0], vectorize=True)
    torch.testing.assert_close(found, jacrev(layer)(w[0]))
    if estimator in SMOOTH:
        forward = torch.autograd.functional.jacobian(layer, w[0], vectorize=True, strategy="forward-mode")
        torch.testing.assert_close(forward, found)


@pytest.mark.parametrize(("solver", "estimator"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(solver: str, estimator: str, dtype: torch.dtype) -> None:
    layer, w = made(solver, estimator)
    # The same numbers in both precisions, so that the solutions agree.
    w = w.to(dtype).double()
    x = w.to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), layer(w))
    y.backward(torch.ones_like(y) * 0.5)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    z = w.clone().requires_grad_()
    layer(z).backward(torch.full_like(z, 0.5))
    assert z.grad is not None
    error = (x.grad.double() - z.grad).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * max(1.0, float(z.grad.abs().max()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batches(estimator: str) -> None:
    layer, w = made("assignment", estimator)
    expected = by_autograd(layer, w)
    for shape in ((2, 2), (1, 4), (4, 1, 1)):
        x = w.reshape(*shape, 3, 3).clone().requires_grad_()
        y = layer(x)
        assert y.shape == x.shape
        loss(y.reshape(4, 3, 3)).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.reshape(4, 3, 3), expected)
    single = w[0].clone().requires_grad_()
    loss(layer(single)[None]).sum().backward()
    torch.testing.assert_close(single.grad, expected[0])
    empty = torch.zeros(0, 3, 3, dtype=w.dtype, requires_grad=True)
    y = layer(empty)
    assert y.shape == (0, 3, 3)
    y.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3, 3)


def test_noise_differs_between_vmapped_entries() -> None:
    layer = co.DiscreteLayer(co.Ranking(), co.Identity("none", co.Normal(5.0)), generator=torch.Generator())
    same = torch.zeros(20, 6, dtype=torch.float64)
    found = vmap(layer)(same)
    assert len({tuple(row) for row in found.tolist()}) > 15


def test_perturbed_under_vmap_draws_what_a_batch_draws() -> None:
    """A vmapped axis is folded into the batch before noise is drawn, so that one seed gives the same numbers."""
    w = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def layer() -> co.DiscreteLayer:
        made = co.DiscreteLayer(co.TopK(2), co.Perturbed(0.5, 8))
        made.generator = torch.Generator().manual_seed(1)
        return made

    batched, mapped = layer(), layer()
    found = vmap(grad(lambda x: mapped(x).pow(3).sum()))(w)
    x = w.clone().requires_grad_()
    batched(x).pow(3).sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_inference_mode_and_no_grad() -> None:
    layer, w = made("grid", "auto")
    with torch.inference_mode():
        y = layer(w)
    assert torch.equal(y, layer(w))
    with torch.no_grad():
        assert not layer(w.clone().requires_grad_()).requires_grad


def test_checkpointing_and_autocast() -> None:
    layer, w = made("assignment", "auto")
    expected = by_autograd(layer, w)
    for reentrant in (True, False):
        x = w.clone().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant)
        loss(y).sum().backward()
        torch.testing.assert_close(x.grad, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flows = co.DiscreteLayer(co.TSP(5), co.Identity("affine"))
        x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
        flows(x).square().sum().backward()
    z = x.detach().clone().requires_grad_()
    flows(z).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, z.grad)


def test_copies_and_pickles_work_alone() -> None:
    layer, w = made("grid", "adaptive")
    layer.train()
    layer.generator = torch.Generator().manual_seed(1)
    layer.estimator.noise = co.SumOfGamma(3)  # type: ignore[assignment]
    by_autograd(layer, w)
    calls = layer.solver_calls
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(by_autograd(other, w), by_autograd(copy.deepcopy(layer), w))
        assert other.solver_calls > calls
        assert layer.solver_calls == calls
    fresh = co.DiscreteLayer(layer.solver, co.AdaptiveIMLE())
    fresh.load_state_dict(layer.state_dict())
    assert fresh.estimator.alpha == layer.estimator.alpha


def test_threads() -> None:
    layer, w = made("grid", "blackbox")
    costs = [w.roll(shift, 0) * (1 + shift) for shift in range(24)]
    expected = [by_autograd(layer, one) for one in costs]
    before = layer.solver_calls
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: by_autograd(layer, one), costs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert layer.solver_calls - before == before, "no call is lost from the count"


def test_parameters_upstream_and_a_solution_changed_in_place() -> None:
    layer, w = made("assignment", "auto")
    net = torch.nn.Linear(9, 9, dtype=torch.float64)
    layer(net(w.flatten(1)).reshape(-1, 3, 3)).square().sum().backward()
    assert net.weight.grad is not None
    assert net.weight.grad.isfinite().all()
    x = w.clone().requires_grad_()
    y = layer(x)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


# The compiler itself looks at .grad of intermediate tensors where a graph breaks, and hides torch's warning of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("estimator", ["auto", "blackbox"])
def test_compiled_programs_run_the_layer_between_graphs(estimator: str) -> None:
    layer, w = made("grid", estimator)

    def program(x: Tensor) -> Tensor:
        return loss(layer(x * 1.5) + 1).sum()

    x, z = w.clone().requires_grad_(), w.clone().requires_grad_()
    compiled = torch.compile(program, backend="eager")
    compiled(x).backward()
    program(z).backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_graphs_that_would_hold_one_solution_are_refused() -> None:
    layer, w = made("assignment", "auto")
    with pytest.raises(NotSupportedYetError, match="looks at values"):
        make_fx(layer)(w)
    with pytest.raises(NotSupportedYetError, match="looks at values"):
        torch.export.export(layer, (w,), strict=False)
    with pytest.raises(NotSupportedYetError, match="looks at values"):
        layer(w.to("meta"))
    with pytest.raises(NotSupportedYetError, match="looks at values"):
        make_fx(lambda x: co.optimal_value(layer.solver, x))(w)

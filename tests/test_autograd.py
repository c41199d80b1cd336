"""The two autograd functions: every transform of torch on every small problem, held against finite
differences, against the dense formula, and against each other."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from implicitdiff.autograd import ImplicitFunction, KKTSolve
from implicitdiff.derivatives.factor import FactoredBy
from implicitdiff.layer import DeclarativeLayer
from implicitdiff.layer.options import Options
from implicitdiff.layer.prepare import prepare
from tests.oracles import dense_vjp, relative_error
from tests.small_problems import BY_NAME, SMALL, GeometricMedian, Portfolio, Quartic, Small, Sphere, draw

small_problems = pytest.mark.parametrize("small", SMALL, ids=lambda small: small.name)
ENTRY_BY_ENTRY = ("sphere", "point", "quartic")
backwards = pytest.mark.parametrize("backward", ["auto", "dense"])


def as_function(
    small: Small, layer: DeclarativeLayer, inputs: tuple[Any, ...]
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The layer as a function of its tensors (inputs, then Parameters): u, multipliers and value, joined in
    one vector.
    """
    leaves, spec = tree_flatten(inputs)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    names = [name for name, _ in layer.named_parameters()]

    def function(*tensors: Tensor) -> Tensor:
        full = list(leaves)
        for position, tensor in zip(positions, tensors[: len(positions)], strict=True):
            full[position] = tensor
        own = dict(zip(names, tensors[len(positions) :], strict=True))
        solution = functional_call(
            _Solve(layer), {f"layer.{k}": v for k, v in own.items()}, tree_unflatten(full, spec)
        )
        return torch.cat([leaf.reshape(-1) for leaf in solution])

    return function, [*(leaves[i].detach() for i in positions), *(p.detach() for p in layer.parameters())]


class _Solve(torch.nn.Module):
    """`layer.solve` as a module, for functional_call."""

    def __init__(self, layer: DeclarativeLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> list[Tensor]:
        solution = self.layer.solve(*inputs)
        return [
            leaf
            for leaf in tree_leaves((solution.u, solution.equality_multipliers, solution.value))
            if leaf is not None
        ]


def requiring(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@small_problems
@backwards
@pytest.mark.parametrize("batch", [1, 3])
def test_gradient_is_the_dense_formula(small: Small, backward: str, batch: int) -> None:
    layer = DeclarativeLayer(small.make(), in_dims=small.in_dims, backward=backward)
    inputs = small.inputs(batch, 3)
    u = layer(*inputs)
    v = tree_map(lambda leaf: draw(*leaf.shape, seed=7).detach(), u)
    loss = sum((a * b).sum() for a, b in zip(tree_leaves(u), tree_leaves(v), strict=True))
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    found = torch.autograd.grad(loss, [*tensors, *layer.parameters()])
    expected = dense_vjp(layer.problem, tree_map(Tensor.detach, u), v, inputs, small.in_dims).leaves()
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-10


@small_problems
@backwards
def test_gradcheck_in_both_modes(small: Small, backward: str) -> None:
    layer = DeclarativeLayer(small.make(), in_dims=small.in_dims, backward=backward)
    function, tensors = as_function(small, layer, small.inputs(2, 1))
    # The fast mode compares random projections of the Jacobians instead of every entry.
    fast = small.name not in ENTRY_BY_ENTRY
    options = {"check_forward_ad": True, "check_batched_grad": not fast, "fast_mode": fast}
    assert gradcheck(function, requiring(tensors), **options)


@small_problems
@backwards
def test_gradgradcheck_reverse_and_forward_over_reverse(small: Small, backward: str) -> None:
    layer = DeclarativeLayer(small.make(), in_dims=small.in_dims, backward=backward)
    function, tensors = as_function(small, layer, small.inputs(1, 2))
    fast = small.name not in ENTRY_BY_ENTRY
    assert gradgradcheck(function, requiring(tensors), check_fwd_over_rev=True, fast_mode=fast)


@small_problems
@backwards
def test_hessian_is_the_same_in_all_four_mixes(small: Small, backward: str) -> None:
    layer = DeclarativeLayer(small.make(), in_dims=small.in_dims, backward=backward)
    function, tensors = as_function(small, layer, small.inputs(2, 4))
    arguments = tuple(range(len(tensors)))

    def scalar(*values: Tensor) -> Tensor:
        return (function(*values) ** 2).sum()

    first_reverse, first_forward = jacrev(scalar, arguments)(*tensors), jacfwd(scalar, arguments)(*tensors)
    for a, b in zip(first_reverse, first_forward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    reference = tree_leaves(jacrev(jacrev(scalar, arguments), arguments)(*tensors))
    assert any(leaf.abs().max() > 1e-3 for leaf in reference)
    for outer, inner in ((jacrev, jacfwd), (jacfwd, jacrev), (jacfwd, jacfwd)):
        for a, b in zip(
            tree_leaves(outer(inner(scalar, arguments), arguments)(*tensors)), reference, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_third_derivatives_are_the_same_in_all_eight_mixes() -> None:
    layer = DeclarativeLayer(Quartic(), in_dims=(0, None))
    x, a = (tensor.detach() for tensor in BY_NAME["quartic"].inputs(1, 5))

    def scalar(x: Tensor) -> Tensor:
        return (layer(x, a) ** 3).sum()

    mixes = [
        outer(middle(inner(scalar)))(x)
        for outer in (jacrev, jacfwd)
        for middle in (jacrev, jacfwd)
        for inner in (jacrev, jacfwd)
    ]
    assert mixes[0].abs().max() > 1e-2
    for mix in mixes[1:]:
        torch.testing.assert_close(mix, mixes[0], rtol=1e-8, atol=1e-9)


@backwards
@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (None, None, 0), (1, 0, 0)])
def test_vmap_of_grad_and_grad_of_vmap_over_any_tensor(backward: str, dims: tuple[int | None, ...]) -> None:
    """vmap over the batched input, over the shared one, over the Parameter (an ensemble), over all."""
    layer = DeclarativeLayer(Quartic(), in_dims=(0, None), backward=backward)
    function, (x, a, theta) = as_function(BY_NAME["quartic"], layer, BY_NAME["quartic"].inputs(3, 6))
    shift = draw(4, 1, 1, seed=9).detach()
    spread = (x + 0.1 * shift, a + 0.02 * shift[:, 0], theta + 0.1 * shift[:, 0, 0].abs())
    values = [
        wide if dim is not None else one for wide, one, dim in zip(spread, (x, a, theta), dims, strict=True)
    ]
    placed = [
        value.movedim(0, dim) if dim is not None else value for value, dim in zip(values, dims, strict=True)
    ]

    def scalar(*tensors: Tensor) -> Tensor:
        return (function(*tensors) ** 2).sum()

    per_entry = [
        grad(scalar, (0, 1, 2))(*(v[i] if d is not None else v for v, d in zip(values, dims, strict=True)))
        for i in range(4)
    ]
    found = vmap(grad(scalar, (0, 1, 2)), in_dims=dims)(*placed)
    for k in range(3):
        for i in range(4):
            torch.testing.assert_close(found[k][i], per_entry[i][k], rtol=1e-9, atol=1e-10)
    total = grad(lambda *tensors: vmap(scalar, in_dims=dims)(*tensors).sum(), (0, 1, 2))(*placed)
    for k, dim in enumerate(dims):
        entries = [entry[k] for entry in per_entry]
        expected = sum(entries) if dim is None else torch.stack(entries, dim)
        torch.testing.assert_close(total[k], expected, rtol=1e-9, atol=1e-10)
    curved = vmap(hessian(scalar), in_dims=dims)(*placed)
    one = jacrev(jacrev(scalar))(*(v[2] if d is not None else v for v, d in zip(values, dims, strict=True)))
    torch.testing.assert_close(curved[2], one, rtol=1e-7, atol=1e-8)


@backwards
def test_nested_vmap_and_a_layer_for_one_sample(backward: str) -> None:
    """`in_dims=None` with two vmaps around it is the layer over two batch axes."""
    x = draw(2, 3, 4, seed=3).detach()
    one = DeclarativeLayer(Sphere(), in_dims=None, backward=backward)
    both = vmap(vmap(one))(x)
    flat = DeclarativeLayer(Sphere(), backward=backward)(x.reshape(6, 4)).reshape(2, 3, 4)
    torch.testing.assert_close(both, flat)
    found = vmap(vmap(jacrev(one)))(x)
    assert found.shape == (2, 3, 4, 4)
    torch.testing.assert_close(found[1, 2], jacfwd(one)(x[1, 2]), rtol=1e-9, atol=1e-10)


def test_plain_dual_numbers_over_a_backward_without_create_graph() -> None:
    """A backward outside of grad mode may still carry tangents: it must not take the path that drops them."""
    layer, x = DeclarativeLayer(Sphere()), draw(2, 3, seed=1)
    direction = draw(2, 3, seed=2).detach()
    _, expected = jvp(grad(lambda x: (layer(x) ** 3).sum()), (x.detach(),), (direction,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        found = torch.autograd.grad((layer(dual) ** 3).sum(), dual)[0]
        tangent = torch.autograd.forward_ad.unpack_dual(found).tangent
        torch.testing.assert_close(tangent, expected)


@backwards
@small_problems
def test_a_cotangent_of_zero_gives_exactly_zero(small: Small, backward: str) -> None:
    layer = DeclarativeLayer(small.make(), in_dims=small.in_dims, backward=backward)
    inputs = small.inputs(3, 8)
    u = layer(*inputs)
    dims = small.in_dims if isinstance(small.in_dims, tuple) else (small.in_dims,) * len(inputs)
    kept = sum((leaf[torch.tensor([0, 2])] ** 2).sum() for leaf in tree_leaves(u))
    batched = [
        leaf
        for x, d in zip(inputs, dims, strict=True)
        if d == 0
        for leaf in tree_leaves(x)
        if isinstance(leaf, Tensor)
    ]
    for create_graph in (False, True):
        for gradient in torch.autograd.grad(kept, batched, retain_graph=True, create_graph=create_graph):
            assert (gradient[1] == 0).all()
            assert (gradient[0] != 0).any()
            assert (gradient[2] != 0).any()


@pytest.mark.parametrize("what", ["u", "input", "parameter"])
def test_changing_a_saved_tensor_in_place_is_noticed(what: str) -> None:
    layer = DeclarativeLayer(GeometricMedian())
    x = draw(2, 2, 4, seed=1)
    inner = x * 1.0
    u = layer(inner)
    loss = u.square().sum()
    with torch.no_grad():
        {"u": u, "input": inner, "parameter": layer.problem.eps}[what].add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_right_hand_sides_alone_under_vmap_share_one_factorisation() -> None:
    layer = DeclarativeLayer(Sphere(), backward="dense")
    x = draw(2, 3, seed=4)
    prepared = prepare(layer.problem, (x,), Options(backward="dense"))
    call = prepared.call()
    *point, _, _, _ = (output.detach() for output in ImplicitFunction.apply(call, x))
    rows: list[int] = []
    factor = call.plan.kkt_factor

    def counted(*given: Any) -> FactoredBy:
        made = factor(*given)

        def solve(rhs_u: Any, rhs_h: Any) -> Any:
            rows.append(rhs_u[0].shape[0])
            return made.solve(rhs_u, rhs_h)

        return FactoredBy(solve)

    call.plan.kkt_factor = counted
    try:
        rhs = draw(5, 1, 2, 3, seed=6).detach()
        below = torch.zeros(1, 2, dtype=torch.float64)
        w, s = vmap(lambda r: KKTSolve.apply(call, r, below, *point, x.detach()))(rhs)
    finally:
        del call.plan.kkt_factor
        call = prepared.call()
    assert rows == [5]
    for i in range(5):
        one_w, one_s = KKTSolve.apply(call, rhs[i], below, *point, x.detach())
        torch.testing.assert_close(w[i], one_w)
        torch.testing.assert_close(s[i], one_s)


def test_a_shared_tensor_gets_the_sum_over_the_batch() -> None:
    layer = DeclarativeLayer(Portfolio(), in_dims=(None, 0))
    Q, mu = BY_NAME["portfolio"].inputs(3, 1)
    whole = torch.autograd.grad((layer(Q, mu) ** 2).sum(), Q)[0]
    parts = [torch.autograd.grad((layer(Q, mu[i : i + 1]) ** 2).sum(), Q)[0] for i in range(3)]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=1e-12)


def test_per_sample_gradients_of_the_parameters() -> None:
    """vmap(grad) with functional_call on a network that ends in the layer."""
    layer = DeclarativeLayer(GeometricMedian(), in_dims=None)
    x = draw(3, 2, 5, seed=2).detach()
    own = {name: value.detach() for name, value in layer.named_parameters()}
    found = vmap(grad(lambda p, x: functional_call(layer, p, (x,)).square().sum()), in_dims=(None, 0))(own, x)
    for i in range(3):
        expected = torch.autograd.grad(layer(x[i]).square().sum(), layer.problem.eps)[0]
        torch.testing.assert_close(found["problem.eps"][i], expected)
    assert isinstance(layer.problem.eps, torch.nn.Parameter)


def test_deepcopy_of_a_layer_with_history_has_gradients_of_its_own() -> None:
    layer = DeclarativeLayer(GeometricMedian())
    x = draw(2, 2, 4, seed=1)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    twin.zero_grad()
    before = layer.problem.eps.grad.clone()
    twin(x).sum().backward()
    torch.testing.assert_close(twin.problem.eps.grad, before)
    torch.testing.assert_close(layer.problem.eps.grad, before)

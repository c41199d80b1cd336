"""torch.func over the layer and over `solve`: vmap, grad, jacrev, jacfwd, hessian, nested, each equal to a Python loop.

vmap runs over one input, over any axis of it, over the Parameters of an ensemble, over the samples of a network.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves, tree_map

import implicitdiff as idf
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.small_problems import BY_NAME, Portfolio, Quartic, Tree, draw


def numbers(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return draw(*shape, seed=seed, scale=scale, shift=shift).detach()


def stacked(results: list[Any]) -> Any:
    """Results of a loop, leaf by leaf, along a new first axis."""
    return tree_map(lambda *leaves: torch.stack(leaves), *results)


def same(found: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    ours, theirs = tree_leaves(found), tree_leaves(expected)
    assert len(ours) == len(theirs)
    assert any(leaf.abs().max() > 1e-3 for leaf in theirs), "a loop of zeros shows nothing"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# Two inputs for each function, both to be mapped over: (layer, inputs without the mapped axis, spread of each).
MARGINALS = numbers(3, seed=5, scale=0.3), numbers(4, seed=6, scale=0.3)


def _pooled(**options: Any) -> Callable[..., Tensor]:
    layer = idf.DeclarativeLayer(RobustPooling("welsch", None), in_dims=(0, None), **options)
    return lambda x, t: layer(x, t.exp())


def _transported(**options: Any) -> Callable[..., Tensor]:
    layer = idf.DeclarativeLayer(OptimalTransport(None), in_dims=(0, None, None, 0), **options)
    r, c = (mass.softmax(0) for mass in MARGINALS)
    return lambda M, t: layer(M, r, c, (1 + t * t).expand(len(M)))


def _portfolio(**options: Any) -> Callable[..., Tensor]:
    layer = idf.DeclarativeLayer(Portfolio(), in_dims=(None, 0), **options)
    return lambda mu, t: layer(t * t * torch.eye(4, dtype=mu.dtype) + ROOT @ ROOT.mT, mu)


def _solved(**options: Any) -> Callable[..., Any]:
    """The multipliers and the value too."""

    def function(x: Tensor, t: Tensor) -> Any:
        found = idf.solve(QUARTIC, x, t * PLANE, in_dims=(0, None), **options)
        return found.u, found.equality_multipliers, found.value

    return function


ROOT = numbers(4, 4, seed=9)
PLANE = numbers(3, seed=4, scale=0.2, shift=1.0)
QUARTIC = Quartic().requires_grad_(False)
MAPPED = numbers(3, seed=3, scale=0.1, shift=1.0)
FUNCTIONS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "pooling": (_pooled(), numbers(3, 2, 3, 5, seed=1)),
    "pooling-cg": (_pooled(linear_solver="cg"), numbers(3, 2, 3, 5, seed=1)),
    "pooling-matrix-free": (_pooled(backward="matrix-free"), numbers(3, 2, 3, 5, seed=1)),
    "transport": (_transported(), numbers(3, 2, 3, 4, seed=2)),
    "transport-lu": (_transported(linear_solver="lu"), numbers(3, 2, 3, 4, seed=2)),
    "portfolio": (_portfolio(), numbers(3, 2, 4, seed=2)),
    "portfolio-dense": (_portfolio(backward="dense"), numbers(3, 2, 4, seed=2)),
    "portfolio-approximate": (_portfolio(backward="approximate"), numbers(3, 2, 4, seed=2)),
    "solve": (_solved(), numbers(3, 2, 3, seed=2)),
    "solve-ldl": (_solved(linear_solver="ldl"), numbers(3, 2, 3, seed=2)),
}
functions = pytest.mark.parametrize("name", list(FUNCTIONS))
main_functions = pytest.mark.parametrize("name", ["pooling", "transport", "portfolio", "solve"])


def scalar_of(function: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def scalar(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([(leaf**3 + leaf).sum() for leaf in tree_leaves(function(x, t))]).sum()

    return scalar


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "value": lambda f: f,
    "grad": lambda f: grad(scalar_of(f), (0, 1)),
    "jacrev": lambda f: jacrev(f, (0, 1)),
    "jacfwd": lambda f: jacfwd(f, 1),
    "jvp": lambda f: lambda x, t: jvp(f, (x, t), (torch.cos(x), torch.ones_like(t))),
    "vjp": lambda f: lambda x, t: vjp(scalar_of(f), x, t)[1](torch.ones((), dtype=x.dtype)),
    "hessian": lambda f: hessian(scalar_of(f), (0, 1)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(scalar_of(f), 1), 0),
    "grad(jvp)": lambda f: lambda x, t: grad(lambda x: jvp(lambda t: scalar_of(f)(x, t), (t,), (t,))[1])(x),
}

SECOND = ("hessian", "jacrev(jacfwd)", "grad(jvp)")


@functions
@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_vmap_is_a_loop(name: str, transform: str) -> None:
    """Over the batched input, over the shared one, over both, over another axis, all of every transform."""
    function, many = FUNCTIONS[name]
    mapped = TRANSFORMS[transform](function)
    if transform in SECOND:  # they are slow: both inputs mapped, each on an axis of its own
        few = many[:2]
        loop = [mapped(x, t) for x, t in zip(few, MAPPED, strict=False)]
        same(vmap(mapped, in_dims=(1, 0))(few.movedim(0, 1), MAPPED[:2]), stacked(loop))
        return
    loops = {
        (0, None): [mapped(x, MAPPED[0]) for x in many],
        (None, 0): [mapped(many[0], t) for t in MAPPED],
        (0, 0): [mapped(x, t) for x, t in zip(many, MAPPED, strict=True)],
    }
    for dims, loop in loops.items():
        given = many if dims[0] == 0 else many[0], MAPPED if dims[1] == 0 else MAPPED[0]
        same(vmap(mapped, in_dims=dims)(*given), stacked(loop))
    moved = many.movedim(0, 2)
    same(vmap(mapped, in_dims=(2, 0))(moved, MAPPED), stacked(loops[0, 0]))
    last = vmap(mapped, in_dims=(-2, None), out_dims=-1)(many.movedim(0, -2), MAPPED[0])
    same(tree_map(lambda leaf: leaf.movedim(-1, 0), last), stacked(loops[0, None]))


@main_functions
def test_transforms_of_vmap_are_those_of_a_loop(name: str) -> None:
    """The transform outside, vmap inside: gradients of shared tensors add up over the mapped axis."""
    function, many = FUNCTIONS[name]
    scalar = scalar_of(function)

    def mapped(x: Tensor, t: Tensor) -> Tensor:
        return vmap(scalar, in_dims=(0, None))(x, t)

    def looped(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([scalar(entry, t) for entry in x])

    for outer in (jacrev, jacfwd):
        same(outer(mapped, 1)(many, MAPPED[0]), outer(looped, 1)(many, MAPPED[0]))
    same(jacrev(mapped)(many[:2], MAPPED[0]), jacrev(looped)(many[:2], MAPPED[0]))
    curved = hessian(lambda t: (mapped(many, t) ** 2).sum())(MAPPED[0])
    same(curved, hessian(lambda t: (looped(many, t) ** 2).sum())(MAPPED[0]), 1e-8, 1e-9)
    both = grad(lambda t: vmap(grad(lambda x, t: scalar(x, t), 1), in_dims=(0, None))(many, t).sum())(
        MAPPED[0]
    )
    same(both, hessian(lambda t: looped(many, t).sum())(MAPPED[0]), 1e-8, 1e-9)


@main_functions
def test_vmaps_nest(name: str) -> None:
    """Over t outside and x inside, and the other way round: the table of a double loop."""
    function, many = FUNCTIONS[name]
    each = grad(scalar_of(function), (0, 1))
    few = MAPPED[:3]
    expected = stacked([stacked([each(x, t) for x in many[:2]]) for t in few])
    same(vmap(lambda t: vmap(lambda x: each(x, t))(many[:2]))(few), expected)
    other = vmap(lambda x: vmap(lambda t: each(x, t))(few))(many[:2])
    same(tree_map(lambda leaf: leaf.transpose(0, 1), other), expected)
    same(
        vmap(each, in_dims=(0, None), chunk_size=2)(many, MAPPED[0]),
        stacked([each(x, MAPPED[0]) for x in many]),
    )


def test_the_fields_of_a_solution_under_vmap() -> None:
    x, a = numbers(5, 2, 3, seed=2), PLANE

    def fields(x: Tensor) -> tuple[Any, ...]:
        found = idf.solve(QUARTIC, x, a, in_dims=(0, None))
        return found.u, found.equality_multipliers, found.value, found.status, found.residual

    found = vmap(fields)(x)
    same(found[:3], stacked([fields(row)[:3] for row in x]))
    assert found[3].shape == (5, 2)
    assert (found[3] == idf.Status.OK).all()
    assert (found[4] < 1e-8).all()


def test_a_warm_start_under_vmap() -> None:
    layer = idf.DeclarativeLayer(QUARTIC, in_dims=(0, None))
    x = numbers(4, 2, 3, seed=2)
    start = layer(x[0], PLANE)
    starts = start + 0.01 * numbers(4, 2, 3, seed=3)
    expected = stacked([layer(row, PLANE) for row in x])
    same(vmap(lambda x, s: layer(x, PLANE, init=s))(x, starts), expected, 1e-7, 1e-7)
    same(vmap(lambda x: layer(x, PLANE, init=start))(x), expected, 1e-7, 1e-7)
    slopes = vmap(jacrev(lambda x, s: layer(x, PLANE, init=s), (0, 1)))(x, starts)
    same(slopes[0], stacked([jacrev(lambda x: layer(x, PLANE))(row) for row in x]), 1e-7, 1e-7)
    assert (slopes[1] == 0).all()  # the solution does not depend on where the search began


def test_trees_of_variables_and_inputs_under_vmap() -> None:
    layer = idf.DeclarativeLayer(Tree().requires_grad_(False))
    inputs, scale = BY_NAME["tree"].inputs(6, 1)
    many = {name: value.detach().reshape(3, 2, *value.shape[1:]) for name, value in inputs.items()}
    rows = [{name: value[i] for name, value in many.items()} for i in range(3)]

    def slope(x: dict[str, Tensor]) -> Any:
        return jacrev(lambda x: layer(x, scale))(x)

    same(vmap(lambda x: layer(x, scale))(many), stacked([layer(row, scale) for row in rows]))
    same(vmap(slope)(many), stacked([slope(row) for row in rows]))
    partly = vmap(lambda p: jacfwd(lambda p: layer({"p": p, "s": many["s"][0]}, scale))(p))(many["p"])
    loop = [jacfwd(lambda p: layer({"p": p, "s": many["s"][0]}, scale))(p) for p in many["p"]]
    same(partly, stacked(loop))


class Network(nn.Module):
    """Features of each point, robust pooling with a learnt width, a transport plan of the result, a linear head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.5 * torch.randn(shape, generator=generator, dtype=torch.float64))

        self.each_point, self.costs, self.head = weights(3, 2), weights(6, 3), weights(6)
        width = torch.tensor(1.0 + 0.1 * seed, dtype=torch.float64)
        self.pool = idf.DeclarativeLayer(RobustPooling("pseudo-huber", nn.Parameter(width)))
        self.plan = idf.DeclarativeLayer(OptimalTransport(nn.Parameter(2.0 * width.detach())))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.each_point @ x)  # (batch, 3, points)
        M = (self.pool(features) @ self.costs.mT).reshape(-1, 2, 3)
        return 6 * self.plan(M).reshape(-1, 6) @ self.head


POINTS = numbers(4, 2, 5, seed=7)
TARGETS = numbers(4, seed=8)


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters()}


def loss_of(network: nn.Module) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return ((functional_call(network, parameters, (x,)) - y) ** 2).mean()

    return loss


def test_per_sample_gradients_of_a_network() -> None:
    network = Network(1)
    own = parameters_of(network)

    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(network)(parameters, x[None], y[None])

    gradients, losses = vmap(grad_and_value(one), in_dims=(None, 0, 0))(own, POINTS, TARGETS)
    for i in range(4):
        network.zero_grad()
        loss = ((network(POINTS[i : i + 1]) - TARGETS[i]) ** 2).mean()
        loss.backward()
        torch.testing.assert_close(losses[i], loss.detach())
        for name, value in network.named_parameters():
            assert value.grad is not None
            assert value.grad.abs().max() > 1e-6, f"{name} has no gradient to compare"
            torch.testing.assert_close(gradients[name][i], value.grad, rtol=1e-9, atol=1e-11)
    assert all(isinstance(value, nn.Parameter) for value in network.parameters())


def test_an_ensemble_is_a_loop_over_its_members() -> None:
    members = [Network(seed) for seed in (1, 2, 3)]
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0])

    def run(own: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(skeleton, (own, rest), (x,))

    same(vmap(run, in_dims=(0, 0, None))(parameters, buffers, POINTS), stacked([m(POINTS) for m in members]))
    own_data = torch.stack([POINTS, POINTS + 0.1, 0.9 * POINTS])
    same(
        vmap(run)(parameters, buffers, own_data),
        stacked([m(x) for m, x in zip(members, own_data, strict=True)]),
    )
    free = {name: value.detach() for name, value in parameters.items()}

    def loss(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return ((run(own, {}, x) - TARGETS) ** 2).mean()

    found = vmap(grad(loss), in_dims=(0, None))(free, POINTS)
    total = grad(lambda own: vmap(loss, in_dims=(0, None))(own, POINTS).sum())(free)
    for i, member in enumerate(members):
        expected = grad(loss_of(member))(parameters_of(member), POINTS, TARGETS)
        for name, value in expected.items():
            torch.testing.assert_close(found[name][i], value, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(total[name][i], value, rtol=1e-9, atol=1e-11)


def test_newton_and_gauss_newton_products_of_a_network() -> None:
    """The Hessian of a loss in all Parameters along a direction, in three ways, and along many at once."""
    network = Network(2)
    own, loss = parameters_of(network), loss_of(network)
    direction = {name: numbers(*value.shape, seed=i) for i, (name, value) in enumerate(own.items())}

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        return loss(parameters, POINTS, TARGETS)

    def product(direction: dict[str, Tensor]) -> dict[str, Tensor]:
        return jvp(grad(objective), (own,), (direction,))[1]

    forward = product(direction)
    reverse = vjp(grad(objective), own)[1](direction)[0]
    network.zero_grad()
    leaves = list(network.parameters())
    first = torch.autograd.grad(((network(POINTS) - TARGETS) ** 2).mean(), leaves, create_graph=True)
    inner = torch.stack([(g * direction[n]).sum() for g, n in zip(first, own, strict=True)]).sum()
    plain = dict(zip(own, torch.autograd.grad(inner, leaves), strict=True))
    same(reverse, forward, 1e-8, 1e-10)
    same([plain[name] for name in own], [forward[name] for name in own], 1e-8, 1e-10)
    step = 1e-5
    ahead, behind = (
        grad(objective)({n: v + s * direction[n] for n, v in own.items()}) for s in (step, -step)
    )
    difference = {name: (ahead[name] - behind[name]) / (2 * step) for name in own}
    same(forward, difference, 1e-4, 1e-6)
    several = {name: torch.stack([value, 2 * value, torch.cos(value)]) for name, value in direction.items()}
    same(
        {name: value[1] for name, value in vmap(product)(several).items()},
        reverse | {n: 2 * v for n, v in forward.items()},
    )


def test_the_hand_written_gradient_under_vmap() -> None:
    """First order only, and there it is the automatic one; alpha is an input and gets none."""
    x, alpha = numbers(3, 2, 3, 5, seed=1), torch.tensor(1.5, dtype=torch.float64)

    def slope(backward: str) -> Callable[[Tensor], Tensor]:
        layer = idf.DeclarativeLayer(RobustPooling("welsch", None), in_dims=(0, None), backward=backward)
        return grad(lambda x: (layer(x, alpha) ** 3).sum())

    same(vmap(slope("hand"))(x), stacked([slope("auto")(row) for row in x]))

"""Sparse Hessians and constraints at sizes where they are solved as such, and sums of kinds.

tests/cases/graphs.py has the small ones. The oracles are the dense formula on the declared functions and, for some, a
closed form.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap

import implicitdiff as idf
from tests.oracles import compare_modulo, dense_vjp, solved

Objective = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graph(nodes: int, edges: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A path through all nodes and random edges beside it, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(nodes, (2, edges), generator=generator)
    path = torch.stack([torch.arange(nodes - 1), torch.arange(1, nodes)])
    tail, head = torch.cat([path, extra], dim=1)
    return tail, head


class Declared(idf.Problem):
    """A problem over u of the shape of its first input, on a fixed graph."""

    def __init__(self, objective: Objective, equality: Any = None, nodes: int = 6, edges: int = 4) -> None:
        super().__init__()
        self._objective = objective
        tail, head = graph(nodes, edges)
        self.register_buffer("tail", tail)
        self.register_buffer("head", head)
        if equality is not None:
            self.equality = lambda u, *x: equality(self, u, *x)

    def objective(self, u: Tensor, *inputs: Tensor) -> Tensor:
        return self._objective(self, u, *inputs)

    def init(self, *inputs: Tensor) -> Tensor:
        return torch.zeros_like(inputs[0])


def near(u: Tensor, x: Tensor) -> Tensor:
    return (u - x).square().sum()


def smooth(p: Declared, u: Tensor, x: Tensor) -> Tensor:
    return near(u, x) + torch.cosh(0.5 * (u[p.tail] - u[p.head])).sum()


def check(
    problem: idf.Problem, *inputs: Tensor, tolerance: float = 1e-9, in_dims: Any = 0, **options: Any
) -> Tensor:
    """The gradients of a layer against the dense formula; returns u."""
    inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    problem = solved(problem)
    u = idf.DeclarativeLayer(problem, in_dims=in_dims, **options)(*inputs)
    v = normal(*u.shape, seed=9)
    floating = [x for x in inputs if x.requires_grad]
    actual = list(torch.autograd.grad(u, floating, v))
    expected = dense_vjp(problem, u, v, inputs, in_dims).leaves()
    expected = [e for e, x in zip(expected, inputs, strict=False) if x.requires_grad]
    assert compare_modulo(actual, expected) < tolerance
    return u


@pytest.mark.parametrize("batch", [1, 3])
def test_a_large_graph_is_solved_as_one(batch: int) -> None:
    found = idf.explain(Declared(smooth, nodes=2000, edges=900), normal(batch, 2000))
    assert (found.hessian.kind, found.solver) == ("sparse", "sparse-lu"), found
    assert "tail" in found.hessian.reason
    assert not found.fallbacks
    # a dense factorisation takes less time at a size that the oracle can do
    check(Declared(smooth, nodes=120, edges=50), normal(batch, 120), linear_solver="sparse-lu")


def test_a_graph_for_each_sample() -> None:
    def objective(p: Declared, u: Tensor, x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return near(u, x) + ((u[i] - u[j]) ** 4).sum() + torch.exp(0.2 * u[i] * u[j]).sum()

    graphs = [graph(40, 21, seed) for seed in range(3)]
    tails, heads = (torch.stack(ends) for ends in zip(*graphs, strict=True))
    x = 0.5 * normal(3, 40)
    check(Declared(objective), x, tails, heads, linear_solver="sparse-lu")
    alone = [check(Declared(objective), x[b : b + 1], tails[b : b + 1], heads[b : b + 1]) for b in range(3)]
    together = check(Declared(objective), x, tails, heads)
    torch.testing.assert_close(together, torch.cat(alone))


GATHERS: dict[str, tuple[Objective, tuple[int, ...], str]] = {
    "a gather of a slice": (
        lambda p, u, x: near(u, x) + torch.cosh(u[1:][p.tail % 5] - u[:-1][p.head % 5]).sum(),
        (6,),
        "sparse",
    ),
    "a slice of a gather": (
        lambda p, u, x: near(u, x) + torch.cosh(u[p.tail][1:] - u[p.head][:-1]).sum(),
        (6,),
        "sparse",
    ),
    "arithmetic with indices": (
        lambda p, u, x: near(u, x) + torch.cosh(u[(p.tail + 2) % 6] - u[p.head]).sum(),
        (6,),
        "sparse",
    ),
    "a flat view": (
        lambda p, u, x: near(u, x) + torch.cosh(u.reshape(-1)[p.tail] + u.reshape(-1)[p.head + 3]).sum(),
        (3, 4),
        "sparse",
    ),
    "entries by two tensors": (
        lambda p, u, x: near(u, x) + torch.cosh(u[p.tail % 3, p.head % 4]).sum(),
        (3, 4),
        "diagonal",
    ),
    "gathered rows": (
        lambda p, u, x: near(u, x) + torch.cosh((u[p.tail % 3] * u[p.head % 3]).sum(1)).sum(),
        (3, 4),
        "sparse",
    ),
    "gathered columns": (
        lambda p, u, x: near(u, x) + torch.cosh(u[:, p.tail % 4] - u[:, p.head % 4]).sum(),
        (3, 4),
        "block-diagonal",
    ),
    "index_select": (
        lambda p, u, x: near(u, x) + torch.cosh(u.index_select(0, p.tail) - u.index_select(0, p.head)).sum(),
        (6,),
        "sparse",
    ),
    "torch.gather": (
        lambda p, u, x: near(u, x) + torch.cosh(u.gather(0, p.tail) * 0.3 - u[p.head]).sum(),
        (6,),
        "sparse",
    ),
    "a scatter of squares": (
        lambda p, u, x: near(u, x) + torch.zeros_like(u).index_add(0, p.tail, u[p.head] ** 2).cosh().sum(),
        (6,),
        "low-rank-plus-diagonal",
    ),
    "a sum of a gather": (
        lambda p, u, x: near(u, x) + u[p.tail].sum().cosh(),
        (6,),
        "low-rank-plus-diagonal",
    ),
    "one entry alone": (lambda p, u, x: near(u, x) + (u[p.tail] ** 4).sum(), (6,), "diagonal"),
    "a cycle by roll of slices": (
        lambda p, u, x: near(u, x) + torch.cosh(u[1:] - u[:-1]).sum() + torch.cosh(u[0] - u[-1]),
        (6,),
        "sparse",
    ),
    "its own transpose": (lambda p, u, x: near(u, x) + torch.cosh(u - u.mT).sum(), (4, 4), "sparse"),
    "rows and columns": (
        lambda p, u, x: near(u, x) + torch.cosh(u.sum(0)).sum() + torch.cosh(u.sum(1)).sum(),
        (3, 4),
        "sparse",
    ),
    "neighbours and a sum": (
        lambda p, u, x: near(u, x) + torch.cosh(u[1:] - u[:-1]).sum() + u.sum() ** 2,
        (6,),
        "sum",
    ),
    "a graph and a product": (
        lambda p, u, x: smooth(p, u, x) + torch.cosh((x[None, :] + p.tail[:2, None]) @ u).sum(),
        (6,),
        "sum",
    ),
    "blocks and a sum": (
        lambda p, u, x: near(u, x) + torch.cosh(u.sum(1)).sum() + 0.1 * u.sum() ** 2,
        (3, 4),
        "sum",
    ),
}


@pytest.mark.parametrize("name", list(GATHERS))
@pytest.mark.parametrize("batch", [1, 2])
def test_spellings(name: str, batch: int) -> None:
    objective, shape, kind = GATHERS[name]
    problem, x = Declared(objective), 0.4 * normal(batch, *shape)
    found = idf.explain(problem, x)
    assert (found.hessian.kind, found.fallbacks) == (kind, ()), found
    check(problem, x)
    if kind == "sparse":
        check(problem, x, linear_solver="sparse-lu")
    if kind == "sum":
        assert found.hessian.parts[1] == "low-rank"
        check(problem, x, linear_solver="woodbury")


GROUPS: dict[str, tuple[Objective, tuple[int, ...]]] = {
    "rows": (lambda p, u, x: near(u, x) + torch.cosh(u.sum(1)).sum(), (4, 6)),
    "columns of rank 2": (
        lambda p, u, x: near(u, x) + torch.cosh(0.5 * (x * u).sum(0)).sum() + torch.exp(0.2 * u.sum(0)).sum(),
        (6, 3),
    ),
    "rows against two products": (
        lambda p, u, x: 3 * near(u, x) + 0.1 * (u.sum(1) * (u * x).sum(1)).sum() + torch.exp(0.3 * u).sum(),
        (3, 5),
    ),
    "two axes number the groups": (
        lambda p, u, x: near(u, x) + torch.logsumexp(u * x, dim=1).sum(),
        (2, 5, 3),
    ),
    "one axis between": (lambda p, u, x: near(u, x) + 0.1 * torch.cosh((u * x).sum((0, 2))).sum(), (2, 4, 3)),
}


@pytest.mark.parametrize("name", list(GROUPS))
@pytest.mark.parametrize("batch", [1, 2])
def test_groups_of_low_rank(name: str, batch: int) -> None:
    """Blocks whose terms split into two sides: Woodbury within each, asked for at sizes that are small for it."""
    objective, shape = GROUPS[name]
    problem, x = Declared(objective), 0.4 * normal(batch, *shape)
    assert idf.explain(problem, x).hessian.kind == "block-diagonal"
    for solver in ("auto", "woodbury", "block-cholesky"):
        check(problem, x, linear_solver=solver)


def test_many_large_groups_are_solved_one_by_one() -> None:
    found = idf.explain(Declared(GROUPS["rows"][0]), normal(1, 50, 400))
    assert (found.hessian.kind, found.solver) == ("block-diagonal", "woodbury"), found


def held(p: Declared, u: Tensor, x: Tensor) -> Tensor:
    return u[0] - x[0] ** 2


def test_a_singular_laplacian_that_is_held() -> None:
    """H has the null vector of ones; K is regular: the solution is the potential of the loads -x/2, shifted."""

    def objective(p: Declared, u: Tensor, x: Tensor) -> Tensor:
        return (u[p.tail] - u[p.head]).square().sum() + (x - x.mean()) @ u

    problem, x = Declared(objective, held, nodes=80, edges=30), normal(2, 80)
    u = check(problem, x, linear_solver="sparse-lu")
    tail, head = problem.tail, problem.head
    laplacian = torch.zeros(80, 80, dtype=torch.float64)
    for i, j in zip(tail.tolist(), head.tolist(), strict=True):
        laplacian[[i, j], [i, j]] += 1.0 if i != j else 0.0
        laplacian[i, j] -= float(i != j)
        laplacian[j, i] -= float(i != j)
    for b in range(2):
        potential = torch.linalg.pinv(laplacian) @ (-(x[b] - x[b].mean()) / 2)
        torch.testing.assert_close(
            u[b].detach(), potential - potential[0] + x[b, 0] ** 2, rtol=1e-8, atol=1e-8
        )


def into(p: Declared, f: Tensor, nodes: int) -> Tensor:
    zero = f.new_zeros(nodes)
    return zero.index_add(0, p.head, f) - zero.index_add(0, p.tail, f)


@pytest.mark.parametrize("all_nodes", [True, False])
def test_flows_through_a_large_network(all_nodes: bool) -> None:
    """Conservation at every node: the equations add up to zero, which is proved; else one node is left out."""

    def objective(p: Declared, f: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return (c * f.square()).sum() + torch.nn.functional.softplus(f).sum()

    def conserved(p: Declared, f: Tensor, c: Tensor, b: Tensor) -> Tensor:
        found = into(p, f, 50) - (b - b.mean())
        return found if all_nodes else found[1:]

    problem = Declared(objective, conserved, nodes=50, edges=20)
    c, b = normal(2, 69).square() + 0.5, normal(2, 50, seed=3)
    found = idf.explain(problem, c, b)
    assert found.hessian.kind == "diagonal", found
    assert bool(found.dependent) == all_nodes
    for solver in ("auto", "sparse-lu"):
        check(problem, c, b, linear_solver=solver)


@pytest.mark.parametrize("kind", ["sparse", "sum"])
def test_every_mode(kind: str) -> None:
    """Forward mode, second order, nested vmap: against the dense plan."""

    def objective(p: Declared, u: Tensor, x: Tensor, a: Tensor) -> Tensor:
        value = near(u, x) + a * torch.cosh(u[p.tail] - u[p.head]).sum()
        return value if kind == "sparse" else value + torch.cosh(x @ u)

    problem = Declared(objective)
    x, a = 0.5 * normal(6), torch.tensor(0.7, dtype=torch.float64)
    asked = {"linear_solver": "sparse-lu" if kind == "sparse" else "woodbury"}
    layers = [
        idf.DeclarativeLayer(solved(problem), in_dims=None, **options)
        for options in (asked, {"backward": "dense"})
    ]
    for transform in (jacrev, jacfwd, hessian):
        found, expected = (transform(layer, argnums=(0, 1))(x, a) for layer in layers)
        for f, e in zip(
            torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True
        ):
            torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-8)
    several = torch.stack([x, x + 0.1])
    found, expected = (vmap(jacrev(layer), in_dims=(0, None))(several, a) for layer in layers)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_an_index_outside_is_an_error() -> None:
    problem = Declared(smooth)
    problem.head[0] = 7
    with pytest.raises(IndexError):
        idf.DeclarativeLayer(problem, linear_solver="sparse-lu")(normal(2, 6))


def test_shapes_alone_tell_the_kind() -> None:
    problem = Declared(smooth, nodes=2000, edges=900).to("meta")
    x = torch.empty(2, 2000, dtype=torch.float64, device="meta")
    found = idf.explain(problem, x)
    assert (found.hessian.kind, found.solver) == ("sparse", "sparse-lu")

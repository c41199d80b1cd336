"""Second derivatives on every solver path, against Newton steps that torch differentiates by itself.

A path that has none must raise, whatever asks for them; no path may be silently wrong, or zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

import implicitdiff as idf
from implicitdiff.layer.options import Options
from implicitdiff.layer.prepare import prepare
from implicitdiff.plan import BACKWARDS
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.solvers import SOLVERS
from tests.attached_newton import Attached
from tests.path_problems import (
    Bent,
    Chain,
    Cumulative,
    Full,
    Held,
    Outputs,
    Regression,
    Ring,
    Rows,
    Separable,
)
from tests.small_problems import Portfolio, Quartic, Torch, draw


def numbers(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return draw(*shape, seed=seed, scale=scale, shift=shift).detach()


def learnt(value: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


@dataclass(frozen=True)
class Path:
    """One problem on one path of the library.

    Attributes:
        name: the test's identifier.
        make: builds the problem.
        tensors: the free tensors; `build` makes the inputs of them.
        in_dims: as for the layer.
        options: the layer's others.
        dropped: how many of the last equalities follow from the others; then lam is not unique, and not compared.
        solver: what the plan must report.
    """

    name: str
    make: Callable[[], idf.Problem]
    tensors: tuple[Tensor, ...]
    in_dims: Any = 0
    options: dict[str, Any] = field(default_factory=dict)
    build: Callable[..., tuple[Tensor, ...]] = lambda *tensors: tensors
    dropped: int = 0
    solver: str | None = None

    @property
    def frozen(self) -> bool:
        return self.options.get("backward") == "approximate"


def pooling(penalty: str, alpha: float) -> Callable[[], idf.Problem]:
    return lambda: RobustPooling(penalty, learnt(alpha))


def simplex(M: Tensor, r: Tensor, c: Tensor, *gamma: Tensor) -> tuple[Tensor, ...]:
    """Marginals of equal totals from free numbers."""
    return (M, r.softmax(-1), c.softmax(-1), *gamma)


POINTS = (numbers(2, 2, 5, seed=1),)
HIGH_POINTS = (numbers(2, 5, 2, seed=2),)
DATA = (numbers(2, 6, 4, seed=3), numbers(2, 6, seed=4))
WIDE = (numbers(2, 2, 4, seed=3), numbers(2, 2, seed=4))
FULL = (numbers(4, 4, seed=5), numbers(2, 4, seed=6))
COSTS = numbers(2, 3, 4, seed=1)
MASSES = (numbers(2, 3, seed=2, scale=0.5), numbers(2, 4, seed=3, scale=0.5))
TRANSPORT = (COSTS, *MASSES)
SMALL_TRANSPORT = (COSTS[:, :2, 1:], MASSES[0][:, 1:], MASSES[1][:, 1:])
STRENGTHS = torch.tensor([1.3, 2.0], dtype=torch.float64)
RISK = numbers(4, 4, seed=9)
ASSETS = (RISK @ RISK.mT + torch.eye(4, dtype=torch.float64), numbers(2, 4, seed=7))
HELD = (numbers(2, 4, seed=5, scale=0.4), numbers(2, 2, seed=6, scale=0.5))
BENT = (numbers(2, 5, seed=5), numbers(2, seed=6))
PLANE = (numbers(2, 3, seed=3), numbers(3, seed=4, scale=0.2, shift=1.0))
SMOOTH = {"quadratic": 1.0, "pseudo-huber": 0.8, "huber": 1.1, "welsch": 1.5, "truncated-quadratic": 1.7}


def transport(name: str, tensors: tuple[Tensor, ...] = TRANSPORT, gamma: Any = 1.5, **more: Any) -> Path:
    build = simplex if len(tensors) > 2 else lambda *given: given
    return Path(name, lambda: OptimalTransport(gamma), tensors, build=build, dropped=1, **more)


BUILT_IN = (
    *(Path(f"pooling-{p}", pooling(p, a), POINTS) for p, a in SMOOTH.items()),
    *(
        Path(f"pooling-input-{p}", partial(RobustPooling, p, None), (*POINTS, a * STRENGTHS.sqrt()))
        for p, a in SMOOTH.items()
        if p in ("pseudo-huber", "welsch")
    ),
    transport("transport-M", (COSTS,)),
    transport("transport-gamma-parameter", gamma=learnt(1.7)),
    transport("transport-gamma-input", (*TRANSPORT, STRENGTHS), gamma=None),
    transport("transport-shared", (COSTS, MASSES[0][0], MASSES[1][0]), in_dims=(0, None, None)),
)


def solved_by(solver: str, label: str, make: Any, tensors: Any, in_dims: Any = 0, shown: str = "") -> Path:
    return Path(
        f"{solver}-{label}", make, tensors, in_dims, {"linear_solver": solver}, solver=shown or solver
    )


def through(backward: str, solver: str | None) -> list[Path]:
    """Four problems by one backward; unrolled Newton gets few steps."""
    options = {"backward": backward}
    short = options | ({"optimizer": idf.optimizers.Newton(max_iter=6)} if backward == "unrolled" else {})
    return [
        Path(f"{backward}-pooling", pooling("pseudo-huber", 0.8), POINTS, 0, options, solver=solver),
        Path(f"{backward}-regression", Regression, WIDE, 0, short, solver=solver),
        Path(f"{backward}-quartic", Quartic, PLANE, (0, None), short, solver=solver),
        transport(f"{backward}-transport", SMALL_TRANSPORT, options=options, solver=solver),
    ]


PATHS = (
    solved_by("divide", "separable", Separable, (numbers(2, 3, seed=2),)),
    solved_by("divide", "quadratic", pooling("quadratic", 1.0), POINTS),
    solved_by("block-cholesky", "rows", Rows, (numbers(2, 3, 2, seed=2),)),
    *(
        solved_by(s, "chain", Chain, (numbers(2, 5, seed=3),))
        for s in ("tridiagonal", "banded-cholesky", "lu")
    ),
    solved_by("gmres", "chain", Chain, (numbers(2, 5, seed=3),)),
    solved_by("sparse-lu", "ring", Ring, (numbers(2, 5, seed=3),)),
    solved_by("tridiagonal", "rows-in-a-chain", Chain, (numbers(2, 4, 2, seed=3),)),
    *(solved_by(s, "bent", Bent, BENT, shown="schur") for s in ("banded-cholesky", "schur")),
    *(solved_by(s, "bent", Bent, BENT) for s in ("lu", "ldl")),
    *(solved_by(s, "held", Held, HELD) for s in ("schur", "lu", "ldl")),
    solved_by("kronecker", "outputs", Outputs, (numbers(2, 4, 3, seed=3), numbers(2, 4, 2, seed=4))),
    solved_by("woodbury", "regression", Regression, WIDE),
    solved_by("woodbury", "pooling", pooling("welsch", 2.5), HIGH_POINTS),
    *(solved_by(s, "regression", Regression, DATA) for s in ("cholesky", "lu", "ldl", "cg")),
    *(solved_by(s, "full", Full, FULL, (None, 0)) for s in ("cholesky", "lu", "ldl", "cg")),
    *(solved_by(s, "pooling", pooling("pseudo-huber", 0.8), POINTS) for s in ("cholesky", "cg")),
    *(solved_by(s, "portfolio", Portfolio, ASSETS, (None, 0)) for s in ("schur", "lu", "ldl")),
    solved_by("schur", "quartic", Quartic, PLANE, (0, None), shown="divide"),  # S is a number
    *(solved_by(s, "quartic", Quartic, PLANE, (0, None)) for s in ("lu", "ldl")),
    *(
        transport(f"{s}-transport", options={"linear_solver": s}, solver=s)
        for s in ("schur", "schur-cg", "lu")
    ),
    Path("auto-cumulative", Cumulative, (numbers(2, 4, seed=8),), solver="lu"),
    *through("dense", "lu"),
    *through("matrix-free", "minres"),
    *through("unrolled", None),
    *through("approximate", "lu"),
    Path("unrolled-solve", Torch, (numbers(2, 3, seed=1, scale=0.5),), 0, {"backward": "unrolled"}),
    transport("unrolled-gamma", gamma=learnt(1.7), options={"backward": "unrolled"}),
)


class Solving(torch.nn.Module):
    """`layer.solve` as a module, for functional_call."""

    def __init__(self, layer: idf.DeclarativeLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> idf.Solution:
        return self.layer.solve(*inputs)


@dataclass(frozen=True)
class Maps:
    """A scalar of (u, lam, value) as a function of the free tensors and Parameters: by the layer, and in truth."""

    layer: idf.DeclarativeLayer
    free: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    truth: Callable[..., Tensor]

    @property
    def arguments(self) -> tuple[int, ...]:
        return tuple(range(len(self.free)))


def maps_of(path: Path) -> Maps:
    problem, count = path.make(), len(path.tensors)
    layer = idf.DeclarativeLayer(problem, in_dims=path.in_dims, **path.options)
    names = [name for name, _ in problem.named_parameters()]
    free = (*path.tensors, *(value.detach() for value in problem.parameters()))
    dims = path.in_dims if isinstance(path.in_dims, tuple) else (path.in_dims,) * count

    def sample(inputs: tuple[Tensor, ...], index: int) -> list[Tensor]:
        return [x[index] if dim == 0 else x for x, dim in zip(inputs, dims, strict=True)]

    inputs = path.build(*path.tensors)
    with torch.no_grad():
        u = idf.solve(problem, *inputs, in_dims=path.in_dims).u
    truths = [
        Attached(problem, u[i], sample(inputs, i), dropped=path.dropped, frozen=path.frozen)
        for i in range(len(u))
    ]
    weight = numbers(*u.shape, seed=99)
    unique = path.dropped == 0 and not path.frozen

    def score(u: Tensor, lam: list[Tensor], value: Tensor) -> Tensor:
        total = (weight * u + 0.5 * u * u).sum() + (value * value).sum()
        return total + sum((leaf + leaf * leaf).sum() for leaf in lam) if unique and lam else total

    def ours(*tensors: Tensor) -> Tensor:
        own = {f"layer.problem.{name}": value for name, value in zip(names, tensors[count:], strict=True)}
        solution = functional_call(Solving(layer), own, path.build(*tensors[:count]))
        lam = [leaf for leaf in tree_leaves(solution.equality_multipliers) if isinstance(leaf, Tensor)]
        return score(solution.u, lam, solution.value)

    def truth(*tensors: Tensor) -> Tensor:
        own, given = dict(zip(names, tensors[count:], strict=True)), path.build(*tensors[:count])
        found = [attached(sample(given, i), own) for i, attached in enumerate(truths)]
        values = [
            f.objective(u, sample(given, i), own)
            for i, (f, (u, _)) in enumerate(zip(truths, found, strict=True))
        ]
        return score(
            torch.stack([pair[0] for pair in found]),
            [torch.stack([pair[1] for pair in found])],
            torch.stack(values),
        )

    return Maps(layer, free, ours, truth)


def double_backward(
    function: Callable[..., Tensor], free: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> list[Tensor]:
    """H along, by two backward passes without torch.func; what has no history counts as zero."""
    tensors = [tensor.clone().requires_grad_() for tensor in free]
    first = torch.autograd.grad(
        function(*tensors), tensors, create_graph=True, materialize_grads=True, allow_unused=True
    )
    total = torch.stack([(g * t).sum() for g, t in zip(first, along, strict=True)]).sum()
    return list(torch.autograd.grad(total, tensors, materialize_grads=True, allow_unused=True))


def dual_over_reverse(
    function: Callable[..., Tensor], free: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> list[Tensor]:
    """H along, by plain dual numbers over a plain backward."""
    with forward_ad.dual_level():
        tensors = [
            forward_ad.make_dual(a.clone().requires_grad_(), b) for a, b in zip(free, along, strict=True)
        ]
        first = torch.autograd.grad(
            function(*tensors), tensors, create_graph=True, materialize_grads=True, allow_unused=True
        )
        tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in first]
    return [torch.zeros_like(a) if t is None else t for t, a in zip(tangents, free, strict=True)]


def close(found: Any, expected: Any, tolerance: float) -> None:
    ours, theirs = tree_leaves(found), tree_leaves(expected)
    assert len(ours) == len(theirs)
    scale = max(float(leaf.abs().max()) for leaf in theirs)
    assert scale > 1e-3, "a truth of zeros shows nothing"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("path", [*BUILT_IN, *PATHS], ids=lambda path: path.name)
def test_second_derivatives_are_the_truth_whatever_asks_for_them(path: Path) -> None:
    maps = maps_of(path)
    if path.solver is not None:
        chosen = Options(in_dims=path.in_dims, **path.options)
        plan = prepare(maps.layer.problem, path.build(*path.tensors), chosen).plan
        assert plan.analysis.solver == path.solver
    args, free, tolerance = maps.arguments, maps.free, 1e-8
    close(jacrev(maps.ours, args)(*free), jacrev(maps.truth, args)(*free), tolerance)
    expected = jacrev(jacrev(maps.truth, args), args)(*free)
    for outer in (jacrev, jacfwd):
        close(outer(jacrev(maps.ours, args), args)(*free), expected, tolerance)
    along = tuple(numbers(*tensor.shape, seed=50 + i) for i, tensor in enumerate(free))
    product = [
        torch.stack([torch.tensordot(b, t, t.dim()) for b, t in zip(row, along, strict=True)]).sum(0)
        for row in expected
    ]

    def slope(*tensors: Tensor) -> Tensor:
        return jvp(maps.ours, tensors, along)[1]

    close(double_backward(maps.ours, free, along), product, tolerance)
    close(dual_over_reverse(maps.ours, free, along), product, tolerance)
    close(grad(slope, args)(*free), product, tolerance)
    twice = torch.stack([(p * t).sum() for p, t in zip(product, along, strict=True)]).sum()
    close(jvp(slope, free, along)[1], twice, tolerance)


CHECKED = [path for path in BUILT_IN if path.name not in ("transport-gamma-parameter", "transport-shared")]


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.name)
def test_gradgradcheck_of_the_built_in_problems(path: Path) -> None:
    maps = maps_of(path)
    tensors = tuple(tensor.clone().requires_grad_() for tensor in maps.free)
    assert gradgradcheck(
        maps.ours, tensors, check_fwd_over_rev=True, check_undefined_grad=False, fast_mode=True
    )


def test_both_sides_of_the_piecewise_penalties_are_tried() -> None:
    for penalty in ("huber", "truncated-quadratic"):
        u = idf.DeclarativeLayer(RobustPooling(penalty, SMOOTH[penalty]))(*POINTS)
        near = (u[:, :, None] - POINTS[0]).norm(dim=1) < SMOOTH[penalty]
        assert near.any()
        assert not near.all()


def test_every_path_there_is_is_tried() -> None:
    solvers = {path.options.get("linear_solver") for path in PATHS}
    backwards = {path.options.get("backward", "auto") for path in PATHS}
    assert set(SOLVERS) <= solvers
    assert set(BACKWARDS) - backwards == {"hand"}  # it has no second derivative: the tests below


BY_HAND = (
    Path("pooling", lambda: RobustPooling("welsch", None), (*POINTS, STRENGTHS)),
    Path("transport", lambda: OptimalTransport(None), (COSTS, STRENGTHS)),
)


def wanting_second(f: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Any]]:
    """Every way to ask for a second derivative of f."""

    def twice(x: Tensor) -> Tensor:
        return (grad(f)(x) ** 2).sum()

    return {
        "plain": lambda x: double_backward(f, (x,), (x,)),
        "autograd.functional": lambda x: torch.autograd.functional.hessian(f, x),
        "grad(grad)": grad(twice),
        "jacrev(jacrev)": jacrev(jacrev(f)),
        "hessian": hessian(f),
        "vmap(grad(grad))": lambda x: vmap(grad(twice))(torch.stack([x, 1.1 * x])),
        "jvp(grad)": lambda x: jvp(grad(f), (x,), (x,))[1],
        "jacfwd(jacfwd)": jacfwd(jacfwd(f)),
        "dual": lambda x: dual_over_reverse(f, (x,), (x,)),
    }


@pytest.mark.parametrize("path", BY_HAND, ids=lambda path: path.name)
@pytest.mark.parametrize("way", list(wanting_second(torch.sum)))
def test_the_hand_written_gradient_has_no_second_derivative_and_says_so(path: Path, way: str) -> None:
    x, strength = path.tensors

    def second(backward: str) -> Any:
        layer = idf.DeclarativeLayer(path.make(), backward=backward)
        return wanting_second(lambda x: (layer(x, strength) ** 2).sum())[way](x)

    with pytest.raises(idf.NotSupportedYetError, match="hand"):
        second("hand")
    assert max(leaf.abs().max() for leaf in tree_leaves(second("auto"))) > 1e-5


def test_the_truth_can_fail() -> None:
    """Steps from a point that is no solution are refused, and a constant lam is another truth than a moving one."""
    x, a = PLANE
    problem = Quartic()
    u = idf.solve(problem, x, a, in_dims=(0, None)).u.detach()
    with pytest.raises(AssertionError, match="away from a solution"):
        Attached(problem, u[0] + 0.01, (x[0], a))
    moving, frozen = (Attached(problem, u[0], (x[0], a), frozen=flag) for flag in (False, True))
    first, second = (jacrev(lambda x, t=t: t((x, a), {})[0])(x[0]) for t in (moving, frozen))
    assert (first - second).abs().max() > 1e-2

"""`Root` and `FixedPoint`: values, derivatives in every mode against the dense formula and differences, errors."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

import implicitdiff as idf
from tests.equation_problems import (
    Cubic,
    Equilibrium,
    Pair,
    Tree,
    cubic_inputs,
    dense_jacobian,
    draw,
    tree_inputs,
)

BACKWARDS = ("auto", "dense", "matrix-free")


def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def test_roots_are_roots_and_have_no_multipliers_and_no_value() -> None:
    layer = idf.DeclarativeLayer(Cubic(), in_dims=(None, 0))
    W, b = cubic_inputs(5)
    found = layer.solve(W, b)
    residual = torch.stack([layer.problem.residual(u, W, x) for u, x in zip(found.u, b, strict=True)])
    assert float(residual.detach().abs().max()) < 1e-14
    assert found.value is None
    assert found.equality_multipliers is None
    assert found.status.tolist() == [0] * 5
    assert float(found.residual.max()) < 1e-14


@pytest.mark.parametrize("backward", BACKWARDS)
def test_first_and_second_order_of_a_root(backward: str) -> None:
    problem = Cubic()
    layer = idf.DeclarativeLayer(problem, in_dims=(None, 0), backward=backward)
    inputs = (*differentiable(*cubic_inputs()), problem.s)

    def of(W: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return layer(W, b)

    assert gradcheck(layer, inputs[:2], check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(of, inputs, fast_mode=True)
    assert gradgradcheck(of, inputs, fast_mode=True)
    u = layer(*inputs[:2])
    (found,) = torch.autograd.grad(u[1, 2], inputs[1])
    truth = dense_jacobian(problem, u[1].detach(), (inputs[0].detach(), inputs[1][1].detach()), 1)
    torch.testing.assert_close(found[1], truth[2].detach(), rtol=1e-11, atol=1e-12)
    assert not bool(found[0].any())


@pytest.mark.parametrize("backward", BACKWARDS)
def test_first_and_second_order_of_a_fixed_point(backward: str) -> None:
    problem = Equilibrium()
    layer = idf.DeclarativeLayer(problem, backward=backward)
    x = differentiable(draw(3, 4))[0]
    inputs = (x, problem.mix, problem.bias)
    assert gradcheck(lambda *_: layer(x), inputs, fast_mode=True)
    assert gradgradcheck(lambda *_: layer(x), inputs, fast_mode=True)
    (found,) = torch.autograd.grad(layer(x)[2, 1], x)
    truth = dense_jacobian(problem, layer(x)[2].detach(), (x[2].detach(),), 0)
    torch.testing.assert_close(found[2], truth[1].detach(), rtol=1e-11, atol=1e-12)


def test_unrolled_newton_steps() -> None:
    problem = Cubic()
    (W, b) = differentiable(*cubic_inputs())
    options = {"optimizer": idf.optimizers.Newton(max_iter=6), "in_dims": (None, 0)}
    unrolled = idf.DeclarativeLayer(problem, backward="unrolled", **options)(W, b)
    implicit = idf.DeclarativeLayer(problem, **options)(W, b)
    cotangent = draw(2, 3, seed=9)
    found = torch.autograd.grad(unrolled, (W, b, problem.s), cotangent, create_graph=True)
    truth = torch.autograd.grad(implicit, (W, b, problem.s), cotangent, create_graph=True)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    (second,) = torch.autograd.grad(found[1].square().sum(), W)
    (other,) = torch.autograd.grad(truth[1].square().sum(), W)
    torch.testing.assert_close(second, other, rtol=1e-9, atol=1e-10)


def test_pytrees_of_unknowns_equations_and_inputs() -> None:
    layer = idf.DeclarativeLayer(Tree(), in_dims=({"p": 0, "q": 0}, None))
    (tree, power) = tree_inputs()
    leaves = differentiable(tree["p"], tree["q"])

    def of(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        u = layer({"p": p, "q": q}, power)
        return u["a"], u["t"]

    assert gradcheck(of, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(of, leaves, fast_mode=True)
    pair = idf.DeclarativeLayer(Pair())
    (x,) = differentiable(0.5 * draw(2, 3, 2, seed=8))
    a, b = pair(x)
    assert a.shape == (2, 2)
    assert b.shape == (2, 3, 2)
    assert gradcheck(pair, (x,), check_forward_ad=True)


def test_transforms_agree_with_the_dense_formula() -> None:
    problem = Cubic()
    one = idf.DeclarativeLayer(problem, in_dims=None)
    W, b = cubic_inputs()
    u = one(W, b[0]).detach()
    truth = dense_jacobian(problem, u, (W, b[0]), 1).detach()
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(one, argnums=1)(W, b[0]), truth, rtol=1e-11, atol=1e-12)
    whole = vmap(jacrev(one, argnums=1), in_dims=(None, 0))(W, b)
    torch.testing.assert_close(whole[0], truth, rtol=1e-11, atol=1e-12)
    several = vmap(one, in_dims=(0, None))(torch.stack([W, 2 * W]), b[0])
    torch.testing.assert_close(several[1], one(2 * W, b[0]), rtol=1e-12, atol=1e-13)

    def loss(b: Tensor) -> Tensor:
        return one(W, b).square().sum()

    hessians = [outer(inner(loss))(b[1]) for outer in (jacrev, jacfwd) for inner in (jacrev, jacfwd)]
    numeric = torch.autograd.functional.hessian(loss, b[1])
    for hessian in hessians:
        torch.testing.assert_close(hessian, numeric, rtol=1e-10, atol=1e-11)
    step = 1e-5 * torch.eye(3, dtype=torch.float64)
    differences = torch.stack([(grad(loss)(b[1] + d) - grad(loss)(b[1] - d)) / 2e-5 for d in step])
    torch.testing.assert_close(hessians[0], differences, rtol=1e-6, atol=1e-8)
    per_sample = vmap(
        grad(lambda s, b: functional_call(one, {"problem.s": s}, (W, b)).sum()), in_dims=(None, 0)
    )
    rows = per_sample(problem.s.detach(), b)
    for row, sample in zip(rows, b, strict=True):
        (alone,) = torch.autograd.grad(one(W, sample).sum(), problem.s)
        torch.testing.assert_close(row, alone, rtol=1e-11, atol=1e-12)


def test_jacobian_and_derivatives() -> None:
    problem = Cubic()
    W, b = cubic_inputs(2)
    by_W, by_b = idf.jacobian(problem, W, b, in_dims=(None, 0))
    u = idf.DeclarativeLayer(problem, in_dims=(None, 0))(W, b).detach()
    for k in range(2):
        truths = [dense_jacobian(problem, u[k], (W, b[k]), which).detach() for which in (0, 1)]
        torch.testing.assert_close(by_W[k].reshape(3, 9), truths[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(by_b[k], truths[1], rtol=1e-11, atol=1e-12)
    at = idf.derivatives(problem, u[0], W, b[0])
    jacobian = jacrev(lambda v: problem.residual(v, W, b[0]))(u[0])
    torch.testing.assert_close(at.H, jacobian.detach(), rtol=1e-12, atol=1e-13)
    assert at.A.shape == (0, 3)
    assert at.C.shape == (0, 12)
    torch.testing.assert_close(-torch.linalg.inv(at.H) @ at.B_by_input["b"], by_b[0], rtol=1e-11, atol=1e-12)
    assert "D_u r" in str(at)


@pytest.mark.parametrize("recorder", ["aot_eager"])
def test_compiled_layers_are_one_graph(recorder: str) -> None:
    layer = idf.DeclarativeLayer(Equilibrium())
    (x,) = differentiable(draw(2, 4))
    compiled = torch.compile(lambda x: layer(x).square().sum(), fullgraph=True, backend=recorder)
    (found,) = torch.autograd.grad(compiled(x), x)
    (truth,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(found, truth)
    exported = torch.export.export(layer, (x.detach(),)).module()
    assert torch.equal(exported(x.detach()), layer(x).detach())


class Flat(idf.Root):
    """u^2 = x: at x = 0 the root is 0, where the Jacobian is singular."""

    def residual(self, u, x):
        return u * u - x

    def init(self, x):
        return 1 + x.abs()

    def solve(self, x):
        return x.sqrt()


def test_a_singular_jacobian_is_an_error_of_its_sample_alone() -> None:
    x = torch.tensor([[4.0], [0.0], [9.0]], dtype=torch.float64, requires_grad=True)
    with pytest.raises(idf.SingularError, match=r"sample 1 of 3: the Jacobian of the residual is singular"):
        idf.DeclarativeLayer(Flat())(x).sum().backward()
    for policy, filler in (("nan", torch.nan), ("zero", 0.0)):
        (found,) = torch.autograd.grad(idf.DeclarativeLayer(Flat(), on_failure=policy)(x).sum(), x)
        torch.testing.assert_close(
            found, torch.tensor([[0.25], [filler], [1 / 6]], dtype=torch.float64), equal_nan=True
        )
    with idf.record() as events, pytest.warns(idf.OptimalityWarning, match="was damped"):
        (found,) = torch.autograd.grad(idf.DeclarativeLayer(Flat(), on_failure="damp")(x).sum(), x)
    torch.testing.assert_close(found, torch.tensor([[0.25], [0.0], [1 / 6]], dtype=torch.float64))
    assert [event.samples for event in events] == [(1,)] or [list(event.samples) for event in events] == [[1]]


class Nowhere(idf.Root):
    """u^2 + x = 0: no root for x > 0."""

    def residual(self, u, x):
        return u * u + x

    def init(self, x):
        return torch.ones_like(x)


def test_a_system_without_a_root_is_not_converged() -> None:
    x = torch.tensor([[1.0, -4.0], [-1.0, -9.0]], dtype=torch.float64)
    with pytest.raises(idf.ConvergenceError, match=r"sample 0 of 2: \|residual\| of output 0"):
        idf.DeclarativeLayer(Nowhere())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", idf.OptimalityWarning)
        found = idf.DeclarativeLayer(Nowhere(), on_failure="warn").solve(x)
    assert found.status.tolist() == [idf.Status.NOT_CONVERGED, idf.Status.OK]
    torch.testing.assert_close(found.u[1], torch.tensor([1.0, 3.0], dtype=torch.float64))


class Wrong(Flat):
    """A solve that is off by 1 %."""

    def solve(self, x):
        return 1.01 * x.sqrt()


def test_a_wrong_solution_is_refused() -> None:
    x = torch.tensor([[4.0], [9.0]], dtype=torch.float64)
    with pytest.raises(idf.NotOptimalError, match="residual"):
        idf.DeclarativeLayer(Wrong())(x)
    report = idf.check(Wrong(), x)
    assert not report.ok


@pytest.mark.parametrize(
    ("problem", "inputs", "in_dims"),
    [
        (Cubic(), cubic_inputs(), (None, 0)),
        (Tree(), tree_inputs(), ({"p": 0, "q": 0}, None)),
        (Equilibrium(), (draw(2, 4),), 0),
        (Pair(), (0.5 * draw(2, 3, 2),), 0),
    ],
)
def test_check_passes_and_knows_it_is_a_system(problem: Any, inputs: Any, in_dims: Any) -> None:
    report = idf.check(problem, *inputs, in_dims=in_dims)
    assert report.ok, report
    names = [row.name for row in report.rows]
    assert "residual" in names
    assert "regular Jacobian" in names
    assert "stationarity" not in names
    assert "second order" not in names


def test_explain_speaks_of_the_jacobian() -> None:
    found = idf.explain(Equilibrium(), draw(2, 4))
    assert found.square == "step"
    assert "J = D_u r" in str(found)
    assert "A = D_u h" not in str(found)
    assert "Anderson, then Newton" in found.forward
    assert r"J^\top s &= v" in found.to_latex()
    assert idf.explain(Cubic(), *cubic_inputs(), in_dims=(None, 0)).forward.startswith("Newton: ")


def test_compare_runs_every_backward() -> None:
    found = idf.compare(Equilibrium(), draw(2, 4), backwards=("dense", "auto", "matrix-free", "unrolled"))
    assert max(row.error for row in found.rows) < 1e-12


def test_one_step_gradients_are_asked_for_by_name() -> None:
    problem = Equilibrium(gain=0.05)
    (x,) = differentiable(draw(2, 4))
    (found,) = torch.autograd.grad(idf.DeclarativeLayer(problem, backward="approximate")(x).sum(), x)
    u = idf.DeclarativeLayer(problem)(x).detach()
    (truth,) = torch.autograd.grad(
        torch.stack([problem.step(a, b) for a, b in zip(u, x, strict=True)]).sum(), x
    )
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13)
    (exact,) = torch.autograd.grad(idf.DeclarativeLayer(problem)(x).sum(), x)
    assert 1e-3 < float((found - exact).abs().max()) < 0.3
    with pytest.raises(idf.OptionError, match="is a Root"):
        idf.DeclarativeLayer(Cubic(), backward="approximate")


def test_forward_methods() -> None:
    x = draw(3, 4)
    steep = Equilibrium(gain=3.0)
    newton = idf.DeclarativeLayer(Equilibrium(), optimizer=idf.optimizers.Newton()).solve(x)
    for optimizer in (
        idf.optimizers.Anderson(),
        idf.optimizers.Anderson(memory=0, patience=100),
        idf.optimizers.MultiStart(idf.optimizers.Newton(), starts=2),
    ):
        found = idf.DeclarativeLayer(Equilibrium(), optimizer=optimizer, optimality_tol=1e-12).solve(x)
        torch.testing.assert_close(found.u, newton.u, rtol=1e-10, atol=1e-11)
    found = idf.DeclarativeLayer(steep).solve(x)  # no contraction
    assert found.status.tolist() == [0, 0, 0]
    for row, sample in zip(found.u, x, strict=True):
        assert float((row - steep.step(row, sample)).detach().abs().max()) < 1e-12
    alone = idf.DeclarativeLayer(steep).solve(x[1:2])
    torch.testing.assert_close(alone.u[0], found.u[1], rtol=1e-11, atol=1e-12)
    with pytest.raises(idf.OptionError, match="LBFGS minimises"):
        idf.DeclarativeLayer(steep, optimizer=idf.optimizers.LBFGS())(x)

    class Bowl(idf.Problem):
        def objective(self, u, x):
            return ((u - x) ** 2).sum()

        def init(self, x):
            return x * 0

    with pytest.raises(idf.OptionError, match="Anderson is for FixedPoint"):
        idf.DeclarativeLayer(Bowl(), optimizer=idf.optimizers.Anderson())(x)


def test_empty_batches_warm_starts_float32_and_hand_written_gradients() -> None:
    W, b = cubic_inputs(3)
    layer = idf.DeclarativeLayer(Cubic(), in_dims=(None, 0))
    (leaf,) = differentiable(W)
    empty = layer(leaf, b[:0])
    assert empty.shape == (0, 3)
    (zero,) = torch.autograd.grad(empty.sum(), leaf)
    assert not bool(zero.any())
    first = layer.solve(W, b)
    assert layer.solve(W, b, init=first.u.detach()).iterations.tolist() == [0, 0, 0]
    single = Cubic().float()
    found = idf.DeclarativeLayer(single, in_dims=(None, 0))(W.float(), b.float())
    torch.testing.assert_close(found.double(), first.u, rtol=1e-5, atol=1e-6)

    class ByHand(Flat):
        def vjp(self, u, v, x):
            return v / (2 * u)

    (x,) = differentiable(torch.tensor([[4.0], [9.0]], dtype=torch.float64))
    (found,) = torch.autograd.grad(idf.DeclarativeLayer(ByHand(), backward="hand")(x).sum(), x)
    torch.testing.assert_close(found, 0.5 / x.detach().sqrt())


def test_declarations_that_do_not_fit_are_refused() -> None:
    class TooMany(idf.Root):
        def residual(self, u, x):
            return torch.cat([u, u[:1]]) - 1 + x.sum()

        def init(self, x):
            return x[:2]

    class Misshapen(idf.FixedPoint):
        def step(self, u, x):
            return x

        def init(self, x):
            return x[:2]

    class Restructured(Misshapen):
        def step(self, u, x):
            return (u,)

    class Unused(idf.Root):
        def residual(self, u, x):
            return u[0] - x, x * 2

        def init(self, x):
            return x, x

    class Idle(idf.Root):
        def residual(self, u, x):
            return u[0] - x, u[0] * 2

        def init(self, x):
            return x, x

    class Both(idf.Root):
        def objective(self, u, x):
            return u.sum()

        def residual(self, u, x):
            return u

        def init(self, x):
            return x

    class Nothing(idf.FixedPoint):
        def init(self, x):
            return x

    x = draw(2, 3)
    for problem, words in (
        (TooMany(), r"returned 3 equations \(\(3,\)\) for 2 unknowns"),
        (Misshapen(), r"Misshapen.step returned \(3,\), but the variable is \(2,\)"),
        (Restructured(), "returned the structure"),
        (Unused(), r"Unused.residual \(output 1\) does not depend on the variable"),
        (Idle(), r"does not depend on the variable u\[1\]"),
        (Both(), "declares objective, but an idf.Root has a residual"),
        (Nothing(), r"does not declare step: add a method step \(see idf.FixedPoint.step\)"),
    ):
        with pytest.raises(idf.ProblemDefinitionError, match=words):
            idf.DeclarativeLayer(problem)(x)


class Divided(idf.Root):
    """W u + u^3 = b with u outside of reach where b is not finite; J singular where W is 0 and u is 0."""

    def residual(self, u, W, b):
        return W @ u + u**3 - b

    def init(self, W, b):
        return b * 0


@pytest.mark.parametrize("backward", ["auto", "dense", "matrix-free"])
def test_a_bad_sample_leaves_the_bits_of_the_others_alone(backward: str) -> None:
    W = 2 * torch.eye(3, dtype=torch.float64) + 0.3 * draw(3, 3, 3)
    b = draw(3, 3, seed=1)
    spoilt_W, spoilt_b = W.clone(), b.clone()
    spoilt_W[1], spoilt_b[1] = 0.0, 0.0
    found = []
    for inputs in ((W, b), (spoilt_W, spoilt_b)):
        leaves = differentiable(*inputs)
        u = idf.DeclarativeLayer(Divided(), on_failure="nan", backward=backward)(*leaves)
        found.append((u, *torch.autograd.grad(u.nan_to_num().square().sum(), leaves)))
    for good, beside in zip(*found, strict=True):
        assert torch.equal(good[[0, 2]], beside[[0, 2]])


def test_fixed_points_do_not_see_each_other() -> None:
    x = draw(3, 4)
    other = x.clone()
    other[1] *= 40
    layer = idf.DeclarativeLayer(Equilibrium(gain=1.5), on_failure="warn")
    first, second = layer.solve(x), layer.solve(other)
    for name in ("u", "iterations", "residual", "status"):
        assert torch.equal(getattr(first, name)[[0, 2]], getattr(second, name)[[0, 2]]), name

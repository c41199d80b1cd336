"""`Root` and `FixedPoint`: values, derivatives in every mode against the dense formula and differences, errors."""

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
    torch.testing.assert_close(at.Dy, torch.cat([by_W[0].reshape(3, 9), by_b[0]], 1), rtol=1e-10, atol=1e-11)
    assert "D_Y r" in str(at)


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

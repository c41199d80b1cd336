"""torch.export, make_fx, tensors without data, selective checkpointing: what looks at operators, not at values."""

import functools
import gc
import io
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import implicitdiff as idf
from implicitdiff.problems import OptimalTransport
from tests.recorded_problems import NumpyQuartic, Quartic, quartic_inputs

DYNAMIC = (({0: torch.export.Dim("batch")}, None),)  # one entry for the layer's *inputs


def exported(layer, strict=False):
    inputs = tuple(tensor.detach() for tensor in quartic_inputs())
    return torch.export.export(layer, inputs, dynamic_shapes=DYNAMIC, strict=strict)


def gradients(module, inputs, parameters):
    """The output of a module and the gradients of a loss."""
    found = torch.autograd.grad(module(*inputs).pow(3).sum(), (*inputs, *parameters))
    return module(*inputs), *found


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("problem", [Quartic, NumpyQuartic])
def test_an_exported_layer_solves_any_batch_and_has_gradients(problem, strict):
    layer = idf.DeclarativeLayer(problem(), in_dims=(0, None))
    program = exported(layer, strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("implicitdiff.solve.default") == 1
    module = program.module()
    for batch in (1, 4, 9):
        inputs = quartic_inputs(batch, seed=batch)
        expected = gradients(layer, inputs, list(layer.parameters()))
        for mine, theirs in zip(gradients(module, inputs, list(module.parameters())), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_saved_and_loaded_in_the_same_process():
    layer = idf.DeclarativeLayer(NumpyQuartic(), in_dims=(0, None))
    file = io.BytesIO()
    torch.export.save(exported(layer), file)
    file.seek(0)
    module = torch.export.load(file).module()
    inputs = quartic_inputs(6, seed=3)
    expected = gradients(layer, inputs, [])
    for mine, theirs in zip(gradients(module, inputs, []), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_loaded_in_another_process_it_says_why_it_cannot_run(tmp_path):
    torch.export.save(exported(idf.DeclarativeLayer(Quartic(), in_dims=(0, None))), tmp_path / "layer.pt2")
    script = (
        "import sys, torch, implicitdiff\n"
        "module = torch.export.load(sys.argv[1]).module()\n"
        "try:\n"
        "    module(torch.ones(2, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))\n"
        "except implicitdiff.ImplicitDiffError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "layer.pt2")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "StaleGraphError" in found.stdout, found.stderr
    assert "in the process that made it" in found.stdout


def test_a_graph_whose_layer_is_gone_or_changed_raises():
    layer = idf.DeclarativeLayer(Quartic(), in_dims=(0, None))
    module = exported(layer).module()
    inputs = quartic_inputs()
    layer.problem.weight = 7.0
    with pytest.raises(idf.ImplicitDiffError, match="has changed since this graph was compiled or exported"):
        module(*inputs)
    layer.problem.weight = 2.0
    torch.testing.assert_close(module(*inputs), layer(*inputs), rtol=1e-12, atol=1e-12)
    del layer
    gc.collect()
    with pytest.raises(idf.ImplicitDiffError, match="as long as its layer lives"):
        module(*inputs)


def test_an_exported_layer_refuses_what_would_be_silently_zero():
    layer = idf.DeclarativeLayer(Quartic(), in_dims=(0, None))
    module = exported(layer).module()
    x, a = (tensor.detach() for tensor in quartic_inputs())
    with pytest.raises(idf.NotSupportedYetError, match=r"torch\.func"):
        torch.func.jvp(lambda x: module(x, a), (x,), (x * x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x * x)
        found = torch.autograd.forward_ad.unpack_dual(module(dual, a)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(layer(dual, a)).tangent
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_make_fx_keeps_the_solve_as_an_operator():
    layer = idf.DeclarativeLayer(NumpyQuartic(), in_dims=(0, None))
    x, a = (tensor.detach() for tensor in quartic_inputs())
    graph = make_fx(layer)(x, a)
    other = x.flip(0) * 1.3
    torch.testing.assert_close(graph(other, a), layer(other, a), rtol=1e-12, atol=1e-12)
    assert not torch.equal(graph(other, a), graph(x, a))


def test_fake_tensors_go_through_forward_and_backward():
    layer = idf.DeclarativeLayer(NumpyQuartic(), in_dims=(0, None))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, a = (mode.from_tensor(tensor.detach()).requires_grad_() for tensor in quartic_inputs())
        before = NumpyQuartic.calls
        found = layer.solve(x, a)
        (found.u.sum() + found.value.sum() + found.equality_multipliers.sum()).backward()
        assert NumpyQuartic.calls == before
        assert found.u.shape == x.grad.shape == (5, 3)
        assert found.equality_multipliers.shape == found.value.shape == found.status.shape == (5,)
        assert (found.status.dtype, found.iterations.dtype) == (torch.int8, torch.int64)
        assert a.grad.shape == (3,)


def test_the_fake_outputs_are_like_the_real_ones():
    layer = idf.DeclarativeLayer(OptimalTransport(gamma=0.5))
    cost = torch.rand(2, 3, 4)
    real = layer.solve(cost)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = layer.solve(mode.from_tensor(cost))
    for name in ("u", "equality_multipliers", "value", "status", "iterations", "residual"):
        for a, b in zip(
            *(torch.utils._pytree.tree_leaves(getattr(s, name)) for s in (real, fake)), strict=True
        ):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), name


def test_meta_tensors_go_through_forward_and_backward():
    layer = idf.DeclarativeLayer(NumpyQuartic(), in_dims=(0, None)).to("meta")
    x, a = (tensor.detach().to("meta").requires_grad_() for tensor in quartic_inputs())
    y = layer(x, a)
    y.sum().backward()
    assert y.device.type == x.grad.device.type == "meta"
    assert (y.shape, x.grad.shape, a.grad.shape) == ((5, 3), (5, 3), (3,))
    assert layer.problem.theta.grad.shape == ()


def policy(ctx, operator, *args, **kwargs):
    saved = operator == torch.ops.implicitdiff.solve.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpointing_solves_once():
    layer = idf.DeclarativeLayer(NumpyQuartic(), in_dims=(0, None))
    inputs, parameters = quartic_inputs(), list(layer.parameters())
    tensors = (*inputs, *parameters)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def loss(model, *inputs):
        return (torch.tanh(model(*inputs)) * inputs[0]).sum()

    expected = torch.autograd.grad(loss(layer, *inputs), tensors)
    for context, solves in ((contexts, 1), (None, 2)):
        given = {"context_fn": context} if context else {}
        before = NumpyQuartic.calls
        y = checkpoint(functools.partial(loss, layer), *inputs, use_reentrant=False, **given)
        found = torch.autograd.grad(y, tensors)
        assert NumpyQuartic.calls - before == solves
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_operators_keep_torch_librarys_rules():
    layer = idf.DeclarativeLayer(Quartic(), in_dims=(0, None))
    program = exported(layer)
    node = next(n for n in program.graph.nodes if "implicitdiff.solve" in str(n.target))
    x, a = (tensor.detach() for tensor in quartic_inputs())
    theta = [x, a, layer.problem.theta.detach(), layer.problem.offsets[0]]
    flags = [True, *(False,) * (len(theta) - 1)]
    assert len(node.args[2]) == len(flags)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.implicitdiff.solve.default, (node.args[0], 5, flags, [], theta), test_utils=checks
    )

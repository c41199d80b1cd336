"""A test of each private, experimental or changing name of torch that the library uses, by name.

If a release of torch moves or changes one of them, the test that fails says which: mend it in
`implicitdiff/torch_private.py`. `test_house_torch.py` sees to it that no other file uses such names.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, vjp, vmap
from torch.utils.checkpoint import checkpoint

from implicitdiff import torch_private
from implicitdiff.torch_private import pytree
from tests.torch_private_checks import CHECKS, floats, of


@of("HOST")
def values_on_the_host_are_readable() -> None:
    assert torch.ones(2, device=torch_private.HOST).numpy().sum() == 2


@of("FakeTensor", "FakeTensorMode", "is_fake")
def fake_tensors_have_shapes_only() -> None:
    real = floats(1, 2)
    with torch_private.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(real)
        total = fake + real
    assert isinstance(total, torch_private.FakeTensor)
    assert total.shape == (2,)
    assert [torch_private.is_fake(x) for x in (fake, real.to("meta"), real)] == [True, True, False]


@of("DataDependentOutputException", "DynamicOutputShapeException")
def fake_tensors_refuse_questions_about_values() -> None:
    with torch_private.FakeTensorMode() as mode:
        fake = mode.from_tensor(floats(1, 0, 2))
        with pytest.raises(torch_private.DataDependentOutputException):
            torch.ops.aten._local_scalar_dense(fake[0])
        with pytest.raises(torch_private.DynamicOutputShapeException):
            fake.nonzero()


class Names(torch_private.TorchDispatchMode):
    """The operations that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@of("TorchDispatchMode", "OpOverload", "schema_of", "packet_of", "is_reduction")
def a_dispatch_mode_sees_operations_and_their_schemas() -> None:
    with Names() as names:
        x = floats(1, 2)
        x.add_(1).sum()
    add, total = names.seen[-2:]
    assert isinstance(add, torch_private.OpOverload)
    assert torch_private.schema_of(add).name == "aten::add_"
    assert torch_private.schema_of(add).is_mutable
    assert torch_private.schema_of(len) is None
    assert torch_private.packet_of(total) is torch.ops.aten.sum
    assert not torch_private.is_reduction(add)
    assert torch_private.is_reduction(total) == hasattr(torch.Tag, "reduction")


@of("HigherOrderOperator")
def control_flow_is_a_higher_order_operator() -> None:
    assert isinstance(torch.ops.higher_order.cond, torch_private.HigherOrderOperator)
    assert not isinstance(torch.ops.aten.add.Tensor, torch_private.HigherOrderOperator)


@of("clean_context")
def every_context_of_the_caller_is_left_and_entered_again() -> None:
    x = floats(1, 2)
    found = []

    def look(value: Tensor) -> Tensor:
        with torch_private.clean_context():
            own = torch.ones(2, 2)
            found.append((own @ own).dtype)
            found.append(bool(own.sum() == 4))  # a value is readable: no fake mode, no transform
        assert torch_private.is_wrapped(value)
        return value.sum()

    names = Names()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), names:
        with torch_private.clean_context():
            assert not torch.is_inference_mode_enabled()
            assert torch.ones(2).is_inference() is False
        assert torch.is_inference_mode_enabled()
        assert [str(name) for name in names.seen] == []
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grad(look)(x)
        vmap(look)(x[None])
        with pytest.raises(ZeroDivisionError), torch_private.clean_context():
            raise ZeroDivisionError
        assert torch.is_autocast_enabled("cpu")
        with torch_private.clean_context(), torch.autocast("cpu", dtype=torch.float16):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16  # one of its own still works
    assert not torch.is_autocast_enabled("cpu")
    assert found == [torch.float32, True] * 2


@of("make_fx", "current_graph", "values_are_readable")
def a_graph_is_known_while_it_is_written() -> None:
    graphs = []

    def function(x: Tensor) -> Tensor:
        graphs.append((torch_private.current_graph(), torch_private.values_are_readable()))
        return x.sin()

    made = torch_private.make_fx(functionalize(function))(floats(1, 2))
    assert [node.target for node in made.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.sin.default
    ]
    assert isinstance(graphs[0][0], torch.fx.Graph)
    assert graphs[0][1] is False
    assert torch_private.current_graph() is None
    assert torch_private.values_are_readable()


@of("compiled_functions_inlined")
def a_compiled_function_is_walked_through() -> None:
    compiled = torch.compile(lambda x: x.sin().cos(), backend="eager")
    with torch_private.compiled_functions_inlined():
        made = torch_private.make_fx(lambda x: compiled(x) + 1)(floats(1, 2))
    names = [str(node.target) for node in made.graph.nodes if node.op == "call_function"]
    assert names == ["aten.sin.default", "aten.cos.default", "aten.add.Tensor"]


@of("is_wrapped", "first_entry")
def wrappers_are_known_and_come_off() -> None:
    x = floats(1, 2, 3)
    found = []

    def look(value: Tensor) -> Tensor:
        found.append((torch_private.is_wrapped(value), torch_private.first_entry(value)))
        return value.sum()

    grad(lambda y: vmap(look, in_dims=1)(y[None]).sum())(x)
    vmap(vmap(look))(torch.stack([x, x + 1])[..., None])
    assert not torch_private.is_wrapped(x)
    assert [(wrapped, entry.tolist()) for wrapped, entry in found] == [(True, [1.0]), (True, [1.0])]


@of("nested_forward_mode", "has_tangent", "tangent_free")
def forward_mode_works_inside_the_jvp_of_a_function() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            with torch_private.nested_forward_mode():
                (x,) = map(torch_private.tangent_free, ctx.saved_tensors)
                return 3 * x**2 * tangent

    x = floats(2.0)
    slope = torch.func.jvp(
        lambda y: torch.func.jvp(Cube.apply, (y,), (torch.ones_like(y),))[1], (x,), (floats(1.0),)
    )
    assert slope[1].item() == pytest.approx(12.0)
    assert not torch_private.has_tangent(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, floats(1.0))
        assert torch_private.has_tangent(dual)
        assert not torch_private.has_tangent(torch_private.tangent_free(dual))


@of("is_grad_batched", "grad_batched_level", "lower_grad_batched", "raise_grad_batched")
def the_older_vmap_of_is_grads_batched_is_seen() -> None:
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Tensor:
            level = torch_private.grad_batched_level()
            plain = torch_private.lower_grad_batched(v, level)
            seen.append((torch_private.is_grad_batched(v), level, plain.shape))
            return torch_private.raise_grad_batched(2 * plain, level)

    x = floats(1, 2).requires_grad_()
    rows = torch.autograd.grad(Double.apply(x), x, torch.eye(2, dtype=x.dtype), is_grads_batched=True)[0]
    assert rows.tolist() == [[2, 0], [0, 2]]
    assert seen == [(True, 1, (2, 2))]
    assert not torch_private.is_grad_batched(x)
    assert torch_private.grad_batched_level() == 0


@of("writes_to")
def writes_are_counted() -> None:
    x = floats(1, 2)
    before = torch_private.writes_to(x)
    x[:1].mul_(2.0)
    assert torch_private.writes_to(x.detach()) == torch_private.writes_to(x) == before + 1


@of("is_view", "has_storage", "storage_key", "sparse_parts")
def memory_and_views_are_known() -> None:
    x = floats(1, 0, 2)
    assert torch_private.is_view(x[1:])
    assert not torch_private.is_view(x.clone())
    assert (
        torch_private.storage_key(x[1:])
        == torch_private.storage_key(x)
        != torch_private.storage_key(x.clone())
    )
    assert torch_private.storage_key(x.to("meta")) != torch_private.storage_key(x.to("meta") + 1)
    assert torch_private.has_storage(x)
    assert torch_private.has_storage(x.to("meta"))
    sparse = x.to_sparse()
    assert not torch_private.has_storage(sparse)
    indices, values = torch_private.sparse_parts(sparse)
    assert (indices.tolist(), values.tolist()) == ([[0, 2]], [1, 2])


@of("pytree", "broadcast_prefix")
def trees_are_taken_apart_and_put_together() -> None:
    tree = {"b": (1, None), "a": [2]}
    leaves, spec = pytree.tree_flatten(tree)
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert pytree.tree_leaves(pytree.tree_map(lambda leaf: (leaf,), tree)) == leaves
    assert torch_private.broadcast_prefix(0, spec) == [0] * len(leaves)
    assert torch_private.broadcast_prefix([0], spec) is None


@of("synchronize")
def waiting_for_the_host_is_nothing_and_every_accelerator_is_waited_for() -> None:
    torch_private.synchronize(torch_private.HOST)
    if torch.accelerator.is_available():
        torch_private.synchronize(torch.ones(1, device=torch.accelerator.current_accelerator()).device)


@of("without_saved_tensor_hooks")
def hooks_rest_and_come_back() -> None:
    hooks_rest(torch_private.without_saved_tensor_hooks)


def hooks_rest(rest: Callable[[], Any]) -> None:
    """What `without_saved_tensor_hooks` does, in the way of any release."""
    x, packed = floats(1, 2).requires_grad_(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append("outer") or t, lambda t: t)
    inner = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append("inner") or t, lambda t: t)
    other: list[str] = []

    def elsewhere() -> None:
        """In another thread, where the hooks of this one say nothing and its own are refused as ever."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                vjp(torch.exp, x.detach())
        except RuntimeError as error:
            other.append(str(error))

    with rest():  # there are none
        x.exp()
    with hooks, inner:
        x.exp()
        assert packed == ["inner"]
        with rest(), rest():
            y = x.exp()
            assert vjp(torch.exp, x.detach())[1](torch.ones_like(x))[0].shape == (2,)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert packed == ["inner"]
        with pytest.raises(RuntimeError, match="saved tensor hooks"):
            vjp(torch.exp, x.detach())
        with pytest.raises(ZeroDivisionError), rest():
            raise ZeroDivisionError
        x.exp()
    with hooks:
        x.exp()
    assert packed == ["inner", "inner", "outer"]
    assert "saved tensor hooks" in other[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], x.detach().exp())
    grad(lambda t: t.exp().sum())(x.detach())  # torch.func itself is as before

    def resting(t: Tensor) -> Tensor:
        with rest():
            return t.exp().sin()

    value = checkpoint(resting, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], (x.exp() * x.exp().cos()).detach())


@pytest.mark.parametrize("name", sorted(torch_private.__all__))
def test_private_name(name: str) -> None:
    assert name in CHECKS, f"write a check of torch_private.{name}"
    CHECKS[name]()


def test_every_check_is_of_a_name_that_exists() -> None:
    assert set(CHECKS) == set(torch_private.__all__)


def test_hooks_that_cannot_be_read_rest_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of torch 2.6, which the newer releases can go too."""
    monkeypatch.setattr(torch_private, "_HOOKS_CAN_BE_READ", False)
    before = torch.autograd.graph.disable_saved_tensors_hooks
    hooks_rest(torch_private.without_saved_tensor_hooks)
    assert torch.autograd.graph.disable_saved_tensors_hooks is before

"""The register of checks of private names of torch, and those of the names that look for recorders and levels.

In: nothing. Out: `CHECKS`, which `test_torch_private.py` completes and runs.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from implicitdiff import torch_private

Check = Callable[[], None]
CHECKS: dict[str, Check] = {}


def of(*names: str) -> Callable[[Check], Check]:
    """Register the check of these names."""

    def register(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return register


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@of("autocast_anywhere", "autocast_enabled", "without_autocast")
def autocast_is_seen_and_switched_off() -> None:
    assert not torch_private.autocast_enabled("cpu")
    assert not torch_private.autocast_enabled("meta")
    assert not torch_private.autocast_anywhere()
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch_private.autocast_anywhere()
        assert torch_private.autocast_enabled("cpu")
        assert (x @ x).dtype == torch.bfloat16
        with torch_private.without_autocast("cpu"), torch_private.without_autocast("meta"):
            assert (x @ x).dtype == torch.float32


@of("only_eager")
def anything_beside_eager_code_is_seen() -> None:
    x, seen = floats(1, 2), []

    def look(*given: Tensor) -> Tensor:
        seen.append(torch_private.only_eager(x, (*given, None)))
        return given[0] * 2

    assert not torch_private.only_eager(x, (x,)), "a derivative of the derivative may be asked for"
    with torch.no_grad():
        assert torch_private.only_eager(x, (x, None))
        assert not torch_private.only_eager(x.to("meta"), (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            look(x)
        vmap(look)(x)
        torch_private.make_fx(look)(x)
        with torch.autograd.forward_ad.dual_level():
            look(torch.autograd.forward_ad.make_dual(x, x))
        with torch_private.FakeTensorMode(allow_non_fake_inputs=True):
            look(x)
        look(torch.nn.Parameter(x))
    assert seen == [False] * 6
    leaf = floats(1, 2).requires_grad_()
    y = leaf * 1
    y.register_hook(lambda v: seen.append(torch_private.only_eager(x, (v,))))
    torch.autograd.grad(y, leaf, torch.eye(2, dtype=torch.float64), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, leaf, floats(1, 1))
    assert seen[6:] == [False, True]


@of("is_traced", "is_recorded")
def recorders_are_seen() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch_private.is_traced([x]), torch_private.is_recorded([x])))
        return x * x

    x = floats(1, 2).requires_grad_()
    look(x)
    look(x.detach().to("meta"))
    torch_private.make_fx(look)(x.detach())
    with torch_private.FakeTensorMode(allow_non_fake_inputs=True):
        look(x.detach())
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mul.Tensor])
    checkpoint(look, x, use_reentrant=False, context_fn=contexts).sum().backward()
    yes, no = (True, True), (False, False)
    assert seen == [no, yes, yes, yes, (False, True), (False, True)]


@of("transforms_active")
def transforms_are_seen() -> None:
    assert not torch_private.transforms_active()
    assert vmap(lambda x: x * torch_private.transforms_active())(floats(1, 2)).sum() == 3


@of("below_autograd", "eager_context")
def a_kernel_can_run_as_plain_eager_code() -> None:
    x = floats(1, 2).requires_grad_()
    with torch_private.below_autograd():
        assert not (x * x).requires_grad
        with torch_private.eager_context():
            assert torch.equal(grad(lambda y: (y * y).sum())(x.detach()), floats(2, 4))
            (found,) = torch.autograd.grad((x * x).sum(), x)
    assert torch.equal(found, floats(2, 4))


@of("standard_gamma")
def gamma_numbers_come_from_a_generator() -> None:
    shape = torch.full((5000,), 3.0)
    first, same, other = (
        torch_private.standard_gamma(shape, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert abs(float(first.mean()) - 3.0) < 0.12  # five standard errors


@of("outside_of_graphs")
def a_function_stays_outside_of_graphs() -> None:
    @torch_private.outside_of_graphs
    def hidden(x: Tensor) -> Tensor:
        assert not torch.compiler.is_compiling()
        return x * float(x.sum())

    compiled = torch.compile(lambda x: hidden(x) + 1, backend="eager")
    assert torch.equal(compiled(floats(1, 2)), floats(4, 7))

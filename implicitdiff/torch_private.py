"""Every private or experimental torch name the library uses, behind one door.

Nothing comes in; plain functions and classes go out, so that a torch release which moves a name is mended
here alone. Written against torch 2.13; the same names exist in 2.6. Next file to read: ``pytrees.py``.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode, make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "autocast_enabled",
    "below_autograd",
    "clean_context",
    "compiled_functions_inlined",
    "current_graph",
    "eager_context",
    "first_entry",
    "grad_batched_level",
    "has_tangent",
    "is_fake",
    "is_grad_batched",
    "is_recorded",
    "is_traced",
    "is_wrapped",
    "lower_grad_batched",
    "make_fx",
    "nested_forward_mode",
    "outside_of_graphs",
    "pytree",
    "raise_grad_batched",
    "standard_gamma",
    "tangent_free",
    "transforms_active",
    "values_are_readable",
    "without_autocast",
    "without_saved_tensor_hooks",
]


@contextlib.contextmanager
def clean_context() -> Iterator[None]:
    """Run the body as if the caller were plain eager code.

    Inside, no dispatch mode (fake, proxy, user meters), no functorch level (vmap, grad, jvp), no inference
    mode and no autocast is active; all of it comes back at the exit, also after an exception. Grad mode is
    left alone.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def compiled_functions_inlined() -> Iterator[None]:
    """Let ``make_fx`` walk through functions compiled by torch.compile, as if they were not."""
    # torch imports this module at the first access, which takes a second or more; make_fx needs it in any
    # case.
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


def current_graph() -> torch.fx.Graph | None:
    """The graph that the innermost ``make_fx`` writes into, None outside of one or while it is disabled."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    graph = mode.tracer.graph
    return graph if isinstance(graph, torch.fx.Graph) else None


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for the device; False where the device knows none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Operators called in the body keep the dtypes of their tensors."""
    # Entered only where there is something to switch off: recorders write it into their graphs.
    return (
        torch.autocast(device_type, enabled=False)
        if autocast_enabled(device_type)
        else contextlib.nullcontext()
    )


def values_are_readable() -> bool:
    """Whether eager code runs; while make_fx or torch.compile records, reading a value would break it."""
    return get_proxy_mode() is None and not torch.compiler.is_compiling()


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a functorch wrapper (inside vmap, grad, jvp), so without readable data."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a shape but no data: on the meta device, or a fake tensor."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


_GRAPHS = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)
_CHECKPOINTS = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


def is_traced(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors have no data, or operators on them are being written into a graph."""
    if any(tensor.is_meta or isinstance(tensor, FakeTensor | FunctionalTensor) for tensor in tensors):
        return True
    return any(isinstance(mode, _GRAPHS) for mode in _get_current_dispatch_mode_stack())


def is_recorded(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether something looks at the operators called: a graph (``is_traced``), or selective checkpointing."""
    if is_traced(tensors):
        return True
    return any(isinstance(mode, _CHECKPOINTS) for mode in _get_current_dispatch_mode_stack())


def transforms_active() -> bool:
    """Whether code runs inside a torch.func transform."""
    return bool(torch._C._are_functorch_transforms_active())


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Operators called in the body go past their autograd kernels."""
    guard: contextlib.AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


# What is switched on and off where nothing else is going on.
_EAGER_KEYS = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


@contextlib.contextmanager
def eager_context() -> Iterator[None]:
    """Run the body of an operator's kernel as plain eager code.

    Inside a kernel torch has switched autograd off for good, and torch.func would differentiate constants.
    """
    with clean_context(), torch._C._ForceDispatchKeyGuard(*_EAGER_KEYS):
        yield


@contextlib.contextmanager
def nested_forward_mode() -> Iterator[None]:
    """Switch forward AD on inside the ``jvp`` of an autograd.Function, which torch runs with it switched off.

    Without it, forward over forward through any Function is silently zero. The saved tensors have to be
    stripped of their level-0 tangents first, see ``tangent_free``.
    """
    enable: Callable[[bool], Any] = torch.autograd.forward_ad._set_fwd_grad_enabled
    with enable(True):
        yield


def tangent_free(tensor: torch.Tensor) -> torch.Tensor:
    """The primal of a dual tensor at level 0, the tensor itself if it has no tangent there."""
    return torch.autograd.forward_ad.unpack_dual(tensor, level=0).primal


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether the tensor carries a forward-mode tangent at the current dual level; False outside of one."""
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def first_entry(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without functorch wrappers and without history: of each vmapped axis its first entry."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        dim = functorch.maybe_get_bdim(tensor)
        tensor = functorch.get_unwrapped(tensor)
        if dim >= 0:
            tensor = tensor.select(dim, 0)
    return tensor.detach()


def is_grad_batched(tensor: torch.Tensor) -> bool:
    """Whether the tensor carries an axis of ``autograd.grad(is_grads_batched=True)``.

    That option and ``autograd.functional`` with ``vectorize=True`` use an older vmap than torch.func's, under
    which an autograd.Function's own vmap rule is not called.
    """
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def grad_batched_level() -> int:
    """How many of these older vmaps are active here."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def lower_grad_batched(tensor: torch.Tensor, level: int) -> torch.Tensor:
    """The plain tensor under a grad-batched one, its axis in front."""
    lowered: torch.Tensor = torch._remove_batch_dim(tensor, level, 1, 0)
    return lowered


def raise_grad_batched(tensor: torch.Tensor, level: int) -> torch.Tensor:
    """The grad-batched tensor over a plain one, whose first axis is hidden."""
    raised: torch.Tensor = torch._add_batch_dim(tensor, 0, level)
    return raised


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Run the body with no hooks on saved tensors (checkpointing, ``save_on_cpu``).

    torch.func's grad and vjp refuse to run while there are any. What autograd saves inside is kept as it is.
    """
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def standard_gamma(shape: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Gamma numbers of scale 1 from a generator, which ``torch.distributions`` does not take."""
    drawn: torch.Tensor = torch._standard_gamma(shape, generator=generator)
    return drawn


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one that torch.compile does not look into; unlike ``torch.compiler.disable`` the compiler is
    imported at the first call, not here.
    """
    hidden: Callable[..., Any] = _disable_dynamo(function)
    return hidden

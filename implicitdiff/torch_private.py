"""Every private or experimental torch name the library uses, and every difference between releases, behind one door.

Nothing comes in; plain functions and classes go out, so that a torch release which moves a name is mended here alone:
``tests/test_torch_private.py`` has a test of each by name. For torch 2.6 to 2.13. Next file to read: ``pytrees.py``.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import HigherOrderOperator, OpOverload
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
    "HOST", "DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode",
    "HigherOrderOperator", "OpOverload", "TorchDispatchMode", "autocast_anywhere", "autocast_enabled", "below_autograd",
    "broadcast_prefix", "clean_context", "compiled_functions_inlined", "current_graph", "eager_context",
    "first_entry", "grad_batched_level", "has_storage", "has_tangent", "is_fake", "is_grad_batched",
    "is_recorded", "is_reduction", "is_traced", "is_view", "is_wrapped", "lower_grad_batched", "make_fx",
    "nested_forward_mode", "only_eager", "outside_of_graphs", "packet_of", "pytree", "raise_grad_batched",
    "schema_of", "sparse_parts", "standard_gamma", "storage_key", "synchronize", "tangent_free",
    "transforms_active", "values_are_readable", "without_autocast", "without_saved_tensor_hooks",
    "writes_to",
]  # fmt: skip

HOST = torch.device("cpu")
"""The device whose values Python can read: the only one that the library names.

For numbers that belong to a plan and to no call. Whatever belongs to a call lies where its inputs do.
"""


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
        stack.enter_context(torch._C._DisableAutocast())  # on every device at once
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


def autocast_anywhere() -> bool:
    """Whether autocast is on for some device."""
    return bool(torch._C._is_any_autocast_enabled())


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
    """Whether the tensor has a shape but no data: on the meta device, a fake tensor, or one around it."""
    return tensor.is_meta or isinstance(tensor, FakeTensor | FunctionalTensor)


_GRAPHS = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)
_CHECKPOINTS = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)


def is_traced(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors have no data, or operators on them are being written into a graph."""
    if any(map(is_fake, tensors)):
        return True
    return any(isinstance(mode, _GRAPHS) for mode in _get_current_dispatch_mode_stack())


def is_recorded(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether something looks at the operators called: a graph (``is_traced``), or selective checkpointing."""
    if is_traced(tensors):
        return True
    return any(isinstance(mode, _CHECKPOINTS) for mode in _get_current_dispatch_mode_stack())


def only_eager(tensor: torch.Tensor, cotangents: Sequence[torch.Tensor | None]) -> bool:
    """Whether a derivative is computed by plain eager code, once: nothing records, transforms, casts or differentiates.

    Args:
        tensor: One of the call's own; those of one call have their data in the same kind of place.
        cotangents: What comes from outside.
    """
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    if torch.autograd.forward_ad._current_level >= 0 or type(tensor) is not torch.Tensor or tensor.is_meta:
        return False
    if autocast_enabled(tensor.device.type):
        return False
    if torch._C._len_torch_dispatch_stack() and is_recorded((tensor,)):
        return False
    return all(c is None or (type(c) is torch.Tensor and not is_grad_batched(c)) for c in cotangents)


def transforms_active() -> bool:
    """Whether code runs inside a torch.func transform."""
    return bool(torch._C._are_functorch_transforms_active())


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Operators called in the body go past their autograd kernels."""
    return torch._C._AutoDispatchBelowAutograd()


# What is switched on and off where nothing else is going on.
_EAGER_KEYS = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


@contextlib.contextmanager
def eager_context() -> Iterator[None]:
    """Run the body of an operator's kernel as plain eager code.

    Inside a kernel torch has switched autograd off for good, and torch.func would differentiate constants.
    """
    with clean_context(), torch._C._ForceDispatchKeyGuard(*_EAGER_KEYS):
        yield


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd takes the tensor for a view of another one."""
    return tensor._base is not None


def writes_to(tensor: torch.Tensor) -> int:
    """How often the tensor's memory has been written to, as autograd counts."""
    return tensor._version


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether the tensor has memory of its own kind; functorch wrappers and some subclasses have none."""
    return bool(torch._C._has_storage(tensor))


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for tensors that share memory, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of a COO tensor as they are stored: not coalesced, not differentiable."""
    return tensor._indices(), tensor._values()


def schema_of(func: Any) -> Any:
    """Name, arguments and writes of an aten operation; None for anything else that a graph may call."""
    return getattr(func, "_schema", None)


def packet_of(func: OpOverload) -> Any:
    """The operation without its overload, ``aten.all`` of ``aten.all.dim``."""
    return func._overloadpacket


def is_reduction(func: OpOverload) -> bool:
    """Whether torch says that the operation reduces its argument; torch 2.6 never says it."""
    tag = getattr(torch.Tag, "reduction", None)
    return tag is not None and tag in func.tags


def broadcast_prefix(prefix: Any, spec: pytree.TreeSpec) -> list[Any] | None:
    """The leaves of a pytree prefix, each repeated for the leaves of ``spec`` below it; None if it is no prefix."""
    return pytree._broadcast_to_and_flatten(prefix, spec)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, where it works on after Python has gone on."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type == device.type:
            torch.accelerator.synchronize(device)


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
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(tensor):  # vmap has no rule for duals
        level, dim = functorch.maybe_get_level(tensor), functorch.maybe_get_bdim(tensor)
        return functorch._add_batch_dim(tangent_free(functorch.get_unwrapped(tensor)), dim, level)
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
    if not _HOOKS_CAN_BE_READ:
        with _hooks_out_of_sight():
            yield
        return
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


_HOOKS_CAN_BE_READ = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # not in torch 2.6


class _Unseen(threading.local):
    """Whether this thread runs below ``_hooks_out_of_sight``, so that torch.func need not look for hooks."""

    active = False


_UNSEEN = _Unseen()
_PATCHED = threading.Lock()
_patches = 0


@contextlib.contextmanager
def _hooks_out_of_sight() -> Iterator[None]:
    """``without_saved_tensor_hooks`` where the hooks can be taken off but not read, and so not put back.

    They stay where they are. torch calls none of them while it believes to be traced, and torch.func's search
    for them, one function that is looked up at every call, does nothing in this thread.
    """
    global _patches
    if _UNSEEN.active or not _hooks_are_there():
        yield
        return
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    with _PATCHED:
        _patches += 1
        torch.autograd.graph.disable_saved_tensors_hooks = _refuse_hooks  # type: ignore[assignment]
    _UNSEEN.active = True
    try:
        yield
    finally:
        _UNSEEN.active = False
        with _PATCHED:
            _patches -= 1
            if not _patches:
                torch.autograd.graph.disable_saved_tensors_hooks = _TORCH_REFUSES_HOOKS
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


_TORCH_REFUSES_HOOKS = torch.autograd.graph.disable_saved_tensors_hooks


def _refuse_hooks(error_message: str) -> contextlib.AbstractContextManager[None]:
    """torch's own function, except below ``_hooks_out_of_sight``: other threads see no difference."""
    return contextlib.nullcontext() if _UNSEEN.active else _TORCH_REFUSES_HOOKS(error_message)


def _hooks_are_there() -> bool:
    """Whether there are hooks on saved tensors; there are none to be pushed where torch.func has disabled them."""
    autograd: Any = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():
        return False
    try:
        # It complains if there are any, which is the only way to ask.
        autograd._saved_tensors_hooks_disable("")
    except RuntimeError:
        return True
    finally:
        autograd._saved_tensors_hooks_enable()
    return False


def standard_gamma(shape: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Gamma numbers of scale 1 from a generator, which ``torch.distributions`` does not take."""
    return torch._standard_gamma(shape, generator=generator)


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, not looked into by torch.compile, which, unlike ``torch.compiler.disable``, it does not import."""
    return _disable_dynamo(function)

"""The door: the user's inputs, checked, taken apart and brought into one layout.

Comes in: a Problem, its inputs and ``in_dims``. Goes out: a frozen ``Bound`` with the tensors as leaves, the
batch axis first. Whatever is wrong is said here, by name, before anything is computed. Next file:
``graph/trace.py``.
"""

import dataclasses
import enum
import functools
import inspect
import math
import numbers
import types
from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import torch

from implicitdiff.attributes import Reachable, scan
from implicitdiff.errors import InputError
from implicitdiff.problem import Problem, require_problem
from implicitdiff.pytrees import Spec, describe, flat_spec, flatten, leaf_names, unflatten
from implicitdiff.torch_private import is_fake, is_wrapped, values_are_readable

InDims: TypeAlias = Any  # int, None, or a pytree prefix of them


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """The inputs of one call.

    Attributes:
        names: The display name of each leaf, ``x``, ``data['cost']``.
        leaves: The tensor leaves; batched ones (batch, *shape), shared ones (*shape).
        batched: For each leaf, whether it carries the batch axis.
        constants: (position among all leaves of ``spec``, value) of the leaves that are no tensors.
        spec: The structure of the tuple of all inputs.
        batch: The number of samples; 1 if ``unbatched``.
        unbatched: Every entry of ``in_dims`` is None: one sample, no leaf is batched, and the results are to
            be handed back without a batch axis.
        dtype: The dtype the floating inputs share (that of the Problem's tensors, or the default, if there is
            none).
        device: The device of the inputs.
        tensor_names: The path of each tensor of the Problem, ``self.eps``.
        tensors: The Problem's parameters, buffers and tensor attributes.
        problem_signature: The key of everything else in the Problem, see ``attributes.Reachable``.
        checked: Whether the values are known to be finite; False where they could not be read (meta tensors,
            inside vmap or grad).
    """

    names: tuple[str, ...]
    leaves: tuple[torch.Tensor, ...]
    batched: tuple[bool, ...]
    constants: tuple[tuple[int, Hashable], ...]
    spec: Spec
    batch: int
    unbatched: bool
    dtype: torch.dtype
    device: torch.device
    tensor_names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    problem_signature: Hashable
    checked: bool

    @functools.cached_property
    def sample_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of one sample of each leaf; of a graph with sizes left open, as numbers that it then assumes."""
        return tuple(
            tuple(map(int, x.shape[1:] if b else x.shape))
            for x, b in zip(self.leaves, self.batched, strict=True)
        )

    @functools.cached_property
    def signature(self) -> Hashable:
        """The key of all that a trace depends on: neither the batch size nor the values of tensors."""
        dtypes = tuple(leaf.dtype for leaf in self.leaves)
        constants = tuple((position, type(value), repr(value)) for position, value in self.constants)
        layout = (describe(self.spec), self.sample_shapes, dtypes, self.batched, constants, str(self.device))
        return (layout, self.unbatched, torch.get_default_dtype(), self.problem_signature)

    def unflatten(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The inputs as the hooks expect them: ``leaves`` for the tensors, the constants in their places."""
        return unflatten_inputs(leaves, self.constants, self.spec)

    def expanded(self) -> tuple[Any, ...]:
        """The inputs for a batched hook: batch axis first everywhere, shared ones expanded with stride 0."""
        pairs = zip(self.leaves, self.batched, strict=True)
        return self.unflatten([x if b else x.expand(self.batch, *x.shape) for x, b in pairs])

    def sample(self, index: int) -> tuple[Any, ...]:
        """The inputs of one sample, for a hook that is written for one sample."""
        pairs = zip(self.leaves, self.batched, strict=True)
        return self.unflatten([x[index] if b else x for x, b in pairs])


def unflatten_inputs(
    leaves: Sequence[Any], constants: Sequence[tuple[int, Hashable]], spec: Spec
) -> tuple[Any, ...]:
    """The tuple of inputs of structure ``spec`` from tensor leaves and constants (position, value)."""
    rest = iter(leaves)
    fixed = dict(constants)
    full = [fixed[i] if i in fixed else next(rest) for i in range(spec.num_leaves)]
    result: tuple[Any, ...] = unflatten(full, spec)
    return result


def bind(problem: Problem, inputs: Sequence[Any], in_dims: InDims = 0) -> Bound:
    """Check the inputs of one call and bring the batch axis to the front.

    Args:
        problem: The Problem.
        inputs: The inputs after u, in the order of ``objective``: tensors or pytrees of tensors; numbers,
            strings and None inside are constants.
        in_dims: As in ``torch.vmap``: an int for all inputs, or a pytree prefix of the tuple of inputs with
            int or None (shared by all samples) as leaves. None everywhere means one sample: no batch axis
            goes in or out.

    Returns:
        The bound inputs. Nothing is copied: batched leaves are views with the axis moved to the front. A
        batch of 0 samples is allowed.

    Raises:
        ProblemDefinitionError: ``problem`` is not a complete Problem.
        NotSupportedYetError: It uses a part of the contract that is not built yet.
        InputError: The number of inputs, a type, rank, batch size, dtype or device is wrong, the Problem's
            tensors lie on another device, no input is a tensor, or a value is NaN or infinite (skipped where
            values cannot be read, see ``Bound.checked``).
    """
    require_problem(problem)
    inputs = tuple(inputs)
    plain = all(isinstance(value, torch.Tensor) for value in inputs)
    values, spec = (inputs, flat_spec(len(inputs))) if plain else flatten(inputs)
    parameters = parameter_names(problem, inputs)
    names: list[str] = []
    for value, base in zip(inputs, parameters, strict=True):
        names += [base] if isinstance(value, torch.Tensor) else leaf_names(flatten(value)[1], base)
    dims = _spread(in_dims, inputs, parameters)

    tensors: list[tuple[str, torch.Tensor, int | None]] = []
    constants: list[tuple[int, Hashable]] = []
    for position, (name, value, dim) in enumerate(zip(names, values, dims, strict=True)):
        if isinstance(value, torch.Tensor):
            tensors.append((name, value, _axis(name, value, dim)))
        else:
            constants.append((position, _constant(name, value)))
    if not tensors:
        raise InputError(
            f"{type(problem).__name__} was called with no inputs that are tensors: at least one tensor is "
            "needed to fix dtype and device; pass the data as tensors, or a dummy torch.zeros(())"
        )
    batch = _batch_size(tensors)
    leaves = tuple(x if d in (None, 0) else x.movedim(d, 0) for _, x, d in tensors)
    batched = tuple(d is not None for _, _, d in tensors)
    leaf_labels = tuple(name for name, _, _ in tensors)
    reachable = scan(problem)
    dtype, device = _shared_dtype(leaf_labels, leaves, reachable.tensors), _shared_device(leaf_labels, leaves)
    # The Problem may stay where it is if the inputs are shapes only.
    if any(tensor.device != device for tensor in reachable.tensors) and device.type != "meta":
        raise InputError(_lies_elsewhere(leaf_labels, device, reachable))
    checked = values_are_readable() and not any(is_fake(x) or is_wrapped(x) for x in leaves)
    if checked:
        check_finite(leaf_labels, leaves, batched)
    return Bound(
        names=leaf_labels,
        leaves=leaves,
        batched=batched,
        constants=tuple(constants),
        spec=spec,
        batch=1 if batch is None else batch,
        unbatched=batch is None,
        dtype=dtype,
        device=device,
        tensor_names=reachable.names,
        tensors=reachable.tensors,
        problem_signature=reachable.signature,
        checked=checked,
    )


def check_finite(names: Sequence[str], leaves: Sequence[torch.Tensor], batched: Sequence[bool]) -> None:
    """Raise if a floating leaf holds a NaN or an infinity.

    Where ``bind`` could not read the values (``Bound.checked`` is False), call it again inside the
    autograd.Function, where the tensors are plain. Tensors whose data cannot be read are passed over.

    Args:
        names: The display name of each leaf.
        leaves: Leaves (batch, *shape) or (*shape).
        batched: Which of them carry the batch axis.

    Raises:
        InputError: Naming the first such input and its samples. Cost otherwise: one sum per leaf, one number read.
    """
    readable = [
        (name, leaf.detach(), flag)
        for name, leaf, flag in zip(names, leaves, batched, strict=True)
        if leaf.is_floating_point() and not (is_fake(leaf) or is_wrapped(leaf))
    ]
    # A sum is not finite as soon as one term is not, and it writes no mask of the size of the input. It may
    # overflow on finite data, so that a sum that is not finite only leads to the thorough look.
    sums = [leaf.sum() for _, leaf, _ in readable]
    if not sums or math.isfinite(float(sums[0] if len(sums) == 1 else torch.stack(sums).sum())):
        return
    for name, leaf, flag in readable:
        bad = ~leaf.isfinite()
        if bool(bad.any()):
            raise InputError(_not_finite(name, leaf, bad, flag))


def parameter_names(problem: Problem, inputs: Sequence[Any]) -> tuple[str, ...]:
    """The names that ``objective`` (``residual``, ``step``) gives to the inputs; checks their number.

    Raises:
        InputError: There are more or fewer inputs than ``objective`` takes after u.
    """
    names, required, rest = _positional(problem)
    given = len(inputs)
    if given < required - 1 or (rest is None and given > len(names) - 1):
        takes = (
            f"{max(required - 1, 0)}"
            if rest is None and len(names) == required
            else f"at least {required - 1}"
        )
        if rest is None and len(names) != required:
            takes = f"{required - 1} to {len(names) - 1}"
        shown = ", ".join([*names, *([f"*{rest}"] if rest else [])])
        raise InputError(
            f"{type(problem).__name__}.{problem.MAIN}({shown}) takes {takes} inputs after the variable, got {given}"
        )
    extra = [f"{rest}[{i}]" for i in range(given - max(len(names), 1) + 1)]
    return (*names[1 : given + 1], *extra)


def variable_name(problem: Problem) -> str:
    """The name that ``objective`` gives to its variable, usually ``u``."""
    names, _, _ = _positional(problem)
    return names[0] if names else "u"


def _positional(problem: Problem) -> tuple[tuple[str, ...], int, str | None]:
    main = getattr(problem, problem.MAIN)
    main = main.forward if isinstance(main, torch.nn.Module) else main
    if isinstance(main, types.MethodType):
        names, required, rest = _signature(main.__func__)
        return names[1:], required - 1, rest
    return _signature(main)


@functools.lru_cache(maxsize=1024)
def _signature(function: Any) -> tuple[tuple[str, ...], int, str | None]:
    """(positional names, how many of them are required, name of *args or None)."""
    kinds = inspect.Parameter
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), None)
    required = sum(p.default is kinds.empty for p in positional)
    return tuple(p.name for p in positional), required, rest


def _spread(in_dims: InDims, inputs: tuple[Any, ...], names: Sequence[str]) -> list[int | None]:
    """One int or None per leaf of the inputs, from a pytree prefix of the tuple of inputs."""
    if _is_dim(in_dims):
        return [in_dims] * len(flatten(inputs)[0])
    if not isinstance(in_dims, tuple | list):
        raise InputError(
            f"in_dims has to be an int, None, or a tuple with one entry per input, got {in_dims!r}"
        )
    if len(in_dims) != len(inputs):
        raise InputError(
            f"in_dims has {len(in_dims)} entries, but there are {len(inputs)} inputs ({', '.join(names)}): "
            "give one entry per input"
        )
    spread: list[int | None] = []
    for dims, value, name in zip(in_dims, inputs, names, strict=True):
        spread += _spread_one(dims, value, name)
    return spread


def _spread_one(dims: InDims, value: Any, name: str) -> list[int | None]:
    if _is_dim(dims):
        return [dims] * len(flatten(value)[0])
    mismatch = InputError(
        f"in_dims for input {name} is {dims!r}, which is no prefix of its structure "
        f"{describe(flatten(value)[1])}: use an int or None for the whole input, or the same containers "
        "with an int or None for each part"
    )
    if isinstance(value, dict):
        if not isinstance(dims, dict) or set(dims) != set(value):
            raise mismatch
        parts = [_spread_one(dims[key], item, f"{name}[{key!r}]") for key, item in value.items()]
    elif isinstance(value, tuple | list):
        if not isinstance(dims, tuple | list) or len(dims) != len(value):
            raise mismatch
        pairs = enumerate(zip(dims, value, strict=True))
        parts = [_spread_one(d, item, f"{name}[{i}]") for i, (d, item) in pairs]
    else:
        raise mismatch
    return [dim for part in parts for dim in part]


def _is_dim(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _axis(name: str, value: torch.Tensor, dim: int | None) -> int | None:
    """The batch axis of one tensor, counted from the front."""
    if value.is_complex():
        raise InputError(
            f"input {name} is complex ({value.dtype}): only real tensors are supported; split it in two"
        )
    if value.layout is not torch.strided:
        raise InputError(f"input {name} is stored as {value.layout}: pass a dense tensor, {name}.to_dense()")
    if dim is None:
        return None
    if not -value.dim() <= dim < value.dim():
        raise InputError(
            f"input {name} has shape {tuple(value.shape)}, so its rank {value.dim()} is too low for the "
            f"batch axis in_dims = {dim}: add a batch axis, or set its entry of in_dims to None if all "
            "samples share it"
        )
    return dim % value.dim()


def _constant(name: str, value: Any) -> Hashable:
    fixed: Hashable = value
    if isinstance(value, numbers.Real | str | bytes | enum.Enum | torch.dtype | torch.device | None):
        return fixed
    kind = type(value)
    if kind.__module__ == "numpy":
        raise InputError(f"input {name} is a numpy {kind.__name__}: pass torch.as_tensor({name})")
    raise InputError(
        f"input {name} is a {kind.__name__}: inputs are tensors or pytrees of tensors (tuple, list, dict); "
        "numbers, strings and None are constants; keep anything else as an attribute of the Problem"
    )


def _batch_size(tensors: Sequence[tuple[str, torch.Tensor, int | None]]) -> int | None:
    sizes = [(name, dim, value.shape[dim]) for name, value, dim in tensors if dim is not None]
    if not sizes:
        return None
    first_name, first_dim, batch = sizes[0]
    for name, dim, size in sizes[1:]:
        if size != batch:
            raise InputError(
                f"the batch sizes differ: input {first_name} has {batch} samples along axis {first_dim}, "
                f"input {name} has {size} along axis {dim}; set the in_dims entry of an input that all "
                "samples share to None"
            )
    return batch


def _shared_dtype(
    names: Sequence[str], leaves: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
) -> torch.dtype:
    floating = [
        (name, leaf.dtype) for name, leaf in zip(names, leaves, strict=True) if leaf.is_floating_point()
    ]
    if any(dtype != floating[0][1] for _, dtype in floating):
        listed = ", ".join(f"{name} {dtype}" for name, dtype in floating)
        raise InputError(
            f"floating inputs have to share their dtype, got {listed}: convert them with .to(dtype)"
        )
    if floating:
        return floating[0][1]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _shared_device(names: Sequence[str], leaves: Sequence[torch.Tensor]) -> torch.device:
    floating = [(n, x.device) for n, x in zip(names, leaves, strict=True) if x.is_floating_point()]
    if any(device != floating[0][1] for _, device in floating):
        listed = ", ".join(f"{name} {device}" for name, device in floating)
        raise InputError(
            f"floating inputs have to share their device, got {listed}: move them with .to(device)"
        )
    return floating[0][1] if floating else leaves[0].device


def _lies_elsewhere(names: Sequence[str], device: torch.device, reachable: Reachable) -> str:
    pairs = zip(reachable.names, reachable.tensors, strict=True)
    others = ", ".join(f"{name} on {tensor.device}" for name, tensor in pairs if tensor.device != device)
    return (
        f"the inputs ({', '.join(names)}) are on {device}, but the Problem has {others}: move the layer with "
        f".to({str(device)!r}), or the inputs"
    )


def _not_finite(name: str, leaf: torch.Tensor, bad: torch.Tensor, batched: bool) -> str:
    kinds = " and ".join(
        word for word, there in (("NaN", leaf.isnan().any()), ("inf", leaf.isinf().any())) if bool(there)
    )
    remedy = "mask or replace such entries before the layer"
    if not batched:
        return (
            f"input {name} (shape {tuple(leaf.shape)}) contains {kinds} in {int(bad.sum())} entries: {remedy}"
        )
    hit = bad.reshape(leaf.shape[0], -1).any(1).nonzero()[:, 0].tolist()
    shown = ", ".join(str(i) for i in hit[:10]) + (", ..." if len(hit) > 10 else "")
    which = f"sample {shown}" if len(hit) == 1 else f"samples {shown} ({len(hit)} of {leaf.shape[0]})"
    return f"input {name} contains {kinds} in {which}: {remedy}"

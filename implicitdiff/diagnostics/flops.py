"""Diagnostics, the arithmetic of one aten operation: what the meter multiplies out.

In: an aten overload, its arguments and its result (shapes only; no data is read). Out: its floating point
operations. Next file: `meter.py`, which calls this for every operation of a running program.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils.flop_counter import flop_registry

from implicitdiff.torch_private import OpOverload, is_reduction, packet_of, schema_of

Arguments = Sequence[object]
Rule = Callable[[Arguments, Mapping[str, object], list[torch.Tensor]], int]


def base_name(func: OpOverload) -> str:
    """The name of an operation without namespace, overload and the underscore of its in-place form."""
    name = schema_of(func).name.split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def argument(func: OpOverload, args: Arguments, kwargs: Mapping[str, object], name: str) -> object:
    """The value of an argument in this call, by its name in the schema; None if there is no such name."""
    for position, declared in enumerate(schema_of(func).arguments):
        if declared.name == name:
            if name in kwargs:
                return kwargs[name]
            return args[position] if position < len(args) else declared.default_value
    return None


def count_flops(
    func: OpOverload, args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]
) -> int | None:
    """Floating point operations of one aten call, from shapes alone.

    Matmul-like: exact, 2 m n k for (m, k) @ (k, n), and one more per entry where something is added.
    Factorisations and triangular solves: the leading term of Golub and Van Loan (Cholesky n^3/3, LU 2 n^3/3,
    one triangular solve n^2 per column), rounded to the nearest integer. Pointwise: one per element of the
    result, transcendental functions too; fused pointwise operations count what they fuse (addcmul 2).
    Reductions: one per element read. Copies, fills, gathers and concatenations: none.

    Args:
        func: The aten overload.
        args, kwargs: Its arguments.
        outputs: The tensors it returned.

    Returns:
        The count, or None for an operation without a rule (the meter then names it in `Measurement.unknown`).
    """
    name = base_name(func)
    if name in _FREE:
        return 0
    if name in _EXACT:
        return _EXACT[name](args, kwargs, outputs)
    if name in _MATMUL_ADD:
        beta = argument(func, args, kwargs, "beta")
        return _MATMUL_ADD[name](args, kwargs, outputs) + (_numel(outputs[0]) if beta != 0 else 0)
    if name in _PER_OUTPUT:
        return _PER_OUTPUT[name] * _numel(outputs[0])
    if name in _PER_INPUT:
        return _PER_INPUT[name] * _numel(_tensor(args[0]))
    if packet_of(func) in flop_registry:
        # Convolutions and attention: torch's own shape formulas.
        return int(
            flop_registry[packet_of(func)](
                *args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else tuple(outputs)
            )
        )
    if torch.Tag.pointwise in func.tags:
        return max((_numel(output) for output in outputs), default=0)
    if is_reduction(func):
        return _numel(_tensor(args[0]))
    return None


def _tensor(value: object) -> torch.Tensor:
    if isinstance(value, (list, tuple)):
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"expected a tensor as the first argument of an aten operation, got {type(value).__name__}"
        )
    return value


def _numel(tensor: torch.Tensor) -> int:
    return int(tensor.numel())


def _columns(tensor: torch.Tensor, order: int) -> int:
    """Right-hand side columns over the whole batch, for matrices with `order` rows."""
    return _numel(tensor) // max(order, 1)


def _matrices(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(number of matrices in the batch, larger side, smaller side)."""
    rows, columns = int(tensor.shape[-2]), int(tensor.shape[-1])
    count = math.prod(int(s) for s in tensor.shape[:-2])
    return count, max(rows, columns), min(rows, columns)


def _product(left: int) -> Rule:
    """Matrix product: 2 k per entry of the result, k the last size of argument `left`."""

    def rule(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
        return 2 * int(_tensor(args[left]).shape[-1]) * _numel(outputs[0])

    return rule


def _addbmm(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    batch, _, inner = _tensor(args[1]).shape
    return 2 * int(batch) * int(inner) * _numel(outputs[0])


def _factorisation(cubic: Callable[[int, int], float]) -> Rule:
    def rule(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
        count, large, small = _matrices(_tensor(args[0]))
        return count * round(cubic(large, small))

    return rule


def _triangular_solve(matrix: int, passes: int) -> Rule:
    """`passes` substitutions of n^2 operations for each column."""

    def rule(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
        order = int(_tensor(args[matrix]).shape[-1])
        # The result has the broadcast batch of matrix and right-hand side, so the columns are counted there.
        return passes * order * order * _columns(outputs[0], order)

    return rule


def _linalg_solve(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    count, order, _ = _matrices(_tensor(args[0]))
    return count * round(2 * order**3 / 3) + 2 * order * order * _columns(outputs[0], order)


def _least_squares(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    count, large, small = _matrices(_tensor(args[0]))
    columns = int(_tensor(args[1]).shape[-1])
    # Householder QR, Q' applied to each column, one substitution.
    return count * (round(2 * small**2 * (large - small / 3)) + columns * (4 * large * small - small * small))


def _eigh(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    count, order, _ = _matrices(_tensor(args[0]))
    vectors = args[2] if len(args) > 2 else kwargs.get("compute_v", True)
    return count * round((9 if vectors else 4 / 3) * order**3)


def _svd(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    count, large, small = _matrices(_tensor(args[0]))
    vectors = args[2] if len(args) > 2 else kwargs.get("compute_uv", True)
    if not vectors:
        return count * round(4 * large * small**2 - 4 * small**3 / 3)
    return count * round(14 * large * small**2 + 8 * small**3)


def _cdist(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    return 3 * int(_tensor(args[0]).shape[-1]) * _numel(outputs[0])


def _outer(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    return _numel(outputs[0])


def _mse_loss(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    reduction = args[2] if len(args) > 2 else kwargs.get("reduction", 1)
    return (2 if reduction == 0 else 3) * _numel(_tensor(args[0]))


def _sort(args: Arguments, kwargs: Mapping[str, object], outputs: list[torch.Tensor]) -> int:
    tensor = _tensor(args[0])
    length = int(tensor.shape[-1]) if tensor.dim() else 1
    return _numel(tensor) * max(1, math.ceil(math.log2(max(length, 2))))


_CHOLESKY = _factorisation(lambda large, small: large**3 / 3)
_LU = _factorisation(lambda large, small: small**2 * (large - small / 3))

_EXACT: dict[str, Rule] = {
    "mm": _product(0), "bmm": _product(0), "mv": _product(0), "dot": _product(0), "vdot": _product(0),
    "mse_loss": _mse_loss, "_cdist_forward": _cdist, "outer": _outer, "ger": _outer,
    "cholesky": _CHOLESKY, "linalg_cholesky_ex": _CHOLESKY,
    "linalg_lu_factor_ex": _LU, "linalg_lu": _LU, "_linalg_det": _LU, "_linalg_slogdet": _LU,
    "linalg_ldl_factor_ex": _CHOLESKY,
    "linalg_inv_ex": _factorisation(lambda large, small: 2 * large**3),
    "cholesky_inverse": _factorisation(lambda large, small: 2 * large**3 / 3),
    "linalg_qr": _factorisation(lambda large, small: 4 * small**2 * (large - small / 3)),
    "geqrf": _factorisation(lambda large, small: 2 * small**2 * (large - small / 3)),
    "linalg_solve_triangular": _triangular_solve(0, 1), "triangular_solve": _triangular_solve(1, 1),
    "cholesky_solve": _triangular_solve(1, 2), "linalg_lu_solve": _triangular_solve(0, 2),
    "linalg_ldl_solve": _triangular_solve(0, 2), "_linalg_solve_ex": _linalg_solve,
    "linalg_lstsq": _least_squares, "_linalg_eigh": _eigh, "_linalg_svd": _svd,
    "linalg_eig": _factorisation(lambda large, small: 25 * large**3),
    "linalg_pinv": _factorisation(lambda large, small: 16 * large * small**2 + 8 * small**3),
    "sort": _sort, "topk": _sort,
}  # fmt: skip

# These add their first argument unless beta is 0.
_MATMUL_ADD: dict[str, Rule] = {
    "addmm": _product(1),
    "baddbmm": _product(1),
    "addmv": _product(1),
    "addbmm": _addbmm,
    "addr": _outer,
}

# Fused pointwise operations: the pointwise operations they stand for, per element of the result.
_PER_OUTPUT = {
    "addcmul": 2, "addcdiv": 2, "lerp": 3, "sigmoid_backward": 3, "tanh_backward": 3, "threshold_backward": 1,
    "_softmax": 5, "_log_softmax": 5, "_softmax_backward_data": 4, "_log_softmax_backward_data": 4,
    "cumsum": 1, "cumprod": 1, "logcumsumexp": 3,
}  # fmt: skip

# Reductions, per element of their first argument.
_PER_INPUT = {
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "prod": 1, "aminmax": 1, "argmax": 1,
    "argmin": 1, "trace": 1, "all": 1, "any": 1, "count_nonzero": 1, "equal": 1, "index_add": 1,
    "scatter_add": 1,
    "linalg_vector_norm": 2, "logsumexp": 4, "var": 3, "std": 3, "var_mean": 3, "std_mean": 3,
    "huber_loss": 5, "smooth_l1_loss": 5, "_linalg_check_errors": 0,
}  # fmt: skip

_FREE = frozenset(
    (
        "clone copy _to_copy fill zero zeros ones full zeros_like ones_like full_like new_zeros new_ones "
        "new_full eye arange linspace logspace scalar_tensor empty empty_like empty_strided new_empty "
        "new_empty_strided cat stack index _unsafe_index index_select gather embedding take masked_select "
        "nonzero index_put _unsafe_index_put index_copy index_fill scatter masked_scatter select_scatter "
        "slice_scatter diagonal_scatter as_strided_scatter select_backward slice_backward diagonal_backward "
        "unfold_backward flip roll constant_pad_nd repeat repeat_interleave tril triu tril_indices "
        "triu_indices diag_embed lift_fresh lift_fresh_copy _local_scalar_dense normal uniform random "
        "randint randperm rand randn rand_like randn_like randint_like exponential fill_diagonal "
        "_efficientzerotensor resize set"
    ).split()
)

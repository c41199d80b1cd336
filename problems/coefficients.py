"""The coefficient of a problem (alpha, gamma): a float, a tensor, a Parameter, or an input per sample.

A problem hands its constructor's argument to `register` and, in each hook, the optional last input to
`resolve` (one sample) or `per_sample` (a batch). Used by `robust_pooling.py` and `optimal_transport.py`.
"""

import math

import torch
from torch import Tensor, nn

from implicitdiff.errors import InputError


def register(module: nn.Module, name: str, value: float | Tensor | None) -> None:
    """Store a coefficient on its problem: a Parameter stays one, a number becomes a buffer of the default
    dtype.

    Args:
        module: The problem, after super().__init__().
        name: The attribute: "alpha", "gamma".
        value: A positive number, a tensor with one entry, or None when it will come as the last input.

    Raises:
        InputError: If it is not positive and finite, or has more than one entry.
    """
    if isinstance(value, Tensor) and (value.numel() != 1 or not value.is_floating_point()):
        raise InputError(
            f"{name} must be a floating number, or a tensor with one such entry, not {value.dtype} of shape "
            f"{tuple(value.shape)}; for one value per sample pass {name}=None, and them as the last input"
        )
    number = value.detach().item() if isinstance(value, Tensor) else value
    if number is not None and not (0 < number < math.inf):
        raise InputError(f"{name} must be positive and finite, not {number}")
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        # The default dtype, as for any Parameter. An entry without axes never widens a tensor of lower
        # precision.
        tensor = value if isinstance(value, Tensor) or value is None else torch.tensor(float(value))
        module.register_buffer(name, tensor)


def resolve(name: str, stored: Tensor | None, given: Tensor | None) -> Tensor:
    """The coefficient of one sample: the last input where there is one, else the stored value.

    Raises:
        InputError: If there is neither, or the input is not a scalar.
    """
    if given is not None:
        if given.dim() != 0:
            raise InputError(
                f"{name} as an input is one number per sample, not of shape {tuple(given.shape)}"
            )
        return given
    if stored is None:
        raise InputError(f"{name} was not given: pass it as the last input, or {name}= to the constructor")
    return stored


def per_sample(name: str, stored: Tensor | None, given: Tensor | None, like: Tensor) -> Tensor:
    """The coefficient for a batch, as a tensor of shape () (shared) or (batch,).

    It takes the dtype of the input `like` (batch, ...): once it has axes to broadcast over, a Parameter of higher
    precision would widen everything it meets.

    Raises:
        InputError: If there is neither, or its shape is wrong.
    """
    batch = like.shape[0]
    if given is not None and given.shape != (batch,):
        raise InputError(
            f"{name} as an input is one number per sample, so of shape ({batch},), not {tuple(given.shape)}"
        )
    return given if given is not None else resolve(name, stored, None).reshape(()).to(like.dtype)


def require_positive(name: str, value: Tensor) -> None:
    """Raise InputError, with the samples named, unless the values () or (batch,) are positive and finite."""
    wrong = ~((value > 0) & (value < math.inf))
    if bool(wrong.any()):
        raise InputError(f"{name} must be positive and finite{name_samples(wrong)}")


def name_samples(wrong: Tensor) -> str:
    """' in sample 3', ' in samples 3, 5', for a mask (batch,); '' for a mask without axes."""
    if wrong.dim() == 0:
        return ""
    samples = wrong.nonzero()[:, 0].tolist()
    listed = ", ".join(str(sample) for sample in samples[:8]) + (", ..." if len(samples) > 8 else "")
    return f" in sample{'s' if len(samples) > 1 else ''} {listed}"

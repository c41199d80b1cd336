"""The pointwise functions that the representation knows: how they fold, differentiate and print.

In: a name. Out: the number, the derivative's recipe, the torch expression. Powers, products and sums are no functions
(they have nodes of their own). Next file: `build.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def _sigmoid(a: float) -> float:
    return 1.0 / (1.0 + math.exp(-a)) if a >= 0.0 else math.exp(a) / (1.0 + math.exp(a))


FOLD: dict[str, Callable[..., float]] = {
    "exp": math.exp,
    "log": lambda a: math.log(a) if a > 0.0 else (-math.inf if a == 0.0 else math.nan),
    "log1p": math.log1p,
    "expm1": math.expm1,
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "sin": math.sin,
    "cos": math.cos,
    "atan": math.atan,
    "erf": math.erf,
    "softplus": lambda a: max(a, 0.0) + math.log1p(math.exp(-abs(a))),
    "abs": abs,
    "sign": lambda a: float((a > 0.0) - (a < 0.0)),
    "detach": lambda a: a,
    "cast": lambda a: a,
    "gt": lambda a, b: float(a > b),
    "ge": lambda a, b: float(a >= b),
    "lt": lambda a, b: float(a < b),
    "le": lambda a, b: float(a <= b),
    "eq": lambda a, b: float(a == b),
    "ne": lambda a, b: float(a != b),
    "and": lambda a, b: float(bool(a) and bool(b)),
    "or": lambda a, b: float(bool(a) or bool(b)),
    "not": lambda a: float(not a),
}
"""Values of functions of constants."""

FLAT = ("detach", "gt", "ge", "lt", "le", "eq", "ne", "sign")
"""Functions that carry no derivative."""


PRINT: dict[str, str] = {
    "exp": "{0}.exp()",
    "log": "{0}.log()",
    "log1p": "{0}.log1p()",
    "expm1": "{0}.expm1()",
    "tanh": "{0}.tanh()",
    "sigmoid": "{0}.sigmoid()",
    "sin": "{0}.sin()",
    "cos": "{0}.cos()",
    "atan": "{0}.atan()",
    "erf": "{0}.erf()",
    "softplus": "torch.nn.functional.softplus({0})",
    "abs": "{0}.abs()",
    "sign": "{0}.sign()",
    "detach": "{0}",
    "where": "torch.where({0}, {1}, {2})",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "~{0}",
    "cast": "{0}.to({like}.dtype)",
}
"""Torch expressions; {0}, {1}, ... are the arguments."""

"""An emitted function as a module to be read and run by itself: with its imports and the constants that it reads.

In: the source of the function and the namespace it was compiled in. Out: source text. Next file: `report.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from implicitdiff.graph.text import wrapped
from implicitdiff.operators.block import NullVectors

IMPORTS = {
    "torch": "import torch",
    "NullVectors": "from implicitdiff.operators.block import NullVectors",
}
"""Imports beside those from `implicitdiff` itself."""
MOST = 64
"""Constants of more numbers than this are arguments instead of text."""


def module(source: str, namespace: Mapping[str, Any]) -> str:
    """The function with everything in front of it that its names need.

    Tensors of the problem's own that are too large for text become keyword arguments.
    """
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    own = {argument.arg for argument in function.args.args}
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} - own
    lines, missing = [], []
    for name in sorted(names & set(namespace)):
        value = namespace[name]
        if isinstance(value, NullVectors):
            names |= {"torch", "NullVectors"}
            vectors = [_vector(vector) for vector in value]
            text = f"NullVectors([{', '.join(text or '' for text in vectors)}])" if all(vectors) else None
        elif isinstance(value, Tensor):
            names.add("torch")
            text = _tensor(value)
        else:
            continue
        if text is None:
            missing.append(name)
        else:
            lines += wrapped(f"{name} = {text}")
    if missing:
        head, rest = source.split("):\n", 1)
        source = f"{head}, *, {', '.join(missing)}):\n{rest}"
    return "\n".join([*_imports(names), *(["", *lines] if lines else []), "", "", source])


def _imports(names: set[str]) -> list[str]:
    top = [f"from implicitdiff import {', '.join(n for n in ('operators', 'solvers') if n in names)}"]
    found = [IMPORTS["torch"]] if "torch" in names else []
    found += top if {"operators", "solvers"} & names else []
    parts = [name for name in ("entries", "indexed", "saddle") if name in names]
    found += [f"from implicitdiff.kkt import {', '.join(parts)}"] if parts else []
    return found + ([IMPORTS["NullVectors"]] if "NullVectors" in names else [])


def _vector(vector: Tensor) -> str | None:
    """A vector as text: pieces of equal numbers are written as one."""
    pieces: list[tuple[float, int]] = []
    for value in vector.tolist():
        if pieces and pieces[-1][0] == value:
            pieces[-1] = (value, pieces[-1][1] + 1)
        else:
            pieces.append((value, 1))
        if len(pieces) > MOST:
            return None
    kind, device = vector.dtype, vector.device
    texts = [f'torch.full(({count},), {value!r}, dtype={kind}, device="{device}")' for value, count in pieces]
    return texts[0] if len(texts) == 1 else f"torch.cat([{', '.join(texts)}])"


def _tensor(tensor: Tensor) -> str | None:
    if tensor.numel() > MOST or tensor.is_meta:
        return None
    return f'torch.tensor({tensor.tolist()}, dtype={tensor.dtype}, device="{tensor.device}")'

"""A private copy of a Problem whose tensors are replaced, so that tracing never touches the live module.

Comes in: a Problem and a replacement for each of its tensors. Goes out: a twin made of shallow copies of
modules and containers. What the traced functions write (``self.calls += 1``) lands on the twin, and other
threads never see a module with foreign tensors in it. Used by ``trace.py``.
"""

import copy
import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch

from implicitdiff.problem import Problem


def skeleton(problem: Problem, replacements: Mapping[int, torch.Tensor]) -> Problem:
    """The twin of a Problem.

    Args:
        problem: The Problem; it is only read.
        replacements: For ``id(tensor)`` of each tensor that ``attributes.scan`` found, the one to put in its
            place.

    Returns:
        The twin. Modules, lists, tuples, dicts, dataclasses, namespaces, partials and bound methods are
        copied, each once (what was shared stays shared); everything else is shared with the original.
    """
    twin = _Copier(replacements).twin(problem)
    assert isinstance(twin, Problem)
    return twin


class _Copier:
    def __init__(self, replacements: Mapping[int, torch.Tensor]) -> None:
        self._replacements = replacements
        self._twins: dict[int, Any] = {}

    def twin(self, value: Any) -> Any:
        """The copy of one object; cyclic ones (a module that holds itself) are noted first, then filled."""
        if isinstance(value, torch.Tensor):
            return self._replacements.get(id(value), value)
        if id(value) in self._twins:
            return self._twins[id(value)]
        result: Any
        match value:
            case torch.jit.ScriptModule():
                return value  # its state lives in C++: its tensors are found in the graph by identity
            case torch.nn.Module():
                return self._module(value)
            case dict():
                result = self._twins[id(value)] = copy.copy(value)
                for key, item in value.items():
                    result[key] = self.twin(item)
            case list():
                result = self._twins[id(value)] = copy.copy(value)
                result[:] = [self.twin(item) for item in value]
            case tuple():
                result = self._tuple(value)
            case types.MethodType():
                result = types.MethodType(value.__func__, self.twin(value.__self__))
            case functools.partial():
                arguments = [self.twin(item) for item in value.args]
                keywords = {key: self.twin(item) for key, item in value.keywords.items()}
                result = functools.partial(self.twin(value.func), *arguments, **keywords)
            case types.SimpleNamespace():
                result = self._twins[id(value)] = copy.copy(value)
                self._fill(result, vars(value))
            case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
                result = self._twins[id(value)] = copy.copy(value)
                names = [field.name for field in dataclasses.fields(value)]
                self._fill(result, {name: getattr(value, name) for name in names if hasattr(value, name)})
            case _:
                return value
        self._twins[id(value)] = result
        return result

    def _module(self, module: torch.nn.Module) -> torch.nn.Module:
        # Past __init__ and __setattr__: a parameter is replaced by a tensor that is no Parameter.
        result = self._twins[id(module)] = object.__new__(type(module))
        for name, item in vars(module).items():
            result.__dict__[name] = self.twin(item)
        return result

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        items = [self.twin(item) for item in value]
        if type(value) is tuple:
            return tuple(items)
        if hasattr(value, "_make"):
            return value._make(items)
        return value  # torch.Size and the like hold no tensors

    def _fill(self, target: object, items: Mapping[str, Any]) -> None:
        for name, item in items.items():
            object.__setattr__(target, name, self.twin(item))

"""What a Problem holds: its tensors, by name, and a key of everything else that its functions can read.

Comes in: a Problem. Goes out: ``Reachable``. The tensors become arguments of the graph, so that their values
are never baked in; all other values are baked in, so that they are part of the key under which a plan is
kept: changing a float attribute, ``eval()``, a closure or a global constant gives another key. Next file to
    read: ``problem.py``.
"""

import dataclasses
import enum
import functools
import types
from collections.abc import Hashable, Iterator
from typing import Any

import torch

_MODULE_INTERNALS = frozenset(vars(torch.nn.Module()))
_ATOMS = frozenset(
    [bool, int, str, bytes, complex, type(None), type(...), slice, torch.dtype, torch.device, torch.layout]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Reachable:
    """What ``scan`` found.

    Attributes:
        names: The path of each tensor, ``self.eps``, ``self.layers[0].weight``; the first one if there are
            several.
        tensors: The distinct tensors: of each module its parameters (as in ``named_parameters``), its
            buffers, those in its other attributes, then those of its submodules.
        captured: Tensors that the functions read without the Problem holding them: in closures and as
            globals.
        signature: A hashable key: equal keys mean equal values of everything that is not a tensor, and the
            same names, shapes, dtypes, devices and sharing of the tensors. It does not hold the tensors
            themselves.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    captured: tuple[torch.Tensor, ...]
    signature: Hashable


def scan(problem: torch.nn.Module) -> Reachable:
    """Walk through a Problem: submodules, lists, tuples, dicts, dataclasses, namespaces, functions.

    Args:
        problem: The Problem (any module).

    Returns:
        Its tensors and the key of all the rest. Cost: one visit to each attribute, no look at any tensor's
        data.
    """
    walk = _Walk()
    signature = walk.key(problem, "self")
    return Reachable(tuple(walk.names), tuple(walk.tensors), tuple(walk.captured), signature)


def problem_signature(problem: torch.nn.Module) -> Hashable:
    """The key of a Problem for the plan cache, see ``Reachable.signature``."""
    return scan(problem).signature


def plain_values(problem: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, value) of the numbers, strings and flags in a Problem's modules, lists, tuples and dicts."""
    yield from _plain_values(problem, "self", set())


def _plain_values(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if type(value) in (bool, int, float, str):
        if value == value:  # a NaN equals nothing
            yield path, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    items: list[tuple[str, Any]] = []
    match value:
        case torch.nn.Module():
            held = {name: item for name, item in vars(value).items() if name not in _MODULE_INTERNALS}
            held |= {"training": value.training, **vars(value)["_modules"]}
            items = [(f"{path}.{name}", item) for name, item in held.items() if name.isidentifier()]
        case dict():
            items = [(f"{path}[{key!r}]", item) for key, item in value.items() if type(key) in (str, int)]
        case list() | tuple():
            items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    for name, item in items:
        yield from _plain_values(item, name, seen)


class Same:
    """A key that only the very same object equals; it keeps the object alive, so that no id recurs."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Walk:
    """One depth-first visit; ``key`` returns the key of an object and collects the tensors on the way."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        self.captured: list[torch.Tensor] = []
        self._position: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        self._collect = True

    def key(self, value: Any, path: str) -> Hashable:
        """The key of one object that lies at ``path``."""
        kind = type(value)
        if kind in _ATOMS:
            return (kind, value) if kind is not slice else (kind, repr(value))
        if kind is float:
            return (kind, value.hex())  # tells 0.0 from -0.0 and makes NaN equal to itself
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType | enum.Enum):
            return Same(value)
        if id(value) in self._seen:
            return ("again", self._seen[id(value)])
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        return (kind, *self._parts(value, path))

    def _tensor(self, tensor: torch.Tensor, path: str) -> Hashable:
        if not self._collect:
            self.captured.append(tensor)
            return Same(tensor)
        position = self._position.get(id(tensor))
        if position is None:
            position = self._position[id(tensor)] = len(self.tensors)
            self.names.append(path)
            self.tensors.append(tensor)
        return (path, position, tensor.shape, tensor.dtype, tensor.device)

    def _parts(self, value: Any, path: str) -> Iterator[Hashable]:
        """The keys of what an object consists of."""
        match value:
            case torch.nn.Module():
                yield from self._module(value, path)
            case dict():
                for name, item in value.items():
                    yield self.key(name, path)
                    yield self.key(item, f"{path}[{name!r}]")
            case list() | tuple():
                for index, item in enumerate(value):
                    yield self.key(item, f"{path}[{index}]")
            case set() | frozenset():
                yield frozenset(self.key(item, path) for item in value)
            case types.FunctionType():
                yield from self._function(value)
            case types.MethodType():
                yield self.key(value.__func__, path)
                yield self.key(value.__self__, path)
            case functools.partial():
                yield self.key(value.func, f"{path}.func")
                yield self.key(value.args, f"{path}.args")
                yield self.key(value.keywords, f"{path}.keywords")
            case _ if dataclasses.is_dataclass(value):
                for field in dataclasses.fields(value):
                    yield self.key(getattr(value, field.name, None), f"{path}.{field.name}")
            case types.SimpleNamespace():
                for name, item in vars(value).items():
                    yield name
                    yield self.key(item, f"{path}.{name}")
            case _:
                yield from _foreign(value)

    def _module(self, module: torch.nn.Module, path: str) -> Iterator[Hashable]:
        values = vars(module)
        yield module.training
        for group in ("_parameters", "_buffers"):
            for name, tensor in values[group].items():
                yield (name, self.key(tensor, f"{path}.{name}"))
        for name, item in values.items():
            if name not in _MODULE_INTERNALS:
                yield (name, self.key(item, f"{path}.{name}"))
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            if values[hooks]:
                yield tuple(Same(hook) for hook in values[hooks].values())
        for name, child in values["_modules"].items():
            yield (name, self.key(child, f"{path}.{name}"))
        kind: type = type(module)
        methods = _methods(kind)
        for method in methods:
            if method.__closure__:
                yield from self._cells(method)
        yield from self._read_globals(methods)

    def _function(self, function: types.FunctionType) -> Iterator[Hashable]:
        # What a function captures is not an attribute: its tensors are not collected, only compared by
        # identity.
        collect, self._collect = self._collect, False
        try:
            yield function.__code__
            yield self.key(function.__defaults__, "")
            yield self.key(function.__kwdefaults__, "")
        finally:
            self._collect = collect
        yield from self._cells(function)
        yield from self._read_globals((function,))

    def _cells(self, function: types.FunctionType) -> Iterator[Hashable]:
        collect, self._collect = self._collect, False
        try:
            for cell in function.__closure__ or ():
                yield self.key(_contents(cell), "")
        finally:
            self._collect = collect

    def _read_globals(self, functions: tuple[types.FunctionType, ...]) -> Iterator[Hashable]:
        collect, self._collect = self._collect, False
        try:
            for namespace, name in _global_data(functions):
                yield (name, self.key(namespace.get(name), ""))
        finally:
            self._collect = collect


def _foreign(value: Any) -> Iterator[Hashable]:
    """The key of an object of another class: its identity, and what of it is cheap to compare."""
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        yield (str(value.dtype), value.shape, value.tobytes())
        return
    yield Same(value)
    for name, item in getattr(value, "__dict__", {}).items():
        if type(item) in _ATOMS or type(item) is float:
            yield (name, type(item), repr(item))


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has not been assigned yet
        return None


def _underlying(value: Any) -> Any:
    """The function of a static method, a class method or a property."""
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)


@functools.lru_cache(maxsize=1024)
def _methods(kind: type) -> tuple[types.FunctionType, ...]:
    """The functions a module class defines itself, without those of torch and of the class Problem."""
    classes = [c for c in kind.__mro__ if c is not object and not c.__module__.startswith("torch.")]
    values = [_underlying(value) for c in classes for value in vars(c).values()]
    functions = [value for value in values if isinstance(value, types.FunctionType)]
    return tuple(
        f for f in functions if f.__module__ not in ("implicitdiff.problem", "implicitdiff.equations")
    )


@functools.lru_cache(maxsize=1024)
def _global_data(functions: tuple[types.FunctionType, ...]) -> tuple[tuple[dict[str, Any], str], ...]:
    """(namespace, name) of each global that the functions read and that is data: no module, class or
    function.

    Functions they call by a global name are followed. The names are found once per function, the values are
    read at each visit.
    """
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    queue = list(functions)
    visited: set[types.FunctionType] = set()
    while queue:
        function = queue.pop()
        if function in visited:
            continue
        visited.add(function)
        namespace = function.__globals__
        for name in sorted(_names(function.__code__)):
            value = namespace.get(name)
            if isinstance(value, types.FunctionType):
                if value.__module__.partition(".")[0] != "torch":
                    queue.append(value)
            elif name in namespace and not isinstance(
                value, types.ModuleType | type | types.BuiltinFunctionType
            ):
                found[id(namespace), name] = (namespace, name)
    return tuple(found.values())


def _names(code: types.CodeType) -> set[str]:
    """All names a code object reads, including those of functions defined inside it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)

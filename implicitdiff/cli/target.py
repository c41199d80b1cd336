"""Command line, PROBLEM: from the word on the command line to an object.

In: the name of a built-in problem, or `path/to/file.py:ClassName`, and `name=value` pairs for its constructor. Out: a
Problem. Used by the commands that take one.
"""

import ast
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from implicitdiff import Problem, problems
from implicitdiff.cli.tool import USER_MODULE, Refused
from implicitdiff.combinatorial import Solver

KINDS = (Problem, Solver)
"""What PROBLEM may be: a declared problem, or a discrete solver, which stands for its layer with Identity."""


def builtin_problems() -> dict[str, type[Problem] | type[Solver]]:
    """The built-in problems by the names that the command line knows: declared ones first, then discrete ones."""
    classes = [getattr(problems, name) for name in problems.__all__]
    found = [c for c in classes if isinstance(c, type) and issubclass(c, KINDS)]
    return {_dashed(c.__name__): c for c in sorted(found, key=lambda c: (issubclass(c, Solver), c.__name__))}


def make_problem(word: str, options: Mapping[str, Any]) -> Problem | Solver:
    """The problem (or discrete solver) that PROBLEM names, made with these options of its constructor.

    Raises:
        click.UsageError: There is no such name, file or class.
        Refused: The file, or the constructor, raises an error.
    """
    found = _named(word)
    if isinstance(found, KINDS):
        if options:
            raise click.UsageError(f"{word} is an object already, so --with has nothing to set")
        return found
    try:
        made: Problem | Solver = found(**options)
        return made
    except TypeError as error:
        takes = ", ".join(inspect.signature(found).parameters) or "nothing"
        remedy = f"it takes {takes}; pass values by --with name=value"
        raise Refused("TypeError", f"{found.__name__} cannot be made: {error} ({remedy})") from error


def pairs(words: tuple[str, ...], option: str) -> dict[str, Any]:
    """{"n": 64} from ("n=64",); values are Python numbers, lists and so on, anything else is text."""
    found = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(f"{option} {word}: write name=value, as in {option} n=64")
        found[name] = _value(text)
    return found


def lists(words: tuple[str, ...], option: str) -> dict[str, list[Any]]:
    """{"n": [16, 64]} from ("n=16,64",)."""
    found = {}
    for word in words:
        name, equals, text = word.partition("=")
        values = [_value(part) for part in text.split(",") if part]
        if not equals or not name.isidentifier() or not values:
            raise click.UsageError(f"{option} {word}: write name=value,value,..., as in {option} n=16,64,256")
        found[name] = values
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _named(word: str) -> Any:
    known = builtin_problems()
    if _dashed(word) in known:
        return known[_dashed(word)]
    path, colon, name = word.rpartition(":")
    path, name = (path, name) if colon and path.endswith(".py") else (word, "")
    if not path.endswith(".py"):
        raise click.UsageError(
            f"there is no problem {word!r}: the built-in ones are {', '.join(known)}; for one of your own write "
            "path/to/file.py:ClassName"
        )
    return _in_file(Path(path), name)


def _in_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise click.UsageError(f"there is no file {path}")
    module = _load(path)
    own = {
        key: value
        for key, value in vars(module).items()
        if (isinstance(value, type) and issubclass(value, KINDS) and value.__module__ == module.__name__)
        or isinstance(value, KINDS)
    }
    choices = (
        f"{path} declares {', '.join(own)}" if own else f"{path} declares no subclass of implicitdiff.Problem"
    )
    if not name:
        if len(own) == 1:
            return next(iter(own.values()))
        raise click.UsageError(f"which problem? {choices}: write {path}:ClassName")
    found: Any = own.get(name)
    if found is None:
        raise click.UsageError(f"there is no problem {name!r} in {path}: {choices}")
    return found


def _load(path: Path) -> ModuleType:
    """Import the file under a name of its own, with its folder on the path as Python has it for a script."""
    name = USER_MODULE + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes are looked up by their module's name
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Refused(
            "SyntaxError", f"{error.filename}, line {error.lineno}: SyntaxError: {error.msg}"
        ) from error
    except Exception as error:  # whatever the user's own file does when it is imported
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _same(frame.filename, path)
        ]
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise Refused(type(error).__name__, f"{place}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _same(filename: str, path: Path) -> bool:
    return Path(filename).resolve() == path.resolve()


def _dashed(name: str) -> str:
    """robust-pooling from RobustPooling, robust_pooling or robust-pooling."""
    parts = "".join(f"-{c.lower()}" if c.isupper() else c for c in name).replace("_", "-")
    return parts.lstrip("-")

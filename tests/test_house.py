"""House rules that no linter checks, over every Python file of the repository.

The list of files comes from the folders themselves, not from git, so that the rules hold in a plain copy.
"""

import ast
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("implicitdiff", "problems", "tests", "docs")
LINE_LIMIT = 400
BANNED = {"torch.linalg.solve", "torch.linalg.solve_ex", "torch.linalg.tensorsolve"}


def python_files(*folders: str) -> list[Path]:
    """All Python files below the folders, each once: directories that are links are not entered."""
    found = []
    for folder in folders:
        for directory, _, names in os.walk(ROOT / folder, followlinks=False):
            found += [Path(directory, name).relative_to(ROOT) for name in names if name.endswith(".py")]
    return sorted(found)


FILES = python_files(*FOLDERS)
DOORS = [
    Path("implicitdiff", "__init__.py"),
    Path("implicitdiff", "combinatorial", "__init__.py"),
    Path("problems", "__init__.py"),
]
# The inner modules that users, and therefore the files of problems/, may import from.
PUBLIC_MODULES = ("combinatorial", "errors", "operators", "optimizers", "problems")


def module_name(path: Path) -> str:
    """The name a file is imported by; the files of problems/ belong to the package through the link."""
    parts = list(path.with_suffix("").parts)
    if parts[0] == "problems":
        parts.insert(0, "implicitdiff")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def dotted_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every name that is used or imported, with import aliases resolved.

    `import torch.linalg as la; la.solve` yields torch.linalg.solve, as does `from torch.linalg import solve`,
    while `numpy.linalg.solve` stays what it is.
    """
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name.partition(".")[0]] = (
                    name.name if name.asname else name.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                yield node.lineno, f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            yield node.lineno, ".".join([aliases.get(inner.id, inner.id), *reversed(parts)])


def banned_uses(source: str) -> list[tuple[int, str]]:
    """Uses of a solver whose second derivatives are wrong when the inner derivative is forward mode."""
    return [(line, name) for line, name in dotted_uses(ast.parse(source)) if name in BANNED]


def bare_excepts(source: str) -> list[int]:
    """Lines with `except:`, which would swallow KeyboardInterrupt and every programming error."""
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler)]
    return [node.lineno for node in handlers if node.type is None]


def declared_exports(path: Path) -> list[str]:
    """The names in a module's `__all__`, which has to be a literal list; empty where there is none."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_is_short_documented_and_has_no_bare_except(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    lines = source.count("\n")
    assert lines <= LINE_LIMIT, f"{path} has {lines} lines: split it by responsibility"
    assert ast.get_docstring(ast.parse(source)) or not source.strip(), f"{path} has no module docstring"
    assert bare_excepts(source) == [], f"{path}: name the exceptions"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_solver_with_wrong_second_derivatives(path: Path) -> None:
    assert banned_uses((ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if "\n__all__" in (ROOT / path).read_text(encoding="utf-8")], ids=str
)
def test_all_is_honest(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    names = declared_exports(path)
    assert names, f"{path}: __all__ is empty, or not a literal list"
    assert len(names) == len(set(names)), "a name is listed twice"
    assert [name for name in names if not hasattr(module, name)] == [], "listed, but not there"


@pytest.mark.parametrize("path", DOORS, ids=str)
def test_door_lists_every_public_name(path: Path) -> None:
    door = importlib.import_module(module_name(path))
    public = {
        name
        for name, value in vars(door).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public, f"{path} exports nothing"
    assert public - set(declared_exports(path)) == set(), f"imported by {path}, but not in __all__"


def test_problems_use_public_names_only() -> None:
    for path in python_files("problems"):
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                inner = [name.name for name in node.names if name.name.startswith("implicitdiff.")]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                inner = [node.module] if (node.module or "").startswith("implicitdiff.") else []
            else:
                continue
            inner = [name for name in inner if name.split(".")[1] not in PUBLIC_MODULES]
            assert inner == [], f"{path}:{node.lineno} imports {inner}: if it is needed, make it public"


def test_problems_are_linked_into_the_package() -> None:
    link = ROOT / "implicitdiff" / "problems"
    assert link.is_symlink(), "implicitdiff/problems must be a symbolic link, not a copy"
    assert os.readlink(link) == os.path.join("..", "problems"), "only a relative link survives a clone"
    assert (ROOT / "problems").is_dir()
    assert not (ROOT / "problems").is_symlink()


def test_package_is_typed() -> None:
    assert (ROOT / "implicitdiff" / "py.typed").is_file()


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.linalg.solve(a, b)",
        "import torch.linalg as la\nla.solve(a, b)",
        "from torch.linalg import solve",
        "from torch import linalg\nf = linalg.solve_ex",
    ],
)
def test_rule_against_solve_can_fail(source: str) -> None:
    assert banned_uses(source) != []


def test_rule_against_solve_lets_numpy_and_factorisations_pass() -> None:
    assert banned_uses("import numpy as np\nnp.linalg.solve(a, b)") == []
    assert banned_uses("import torch\ntorch.linalg.solve_triangular(a, b, upper=False)") == []


def test_rule_against_bare_except_can_fail() -> None:
    assert bare_excepts("try:\n    f()\nexcept:\n    pass") == [3]
    assert bare_excepts("try:\n    f()\nexcept ValueError:\n    pass") == []

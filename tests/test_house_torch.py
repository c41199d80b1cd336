"""House rules about torch: no device is named, every tensor is made on a named one, private names have one door.

Over the files of the library and of problems/. `test_torch_private.py` has a test of each name behind the door.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_house import ROOT, dotted_uses, python_files

FILES = python_files("implicitdiff", "problems")
DOOR = Path("implicitdiff", "torch_private.py")

# "meta" is no device of a machine: it says that there are shapes without numbers.
KINDS = "cpu|cuda|hip|mps|xpu|xla|hpu|mtia|npu|ipu|maia|vulkan|opencl|lazy|privateuseone"
DEVICE = re.compile(rf"({KINDS})(:\d+)?")
DEVICE_NAMES = frozenset([*KINDS.split("|"), *(f"is_{kind}" for kind in KINDS.split("|"))])

# What takes `device=` and makes a tensor on torch's default device without it. `tensor` and `as_tensor` move what
# they are given there, too.
FACTORIES = frozenset(
    "arange as_tensor asarray empty empty_strided eye full linspace logspace ones rand randint randn randperm "
    "scalar_tensor tensor tril_indices triu_indices zeros".split()
)
# A number that a Problem is made with becomes a buffer on the default device, as in every torch module.
MADE_BY_USERS = {Path("problems", "coefficients.py"): 1}


def named_devices(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) wherever a device is named: a string, torch.cuda and its like, x.cuda(), x.is_cuda."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DEVICE.fullmatch(node.value):
            yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Attribute) and node.attr in DEVICE_NAMES:
            yield node.lineno, f".{node.attr}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                name = f"{module}.{alias.name}"
                if "torch" in name and DEVICE_NAMES & set(name.split(".")):
                    yield node.lineno, name


def homeless(source: str) -> Iterator[tuple[int, str]]:
    """(line, function) of each tensor that is made without `device=`; in code that is emitted as text too."""
    tree = ast.parse(source)
    messages = {id(part) for node in ast.walk(tree) if _is_error(node) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts = ast.unparse(node.func).split(".")
            made = parts[0] == "torch" and len(parts) == 2 and parts[1] in FACTORIES
            if made and not any(keyword.arg == "device" for keyword in node.keywords):
                yield node.lineno, ".".join(parts)
        elif isinstance(node, ast.JoinedStr) and id(node) not in messages:
            text = ast.unparse(node)
            made = re.findall(rf"torch\.(?:{'|'.join(FACTORIES)})\(", text)
            if len(made) > text.count("device="):
                yield node.lineno, text


def _is_error(node: ast.AST) -> bool:
    """A message may show the user how a tensor is made."""
    made = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")
    return made or isinstance(node, ast.Raise)


def private_uses(source: str, own: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of each private or experimental name of torch; `own` are the library's private names.

    Names of operations (torch.ops.aten._softmax) are no Python names, and are written as torch writes them.
    """
    tree = ast.parse(source)
    for line, name in dotted_uses(tree):
        parts = name.split(".")
        if (
            parts[0] == "torch"
            and parts[1:2] != ["ops"]
            and (any(map(_private, parts)) or "experimental" in parts)
        ):
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch.") and any(map(_private, alias.name.split("."))):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Attribute) and _private(node.attr) and node.attr not in own:
            if ast.unparse(node.value) not in ("aten", "torch.ops.aten", "sys"):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and _private(str(name.value)) and name.value not in own:
                yield node.lineno, ast.unparse(node)


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> frozenset[str]:
    """Private names that the library gives itself, and `_make` of named tuples."""
    found = {"_make"}
    for path in FILES:
        if path == DOOR:
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return frozenset(found)


OWN = own_names()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_device_is_named_and_every_tensor_is_made_on_one(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    named = [f"{path}:{line} names {what}" for line, what in named_devices(source)]
    if path == DOOR:
        assert len(named) == 1, "the host is named once, as HOST"
        assert re.search(r'^HOST = torch\.device\("cpu"\)$', source, re.MULTILINE)
    else:
        assert named == [], "take the device of a tensor of the call, or torch_private.HOST"
    made = [f"{path}:{line} makes {what} without device=" for line, what in homeless(source)]
    assert len(made) == MADE_BY_USERS.get(path, 0), made


@pytest.mark.parametrize("path", [path for path in FILES if path != DOOR], ids=str)
def test_private_names_of_torch_have_one_door(path: Path) -> None:
    found = private_uses((ROOT / path).read_text(encoding="utf-8"), OWN)
    assert [f"{path}:{line} uses {name}" for line, name in found] == [], f"put it into {DOOR}, with a test"


@pytest.mark.parametrize(
    "source",
    [
        'torch.device("cuda:1")',
        'x.to("cpu")',
        "x.cuda()",
        "x.is_mps",
        "torch.cuda.synchronize()",
        "from torch.cuda import amp",
        "import torch.mps",
    ],
)
def test_rule_against_devices_can_fail(source: str) -> None:
    assert list(named_devices(source)) != []


@pytest.mark.parametrize("source", ['x.to("meta")', "x.is_meta", '"""Runs on a cpu."""', "x.to(y.device)"])
def test_rule_against_devices_lets_the_general_pass(source: str) -> None:
    assert list(named_devices(source)) == []


def test_rule_for_the_device_of_new_tensors_can_fail() -> None:
    assert list(homeless("torch.zeros(3)")) == [(1, "torch.zeros")]
    assert list(homeless("torch.as_tensor(x, dtype=y.dtype)")) != []
    assert list(homeless('f"torch.eye({n}, dtype={x}.dtype)"')) != []
    assert list(homeless('f"torch.eye({n}, dtype={x}.dtype, device={x}.device)"')) == []
    assert list(homeless("torch.zeros(3, device=x.device)\nx.new_zeros(3)\ntorch.zeros_like(x)")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._functorch",
        "import torch._dynamo",
        "from torch._ops import OpOverload",
        "from torch.utils import _pytree as pytree",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "import torch\ntorch.utils._pytree.tree_map",
        "func._schema",
        'getattr(func, "_schema")',
        "tensor.untyped_storage()._cdata",
    ],
)
def test_rule_against_private_names_can_fail(source: str) -> None:
    assert list(private_uses(source, OWN)) != []


def test_rule_against_private_names_lets_the_rest_pass() -> None:
    source = "import torch\naten = torch.ops.aten\naten._softmax\nself._own = 1\nself._own\ntorch.__version__"
    assert list(private_uses(source, frozenset(["_own"]))) == []


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = [name for name in tomllib.load(file)["project"]["dependencies"] if name.startswith("torch")]
    oldest = re.search(r'OLDEST_TORCH = "(\d+\.\d+)\.0"', (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    assert oldest is not None
    assert wanted == [f"torch>={oldest[1]}"]
    for text in ("README.md", "CONTRIBUTING.md"):
        assert f"torch >= {oldest[1]}" in (ROOT / text).read_text(encoding="utf-8"), text

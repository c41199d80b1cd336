"""Report 3, continued: goals that no clock decides: the emitted text, strangers' declarations, the fuzz campaign.

Nothing comes in but the folder with the last campaign's summary; `Check`s go out.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import torch

import implicitdiff as idf
from benchmarks.race import counted
from benchmarks.targets import Check
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.cases.base import Case
from tests.cases.pooling import CASES as POOLING
from tests.cases.strangers_pooling import CASES as STRANGERS_POOLING
from tests.cases.strangers_transport import CASES as STRANGERS_TRANSPORT
from tests.cases.transport import CASES as TRANSPORT


def statements(code: str) -> int:
    """Statements of the functions in a text, without their heads and docstrings."""
    found = 0
    for function in ast.walk(ast.parse(code)):
        if isinstance(function, ast.FunctionDef):
            body = function.body[ast.get_docstring(function) is not None :]
            found += sum(isinstance(node, ast.stmt) for part in body for node in ast.walk(part))
    return found


def texts() -> list[Check]:
    """How long the emitted passes of the built-ins are."""
    x, M = torch.empty(1, 128, 1024, device="meta"), torch.empty(1, 100, 100, device="meta")
    marginal = torch.empty(1, 100, device="meta")
    pooling = idf.explain(RobustPooling("pseudo-huber", 16.0), x)
    transport = idf.explain(OptimalTransport(10.0), M, marginal, marginal)
    return [
        Check("code of pooling", "statements", 16, statements(pooling.code), note=pooling.solver),
        Check("code of transport", "statements", 24, statements(transport.code), note=transport.solver),
    ]


def strangers(quick: bool) -> Iterator[list[Check]]:
    """Bytes and peak of other spellings of the built-ins, over the built-in, for the inputs that both have."""
    built_in = {case.name: case for case in (*POOLING, *TRANSPORT)}
    for case in (*STRANGERS_POOLING, *STRANGERS_TRANSPORT):
        own = built_in.get(case.built_in or "")
        if own is None or len(case.sizes[0]) != len(own.sizes[0]):
            continue  # three marginals are more than another spelling
        large = (64, 512) if case in STRANGERS_POOLING else (30, 40)
        sizes = (16, 64) if quick and case in STRANGERS_POOLING else (8, 12) if quick else large
        try:
            mine, theirs = _cost(case, sizes, 3), _cost(own, sizes, 3)
        except idf.ImplicitDiffError as error:
            yield [
                Check(f"stranger {case.name}", "bytes", 1.05, None, note=" ".join(str(error).split())[:120])
            ]
            continue
        setting = f"stranger {case.name} {sizes[0]}x{sizes[1]}"
        yield [
            Check(setting, name, 1.05, a / b)
            for name, a, b in zip(("bytes", "peak"), mine, theirs, strict=True)
        ]


def _cost(case: Case, sizes: tuple[int, ...], batch: int) -> tuple[int, int]:
    inputs = case.make_inputs(batch=batch, sizes=sizes)
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 1]
    u = idf.DeclarativeLayer(case.problem(), in_dims=case.in_dims, on_failure="warn")(*inputs)
    (u,) = u if isinstance(u, tuple) else (u,)
    v = torch.ones_like(u)
    torch.autograd.grad(u, leaves, v, retain_graph=True, allow_unused=True)
    _, counts = counted(lambda: torch.autograd.grad(u, leaves, v, retain_graph=True, allow_unused=True))
    return counts.bytes, counts.peak


def fuzz(folder: Path) -> list[Check]:
    """The goals of the last `make fuzz`, from the summary it left."""
    path = folder / "summary.json"
    if not path.exists():
        return [Check("random programs", "checked", 10_000, None, at_least=True, note="run make fuzz first")]
    found = json.loads(path.read_text(encoding="utf-8"))
    subject = "random programs"
    return [
        Check(subject, "checked", 10_000, found["checked"], at_least=True),
        Check(subject, "mismatches", 0, found["wrong"]),
        Check(subject, "share of planted kinds found", 0.95, found["found"], at_least=True),
        Check(subject, "share that falls back", 0.05, found["fallbacks"]),
        Check(subject, "hits of the rarest rule file", 50, found["rarest_rule"], at_least=True),
    ]

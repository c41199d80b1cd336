"""Assembles a random program: a Problem as source text, with a kind of Hessian that is known because it was
planted.

In: a random.Random. Out: a frozen `Program`, which can print itself as a file to paste. Next: check.py.
"""

import linecache
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import implicitdiff as idf
from tests.fuzz import bands, constraints, graphs, terms
from tests.fuzz.bands import Band
from tests.fuzz.scope import Scope, Shape, Source
from tests.fuzz.values import Value

KINDS = (
    "scaled-identity", "diagonal", "banded", "block-diagonal", "low-rank-plus-diagonal", "sparse", "sum", "dense",
)  # fmt: skip


@dataclass(frozen=True)
class Program:
    """One random problem with its data.

    Attributes:
        source: The text of a class `Generated(idf.Problem)`.
        variables: The shape of each leaf of u, for one sample.
        sources: The inputs and Parameters it reads.
        planted: The kind of its H; "dense" promises nothing.
        groups: A number for each entry of u: entries of different groups are not coupled by H.
        places: A number for each entry of u: entries whose places differ by more than `reach` are not coupled by H.
        reach: See `places`.
        constraints: "none", "linear", "nonlinear" or "dependent".
        dependences: How many constraints follow from others.
        batch: The number of samples.
        data_seed: The seed of u, the multipliers, the cotangents and the data.
    """

    source: str
    variables: tuple[Shape, ...]
    sources: tuple[Source, ...]
    planted: str
    groups: tuple[int, ...]
    places: tuple[int, ...]
    reach: int
    constraints: str
    dependences: int
    batch: int
    data_seed: int

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The sources that are inputs, in the order of the hooks' arguments."""
        return tuple(source for source in self.sources if not source.parameter)

    @property
    def in_dims(self) -> tuple[int | None, ...]:
        """As for the layer."""
        return tuple(0 if source.batched else None for source in self.inputs)

    def problem(self) -> idf.Problem:
        """An instance, its Parameters drawn from `data_seed`. Its source lines are known to `linecache`."""
        file = f"<program {abs(hash(self.source))}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        namespace: dict[str, Any] = {"torch": torch, "idf": idf, "__name__": __name__}
        exec(compile(self.source, file, "exec"), namespace)
        problem: idf.Problem = namespace["Generated"]()
        draws = _Draws(self.data_seed + 1)
        for source in self.sources:
            if source.parameter:
                getattr(problem, source.name).data.copy_(draws.of(source, ()))
        return problem

    def make_inputs(self) -> tuple[Tensor, ...]:
        """The inputs, batch axis first where batched."""
        draws = _Draws(self.data_seed + 2)
        return tuple(draws.of(source, (self.batch,) if source.batched else ()) for source in self.inputs)

    def __str__(self) -> str:
        shapes = ", ".join(f"{s.text} {s.shape}{'' if s.batched else ' shared'}" for s in self.sources)
        head = f"# planted: {self.planted}; constraints: {self.constraints}; u {self.variables}"
        return f"{head}; batch {self.batch}\n# {shapes}; data seed {self.data_seed}\n{self.source}"


class _Draws:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def of(self, source: Source, lead: Shape) -> Tensor:
        shape = (*lead, *source.shape)
        if source.positive:
            return 0.5 + torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return 0.7 * torch.randn(shape, generator=self._generator, dtype=torch.float64)


def generate(rng: random.Random) -> Program:
    """A random program."""
    s = Scope(rng, sizes=(rng.randint(2, 5), rng.randint(1, 6)))
    if s.chance(0.08):
        return _assemble(s, *_two_variables(s))
    variable, text, u = _layout(s)
    band = bands.some_band(s, u)
    planted = _kind(s, u, band)
    band = band if planted == "banded" else None
    tied = _tied(s, u) if planted == "block-diagonal" else frozenset()
    objective = _lines(s, " + ".join(_objective(s, u, planted, tied, band)))
    objective = [f"u0 = {text}", *objective] if text != "u" else objective
    kind, outputs, dependences, lines = _equality(s, u, planted, tied, band)
    lines = [f"u0 = {text}", *lines] if text != "u" and outputs else lines
    permuted = "permute" in text
    groups = _groups(u, planted, tied, permuted)
    places = _numbers(u, frozenset() if band is None else frozenset(u.axes[band.axis]), permuted)
    reach = 0 if band is None else band.reach
    return _assemble(s, (variable,), objective, lines, planted, (groups, places, reach), kind, dependences)


def _layout(s: Scope) -> tuple[Shape, str, Value]:
    """The declared shape of u, and u as the terms see it: as it is, permuted, or a vector, reshaped."""
    rank = s.rng.choice([0] + [1] * 6 + [2] * 8 + [3] * 3)
    shape = tuple(s.size() for _ in range(rank))
    if rank == 3:
        shape = tuple(min(size, 4) for size in shape)
    axes = tuple((f"u{k}",) for k in range(rank))
    layout = s.rng.choice(["plain"] * 6 + ["flat", "permuted"] * (rank > 1))
    if layout == "flat":
        sizes = ", ".join(map(str, shape))
        return (math.prod(shape),), f"u.reshape({sizes})", Value("u0", shape, axes)
    if layout == "permuted":
        order = ", ".join(map(str, range(rank - 1, -1, -1)))
        return shape[::-1], f"u.permute({order})", Value("u0", shape, axes)
    return shape, "u", Value("u", shape, axes)


def _groups(u: Value, planted: str, tied: frozenset[str], permuted: bool) -> tuple[int, ...]:
    """The group of every entry of u, in the order in which u is declared."""
    if planted not in ("scaled-identity", "diagonal", "block-diagonal"):
        return (0,) * math.prod(u.shape)
    return _numbers(u, tied if planted == "block-diagonal" else u.labels, permuted)


def _numbers(u: Value, labels: frozenset[str], permuted: bool) -> tuple[int, ...]:
    """The position along the axes `labels` of every entry of u, in the order in which u is declared."""
    shape = tuple(size if axis[0] in labels else 1 for axis, size in zip(u.axes, u.shape, strict=True))
    numbers = torch.arange(math.prod(shape)).reshape(shape).expand(u.shape)
    if permuted:
        numbers = numbers.permute(*range(numbers.dim() - 1, -1, -1))
    return tuple(numbers.reshape(-1).tolist())


def _kind(s: Scope, u: Value, band: Band | None) -> str:
    weights = dict(zip(KINDS, (2, 3, 4, 4, 4, 4, 3, 3), strict=True))
    if band is None:
        del weights["banded"]
    if sum(size > 1 for size in u.shape) < 2:
        del weights["block-diagonal"]
    if not graphs.has_graph(u):
        del weights["sparse"], weights["sum"]
    return s.rng.choice([kind for kind, weight in weights.items() for _ in range(weight)])


def _tied(s: Scope, u: Value) -> frozenset[str]:
    """Some, but not all, of the labels of axes longer than 1."""
    long = [label for (label,), size in zip(u.axes, u.shape, strict=True) if size > 1]
    return frozenset(s.rng.sample(long, s.rng.randint(1, len(long) - 1)))


def _objective(s: Scope, u: Value, planted: str, tied: frozenset[str], band: Band | None) -> list[str]:
    """The terms of the objective: the planted one, a ridge where needed, others with no less structure."""
    plain = [terms.ridge, terms.linear, terms.scaled_identity, terms.expanded_square]
    if planted == "scaled-identity":
        chosen = [terms.scaled_identity(s, u)] + [
            s.rng.choice(plain)(s, u) for _ in range(s.rng.randint(0, 2))
        ]
    elif planted == "diagonal":
        chosen = [terms.diagonal(s, u), terms.ridge(s, u)]
    elif band is not None:
        chosen = [bands.neighbours(s, u, band), terms.ridge(s, u)]
        if s.chance(0.6):
            chosen.append(s.rng.choice([bands.neighbours, bands.at_the_ends])(s, u, band))
    elif planted == "sparse":
        chosen = [graphs.edges(s, u) for _ in range(s.rng.randint(1, 2))] + [terms.ridge(s, u)]
    elif planted == "sum":
        other = bands.some_band(s, u)
        base = bands.neighbours(s, u, other) if other is not None and s.chance(0.6) else graphs.edges(s, u)
        chosen = [base, terms.coupled(s, u, frozenset()), terms.ridge(s, u)]
    elif planted in ("block-diagonal", "low-rank-plus-diagonal"):
        forms = [terms.coupled] * 4 + [terms.normalised] * (bool(u.shape))
        forms += [terms.quadratic_form] * (planted == "block-diagonal")
        chosen = [s.rng.choice(forms)(s, u, tied), terms.ridge(s, u)]
        if s.chance(0.3):
            chosen.append(s.rng.choice(forms)(s, u, tied))
    else:
        form = s.rng.choice([*terms.UNPROMISED, terms.neighbours if s.chance(0.5) else terms.pairwise])
        other = bands.some_band(s, u)
        if other is not None and s.chance(0.2):
            chosen = [bands.neighbours(s, u, other), terms.coupled(s, u, frozenset()), terms.ridge(s, u)]
        elif s.chance(0.3) and u.shape:
            chosen = [terms.quadratic_form(s, u, frozenset()), terms.ridge(s, u)]
        else:
            chosen = [form(s, u), terms.ridge(s, u)]
    extra = plain if planted == "scaled-identity" else [*plain, terms.diagonal]
    if s.chance(0.5):
        chosen.append(s.rng.choice(extra)(s, u))
    s.rng.shuffle(chosen)
    return chosen


def _two_variables(s: Scope) -> tuple[Any, ...]:
    """A pair (a, b) as the variable: terms of each, and a product that couples them. No kind is promised."""
    shapes = tuple((s.size(),) * s.rng.randint(0, 2) for _ in range(2))
    first, second = (
        Value(name, shape, tuple((f"{name}{k}",) for k in range(len(shape))))
        for name, shape in zip("ab", shapes, strict=True)
    )
    chosen = [
        terms.ridge(s, first),
        terms.ridge(s, second),
        terms.diagonal(s, first),
        terms.linear(s, second),
    ]
    if s.chance(0.7):
        product = [terms.coupled(s, v, frozenset()) for v in (first, second)]
        chosen.append(f"0.3 * ({product[0]}) * ({product[1]})")
    objective = ["a, b = u", *_lines(s, " + ".join(chosen))]
    lines: list[str] = []
    if s.chance(0.5):
        outputs = [constraints.linear(s, v) for v in (first, second)]
        both = f"{outputs[0].text}.sum() + {outputs[1].text}.sum()"
        lines = ["a, b = u", *_lines(s, both)]
    size = sum(math.prod(shape) for shape in shapes)
    zeros = (0,) * size
    return shapes, objective, lines, "dense", (zeros, zeros, 0), "linear" if lines else "none", 0


def _equality(
    s: Scope, u: Value, planted: str, tied: frozenset[str], band: Band | None
) -> tuple[str, list[Value], int, list[str]]:
    """(kind of constraints, outputs, dependences, the lines of `equality`)."""
    kind = s.rng.choice(["none"] * 9 + ["linear"] * 4 + ["nonlinear"] * 4 + ["dependent"] * 3)
    dependences = 0
    if kind == "none" or math.prod(u.shape) == 1:
        return "none", [], 0, []
    if kind == "dependent":
        outputs, dependences = constraints.dependent(s, u)
        if s.chance(0.2):
            outputs.append(constraints.linear(s, u))
    else:
        linear = kind == "linear"
        if band is not None and s.chance(0.5):
            outputs = [bands.ends(s, u, band) if linear else constraints.banded(s, u, band)]
        else:
            outputs = [constraints.linear(s, u) if linear else constraints.nonlinear(s, u, planted, tied)]
            if linear and math.prod(u.shape) > 4 and s.chance(0.25):
                outputs = [graphs.flows(s, u)]
        if s.chance(0.3):
            outputs.append(constraints.linear(s, u))
    returned = s.rng.choice(["tuple", "dict"] if len(outputs) > 1 else ["tensor", "tensor", "tuple"])
    texts = [v.text for v in outputs]
    spelled = {
        "tensor": texts[0],
        "tuple": f"({', '.join(texts)},)",
        "dict": "{" + ", ".join(f"'{key}': {text}" for key, text in zip("qba", texts, strict=False)) + "}",
    }
    return kind, outputs, dependences, _lines(s, spelled[returned])


def _lines(s: Scope, result: str) -> list[str]:
    """The lines written so far, with the return; the scope starts afresh for the next function."""
    lines, s.lines, s.pool = s.lines, [], []
    return [*lines, f"return {result}"]


def _assemble(
    s: Scope,
    variables: tuple[Shape, ...],
    objective: list[str],
    equality: list[str],
    planted: str,
    pattern: tuple[tuple[int, ...], tuple[int, ...], int],
    kind: str,
    dependences: int,
) -> Program:
    sources = list(s.sources)
    if not any(source.batched for source in sources):
        sources.append(Source("unused", (2,), batched=True, parameter=False, positive=False))
    arguments = ", ".join(["u", *(source.name for source in sources if not source.parameter)])
    rest = arguments.removeprefix("u, ")
    zeros = [f"torch.zeros({shape}, dtype=torch.float64)" for shape in variables]
    body = ["class Generated(idf.Problem):"]
    parameters = [source for source in sources if source.parameter]
    if parameters or s.indices:
        body += ["    def __init__(self):", "        super().__init__()"]
        for p in parameters:
            zero = f"torch.zeros({p.shape}, dtype=torch.float64)"
            body.append(f"        self.{p.name} = torch.nn.Parameter({zero})")
        for k, entries in enumerate(s.indices):
            body.append(f"        self.i{k} = torch.tensor({list(entries)})")
    body += [f"    def objective(self, {arguments}):", *(f"        {line}" for line in objective)]
    if equality:
        body += [f"    def equality(self, {arguments}):", *(f"        {line}" for line in equality)]
    result = zeros[0] if len(zeros) == 1 else f"({', '.join(zeros)})"
    body += [f"    def init(self, {rest}):", f"        return {result}"]
    return Program(
        source="\n".join(body) + "\n",
        variables=variables,
        sources=tuple(sources),
        planted=planted,
        groups=pattern[0],
        places=pattern[1],
        reach=pattern[2],
        constraints=kind if equality else "none",
        dependences=dependences,
        batch=s.rng.choice([1, 2, 2, 3]),
        data_seed=s.rng.randint(0, 2**31),
    )

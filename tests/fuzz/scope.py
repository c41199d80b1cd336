"""What a random program is made from: sizes, inputs, Parameters, and texts of expressions that do not depend
on u.

In: a random.Random (hypothesis' own one shrinks). Out: source text with the record of the inputs it uses.
Next: values.py.
"""

import random
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """One tensor that the program reads: an input, batched or shared, or a Parameter (`self.p0`)."""

    name: str
    shape: Shape
    batched: bool
    parameter: bool
    positive: bool

    @property
    def text(self) -> str:
        """How the program spells it."""
        return f"self.{self.name}" if self.parameter else self.name


@dataclass
class Scope:
    """The state of one program while it is written."""

    rng: random.Random
    sizes: tuple[int, ...]
    sources: list[Source] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    pool: list[Any] = field(
        default_factory=list
    )  # values tied to every label of u, for later terms to use again
    free_labels: int = 0
    indices: list[tuple[int, ...]] = field(default_factory=list)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def size(self) -> int:
        """A size: mostly one of the program's two, so that equal sizes meet, at times any of 1 to 6."""
        return self.rng.choice(self.sizes) if self.chance(0.8) else self.rng.randint(1, 6)

    def label(self) -> str:
        """A fresh label for an axis that is none of u's."""
        self.free_labels += 1
        return f"f{self.free_labels}"

    def let(self, text: str) -> str:
        """Binds an expression to a new name, so that later lines can use it more than once."""
        if text.isidentifier():
            return text
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    def index(self, entries: list[int]) -> str:
        """An index tensor, an attribute of the problem."""
        self.indices.append(tuple(entries))
        return f"self.i{len(self.indices) - 1}"

    def number(self) -> str:
        """A literal between 0.3 and 1.9."""
        return str(self.rng.choice([0.3, 0.5, 0.7, 1, 1.3, 1.9]))

    # ------------------------------------------------------------------------------------------------ data

    def data(self, shape: Shape, positive: bool = False, depth: int = 0) -> str:
        """An expression of inputs with exactly this shape; `positive`: greater than 0.2 everywhere."""
        if depth < 2 and self.chance(0.35):
            return self._derived(shape, positive, depth + 1)
        known = [s for s in self.sources if s.shape == shape and s.positive >= positive]
        if known and self.chance(0.5):
            return self.rng.choice(known).text
        return self._new(shape, positive)

    def _new(self, shape: Shape, positive: bool) -> str:
        kind = self.rng.choice(["batched"] * 5 + ["shared", "parameter"])
        letter = "p" if kind == "parameter" else "x"
        count = sum(s.parameter == (kind == "parameter") for s in self.sources)
        made = Source(f"{letter}{count}", shape, kind == "batched", kind == "parameter", positive)
        self.sources.append(made)
        return made.text

    def _derived(self, shape: Shape, positive: bool, depth: int) -> str:
        if positive:
            x = self.data(shape, False, depth)
            forms = ["torch.exp(0.3 * {})", "(0.3 + {}.square())", "torch.nn.functional.softplus({} + 1.5)"]
            return self.rng.choice([*forms, "(1.5 + torch.sin({}))"]).format(_wrapped(x))
        forms = ["pointwise", "product", "sliced", "selected"]
        forms += ["transposed", "matmul", "contracted"] * (len(shape) == 2)
        forms += ["summed", "ones"] if shape else []
        forms += ["eye"] * (len(shape) == 2 and shape[0] == shape[1])
        return getattr(self, f"_{self.rng.choice(forms)}")(shape, depth)

    def _pointwise(self, shape: Shape, depth: int) -> str:
        forms = ["torch.tanh({})", "torch.sin({})", "(-{})", "(1 - {})", "torch.sigmoid({})", "{}.abs()"]
        form = self.rng.choice(forms)
        return form.format(_wrapped(self.data(shape, False, depth)))

    def _product(self, shape: Shape, depth: int) -> str:
        operation = self.rng.choice(["*", "+", "-"])
        return f"({self.data(shape, False, depth)} {operation} {self.broadcastable(shape, depth)})"

    def _sliced(self, shape: Shape, depth: int) -> str:
        if not shape:
            return self._pointwise(shape, depth)
        axis = self.rng.randrange(len(shape))
        longer = (*shape[:axis], shape[axis] + self.rng.randint(1, 2), *shape[axis + 1 :])
        start = self.rng.randint(0, longer[axis] - shape[axis])
        index = ", ".join([":"] * axis + [f"{start}:{start + shape[axis]}"])
        return f"{_wrapped(self.data(longer, False, 2))}[{index}]"

    def _selected(self, shape: Shape, depth: int) -> str:
        axis = self.rng.randint(0, len(shape))
        count = self.rng.randint(1, 3)
        larger = (*shape[:axis], count, *shape[axis:])
        index = ", ".join([":"] * axis + [str(self.rng.randint(-count, count - 1))])
        return f"{_wrapped(self.data(larger, False, 2))}[{index}]"

    def _transposed(self, shape: Shape, depth: int) -> str:
        return f"{_wrapped(self.data(shape[::-1], False, depth))}.mT"

    def _matmul(self, shape: Shape, depth: int) -> str:
        inner = self.size()
        return f"({self.data((shape[0], inner), False, 2)} @ {self.data((inner, shape[1]), False, 2)})"

    def _contracted(self, shape: Shape, depth: int) -> str:
        inner = self.size()
        a, b = self.data((inner, shape[0]), False, 2), self.data((shape[1], inner), False, 2)
        return f"torch.einsum('ka,bk->ab', {a}, {b})"

    def _summed(self, shape: Shape, depth: int) -> str:
        axis = self.rng.randint(0, len(shape))
        larger = (*shape[:axis], self.size(), *shape[axis:])
        return f"{_wrapped(self.data(larger, False, 2))}.sum({axis})"

    def _ones(self, shape: Shape, depth: int) -> str:
        x = self.data(shape, False, depth)
        forms = ["({0} + torch.ones_like({0}))", "({0} * torch.full_like({0}, 0.7))"]
        forms += ["({0} - torch.sigmoid(torch.full_like({0}, 0.3)))", "({0} + torch.zeros_like({0}).cos())"]
        return self.rng.choice(forms).format(x)

    def _eye(self, shape: Shape, depth: int) -> str:
        return f"({self.data(shape, False, depth)} + torch.eye({shape[0]}, dtype=torch.float64))"

    def broadcastable(self, shape: Shape, depth: int = 0, positive: bool = False) -> str:
        """An expression of inputs that broadcasts to `shape` without changing it, or a number."""
        if self.chance(0.12):
            return self.number()
        kept = list(shape)
        for axis in range(len(kept)):
            if self.chance(0.2):
                kept[axis] = 1
        while kept and kept[0] == 1 and self.chance(0.7):
            kept.pop(0)
        return self.data(tuple(kept), positive, depth)


def _wrapped(text: str) -> str:
    """Parentheses, where the text is not already an operand of a method call."""
    return text if text.replace(".", "").replace("_", "").isalnum() else f"({text})"

"""Values that depend on u, with the labels of their axes, and the random steps that lead from one to the
next.

A label that is one of u's says: along this axis the value is tied to u, entry by entry. That is what makes a
structure known in advance: a nonlinear function of a value couples exactly the entries of u that share its
tied labels. Next: terms.py.
"""

import math
from dataclasses import dataclass

from tests.fuzz.scope import Scope, Shape

Label = str
Axis = tuple[Label, ...]  # more than one label: axes merged by a reshape


@dataclass(frozen=True)
class Value:
    """An expression of u, its shape, and the labels along each axis."""

    text: str
    shape: Shape
    axes: tuple[Axis, ...]

    @property
    def labels(self) -> frozenset[Label]:
        """All labels of its axes."""
        return frozenset(label for axis in self.axes for label in axis)


CONVEX = (
    "torch.exp(0.5 * {})", "torch.cosh({})", "torch.nn.functional.softplus({})", "torch.sqrt(1 + {} ** 2)",
    "{} ** 4", "torch.relu({} + 0.4) ** 2", "torch.clamp({}, min=-0.3).square()", "{}.square()", "({} * {})",
    "torch.where({} > 0.1, {} ** 2, 0.5 * {} ** 2)", "torch.log(1 + torch.exp({}))",
    "torch.maximum({}, 0.4 * {}) ** 2",
    "torch.nn.functional.huber_loss({}, torch.zeros_like({}), reduction='none', delta=0.8)",
    "-torch.nn.functional.logsigmoid({})", "torch.expm1(0.4 * {})", "(1 + {}.square()).pow(0.75)",
)  # fmt: skip
ANY = (
    "torch.tanh({})", "torch.sin({})", "torch.cos({})", "torch.sigmoid({})", "torch.atan({})",
    "torch.log1p({} ** 2)", "1 / (1 + {} ** 2)", "{} ** 3", "{} * torch.tanh({})",
    "torch.rsqrt(1 + {}.square())", "torch.erf({})",
    "torch.exp(-{} ** 2)", "torch.abs({}) * {}", "torch.special.entr(1.5 + torch.sigmoid({}))",
    "torch.nn.functional.silu({})", "torch.reciprocal(2 + torch.cosh({}))", "torch.log(2 + torch.sin({}))",
    "torch.xlogy(0.5 + torch.sigmoid({}), 1.2 + torch.sigmoid({}))", "torch.minimum({}, 0.5 * {}) ** 3",
)  # fmt: skip


def pointwise(s: Scope, v: Value) -> Value:
    """A nonlinear function of every entry."""
    name = s.let(v.text)
    form = s.rng.choice(CONVEX if s.chance(0.6) else ANY)
    return Value(s.let(form.replace("{}", name)), v.shape, v.axes)


def affine(s: Scope, v: Value, keep_unit: bool = False) -> Value:
    """One affine step with broadcast data; with `keep_unit` the slope stays the same for every entry of u."""
    text = v.text
    step = s.rng.choice(["minus", "rminus", "plus", "times", "over", "negate"])
    if step in ("minus", "rminus", "plus"):
        other = s.broadcastable(v.shape)
        forms = {"minus": "({} - {})", "rminus": "({1} - {0})", "plus": "({} + {})"}
        return Value(forms[step].format(text, other), v.shape, v.axes)
    if step == "negate":
        return Value(f"(-{text})", v.shape, v.axes)
    factor = _number_or_scalar(s) if keep_unit else s.broadcastable(v.shape, positive=True)
    operator = "*" if step == "times" else "/"
    return Value(f"({text} {operator} {factor})", v.shape, v.axes)


def _number_or_scalar(s: Scope) -> str:
    return s.number() if s.chance(0.5) else s.data((), positive=True)


def lift(s: Scope, v: Value, keep_unit: bool = False) -> Value:
    """A new axis by unsqueeze and data that is wider there: u[:, None] - x."""
    position, size = s.rng.randint(0, len(v.shape)), s.size()
    index = ", ".join([":"] * position + ["None"])
    wide = f"{v.text}[{index}]" if s.chance(0.6) else f"{v.text}.unsqueeze({position})"
    shape = (*v.shape[:position], size, *v.shape[position:])
    axes = (*v.axes[:position], (s.label(),), *v.axes[position:])
    if s.chance(0.15):
        sizes = ", ".join(map(str, shape))
        return Value(f"{wide}.expand({sizes})", shape, axes)
    narrow = (*[1] * position, size, *[1] * (len(v.shape) - position))
    data = s.data(shape if s.chance(0.7) else narrow)
    if not keep_unit and s.chance(0.3):
        return Value(f"({wide} * {data})", shape, axes)
    return Value(s.rng.choice([f"({wide} - {data})", f"({data} - {wide})"]), shape, axes)


def view(s: Scope, v: Value, mergeable: bool = True) -> Value:
    """A change of layout: permute, transpose, merge two axes, a pair of unsqueeze and squeeze."""
    rank = len(v.shape)
    forms = ["squeeze"] + ["permute"] * (rank > 1) + ["merge"] * (rank > 1 and mergeable)
    form = s.rng.choice(forms)
    if form == "squeeze":
        k = s.rng.randint(0, rank)
        return Value(f"{v.text}.unsqueeze({k}).squeeze({k})", v.shape, v.axes)
    if form == "merge":
        k = s.rng.randrange(rank - 1)
        shape = (*v.shape[:k], v.shape[k] * v.shape[k + 1], *v.shape[k + 2 :])
        axes = (*v.axes[:k], v.axes[k] + v.axes[k + 1], *v.axes[k + 2 :])
        inferred = [str(size) for size in shape]
        if s.chance(0.5):
            inferred[s.rng.randrange(len(inferred))] = "-1"
        return Value(f"{v.text}.reshape({', '.join(inferred)})", shape, axes)
    order = list(range(rank))
    s.rng.shuffle(order)
    return permuted(s, v, tuple(order))


def permuted(s: Scope, v: Value, order: tuple[int, ...]) -> Value:
    """`v` with its axes in another order."""
    text = f"{v.text}.permute({', '.join(map(str, order))})"
    if order == (1, 0) and s.chance(0.5):
        text = s.rng.choice([f"{v.text}.mT", f"{v.text}.t()", f"torch.transpose({v.text}, 0, 1)"])
    return Value(text, tuple(v.shape[k] for k in order), tuple(v.axes[k] for k in order))


def contract(s: Scope, v: Value, axis: int) -> Value:
    """One axis summed away: plainly, with weights, or against a matrix that brings a free axis."""
    size, rank = v.shape[axis], len(v.shape)
    rest, rest_axes = v.shape[:axis] + v.shape[axis + 1 :], v.axes[:axis] + v.axes[axis + 1 :]
    form = s.rng.choice(["sum", "weighted", "mean", "matrix", "matrix", "einsum", "einsum"])
    if form == "sum":
        return Value(f"{v.text}.sum({axis if s.chance(0.5) else axis - rank})", rest, rest_axes)
    if form == "mean":
        return Value(f"{v.text}.mean({axis})", rest, rest_axes)
    if form == "weighted":
        weights = s.data((size, *[1] * (rank - axis - 1)))
        return Value(f"({weights} * {v.text}).sum({axis})", rest, rest_axes)
    count, label = s.size(), (s.label(),)
    if form == "matrix" and axis == rank - 1:
        W = s.data((size, count))
        return Value(f"({v.text} @ {W})", (*rest, count), (*rest_axes, label))
    if form == "matrix" and axis == rank - 2:
        W = s.data((count, size))
        shape = (*v.shape[:axis], count, v.shape[-1])
        return Value(f"({W} @ {v.text})", shape, (*v.axes[:axis], label, v.axes[-1]))
    letters = "abcdefgh"[:rank]
    out = letters.replace(letters[axis], "")
    place = s.rng.randint(0, len(out))
    out = out[:place] + "z" + out[place:]
    flipped = s.chance(0.5)
    W = s.data((count, size) if flipped else (size, count))
    matrix = "z" + letters[axis] if flipped else letters[axis] + "z"
    shape = (*rest[:place], count, *rest[place:])
    axes = (*rest_axes[:place], label, *rest_axes[place:])
    return Value(f"torch.einsum('{letters},{matrix}->{out}', {v.text}, {W})", shape, axes)


def total(s: Scope, v: Value) -> str:
    """The sum of all entries, in one of many spellings; the value is bound first."""
    t = s.let(v.text)
    if not v.shape:
        return t
    forms = ["{t}.sum()", "torch.sum({t})", "{t}.sum(0).sum()", "{t}.reshape(-1).sum()", "{n} * {t}.mean()"]
    form = s.rng.choice([*forms, "einsum"])
    if form == "einsum":
        return f"torch.einsum('{'abcdefgh'[: len(v.shape)]}->', {t})"
    return form.replace("{t}", t).replace("{n}", str(math.prod(v.shape)))


def weighted_total(s: Scope, v: Value, positive: bool = True) -> str:
    """The sum of all entries with broadcast weights, in one of many spellings."""
    if s.chance(0.25):
        return total(s, v)
    t, exact = s.let(v.text), s.data(v.shape, positive)
    letters = "abcdefgh"[: len(v.shape)]
    forms = [f"({s.broadcastable(v.shape, positive=positive)} * {t}).sum()", f"({t} * {exact}).sum()"]
    forms += [f"torch.einsum('{letters},{letters}->', {exact}, {t})"] if v.shape else []
    forms += [f"({exact} @ {t})", f"torch.dot({t}, {exact})"] if len(v.shape) == 1 else []
    forms += [f"({exact}.reshape(-1) @ {t}.reshape(-1))"] if len(v.shape) > 1 else []
    return s.rng.choice(forms)

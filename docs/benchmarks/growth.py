"""Report 3: how the cost grows with the size, and the fixed costs: planning, small problems, the dense rung.

Nothing comes in; curves and `Check`s against the goals go out. Next: choice.py.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import implicitdiff as idf
from benchmarks import works
from benchmarks.methods import Racer, racer
from benchmarks.race import alternate, counted, timed
from benchmarks.targets import Check
from benchmarks.work import Work
from implicitdiff.diagnostics.held import plan_of
from implicitdiff.problems import OptimalTransport, RobustPooling

# A curve ends before the size that is predicted, from the two before it, to exceed one of these.
MEMORY = 3e9  # bytes of peak
SECONDS = 2.0  # of one pass
FLAT = 1.15  # what counts as a slope of one, caches and fixed costs allowed for
PENALTIES = ("quadratic", "pseudo-huber", "huber", "welsch", "truncated-quadratic")


class Separable(idf.Problem):
    """minimise over u  sum_i w_i cosh(u_i) - x_i u_i"""

    def objective(self, u: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return (w * torch.cosh(u)).sum() - (x * u).sum()

    def init(self, w: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def solve(self, w: Tensor, x: Tensor) -> Tensor:
        return torch.asinh(x / w)


class Blocks(idf.Problem):
    """minimise over u  sum_k u_k'Q_k u_k / 2 - x_k'u_k  over the rows u_k of u"""

    def objective(self, u: Tensor, Q: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (torch.einsum("kij,kj->ki", Q, u) * u).sum() - (x * u).sum()

    def init(self, Q: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def solve(self, Q: Tensor, x: Tensor) -> Tensor:
        return torch.cholesky_solve(x[..., None], torch.linalg.cholesky_ex(Q).L)[..., 0]


class Levelled(idf.Problem):
    """minimise over u  sum_t (u_t+1 - u_t)^2 + |u - x|^2 + (sum_t u_t)^2 / m, tridiagonal and a part of rank 1"""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        steps = u[1:] - u[:-1]
        return steps.square().sum() + (u - x).square().sum() + u.sum().square() / u.shape[0]

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Groups(idf.Problem):
    """minimise over u  |u - x|^2 + sum_k (sum_i u_ki)^2, a part of rank 1 in each row"""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u - x).square().sum() + u.sum(1).square().sum()

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Classifier(idf.Problem):
    """minimise over u  sum_i log(1 + exp(-y_i x_i'u)), H = X'D X without a diagonal: dense"""

    def objective(self, u: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-y * (X @ u)).sum()

    def init(self, X: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(X[0])


@dataclass(frozen=True)
class Point:
    """One size of a curve: seconds and bytes of one derived backward pass."""

    curve: str
    kind: str
    size: int
    seconds: float
    bytes: int
    peak: int


HEADER = ("curve", "kind", "size", "time", "bytes", "peak")


@dataclass(frozen=True)
class Curve:
    """A family of problems that grows along one size."""

    name: str
    make: Callable[[int], tuple[idf.Problem, tuple[Tensor, ...]]]
    sizes: tuple[int, ...]


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _separable(m: int) -> tuple[idf.Problem, tuple[Tensor, ...]]:
    return Separable(), (_draw(1, m).abs() + 0.5, _draw(1, m))


def _smoothing(m: int) -> tuple[idf.Problem, tuple[Tensor, ...]]:
    return works.Smoothing(), (_draw(1, m), _draw(1, m).abs() + 0.5)


def _few_points(m: int) -> tuple[idf.Problem, tuple[Tensor, ...]]:
    return RobustPooling("pseudo-huber", math.sqrt(m)), (_draw(1, m, 8),)


def _blocks(count: int) -> tuple[idf.Problem, tuple[Tensor, ...]]:
    factor = _draw(1, count, 3, 3)
    return Blocks(), (factor @ factor.mT + torch.eye(3), _draw(1, count, 3))


def _levelled(m: int) -> tuple[idf.Problem, tuple[Tensor, ...]]:
    return Levelled(), (_draw(1, m),)


def _groups(count: int) -> tuple[idf.Problem, tuple[Tensor, ...]]:
    return Groups(), (_draw(1, count, 128),)


def curves(quick: bool) -> tuple[Curve, ...]:
    """What has to grow linearly, with the sizes that are tried."""
    powers = [10**k for k in range(2, 8)]

    def upto(last: int, quick_last: int) -> tuple[int, ...]:
        return tuple(p for p in powers if p <= (quick_last if quick else last))

    return (
        Curve("diagonal H, in m", _separable, upto(10**7, 10**6)),
        Curve("tridiagonal H, in m", _smoothing, upto(10**6, 10**5)),
        Curve("low rank, k = 8, in m", _few_points, upto(10**6, 10**5)),
        Curve("blocks of 3 x 3, in their number", _blocks, upto(10**6, 10**5)),
        Curve("groups of 128 of rank 1, in their number", _groups, upto(10**4, 10**3)),
        Curve("tridiagonal and rank 1, in m", _levelled, upto(10**6, 10**5)),
    )


def points(curve: Curve, readings: int = 5) -> Iterator[Point]:
    """The curve, up to the size that is predicted to be too large."""
    found: list[Point] = []
    for size in curve.sizes:
        if _predicted(found, size, "peak") > MEMORY or _predicted(found, size, "seconds") > SECONDS:
            return
        problem, inputs = curve.make(size)
        kind = plan_of(problem, inputs, 0).plan.analysis.hessian.kind
        leaves = tuple(x.requires_grad_() for x in inputs)
        u = idf.DeclarativeLayer(problem, on_failure="warn")(*leaves)
        v = _draw(*u.shape)

        def run(u: Tensor = u, leaves: tuple[Tensor, ...] = leaves, v: Tensor = v) -> Sequence[Tensor]:
            return torch.autograd.grad(u, leaves, v, retain_graph=True)

        run()
        _, counts = counted(run)
        loops = max(1, min(50, math.ceil(2e-3 / timed(run))))
        taken = statistics.median(timed(run, loops) for _ in range(readings))
        found.append(Point(curve.name, kind, size, taken, counts.bytes, counts.peak))
        yield found[-1]


def _predicted(found: Sequence[Point], size: int, quantity: str) -> float:
    """The quantity at the next size if it goes on as between the last two points, at least linearly."""
    if len(found) < 2:
        return 0.0
    before, last = getattr(found[-2], quantity), getattr(found[-1], quantity)
    growth = max(1.0, math.log(last / before) / math.log(found[-1].size / found[-2].size))
    predicted: float = last * (size / found[-1].size) ** growth
    return predicted


def slope(found: Sequence[Point], quantity: str) -> float:
    """The least-squares slope of log quantity over log size, in the last two decades."""
    upper = [p for p in found if p.size * 100 >= found[-1].size]
    x = [math.log(p.size) for p in upper]
    y = [math.log(getattr(p, quantity)) for p in upper]
    return statistics.linear_regression(x, y).slope


def slopes(found: Sequence[Point]) -> list[Check]:
    """The checks of one curve."""
    last = found[-1]
    subject = f"{last.curve} up to {last.size:.0e}, {last.kind}"
    return [
        Check(subject, f"slope of {quantity}", FLAT, slope(found, quantity), note="last two decades")
        for quantity in ("seconds", "bytes")
    ]


def planning(quick: bool) -> Iterator[list[Check]]:
    """Seconds to trace and plan each built-in at n = 16 and at n = 4096; nothing but shapes is given."""
    makers: dict[str, Callable[[int], tuple[idf.Problem, tuple[Tensor, ...]]]] = {
        f"pooling {name}": lambda n, name=name: (RobustPooling(name, 16.0), (_meta(1, 128, n),))
        for name in PENALTIES
    }
    makers["transport"] = lambda n: (
        OptimalTransport(10.0),
        (_meta(1, n, n), _meta(1, n), _meta(1, n)),
    )
    for name, make in makers.items():
        plan_of(*make(16), in_dims=0)
        taken: dict[int, list[float]] = {16: [], 4096: []}
        for _ in range(3 if quick else 9):
            for n, seconds in taken.items():
                problem, inputs = make(n)
                seconds.append(timed(functools.partial(plan_of, problem, inputs, 0)))
        small, large = (statistics.median(seconds) for seconds in taken.values())
        ratio = statistics.median(b / a for a, b in zip(*taken.values(), strict=True))
        yield [
            Check(f"planning {name}", "seconds, n = 16 and 4096", 0.1, max(small, large)),
            Check(f"planning {name}", "n = 4096 / n = 16", 1.1, max(ratio, 1 / ratio)),
        ]


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def small_problems(rounds: int) -> Iterator[list[Check]]:
    """Problems of a handful of variables: the whole of autograd's call, derived over hand-written."""
    makers: tuple[Callable[[], Work], ...] = (
        works.median,
        lambda: works.softmax(1, 5),
        lambda: works.smoothing(1, 6),
        lambda: works.logistic(2, 4, 6),
        lambda: works.quadratic(3, 4, 2, whole=False),
        lambda: works.transport(1, 3, 4),
    )
    for make in makers:
        work = make()
        hand, auto = racer(work, "hand"), racer(work, "auto")
        if isinstance(hand, Racer) and isinstance(auto, Racer):
            times = alternate({"hand": hand.run, "auto": auto.run}, rounds)["auto"]
            subject = f"small: {work.name} {work.setting}"
            yield [
                Check(subject, "time", 1.4, times.ratio, times.ratio_low, times.ratio_high, note=auto.solver)
            ]


def dense_rung(quick: bool) -> list[Check]:
    """H as one labelled product J'D J against a loop of m gradients, m = 128, n = 1024."""
    m, n = (32, 256) if quick else (128, 1024)
    X, y, u = _draw(1, n, m), _draw(1, n).sign(), _draw(1, m)
    problem = Classifier()
    planned = plan_of(problem, (X, y), 0)

    def product() -> Tensor:
        return planned.plan.hessian((u,), (), planned.theta).to_dense()

    def loop() -> Tensor:
        point = u[0].clone().requires_grad_()
        (slopes,) = torch.autograd.grad(problem.objective(point, X[0], y[0]), point, create_graph=True)
        rows = [torch.autograd.grad(entry, point, retain_graph=True)[0] for entry in slopes]
        return torch.stack(rows)[None]

    gap = float((product() - loop()).abs().max() / loop().abs().max())
    times = alternate({"product": product, "loop": loop}, 3 if quick else 9)["loop"]
    note = f"{planned.plan.analysis.hessian.kind}; they differ by {gap:.1e}"
    subject = f"dense H, m = {m}, n = {n}"
    return [Check(subject, "loop / J'D J", 50, times.ratio, times.ratio_low, times.ratio_high, True, note)]

"""`Root` and `FixedPoint` where things go wrong, the forward methods, and samples that do not see each other."""

import warnings

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from tests.equation_problems import Cubic, Equilibrium, cubic_inputs, draw


def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


class Flat(idf.Root):
    """u^2 = x: at x = 0 the root is 0, where the Jacobian is singular."""

    def residual(self, u, x):
        return u * u - x

    def init(self, x):
        return 1 + x.abs()

    def solve(self, x):
        return x.sqrt()


def test_a_singular_jacobian_is_an_error_of_its_sample_alone() -> None:
    x = torch.tensor([[4.0], [0.0], [9.0]], dtype=torch.float64, requires_grad=True)
    with pytest.raises(idf.SingularError, match=r"sample 1 of 3: the Jacobian of the residual is singular"):
        idf.DeclarativeLayer(Flat())(x).sum().backward()
    for policy, filler in (("nan", torch.nan), ("zero", 0.0)):
        (found,) = torch.autograd.grad(idf.DeclarativeLayer(Flat(), on_failure=policy)(x).sum(), x)
        torch.testing.assert_close(
            found, torch.tensor([[0.25], [filler], [1 / 6]], dtype=torch.float64), equal_nan=True
        )
    with idf.record() as events, pytest.warns(idf.OptimalityWarning, match="was damped"):
        (found,) = torch.autograd.grad(idf.DeclarativeLayer(Flat(), on_failure="damp")(x).sum(), x)
    torch.testing.assert_close(found, torch.tensor([[0.25], [0.0], [1 / 6]], dtype=torch.float64))
    assert [event.samples for event in events] == [(1,)] or [list(event.samples) for event in events] == [[1]]


class Nowhere(idf.Root):
    """u^2 + x = 0: no root for x > 0."""

    def residual(self, u, x):
        return u * u + x

    def init(self, x):
        return torch.ones_like(x)


def test_a_system_without_a_root_is_not_converged() -> None:
    x = torch.tensor([[1.0, -4.0], [-1.0, -9.0]], dtype=torch.float64)
    with pytest.raises(idf.ConvergenceError, match=r"sample 0 of 2: \|residual\| of output 0"):
        idf.DeclarativeLayer(Nowhere())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", idf.OptimalityWarning)
        found = idf.DeclarativeLayer(Nowhere(), on_failure="warn").solve(x)
    assert found.status.tolist() == [idf.Status.NOT_CONVERGED, idf.Status.OK]
    torch.testing.assert_close(found.u[1], torch.tensor([1.0, 3.0], dtype=torch.float64))


class Wrong(Flat):
    """A solve that is off by 1 %."""

    def solve(self, x):
        return 1.01 * x.sqrt()


def test_a_wrong_solution_is_refused() -> None:
    x = torch.tensor([[4.0], [9.0]], dtype=torch.float64)
    with pytest.raises(idf.NotOptimalError, match="residual"):
        idf.DeclarativeLayer(Wrong())(x)
    report = idf.check(Wrong(), x)
    assert not report.ok


def test_forward_methods() -> None:
    x = draw(3, 4)
    steep = Equilibrium(gain=3.0)
    newton = idf.DeclarativeLayer(Equilibrium(), optimizer=idf.optimizers.Newton()).solve(x)
    for optimizer in (
        idf.optimizers.Anderson(),
        idf.optimizers.Anderson(memory=0, patience=100),
        idf.optimizers.MultiStart(idf.optimizers.Newton(), starts=2),
    ):
        found = idf.DeclarativeLayer(Equilibrium(), optimizer=optimizer, optimality_tol=1e-12).solve(x)
        torch.testing.assert_close(found.u, newton.u, rtol=1e-10, atol=1e-11)
    found = idf.DeclarativeLayer(steep).solve(x)  # no contraction
    assert found.status.tolist() == [0, 0, 0]
    for row, sample in zip(found.u, x, strict=True):
        assert float((row - steep.step(row, sample)).detach().abs().max()) < 1e-12
    alone = idf.DeclarativeLayer(steep).solve(x[1:2])
    torch.testing.assert_close(alone.u[0], found.u[1], rtol=1e-11, atol=1e-12)
    with pytest.raises(idf.OptionError, match="LBFGS minimises"):
        idf.DeclarativeLayer(steep, optimizer=idf.optimizers.LBFGS())(x)

    class Bowl(idf.Problem):
        def objective(self, u, x):
            return ((u - x) ** 2).sum()

        def init(self, x):
            return x * 0

    with pytest.raises(idf.OptionError, match="Anderson is for FixedPoint"):
        idf.DeclarativeLayer(Bowl(), optimizer=idf.optimizers.Anderson())(x)


def test_empty_batches_warm_starts_float32_and_hand_written_gradients() -> None:
    W, b = cubic_inputs(3)
    layer = idf.DeclarativeLayer(Cubic(), in_dims=(None, 0))
    (leaf,) = differentiable(W)
    empty = layer(leaf, b[:0])
    assert empty.shape == (0, 3)
    (zero,) = torch.autograd.grad(empty.sum(), leaf)
    assert not bool(zero.any())
    first = layer.solve(W, b)
    assert layer.solve(W, b, init=first.u.detach()).iterations.tolist() == [0, 0, 0]
    single = Cubic().float()
    found = idf.DeclarativeLayer(single, in_dims=(None, 0))(W.float(), b.float())
    torch.testing.assert_close(found.double(), first.u, rtol=1e-5, atol=1e-6)

    class ByHand(Flat):
        def vjp(self, u, v, x):
            return v / (2 * u)

    (x,) = differentiable(torch.tensor([[4.0], [9.0]], dtype=torch.float64))
    (found,) = torch.autograd.grad(idf.DeclarativeLayer(ByHand(), backward="hand")(x).sum(), x)
    torch.testing.assert_close(found, 0.5 / x.detach().sqrt())


def test_declarations_that_do_not_fit_are_refused() -> None:
    class TooMany(idf.Root):
        def residual(self, u, x):
            return torch.cat([u, u[:1]]) - 1 + x.sum()

        def init(self, x):
            return x[:2]

    class Misshapen(idf.FixedPoint):
        def step(self, u, x):
            return x

        def init(self, x):
            return x[:2]

    class Restructured(Misshapen):
        def step(self, u, x):
            return (u,)

    class Unused(idf.Root):
        def residual(self, u, x):
            return u[0] - x, x * 2

        def init(self, x):
            return x, x

    class Idle(idf.Root):
        def residual(self, u, x):
            return u[0] - x, u[0] * 2

        def init(self, x):
            return x, x

    class Both(idf.Root):
        def objective(self, u, x):
            return u.sum()

        def residual(self, u, x):
            return u

        def init(self, x):
            return x

    class Nothing(idf.FixedPoint):
        def init(self, x):
            return x

    x = draw(2, 3)
    for problem, words in (
        (TooMany(), r"returned 3 equations \(\(3,\)\) for 2 unknowns"),
        (Misshapen(), r"Misshapen.step returned \(3,\), but the variable is \(2,\)"),
        (Restructured(), "returned the structure"),
        (Unused(), r"Unused.residual \(output 1\) does not depend on the variable"),
        (Idle(), r"does not depend on the variable u\[1\]"),
        (Both(), "declares objective, but an idf.Root has a residual"),
        (Nothing(), r"does not declare step: add a method step \(see idf.FixedPoint.step\)"),
    ):
        with pytest.raises(idf.ProblemDefinitionError, match=words):
            idf.DeclarativeLayer(problem)(x)


class Divided(idf.Root):
    """W u + u^3 = b with u outside of reach where b is not finite; J singular where W is 0 and u is 0."""

    def residual(self, u, W, b):
        return W @ u + u**3 - b

    def init(self, W, b):
        return b * 0


@pytest.mark.parametrize("backward", ["auto", "dense", "matrix-free"])
def test_a_bad_sample_leaves_the_bits_of_the_others_alone(backward: str) -> None:
    W = 2 * torch.eye(3, dtype=torch.float64) + 0.3 * draw(3, 3, 3)
    b = draw(3, 3, seed=1)
    spoilt_W, spoilt_b = W.clone(), b.clone()
    spoilt_W[1], spoilt_b[1] = 0.0, 0.0
    found = []
    for inputs in ((W, b), (spoilt_W, spoilt_b)):
        leaves = differentiable(*inputs)
        u = idf.DeclarativeLayer(Divided(), on_failure="nan", backward=backward)(*leaves)
        found.append((u, *torch.autograd.grad(u.nan_to_num().square().sum(), leaves)))
    for good, beside in zip(*found, strict=True):
        assert torch.equal(good[[0, 2]], beside[[0, 2]])


def test_fixed_points_do_not_see_each_other() -> None:
    x = draw(3, 4)
    other = x.clone()
    other[1] *= 40
    layer = idf.DeclarativeLayer(Equilibrium(gain=1.5), on_failure="warn")
    first, second = layer.solve(x), layer.solve(other)
    for name in ("u", "iterations", "residual", "status"):
        assert torch.equal(getattr(first, name)[[0, 2]], getattr(second, name)[[0, 2]]), name

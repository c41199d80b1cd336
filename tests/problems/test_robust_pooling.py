"""RobustPooling: optimal solutions, Fig. 2 against Eqn. 3, every form of alpha, bad input."""

import math

import pytest
import torch
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff.problems import PENALTIES, RobustPooling
from implicitdiff.problems.penalties import slopes
from tests.oracles import dense_vjp, relative_error
from tests.reference import fig2

NAMES = list(PENALTIES)
CONVEX = [name for name in NAMES if PENALTIES[name].convex]
NON_CONVEX = [name for name in NAMES if not PENALTIES[name].convex]


def points(batch: int, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A cloud around an off-centre point, with a fifth of the points far out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, m, n, generator=generator, dtype=dtype)
    x[:, :, : n // 5] *= 6
    return x + torch.linspace(-1, 2, m, dtype=dtype)[:, None]


def pooling(name: str, alpha: float = 1.7) -> RobustPooling:
    return RobustPooling(name, alpha).double()


def relative_gradient(problem: RobustPooling, u: Tensor, x: Tensor) -> Tensor:
    """|D_u f|_inf over the largest term that cancels in sum_j kappa_1 (u - x_j): kappa_1 u, kappa_1 x_j."""
    gradient = torch.func.vmap(torch.func.grad(problem.objective))(u, x)
    s = (u[:, :, None] - x).square().sum(1)
    kappa1 = 2 * slopes(problem.rho, s, problem.alpha)[0]
    largest = (kappa1[:, None] * torch.maximum(u.abs()[:, :, None], x.abs())).amax((1, 2))
    return gradient.abs().amax(1) / largest


# Solutions


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "m", "n"), [(3, 2, 15), (2, 6, 4), (1, 1, 7), (2, 3, 1), (5, 32, 40)])
def test_solution_is_a_minimum(name: str, batch: int, m: int, n: int) -> None:
    x, problem = points(batch, m, n), pooling(name)
    solution = problem.solve(x)
    assert solution.u.shape == (batch, m)
    assert solution.status.tolist() == [idf.Status.OK] * batch
    assert solution.status.dtype == torch.int8
    assert relative_gradient(problem, solution.u, x).max() < 1e-12
    hessian = torch.func.vmap(torch.func.hessian(problem.objective))(solution.u, x)
    # A minimum; not a strict one where all points are beyond the bend of the Huber penalty on a line.
    assert torch.linalg.eigvalsh(hessian).min() > -1e-10


@pytest.mark.parametrize("name", NAMES)
def test_random_float32_calls_are_all_optimal(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    tolerance = torch.finfo(torch.float32).eps ** 0.5
    for _ in range(200):
        m, n = (int(torch.randint(1, top, (), generator=generator)) for top in (12, 60))
        x = torch.randn(2, m, n, generator=generator) * 10 ** (2 * torch.rand((), generator=generator) - 1)
        problem = RobustPooling(name, alpha=float(10 ** (2 * torch.rand((), generator=generator) - 1)))
        solution = problem.solve(x)
        assert not solution.status.any()
        error = float(relative_gradient(problem, solution.u, x).max())
        assert error <= tolerance, f"m={m}, n={n}, alpha={float(problem.alpha)}"


@pytest.mark.parametrize("name", CONVEX)
def test_convex_solution_is_where_a_plain_descent_ends(name: str) -> None:
    x, problem = points(2, 3, 12), pooling(name)
    u = x.median(2).values
    gradient = torch.func.vmap(torch.func.grad(problem.objective))
    for _ in range(1000):  # H is at most n times the identity for each of them
        u = u - gradient(u, x) / x.shape[2]
    torch.testing.assert_close(problem.solve(x).u, u, rtol=1e-9, atol=1e-9)


def test_quadratic_is_the_mean() -> None:
    x = points(3, 4, 9)
    assert torch.equal(pooling("quadratic").solve(x).u, x.mean(2))


@pytest.mark.parametrize("name", NON_CONVEX)
def test_non_convex_solution_is_no_worse_than_any_start(name: str) -> None:
    problem = pooling(name, alpha=0.8)
    for seed in range(10):
        x = points(2, 3, 25, seed)
        objective = torch.func.vmap(problem.objective)
        best = objective(problem.solve(x).u, x)
        for start in (x.mean(2), x.median(2).values, *x.unbind(2)):
            assert (best <= objective(start, x) + 1e-12).all()


@pytest.mark.parametrize("name", NON_CONVEX)
def test_non_convex_solution_on_a_line_is_near_the_global_one(name: str) -> None:
    problem = pooling(name, alpha=0.7)
    x = points(6, 1, 20, seed=4)
    grid = torch.linspace(-15, 15, 20_001).double()
    values = torch.func.vmap(
        lambda cloud: torch.func.vmap(lambda u: problem.objective(u[None], cloud))(grid)
    )(x)
    found = torch.func.vmap(problem.objective)(problem.solve(x).u, x)
    assert (found <= 1.02 * values.amin(1)).all()


def test_welsch_finds_the_larger_of_two_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(1, 2, 30, generator=generator).double()
    x[:, :, :12] += 5.0  # 40 % far away: the mean is in between, near neither
    u = pooling("welsch", alpha=0.5).solve(x).u
    torch.testing.assert_close(u, x[:, :, 12:].mean(2), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", NON_CONVEX)
def test_features_of_a_network_are_pooled_to_a_minimum(name: str) -> None:
    # Points on a surface of few dimensions: H is indefinite over long flat stretches, where reweighted means
    # advance by a thousandth of the distance a step.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(32, 2, generator=generator), torch.randn(32, 32, generator=generator) / 32**0.5
    points_in_plane = torch.randn(64, 2, 64, generator=generator)
    features = (weights[1] @ (weights[0] @ points_in_plane).relu()).relu()
    spread = float(features.std(2).mean())
    for width in (0.7, 1.5, 2.0, 2.5, 3.0, 4.0):
        problem = RobustPooling(name, alpha=width * spread)
        solution = problem.solve(features)
        assert not solution.status.any()
        hessian = torch.func.vmap(torch.func.hessian(problem.objective))(solution.u, features)
        values = torch.linalg.eigvalsh(hessian)
        assert (values.amin(1) > -1e-4 * values.amax(1)).all()


def test_weights_that_underflow_leave_a_minimum() -> None:
    # With standard normal points in R^128 and alpha = 1 every exp(-|u - x_j|^2 / 2) away from a point is 0.
    x = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(0))
    for name in NON_CONVEX:
        problem = RobustPooling(name, alpha=1.0)
        solution = problem.solve(x)
        assert not solution.status.any()
        v = torch.ones(2, 128)
        gradient = problem.vjp(solution.u, v, x)
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient.sum(2), v)  # moving all points moves the minimum with them


def test_large_alpha_does_not_stop_early() -> None:
    # alpha^2 (sqrt(1 + s / alpha^2) - 1) has no correct digit left here, so values cannot steer the descent.
    x = points(2, 3, 20, dtype=torch.float32)
    problem = RobustPooling("pseudo-huber", alpha=1e4)
    torch.testing.assert_close(problem.solve(x).u, x.mean(2), rtol=1e-5, atol=1e-5)
    assert not problem.solve(x).status.any()


def test_shared_points_expanded_with_stride_zero() -> None:
    x = points(1, 3, 12)
    for name in NAMES:
        u = pooling(name).solve(x.expand(4, -1, -1)).u
        torch.testing.assert_close(u, pooling(name).solve(x).u.expand(4, -1), rtol=1e-12, atol=1e-12)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    x = points(4, 2, 15)
    x[1] *= 100
    for name in NAMES:
        problem = pooling(name, 0.6)
        torch.testing.assert_close(problem.solve(x).u[2:3], problem.solve(x[2:3]).u, rtol=1e-10, atol=1e-10)


def test_empty_batch() -> None:
    for name in NAMES:
        assert pooling(name).solve(points(3, 2, 5)[:0]).u.shape == (0, 2)


@pytest.mark.parametrize("name", NAMES)
def test_solve_can_be_unrolled(name: str) -> None:
    x = points(2, 3, 10).requires_grad_()
    problem = pooling(name)
    u = problem.solve(x).u
    v = torch.linspace(-1, 2, u.numel()).reshape(u.shape).double()
    (unrolled,) = torch.autograd.grad(u, x, v)
    exact = problem.vjp(u.detach(), v, x.detach())
    assert relative_error(unrolled, exact) < 1e-6


# alpha


def test_alpha_as_number_parameter_and_input_agree() -> None:
    x = points(3, 2, 10)
    alphas = torch.tensor([0.5, 1.0, 2.0]).double()
    for name in NAMES:
        per_sample = RobustPooling(name, alpha=None).solve(x, alphas).u
        for b, alpha in enumerate(alphas):
            one = x[b : b + 1]
            buffer = RobustPooling(name, alpha=float(alpha)).double().solve(one).u[0]
            parameter = RobustPooling(name, alpha=nn.Parameter(alpha.clone())).solve(one).u[0].detach()
            torch.testing.assert_close(buffer, per_sample[b], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(parameter, per_sample[b], rtol=1e-10, atol=1e-10)


def test_the_last_input_takes_the_place_of_the_stored_alpha() -> None:
    x, alphas = points(2, 2, 10), torch.full((2,), 0.4).double()
    torch.testing.assert_close(pooling("welsch", 5.0).solve(x, alphas).u, pooling("welsch", 0.4).solve(x).u)


def test_alpha_is_a_buffer_or_a_parameter() -> None:
    assert dict(RobustPooling(alpha=2.0).named_buffers()).keys() == {"alpha"}
    assert dict(RobustPooling(alpha=nn.Parameter(torch.tensor(2.0))).named_parameters()).keys() == {"alpha"}


# The hand-written gradient


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "m", "n"), [(3, 4, 9), (1, 5, 3), (2, 1, 6), (1, 3, 1)])
def test_vjp_is_eqn_3(name: str, batch: int, m: int, n: int) -> None:
    x, problem = points(batch, m, n), pooling(name)
    u = problem.solve(x).u
    v = torch.randn(batch, m, generator=torch.Generator().manual_seed(2)).double()
    exact = dense_vjp(problem, u, v, (x,)).inputs[0]
    assert relative_error(problem.vjp(u, v, x), exact) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_vjp_is_the_reference(name: str) -> None:
    x, problem = points(3, 6, 20), pooling(name, 2.0)
    u = problem.solve(x).u
    v = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).double()
    assert relative_error(problem.vjp(u, v, x), fig2.backward(x, u, v, name, 2.0)) < 1e-8  # it adds 1e-9 to z


def test_vjp_with_alpha_as_input_has_no_gradient_for_it() -> None:
    x, alphas = points(3, 2, 8), torch.tensor([0.5, 1.0, 2.0]).double()
    problem = RobustPooling("pseudo-huber", alpha=None)
    u = problem.solve(x, alphas).u
    v = torch.ones_like(u)
    gradient, none = problem.vjp(u, v, x, alphas)
    assert none is None
    assert relative_error(gradient, dense_vjp(problem, u, v, (x, alphas)).inputs[0]) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_vjp_of_a_zero_cotangent_is_exactly_zero(name: str) -> None:
    x, problem = points(3, 4, 9), pooling(name)
    v = torch.ones(3, 4).double()
    v[1] = 0
    gradient = problem.vjp(problem.solve(x).u, v, x)
    assert not gradient[1].any()
    assert gradient[0].any()


def test_vjp_at_a_flat_point_names_the_sample() -> None:
    x = points(3, 2, 8)
    u = x.mean(2)
    u[1] += 1000  # beyond alpha from every point: H = 0
    with pytest.raises(idf.SingularError, match="sample 1"):
        pooling("truncated-quadratic").vjp(u, torch.ones_like(u), x)


def test_vjp_where_the_hessian_is_indefinite_names_the_sample() -> None:
    x = points(3, 2, 8)
    u = x.mean(2)
    u[2] += 5
    with pytest.raises(idf.SingularError, match="sample 2"):
        pooling("welsch", 3.0).vjp(u, torch.ones_like(u), x)


# Bad input


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_that_is_not_positive(alpha: float) -> None:
    with pytest.raises(idf.InputError, match="alpha"):
        RobustPooling(alpha=alpha)


def test_alpha_of_the_wrong_kind() -> None:
    with pytest.raises(idf.InputError, match="last input"):
        RobustPooling(alpha=torch.ones(3))
    with pytest.raises(idf.InputError, match="int64"):
        RobustPooling(alpha=torch.tensor(1))


def test_bad_inputs_name_the_samples() -> None:
    x, problem = points(3, 2, 5), RobustPooling(alpha=None)
    with pytest.raises(idf.InputError, match="alpha was not given"):
        problem.solve(x)
    with pytest.raises(idf.InputError, match="samples 0, 2"):
        problem.solve(x, torch.tensor([-1.0, 1.0, 0.0]).double())
    with pytest.raises(idf.InputError, match=r"\(3,\)"):
        problem.solve(x, torch.ones(3, 1).double())


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4, 4), (2, 3, 0), (2, 0, 3)])
def test_points_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(idf.InputError, match="x"):
        RobustPooling().solve(torch.ones(shape))


def test_objective_checks_the_rank_of_one_sample() -> None:
    with pytest.raises(idf.InputError, match=r"\(m, n\)"):
        RobustPooling().objective(torch.ones(3), torch.ones(3))


def test_example_can_be_solved() -> None:
    for name in NAMES:
        for alpha in (1.0, None):
            problem = RobustPooling(name, alpha)
            inputs = problem.example()
            assert not problem.solve(*inputs).status.any()
            assert problem.init(*(leaf[0] for leaf in inputs)).shape == (4,)

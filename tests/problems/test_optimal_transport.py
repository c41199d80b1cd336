"""OptimalTransport: marginals and multipliers, Fig. 4 against Eqn. 3, large gamma, and every bad input."""

import math

import pytest
import torch
from torch import Tensor, nn

import implicitdiff as idf
from implicitdiff.problems import OptimalTransport
from tests.oracles import compare_modulo, dense_vjp, gradient_null_vectors, relative_error
from tests.reference import fig4

SHAPES = [(3, 4, 6), (2, 7, 3), (1, 5, 5), (2, 1, 4), (2, 3, 1), (2, 1, 1), (4, 30, 20)]


def instance(
    batch: int, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Costs and uneven marginals."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.rand(batch, m, n, generator=generator, dtype=dtype)
    r = torch.randn(batch, m, generator=generator, dtype=dtype).softmax(1)
    c = torch.randn(batch, n, generator=generator, dtype=dtype).softmax(1)
    return M, r, c


def transport(gamma: float = 4.0) -> OptimalTransport:
    return OptimalTransport(gamma).double()


def cotangent(P: Tensor) -> Tensor:
    return torch.randn(P.shape, generator=torch.Generator().manual_seed(9), dtype=P.dtype)


def slope(P: Tensor, M: Tensor, r: Tensor, c: Tensor, gamma: float) -> Tensor:
    """The paper's Eqn. 12."""
    return M + (P.log() + 1 - r.log()[:, :, None] - c.log()[:, None]) / gamma


def violations(P: Tensor, r: Tensor, c: Tensor) -> float:
    """The largest violation of a marginal, relative to the largest marginal."""
    largest = torch.maximum(r.amax(1), c.amax(1))
    rows, columns = (P.sum(2) - r).abs().amax(1), (P.sum(1) - c).abs().amax(1)
    return float((torch.maximum(rows, columns) / largest).max())


# The declaration


def test_objective_is_the_papers() -> None:
    M, r, c = (leaf[0] for leaf in instance(1, 4, 6))
    P = torch.rand(4, 6).double()
    for gamma in (0.5, 4.0):
        by_hand = (M * P).sum() + (P * (P.log() - torch.outer(r, c).log())).sum() / gamma
        torch.testing.assert_close(transport(gamma).objective(P, M, r, c), by_hand)
        torch.testing.assert_close(
            transport(1.0).objective(P, M, r, c, torch.tensor(gamma).double()), by_hand
        )
        uniform = (M * P).sum() + (P * (P.log() - math.log(1 / 24))).sum() / gamma
        torch.testing.assert_close(transport(gamma).objective(P, M), uniform)
        torch.testing.assert_close(transport(1.0).objective(P, M, torch.tensor(gamma).double()), uniform)


def test_objective_is_finite_where_the_plan_is_zero() -> None:
    M, r, c = (leaf[0] for leaf in instance(1, 3, 4))
    assert torch.isfinite(transport().objective(torch.zeros(3, 4).double(), M, r, c))


def test_equality_holds_all_marginals() -> None:
    M, r, c = (leaf[0] for leaf in instance(1, 3, 4))
    P = torch.rand(3, 4).double()
    rows, columns = transport().equality(P, M, r, c)
    torch.testing.assert_close(rows, P.sum(1) - r)
    torch.testing.assert_close(columns, P.sum(0) - c)
    rows, columns = transport().equality(P, M)
    torch.testing.assert_close(rows, P.sum(1) - 1 / 3)
    torch.testing.assert_close(columns, P.sum(0) - 1 / 4)


def test_init_is_the_plan_of_gamma_zero() -> None:
    M, r, c = (leaf[0] for leaf in instance(1, 3, 4))
    torch.testing.assert_close(transport().init(M, r, c), torch.outer(r, c))
    torch.testing.assert_close(transport().init(M), torch.full((3, 4), 1 / 12).double())


# Solutions and multipliers


@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0, 100.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solution_and_multipliers(shape: tuple[int, int, int], gamma: float) -> None:
    M, r, c = instance(*shape)
    problem = OptimalTransport(torch.tensor(gamma, dtype=torch.float64))
    solution = problem.solve(M, r, c)
    P, (lam_r, lam_c) = solution.u, solution.equality_multipliers
    assert solution.status.tolist() == [idf.Status.OK] * shape[0]
    assert violations(P, r, c) < 1e-12
    # lambda' A = D_P f, and of all such lambda the shortest: orthogonal to (1_m, -1_n).
    torch.testing.assert_close(
        lam_r[:, :, None] + lam_c[:, None], slope(P, M, r, c, gamma), rtol=0, atol=1e-12 * (1 + 1 / gamma)
    )
    torch.testing.assert_close(lam_r.sum(1), lam_c.sum(1), rtol=0, atol=1e-11 * (1 + 1 / gamma))


def test_random_float32_calls_are_all_optimal() -> None:
    generator = torch.Generator().manual_seed(5)
    tolerance = torch.finfo(torch.float32).eps ** 0.5
    for seed in range(1000):
        m, n = (int(torch.randint(1, 25, (), generator=generator)) for _ in range(2))
        gamma = float(10 ** (3 * torch.rand((), generator=generator) - 1))
        M, r, c = instance(1, m, n, seed, torch.float32)
        solution = OptimalTransport(gamma).solve(M, r, c)
        where = f"m={m}, n={n}, gamma={gamma}"
        assert not solution.status.any(), where
        assert violations(solution.u, r, c) <= tolerance, where
        lam_r, lam_c = solution.equality_multipliers
        terms = slope(solution.u, M, r, c, gamma)
        off = (terms - lam_r[:, :, None] - lam_c[:, None])[solution.u > 0].abs().max()
        assert off <= tolerance * terms[solution.u > 0].abs().max(), where


def test_uniform_marginals_may_be_left_out() -> None:
    M, _, _ = instance(2, 3, 5)
    r, c = (torch.full((2, k), 1 / k, dtype=torch.float64) for k in (3, 5))
    given = transport().solve(M, r, c).u
    torch.testing.assert_close(transport().solve(M).u, given)
    torch.testing.assert_close(transport().solve(M, None, c).u, given)  # type: ignore[arg-type]


def test_nothing_is_normalised() -> None:
    M, r, c = instance(2, 3, 5)
    P = transport().solve(M, 3 * r, 3 * c).u
    assert violations(P, 3 * r, 3 * c) < 1e-12


def test_transposed_problem_has_the_transposed_plan() -> None:
    M, r, c = instance(2, 3, 8)
    torch.testing.assert_close(
        transport().solve(M.mT, c, r).u.mT, transport().solve(M, r, c).u, rtol=1e-11, atol=0
    )


def test_shared_marginals_expanded_with_stride_zero() -> None:
    M, r, c = instance(3, 4, 6)
    shared_r, shared_c = r[:1].expand(3, -1), c[:1].expand(3, -1)
    P = transport().solve(M, shared_r, shared_c).u
    torch.testing.assert_close(P, transport().solve(M, shared_r.clone(), shared_c.clone()).u)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    M, r, c = instance(3, 4, 6)
    M[1] *= 100
    alone = transport().solve(M[2:], r[2:], c[2:]).u
    torch.testing.assert_close(transport().solve(M, r, c).u[2:], alone, rtol=1e-10, atol=0)


def test_empty_batch() -> None:
    M, r, c = (leaf[:0] for leaf in instance(2, 3, 4))
    solution = transport().solve(M, r, c)
    assert solution.u.shape == (0, 3, 4)
    assert [leaf.shape for leaf in solution.equality_multipliers] == [(0, 3), (0, 4)]


def test_solve_can_be_unrolled() -> None:
    M, r, c = instance(2, 4, 6)
    M.requires_grad_()
    P = transport(8.0).solve(M, r, c).u
    v = cotangent(P)
    (unrolled,) = torch.autograd.grad(P, M, v)
    exact = transport(8.0).vjp(P.detach(), v, M.detach(), r, c)[0]
    assert isinstance(exact, Tensor)
    assert relative_error(unrolled, exact) < 1e-6


# gamma


def test_gamma_as_number_parameter_and_input_agree() -> None:
    M, r, c = instance(3, 4, 6)
    gammas = torch.tensor([0.5, 2.0, 20.0]).double()
    per_sample = OptimalTransport(None).solve(M, r, c, gammas)
    for b, gamma in enumerate(gammas):
        one = M[b : b + 1], r[b : b + 1], c[b : b + 1]
        buffer = transport(float(gamma)).solve(*one)
        parameter = OptimalTransport(nn.Parameter(gamma.clone())).solve(*one)
        for other in (buffer, parameter):
            torch.testing.assert_close(other.u[0].detach(), per_sample.u[b], rtol=1e-10, atol=0)
            for k in range(2):
                torch.testing.assert_close(
                    other.equality_multipliers[k][0].detach(), per_sample.equality_multipliers[k][b]
                )
    only_costs = OptimalTransport(None).solve(M, gammas)
    torch.testing.assert_close(only_costs.u[1], transport(2.0).solve(M).u[1])


@pytest.mark.parametrize("shape", [(2, 100, 100), (2, 30, 20)], ids=str)
def test_gamma_300_in_float32(shape: tuple[int, int, int]) -> None:
    M, r, c = instance(*shape, dtype=torch.float32)
    solution = OptimalTransport(300.0).solve(M, r, c)
    assert not solution.status.any()
    P = solution.u
    assert (P[P > 0] >= torch.finfo(torch.float32).tiny).all()
    assert (P == 0).any()  # else the test does not see underflow
    r, c = (leaf.double() / leaf.double().sum(1, keepdim=True) for leaf in (r, c))
    in_float64 = OptimalTransport(300.0).double().solve(M.double(), r, c).u
    torch.testing.assert_close(P.double(), in_float64, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 5, 7), (2, 30, 20), (1, 60, 60)], ids=str)
def test_gamma_10000_in_float32_is_finite_and_honest(shape: tuple[int, int, int]) -> None:
    tolerance = torch.finfo(torch.float32).eps ** 0.5
    for seed in range(5):
        M, r, c = instance(*shape, seed, torch.float32)
        solution = OptimalTransport(1e4).solve(M, r, c)
        assert torch.isfinite(solution.u).all()
        assert all(torch.isfinite(leaf).all() for leaf in solution.equality_multipliers)
        for b, status in enumerate(solution.status.tolist()):
            one = slice(b, b + 1)
            converged = violations(solution.u[one], r[one], c[one]) <= tolerance
            assert status == (idf.Status.OK if converged else idf.Status.NOT_CONVERGED)


def test_an_unfinished_sample_is_reported_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from implicitdiff.problems import sinkhorn

    monkeypatch.setattr(sinkhorn, "NEWTON_STEPS", 1)
    monkeypatch.setattr(sinkhorn, "SWEEPS", 3)
    M, r, c = instance(3, 20, 20)
    M[1] *= 100
    status = transport(1.0).solve(M, r, c).status
    assert status.tolist() == [idf.Status.OK, idf.Status.NOT_CONVERGED, idf.Status.OK]


# The hand-written gradient


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_vjp_is_eqn_3(shape: tuple[int, int, int], gamma: float) -> None:
    inputs = instance(*shape)
    problem = transport(gamma)
    P = problem.solve(*inputs).u
    v = cotangent(P)
    exact = dense_vjp(problem, P, v, inputs).leaves()
    found = problem.vjp(P, v, *inputs)
    assert isinstance(found, tuple)
    # The gradients for r and c are defined up to a multiple of (1_m, -1_n); Fig. 4 picks the first entry as
    # 0.
    assert compare_modulo(found, exact, gradient_null_vectors(problem, P, inputs)) < 1e-10
    assert not found[1][:, 0].any()


def test_vjp_for_costs_alone() -> None:
    M, _, _ = instance(2, 4, 5)
    problem = transport()
    P = problem.solve(M).u
    v = cotangent(P)
    found = problem.vjp(P, v, M)
    assert isinstance(found, Tensor)
    assert relative_error(found, dense_vjp(problem, P, v, (M,)).inputs[0]) < 1e-10


def test_vjp_has_no_gradient_for_gamma() -> None:
    M, r, c = instance(3, 4, 5)
    gammas = torch.tensor([0.5, 2.0, 6.0]).double()
    problem = OptimalTransport(None)
    for inputs in ((M, gammas), (M, r, c, gammas)):
        P = problem.solve(*inputs).u
        v = cotangent(P)
        found = problem.vjp(P, v, *inputs)
        assert len(found) == len(inputs)
        assert found[-1] is None
        assert isinstance(found[0], Tensor)
        assert relative_error(found[0], dense_vjp(problem, P, v, inputs).inputs[0]) < 1e-10


def test_vjp_is_the_reference() -> None:
    M, r, c = instance(3, 6, 9)
    problem = transport(3.0)
    P = problem.solve(M, r, c).u
    v = cotangent(P)
    for found, reference in zip(problem.vjp(P, v, M, r, c), fig4.backward(M, r, c, P, v, 3.0), strict=True):
        assert relative_error(found, reference) < 1e-12


def test_vjp_of_a_zero_cotangent_is_exactly_zero() -> None:
    M, r, c = instance(3, 4, 6)
    problem = transport()
    P = problem.solve(M, r, c).u
    v = cotangent(P)
    v[1] = 0
    for gradient in problem.vjp(P, v, M, r, c):
        assert isinstance(gradient, Tensor)
        assert not gradient[1].any()
        assert gradient[0].any()


def test_vjp_where_the_schur_complement_is_indefinite_names_the_sample() -> None:
    M, r, c = instance(3, 4, 6)
    problem = transport()
    P = problem.solve(M, r, c).u
    c[1] /= 2  # not the marginal of P any more
    with pytest.raises(idf.SingularError, match="sample 1"):
        problem.vjp(P, cotangent(P), M, r, c)


# Bad input


def test_unequal_totals_name_the_samples() -> None:
    M, r, c = instance(4, 3, 5)
    r[1] *= 1.01
    c[3] *= 2
    with pytest.raises(idf.InfeasibleError, match="samples 1, 3"):
        transport().solve(M, r, c)


@pytest.mark.parametrize("mass", [-0.1, 0.0, math.inf, math.nan])
def test_mass_that_is_not_positive_names_the_sample(mass: float) -> None:
    M, r, c = instance(3, 3, 5)
    c[2, 1] = mass
    with pytest.raises(idf.InputError, match=r"c has .* sample 2"):
        transport().solve(M, r, c)
    M, r, c = instance(3, 3, 5)
    r[0, 1] = mass
    with pytest.raises(idf.InputError, match=r"r has .* sample 0"):
        transport().solve(M, r, c)


def test_rounding_of_the_totals_is_no_infeasibility() -> None:
    generator = torch.Generator().manual_seed(0)
    r, c = (torch.rand(2, size, generator=generator) for size in (3000, 7))
    r, c = r / r.sum(1, keepdim=True), c / c.sum(1, keepdim=True)
    assert not OptimalTransport(2.0).solve(torch.rand(2, 3000, 7), r, c).status.any()


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_gamma_that_is_not_positive(gamma: float) -> None:
    with pytest.raises(idf.InputError, match="gamma"):
        OptimalTransport(gamma)


def test_gamma_per_sample_that_is_not_positive_names_the_sample() -> None:
    M, r, c = instance(3, 3, 5)
    with pytest.raises(idf.InputError, match="sample 1"):
        OptimalTransport(None).solve(M, r, c, torch.tensor([1.0, -1.0, 2.0]).double())
    with pytest.raises(idf.InputError, match="gamma was not given"):
        OptimalTransport(None).solve(M, r, c)


def test_wrong_number_of_inputs() -> None:
    M, r, c = instance(2, 3, 5)
    with pytest.raises(idf.InputError, match="5 inputs"):
        transport().solve(M, r, c, M[:, 0, 0], M)


def test_wrong_shapes() -> None:
    M, r, c = instance(2, 3, 5)
    with pytest.raises(idf.InputError, match=r"c must have shape \(2, 5\)"):
        transport().solve(M, r, r)
    with pytest.raises(idf.InputError, match=r"r must have shape \(2, 3\)"):
        transport().solve(M, r[:, None], c)
    with pytest.raises(idf.InputError, match=r"\(batch, m, n\)"):
        transport().solve(M[0], r, c)
    with pytest.raises(idf.InputError, match=r"\(m, n\)"):
        transport().objective(M[0], M, r, c)
    with pytest.raises(idf.InputError, match="m, n >= 1"):
        transport().solve(M[:, :0])


def test_example_can_be_solved() -> None:
    for gamma in (1.0, None):
        problem = OptimalTransport(gamma)
        inputs = problem.example()
        assert not problem.solve(*inputs).status.any()
        assert problem.init(*(leaf[0] for leaf in inputs)).shape == (4, 6)

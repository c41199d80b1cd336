"""The oracles themselves, against closed forms and against finite differences of an independent solver.

Nothing of the library is tested here. If a test of this file fails, no other comparison with the oracles
means anything.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.cases import BY_NAME, CASES, Case
from tests.oracles import (
    Sample,
    compare_modulo,
    dense_constraint_jacobian,
    dense_hessian,
    dense_vjp,
    dense_vjp_at,
    eqn3,
    gradient_null_vectors,
    kkt_solution,
    newton_solution,
    relative_error,
)
from tests.oracles.dense import split_batch
from tests.oracles.sample import differentiable

# Minimised exactly by the oracle's Newton; the non-convex penalties' minimum depends on their own solver's
# starts.
NEWTON = [case for case in CASES if case.name != "pooling-truncated-quadratic"]


def solution(case: Case, inputs: tuple) -> Any:
    """u of the whole batch by the oracle's Newton."""
    samples = split_batch(inputs, case.in_dims)
    problem = case.problem()
    found = [newton_solution(problem, one).u for one in samples.inputs]
    return found[0] if samples.unbatched else tree_map(lambda *leaves: torch.stack(leaves), *found)


def like(tree: Any, seed: int) -> Any:
    """Seeded normal numbers in the shapes of `tree`."""
    generator = torch.Generator().manual_seed(seed)
    return tree_map(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype), tree)


def dot(a: Any, b: Any) -> float:
    """The inner product of two pytrees of tensors."""
    return sum(float((s * t).sum()) for s, t in zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True))


@pytest.mark.parametrize("case", NEWTON, ids=str)
def test_dense_vjp_is_the_finite_difference_of_the_solution(case: Case) -> None:
    """<v, u(x + t d) - u(x - t d)> / 2t = <gradient, d> along a random direction d of consistent inputs."""
    free = case.make_inputs(seed=2, batch=2)
    consistent = case.consistent or (lambda *inputs: inputs)
    leaves, spec = tree_flatten(free)
    direction = [like(leaf, 11 + k) if differentiable(leaf) else None for k, leaf in enumerate(leaves)]

    def moved(t: float) -> tuple:
        pieces = [leaf if d is None else leaf + t * d for leaf, d in zip(leaves, direction, strict=True)]
        return consistent(*tree_unflatten(pieces, spec))

    inputs = consistent(*free)
    u = solution(case, inputs)
    v = like(u, 5)
    gradients = dense_vjp(case.problem(), u, v, inputs, case.in_dims).inputs
    step = 1e-5
    difference = (dot(v, solution(case, moved(step))) - dot(v, solution(case, moved(-step)))) / (2 * step)
    along = [
        (after - before) / (2 * step)
        for after, before, d in zip(
            *(tree_flatten(moved(t))[0] for t in (step, -step)), direction, strict=True
        )
        if d is not None
    ]
    predicted = dot([g for g in tree_flatten(gradients)[0] if g is not None], along)
    assert predicted == pytest.approx(difference, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("case", [case for case in NEWTON if list(case.problem().parameters())], ids=str)
def test_dense_vjp_reaches_parameters(case: Case) -> None:
    inputs = case.make_inputs(seed=4, batch=2)
    problem = case.problem()
    samples = split_batch(inputs, case.in_dims)

    def value(v: Any) -> float:
        found = [newton_solution(problem, one).u for one in samples.inputs]
        return dot(v, tree_map(lambda *parts: torch.stack(parts), *found))

    u = solution(case, inputs)
    v = like(u, 6)
    gradients = dense_vjp(problem, u, v, inputs, case.in_dims).parameters
    assert set(gradients) == {name for name, _ in problem.named_parameters()}
    for name, parameter in problem.named_parameters():
        direction = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64
        )
        original, step = parameter.detach().clone(), 1e-5
        values = []
        for sign in (1, -1):
            parameter.data.copy_(original + sign * step * direction)
            values.append(value(v))
        parameter.data.copy_(original)
        predicted = float((gradients[name] * direction).sum())
        assert predicted == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6, abs=1e-7), name


# Eqn. 3 has H^-1 in it; where H is singular only K is regular.
INVERTIBLE = [case for case in NEWTON if not case.dependent and not case.name.startswith("pinned-graph")]


@pytest.mark.parametrize("case", INVERTIBLE, ids=str)
def test_eqn3_and_the_kkt_system_agree(case: Case) -> None:
    """The paper's formula as printed, and K (w, s) = -(v, 0) with gradient B'w - C's, are the same
    function.
    """
    for inputs in split_batch(case.make_inputs(seed=1, batch=2), case.in_dims).inputs:
        found = newton_solution(case.problem(), inputs)
        sample = Sample(case.problem(), found.u, inputs)
        d = sample.derivatives(sample.u)
        v = torch.randn(d.H.shape[0], dtype=torch.float64)
        w, s = kkt_solution(d, v)
        assert relative_error(w @ d.B - s @ d.C, v @ eqn3(d)) < 1e-9
        assert relative_error(d.stationarity, torch.zeros_like(d.stationarity), floor=1.0) < 1e-9
        assert relative_error(d.constraint, torch.zeros_like(d.constraint), floor=1.0) < 1e-9


def test_softmax_closed_form() -> None:
    """Du = diag(u) - u u'."""
    case = BY_NAME["softmax"]
    (x,) = case.make_inputs(batch=3)
    u = torch.softmax(x, 1)
    assert relative_error(solution(case, (x,)), u) < 1e-12
    v = torch.randn_like(u)
    expected = u * v - u * (u * v).sum(1, keepdim=True)
    assert relative_error(dense_vjp(case.problem(), u, v, (x,)).inputs[0], expected) < 1e-12


def test_sphere_closed_form() -> None:
    """u = x / |x|, lambda = -|x| / 2, Du = (I - u u') / |x|; D lambda = -u / 2."""
    case = BY_NAME["sphere"]
    (x,) = case.make_inputs(batch=3)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    u, v = x / norm, torch.randn_like(x)
    assert relative_error(solution(case, (x,)), u) < 1e-10
    expected = (v - u * (u * v).sum(1, keepdim=True)) / norm
    assert relative_error(dense_vjp(case.problem(), u, v, (x,)).inputs[0], expected) < 1e-12
    sample = Sample(case.problem(), u[0], (x[0],))
    assert relative_error(sample.least_squares_multipliers(sample.u), -norm[0] / 2) < 1e-12
    v_lam = torch.randn(3, dtype=torch.float64)
    both = dense_vjp_at(case.problem(), u, None, v, (x,), v_lam=v_lam).inputs[0]
    assert relative_error(both, expected - 0.5 * v_lam[:, None] * u) < 1e-12


def test_ridge_closed_form() -> None:
    """u = (X'X + mu I)^-1 X'y, differentiated by autograd through an explicit inverse."""
    case = BY_NAME["ridge"]
    X, y = (t.requires_grad_() for t in case.make_inputs(batch=3))
    problem = case.problem()
    mu = dict(problem.named_parameters())["mu"]
    gram = X.mT @ X + mu * torch.eye(X.shape[2], dtype=torch.float64)
    u = torch.linalg.inv(gram) @ (X.mT @ y[..., None])
    u = u[..., 0]
    v = torch.randn_like(u)
    expected = torch.autograd.grad((u * v).sum(), [X, y, mu])
    actual = dense_vjp(problem, u.detach(), v, (X, y)).leaves()
    assert compare_modulo(actual, expected) < 1e-11


def test_quadratic_program_closed_form() -> None:
    """u from one linear solve of the KKT system, differentiated by autograd, with a shared Q that is not
    symmetric.
    """
    case = BY_NAME["portfolio"]
    Q, mu = (t.requires_grad_() for t in case.make_inputs(batch=3))
    m = mu.shape[1]
    K = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    K[m, :m] = K[:m, m] = 1
    K = K + torch.nn.functional.pad((Q + Q.mT) / 2, (0, 1, 0, 1))
    u = torch.cat([mu, torch.ones(3, 1, dtype=torch.float64)], 1) @ torch.linalg.inv(K)[:m].mT
    v = torch.randn_like(u)
    expected = torch.autograd.grad((u * v).sum(), [Q, mu])
    actual = dense_vjp(case.problem(), u.detach(), v, (Q, mu), case.in_dims).leaves()
    assert compare_modulo(actual, expected) < 1e-12


def test_null_vectors_of_transport() -> None:
    """The gradients of r and c are defined modulo (1_m, -1_n), and the reported null vectors are just
    that.
    """
    case = BY_NAME["transport"]
    M, r, c = case.make_inputs(batch=2, sizes=(4, 3))
    u = solution(case, (M, r, c))
    vectors = gradient_null_vectors(case.problem(), u, (M, r, c))
    assert len(vectors) == 2
    for b, (of_M, of_r, of_c) in enumerate(vectors):
        assert float(of_M.abs().max()) < 1e-12
        constants = torch.cat([of_r[b], -of_c[b]])
        assert float(constants.std()) < 1e-12
        assert float(constants.abs().min()) > 0.1
        assert float(of_r[1 - b].abs().max()) == 0.0
    v = torch.randn_like(u)
    exact = dense_vjp(case.problem(), u, v, (M, r, c)).leaves()
    shifted = [exact[0], exact[1] + 0.7, exact[2] - 0.7]
    assert compare_modulo(shifted, exact, vectors) < 1e-12
    assert compare_modulo(shifted, exact) > 0.1
    assert compare_modulo([exact[0], exact[1] + 0.7, exact[2]], exact, vectors) > 0.1


def test_hessian_and_jacobian_closed_forms() -> None:
    """Ellipsoid: H = diag(2 w - 2 lambda a), A = (2 a u)'."""
    case = BY_NAME["ellipsoid"]
    x, w, a = case.make_inputs(batch=3)
    u = torch.randn_like(x)
    lam = torch.randn(3, dtype=torch.float64)
    H = dense_hessian(case.problem(), u, (x, w, a), lam=lam)
    assert relative_error(H, torch.diag_embed(2 * w - 2 * lam[:, None] * a)) < 1e-13
    A = dense_constraint_jacobian(case.problem(), u, (x, w, a))
    assert relative_error(A, (2 * a * u)[:, None]) < 1e-13


def test_relative_error_is_infinite_for_nan() -> None:
    one = torch.ones(2)
    assert relative_error(torch.tensor([1.0, float("nan")]), one) == float("inf")
    assert relative_error(one, one) == 0.0
    with pytest.raises(AssertionError, match="shape"):
        relative_error(one[:1], one)


def test_newton_refuses_an_infeasible_problem() -> None:
    """The fixture's fault must not pass for a solution."""
    case = BY_NAME["sphere"]

    class Contradiction(type(case.problem())):  # type: ignore[misc]
        def equality(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return u.sum() - 1, u.sum() - 2

    with pytest.raises(AssertionError, match="stopped at a residual"):
        newton_solution(Contradiction(), (torch.randn(3, dtype=torch.float64),))

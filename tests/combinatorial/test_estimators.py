"""Estimators with noise and losses against closed forms and finite differences; solver calls counted."""

import math

import pytest
import torch
from torch import Tensor

import implicitdiff.combinatorial as co
from implicitdiff import InputError, NotSupportedYetError, OptionError

ONE_HOT = co.TopK(1)
MANY = 40000


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(
    solver: co.Solver, estimator: co.Estimator, seed: int = 0, domain: str = "error"
) -> co.DiscreteLayer:
    return co.DiscreteLayer(solver, estimator, generator=generator(seed), domain=domain)  # type: ignore[arg-type]


def gradient(made: co.DiscreteLayer, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    w = w.clone().requires_grad_()
    y = made(w)
    (found,) = torch.autograd.grad((y * g).sum(), w)
    return y.detach(), found


W = torch.tensor([[0.3, -0.2, 0.5], [0.0, 0.4, -0.6]], dtype=torch.float64)
G = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("baseline", [True, False])
def test_perturbed_by_gumbel_noise_is_a_softmax(baseline: bool) -> None:
    """One-hot y(w - sigma Z) is a sample of softmax(-w / sigma), whose gradient is known."""
    sigma = 0.7
    made = layer(ONE_HOT, co.Perturbed(sigma, MANY, "gumbel", baseline=baseline))
    y, found = gradient(made, W, G)
    w = W.clone().requires_grad_()
    p = torch.softmax(-w / sigma, dim=1)
    (expected,) = torch.autograd.grad((p * G).sum(), w)
    torch.testing.assert_close(y, p.detach(), rtol=0, atol=0.01)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("baseline", [True, False])
def test_two_samples_are_unbiased(baseline: bool) -> None:
    """Each sample is the other's baseline; the mean over many pairs is the softmax' gradient, and not half of it."""
    w, g = (one[:1].expand(MANY, 3) for one in (W, G))
    _, found = gradient(layer(ONE_HOT, co.Perturbed(0.7, 2, "gumbel", baseline=baseline)), w, g)
    x = W[:1].clone().requires_grad_()
    (expected,) = torch.autograd.grad((torch.softmax(-x / 0.7, dim=1) * G[:1]).sum(), x)
    torch.testing.assert_close(found.mean(0), expected[0], rtol=0, atol=0.02)


def test_perturbed_by_normal_noise_between_two() -> None:
    """P(w_1 + sigma Z_1 < w_2 + sigma Z_2) = Phi((w_2 - w_1) / (sigma sqrt 2))."""
    sigma, w = 0.5, torch.tensor([[0.2, 0.5]], dtype=torch.float64)
    y, found = gradient(layer(ONE_HOT, co.Perturbed(sigma, MANY)), w, torch.tensor([[1.0, 0.0]]).double())
    gap = (w[0, 1] - w[0, 0]) / (sigma * math.sqrt(2))
    normal = torch.distributions.Normal(0.0, 1.0)
    slope = normal.log_prob(gap).exp() / (sigma * math.sqrt(2))
    torch.testing.assert_close(y[0, 0], normal.cdf(gap), rtol=0, atol=0.01)
    torch.testing.assert_close(found[0], torch.stack((-slope, slope)), rtol=0, atol=0.03)


def test_perturbed_by_factors_between_two() -> None:
    """With w_i exp(sigma Z_i - sigma^2 / 2) it is Phi(log(w_2 / w_1) / (sigma sqrt 2))."""
    sigma, w = 0.5, torch.tensor([[0.4, 0.5]], dtype=torch.float64)
    made = layer(ONE_HOT, co.Perturbed(sigma, MANY, multiplicative=True))
    y, found = gradient(made, w, torch.tensor([[1.0, 0.0]]).double())
    x = w.clone().requires_grad_()
    p = torch.distributions.Normal(0.0, 1.0).cdf((x[0, 1] / x[0, 0]).log() / (sigma * math.sqrt(2)))
    (expected,) = torch.autograd.grad(p, x)
    torch.testing.assert_close(y[0, 0], p.detach(), rtol=0, atol=0.01)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.06)


def test_perturbed_has_one_jacobian_in_both_modes() -> None:
    w = draw(1, 4)
    reverse = torch.func.jacrev(layer(co.TopK(2), co.Perturbed(0.5, 30), seed=3))(w)
    forward = torch.func.jacfwd(layer(co.TopK(2), co.Perturbed(0.5, 30), seed=3))(w)
    assert reverse.abs().max() > 0.01
    torch.testing.assert_close(reverse, forward)


def test_the_variance_is_lower_with_a_baseline() -> None:
    """The gradient of a loss with a large constant part, over many draws."""
    spread = {}
    for baseline in (True, False):
        made = layer(co.TopK(2), co.Perturbed(0.5, 5, baseline=baseline))
        found = torch.stack([gradient(made, draw(2, 1, 5), 1 + 0.1 * draw(3, 1, 5))[1] for _ in range(100)])
        spread[baseline] = found.var(0).sum()
    assert spread[True] < 0.2 * spread[False]


def test_imle_samples_by_perturb_and_map() -> None:
    """With Gumbel noise the mean solution is softmax(-w); the noise is subtracted from costs."""
    y, found = gradient(layer(ONE_HOT, co.IMLE(2.0, co.Gumbel(), samples=MANY)), W, G)
    torch.testing.assert_close(y, torch.softmax(-W, dim=1), rtol=0, atol=0.01)
    # So the gradient is the difference of two softmaxes over lam.
    expected = (torch.softmax(-(W + 2.0 * G), dim=1) - torch.softmax(-W, dim=1)) / 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_adaptive_imle_by_hand() -> None:
    """Without noise it is Blackbox with lam = alpha |w| / |g| of each sample."""
    w, g = draw(4, 3, 6), draw(5, 3, 6)
    estimator = co.AdaptiveIMLE(alpha=1.5)
    _, found = gradient(layer(co.TopK(2), estimator), w, g)
    for sample in range(3):
        one = slice(sample, sample + 1)
        lam = float(1.5 * w[one].norm() / g[one].norm())
        _, expected = gradient(layer(co.TopK(2), co.Blackbox(lam)), w[one], g[one])
        torch.testing.assert_close(found[one], expected)
    central = gradient(layer(co.TopK(2), co.AdaptiveIMLE(alpha=1.5, central=True)), w[:1], g[:1])[1]
    lam = float(1.5 * w[:1].norm() / g[:1].norm())
    torch.testing.assert_close(central, gradient(layer(co.TopK(2), co.LPGD(lam)), w[:1], g[:1])[1])


def test_adaptive_imle_changes_alpha_in_training_only() -> None:
    estimator = co.AdaptiveIMLE(alpha=0.0, eta=0.1, target=1.0, momentum=0.0)
    made = layer(co.TopK(2), estimator)
    w, g = draw(4, 3, 6), draw(5, 3, 6)
    assert gradient(made, w, g)[1].abs().max() == 0, "alpha = 0"
    assert estimator.alpha == pytest.approx(0.1)
    while gradient(made, w, g)[1].abs().max() == 0:
        assert estimator.alpha < 20
    before = float(estimator.alpha)
    for _ in range(60):
        gradient(made, w, g)
    # Two or more non-zero entries in a sample: alpha falls until they are fewer than one on average, and hovers.
    assert 0 < estimator.alpha < before + 0.3
    made.eval()
    held = float(estimator.alpha)
    gradient(made, w, g)
    assert float(estimator.alpha) == held
    assert "estimator.alpha" in made.state_dict()


def test_straight_through_a_softmax() -> None:
    w, g, T = draw(6, 2, 5), draw(7, 2, 5), 0.6
    _, found = gradient(layer(co.TopK(2), co.StraightThrough(T)), w, g)
    x = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad((2 * torch.softmax(-x / T, dim=1) * g).sum(), x)
    torch.testing.assert_close(found, expected)


def test_lpgd_with_a_proximal_term_by_enumeration() -> None:
    w, g, tau, rho = draw(8, 4, 6), draw(9, 4, 6), 1.3, 0.8
    solver = co.TopK(2)
    listed = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).double()
    listed = listed[listed.sum(1) == 2]
    y = solver(w)

    def proximal(sign: int) -> Tensor:
        distance = (listed[None] - y[:, None]).square().sum(2)
        values = (w + sign * tau * g) @ listed.T + rho / 2 * distance
        return listed[values.argmin(1)]

    expected = (proximal(1) - proximal(-1)) / (2 * tau)
    _, found = gradient(layer(solver, co.LPGD(tau, rho)), w, g)
    torch.testing.assert_close(found, expected)
    plain = gradient(layer(solver, co.LPGD(tau)), w, g)[1]
    assert not torch.equal(found, plain), "rho must matter here"
    with pytest.raises(OptionError, match="zeros and ones"):
        gradient(layer(co.Ranking(), co.LPGD(tau, rho)), w, g)


CALLS = {
    "identity": (co.Identity(), 1),
    "margin": (co.Identity(margin=co.Rademacher(0.1)), 1),
    "through": (co.StraightThrough(0.5), 1),
    "blackbox": (co.Blackbox(1.0), 2),
    "right": (co.LPGD(1.0, side="right"), 2),
    "left": (co.LPGD(1.0, side="left"), 2),
    "both": (co.LPGD(1.0), 3),
    "imle": (co.IMLE(1.0, co.SumOfGamma(2), samples=4), 8),
    "adaptive": (co.AdaptiveIMLE(co.SumOfGamma(2), samples=2), 4),
    "adaptive-central": (co.AdaptiveIMLE(co.SumOfGamma(2), samples=2, central=True), 6),
    "perturbed": (co.Perturbed(0.5, 7), 7),
}


@pytest.mark.parametrize("name", CALLS)
def test_solver_calls(name: str) -> None:
    """Counted in the solver itself, not by the layer alone."""
    estimator, calls = CALLS[name]
    seen = 0
    inside = co.TopK(2)

    def counting(costs: Tensor) -> Tensor:
        nonlocal seen
        seen += len(costs)
        return inside(costs)

    made = layer(co.solver(counting, cost_shape=(6,), equalities=torch.ones(6)), estimator)
    w, g = draw(1, 5, 6), draw(2, 5, 6)
    gradient(made, w, g)
    assert seen == made.solver_calls == 5 * calls


def test_samples_without_gradient_are_not_solved_again() -> None:
    made = layer(co.TopK(2), co.Blackbox(1.0))
    g = draw(2, 5, 6)
    g[1] = g[3] = 0
    _, found = gradient(made, draw(1, 5, 6), g)
    assert made.solver_calls == 5 + 3
    assert (found[[1, 3]] == 0).all()


ESTIMATORS = {key: estimator for key, (estimator, _) in CALLS.items() if "adaptive" not in key}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_maximisation_is_minimisation_of_the_negative(name: str) -> None:
    estimator = ESTIMATORS[name]
    theta, g = draw(1, 3, 6), draw(2, 3, 6)
    y_max, found_max = gradient(layer(co.TopK(2, sense="max"), estimator, seed=4), theta, g)
    y_min, found_min = gradient(layer(co.TopK(2), estimator, seed=4), -theta, g)
    assert torch.equal(y_max, y_min)
    torch.testing.assert_close(found_max, -found_min)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_evaluation_is_the_plain_solution_and_noise_is_reproducible(name: str) -> None:
    estimator = ESTIMATORS[name]
    solver, w, g = co.TopK(2), draw(1, 3, 6), draw(2, 3, 6)
    first, second = (gradient(layer(solver, estimator, seed=9), w, g) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    made = layer(solver, estimator).eval()
    assert torch.equal(made(w), solver(w))
    assert gradient(made, w, g)[1].abs().max() > 0


@pytest.mark.parametrize("name", ["blackbox", "imle", "both", "perturbed"])
def test_what_has_no_second_derivative_says_so(name: str) -> None:
    made = layer(co.TopK(2), ESTIMATORS[name])
    w = draw(1, 3, 6).requires_grad_()
    (found,) = torch.autograd.grad(made(w).pow(3).sum(), w, create_graph=True)
    with pytest.raises(NotSupportedYetError, match="second derivatives"):
        found.sum().backward()
    with pytest.raises(NotSupportedYetError, match=r"second derivatives|forward-mode"):
        torch.func.hessian(lambda x: made(x).pow(3).sum())(w.detach())
    with pytest.raises(NotSupportedYetError, match="second derivatives"):
        torch.func.jacrev(torch.func.jacrev(lambda x: made(x).pow(3).sum()))(w.detach())


def test_margins() -> None:
    """The noise is added to P(w), so that its size is relative to unit norm; with signs at stake it is a factor."""
    seen: list[Tensor] = []

    def noting(costs: Tensor) -> Tensor:
        seen.append(costs)
        return co.TopK(2)(costs)

    w = 50 * draw(1, 2, 4)
    solver = co.solver(noting, cost_shape=(4,), equalities=torch.ones(4))
    layer(solver, co.Identity("std", co.Rademacher(0.2)))(w)
    added = seen[0] - co.Norm(co.Mean())(w)
    torch.testing.assert_close(added.abs(), torch.full_like(w, 0.1))
    positive = co.solver(noting, cost_shape=(4,), domain="nonnegative")
    layer(positive, co.Identity("norm", co.Rademacher(0.2)))(w.abs())
    factor = seen[1] / co.Norm()(w.abs())
    torch.testing.assert_close((factor - 1).abs(), torch.full_like(w, 0.1))
    layer(positive, co.Identity("norm", co.Uniform(0.2), multiplicative=False), domain="clamp")(w.abs())
    assert (seen[2] - co.Norm()(w.abs())).abs().max() <= 0.1
    assert (seen[2] >= 1e-6).all()
    with pytest.raises(OptionError, match="multiplicative"):
        layer(positive, co.Identity(margin=co.Gumbel()))(w.abs())


def test_informed_margin_makes_the_true_solution_dearer() -> None:
    w, target = draw(1, 3, 5), co.TopK(2)(draw(2, 3, 5))
    moved = co.informed_margin(w, target, 0.4)
    torch.testing.assert_close(moved - w, torch.where(target == 1, 0.2, -0.2).double())
    torch.testing.assert_close(co.informed_margin(-w, target, 0.4, sense="max"), -moved)


@pytest.mark.parametrize("sense", ["min", "max"])
def test_optimal_value_has_its_exact_gradient(sense: str) -> None:
    solver = co.Assignment(sense=sense)  # type: ignore[arg-type]
    w = draw(3, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: co.optimal_value(solver, x), (w,))
    assert torch.autograd.gradcheck(lambda x: co.optimal_value(solver, x), (w,), check_forward_ad=True)
    (found,) = torch.autograd.grad(co.optimal_value(solver, w).sum(), w)
    assert torch.equal(found, solver(w))


def test_the_largest_flow_has_the_cut_as_gradient() -> None:
    import networkx as nx

    graph = nx.DiGraph([("s", "a"), ("s", "b"), ("a", "b"), ("a", "t"), ("b", "t")])
    capacity = torch.tensor([3.0, 2.0, 1.5, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    solver = co.MinCut(graph, "s", "t")
    value = co.optimal_value(solver, capacity)
    for edge, amount in zip(solver.edges, capacity.tolist(), strict=True):
        graph.edges[edge]["capacity"] = amount
    assert value.item() == pytest.approx(nx.maximum_flow_value(graph, "s", "t"))
    assert torch.autograd.gradcheck(lambda x: co.optimal_value(solver, x), (capacity,))


@pytest.mark.parametrize("sense", ["min", "max"])
def test_spo_plus(sense: str) -> None:
    solver = co.TopK(2, sense=sense)  # type: ignore[arg-type]
    loss = co.SPOPlusLoss(solver, reduction="none")
    w, c = draw(1, 50, 6), draw(2, 50, 6)
    regret = co.regret(solver, w, c)
    assert (regret >= -1e-12).all()
    assert regret.max() > 0.5
    assert (loss(w, c) >= regret - 1e-12).all()
    torch.testing.assert_close(loss(c, c), torch.zeros(50, dtype=w.dtype))
    torch.testing.assert_close(loss(w, c, solver(c)), loss(w, c))
    x, t = w[:3].clone().requires_grad_(), c[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, t), check_forward_ad=True)
    (found,) = torch.autograd.grad(loss(x, t).sum(), x)
    sign = 1 if sense == "min" else -1
    expected = 2 * sign * (solver(t) - solver(2 * x - t))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sense", ["min", "max"])
@pytest.mark.parametrize("multiplicative", [True, False])
def test_fenchel_young(sense: str, multiplicative: bool) -> None:
    solver = co.TopK(2, sense=sense)  # type: ignore[arg-type]
    target = solver(draw(1, 3, 5))

    def loss(w: Tensor) -> Tensor:
        made = co.FenchelYoungLoss(
            solver, 0.4, 6, multiplicative=multiplicative, reduction="none", generator=generator(5)
        )
        return made(w, target)

    assert torch.autograd.gradcheck(loss, (draw(2, 3, 5).requires_grad_(),), check_forward_ad=True)


def test_fenchel_young_is_the_loss_of_a_softmax() -> None:
    """Gumbel noise, one-hot: E L = <w, y*> + log sum exp(-w) (up to Euler's constant), gradient y* - softmax(-w)."""
    w, target = W.clone().requires_grad_(), torch.eye(3, dtype=torch.float64)[[0, 2]]
    made = co.FenchelYoungLoss(ONE_HOT, 1.0, MANY, noise="gumbel", reduction="none", generator=generator())
    value = made(w, target)
    (found,) = torch.autograd.grad(value.sum(), w)
    expected = (W * target).sum(1) + torch.logsumexp(-W, dim=1) + 0.5772156649
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(found, target - torch.softmax(-W, dim=1), rtol=0, atol=0.01)


def test_reductions() -> None:
    w, c = draw(1, 2, 3, 6), draw(2, 2, 3, 6)
    solver = co.TopK(2)
    each = co.SPOPlusLoss(solver, reduction="none")(w, c)
    assert each.shape == co.regret(solver, w, c).shape == co.optimal_value(solver, w).shape == (2, 3)
    torch.testing.assert_close(co.SPOPlusLoss(solver)(w, c), each.mean())
    torch.testing.assert_close(co.SPOPlusLoss(solver, reduction="sum")(w, c), each.sum())
    with pytest.raises(OptionError, match="reduction"):
        co.FenchelYoungLoss(solver, reduction="median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be equal"):
        co.SPOPlusLoss(solver)(w, c[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: co.Blackbox(0.0),
        lambda: co.Blackbox(float("nan")),
        lambda: co.LPGD(1.0, -1.0),
        lambda: co.LPGD(1.0, side="up"),
        lambda: co.IMLE(1.0, samples=0),
        lambda: co.Perturbed(noise="cauchy"),
        lambda: co.AdaptiveIMLE(momentum=1.0),
        lambda: co.StraightThrough(0.0),
        lambda: co.Rademacher(-1.0),
        lambda: co.SumOfGamma(0),
        lambda: co.FenchelYoungLoss(ONE_HOT, sigma=0.0),
    ],
)
def test_wrong_options_are_named(make: object) -> None:
    with pytest.raises(OptionError, match=r"expected|one of"):
        make()  # type: ignore[operator]

"""Noise: moments against known ones, signs, and reproducibility."""

import math

import pytest
import torch

import implicitdiff.combinatorial as co
from implicitdiff import OptionError
from implicitdiff.combinatorial.noise import gumbel, normal, uniform

EULER = 0.5772156649
ALL = [co.Rademacher(0.6), co.Normal(0.5), co.Uniform(0.6), co.Gumbel(0.7), co.SumOfGamma(3, 0.7)]


def drawn(noise: co.Noise, size: int = 200_000, seed: int = 0) -> torch.Tensor:
    return noise.draw(torch.zeros(size, dtype=torch.float64), torch.Generator().manual_seed(seed))


def test_rademacher_has_two_values() -> None:
    xi = drawn(co.Rademacher(0.6))
    assert set(xi.tolist()) == {-0.3, 0.3}
    assert abs(xi.mean()) < 0.005


def test_moments() -> None:
    for xi, mean, variance in [
        (drawn(co.Normal(0.5)), 0.0, 0.25),
        (drawn(co.Uniform(0.6)), 0.0, 0.03),
        (drawn(co.Gumbel(0.7)), 0.7 * EULER, 0.49 * math.pi**2 / 6),
    ]:
        assert float(xi.mean()) == pytest.approx(mean, abs=0.01)
        assert float(xi.var()) == pytest.approx(variance, rel=0.02, abs=1e-3)
    assert drawn(co.Uniform(0.6)).abs().max() <= 0.3


@pytest.mark.parametrize(("k", "tau", "s"), [(10, 1.0, 10), (3, 2.0, 50), (5, 0.5, 100)])
def test_sum_of_gamma_is_a_share_of_a_gumbel(k: int, tau: float, s: int) -> None:
    """E = tau / k (sum of 1 / i - log s), Var = tau^2 / k (sum of 1 / i^2); k copies sum to about Gumbel(0, tau)."""
    size = 20_000
    copies = torch.zeros(k, size, dtype=torch.float64)
    total = co.SumOfGamma(k, tau, s).draw(copies, torch.Generator().manual_seed(1)).sum(0)
    places = torch.arange(1, s + 1, dtype=torch.float64)
    assert float(total.mean()) == pytest.approx(tau * float((1 / places).sum() - math.log(s)), abs=0.04 * tau)
    assert float(total.var()) == pytest.approx(tau**2 * float((1 / places**2).sum()), rel=0.06)
    quantile = tau * -math.log(-math.log(0.5))
    assert float(total.median()) == pytest.approx(quantile, abs=0.06 * tau)


@pytest.mark.parametrize("noise", [co.Rademacher(0.6), co.Normal(0.5), co.Uniform(0.6)])
def test_factors_are_positive_with_mean_one(noise: co.Noise) -> None:
    found = noise.factor(torch.zeros(200_000, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert (found > 0).all()
    assert float(found.mean()) == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("noise", ALL, ids=str)
def test_generators_and_dtypes(noise: co.Noise) -> None:
    assert torch.equal(drawn(noise, 100, 5), drawn(noise, 100, 5))
    assert not torch.equal(drawn(noise, 100, 5), drawn(noise, 100, 6))
    single = noise.draw(torch.zeros(2, 3), None)
    assert single.dtype == torch.float32
    assert single.shape == (2, 3)


def test_uniform_numbers_never_reach_the_ends() -> None:
    for dtype in (torch.float32, torch.float64):
        w = torch.zeros(500_000, dtype=dtype)
        u = uniform(w, torch.Generator().manual_seed(0))
        assert u.min() > 0
        assert u.max() < 1
        assert gumbel(w, torch.Generator().manual_seed(0)).isfinite().all()
        assert normal(w, None).dtype == dtype


def test_no_multiplicative_form() -> None:
    w = torch.ones(3)
    for noise in (co.Gumbel(), co.SumOfGamma(2)):
        with pytest.raises(OptionError, match="multiplicative"):
            noise.factor(w, None)
    for noise in (co.Rademacher(2.0), co.Uniform(3.0)):
        with pytest.raises(OptionError, match="a < 2"):
            noise.factor(w, None)

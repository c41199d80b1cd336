"""jacobian and derivatives, against torch.func on the layer and against the dense formula."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev
from torch.utils._pytree import tree_leaves, tree_map

import implicitdiff as idf
from implicitdiff import vjp
from implicitdiff.autograd.kkt import solve as kkt_solve
from implicitdiff.layer import DeclarativeLayer, solve
from implicitdiff.vjp import derivatives, jacobian
from tests.oracles import Sample, eqn3, relative_error
from tests.small_problems import (
    BY_NAME,
    SMALL,
    GeometricMedian,
    Marginals,
    Portfolio,
    Small,
    Sphere,
    Tree,
    draw,
)


def sample_of(inputs: tuple[Any, ...], dims: Any, index: int) -> tuple[Any, ...]:
    """One sample of the inputs; `dims` is one entry for all, or one for each input."""
    spread = dims if isinstance(dims, tuple) else (dims,) * len(inputs)
    return tuple(
        tree_map(
            lambda leaf, dim=dim: leaf[index].detach() if isinstance(leaf, Tensor) and dim == 0 else leaf,
            value,
        )
        for value, dim in zip(inputs, spread, strict=True)
    )


@pytest.mark.parametrize("small", SMALL, ids=lambda small: small.name)
def test_jacobian_is_that_of_the_layer(small: Small) -> None:
    inputs = small.inputs(3, 2)
    problem = small.make()
    found = jacobian(problem, *inputs, in_dims=small.in_dims)
    one = DeclarativeLayer(problem, in_dims=None)
    positions = tuple(
        i for i, value in enumerate(inputs) if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    )
    for index in range(3):
        sample = tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf,
            sample_of(inputs, small.in_dims, index),
        )
        expected = [leaf.detach() for leaf in tree_leaves(jacrev(one, positions)(*sample))]
        ours = [leaf[index] for leaf in tree_leaves(found) if leaf is not None]
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected, strict=True):
            assert a.shape == b.shape
            assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize("size", [2, 7])
def test_jacobian_row_by_row_and_column_by_column(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """u of 3 entries, x of 2 or 7: the smaller side is the number of right-hand sides."""

    class Map(idf.Problem):
        def objective(self, u, x):
            padded = torch.nn.functional.pad(x, (0, 3))[:3] * x.sum()
            return ((u - padded) ** 2).sum() / 2 + (u**4).sum() / 4

        def equality(self, u, x):
            return u.sum() - (x**2).sum()

        def init(self, x):
            return torch.ones(3, dtype=x.dtype)

    x = draw(2, size, seed=3, shift=0.5)
    rows: list[int] = []

    def counted(call: Any, u: Any, lam: Any, theta: Any, rhs_u: Any, rhs_h: Any) -> Any:
        rows.append(rhs_u[0].shape[0])
        return kkt_solve(call, u, lam, theta, rhs_u, rhs_h)

    monkeypatch.setattr(vjp, "kkt_solve", counted)
    problem = Map()
    found = jacobian(problem, x)
    assert rows == [min(3, size)]
    expected = torch.stack([jacrev(DeclarativeLayer(problem, in_dims=None))(row) for row in x.detach()])
    assert relative_error(found, expected) < 1e-9


def test_jacobian_layouts() -> None:
    assert jacobian(GeometricMedian(), draw(3, 2, 5, seed=1)).shape == (3, 2, 2, 5)
    assert jacobian(GeometricMedian(), draw(2, 5, seed=1), in_dims=None).shape == (2, 2, 5)
    Q, mu = BY_NAME["portfolio"].inputs(3, 1)
    by_q, by_mu = jacobian(Portfolio(), Q, mu, in_dims=(None, 0))
    assert (by_q.shape, by_mu.shape) == ((3, 4, 4, 4), (3, 4, 4))
    tree = jacobian(Tree(), *BY_NAME["tree"].inputs(2, 1))
    assert tree["a"][0]["p"].shape == (2, 3, 3)
    assert tree["t"][0]["s"].shape == (2,)
    assert tree["a"][1] is None
    assert jacobian(Sphere(), draw(0, 3, seed=1)).shape == (0, 3, 3)


def test_jacobian_inside_a_transform_says_what_to_use() -> None:
    with pytest.raises(idf.InputError, match="jacrev"):
        torch.func.vmap(lambda x: jacobian(Sphere(), x))(draw(2, 2, 3, seed=1).detach())


@pytest.mark.parametrize("small", SMALL, ids=lambda small: small.name)
def test_derivatives_are_those_of_the_declared_functions(small: Small) -> None:
    problem, inputs = small.make(), small.inputs(2, 4)
    problem.requires_grad_(False)
    sample = sample_of(inputs, small.in_dims, 1)
    u = tree_map(Tensor.detach, solve(problem, *sample, in_dims=None).u)
    found = derivatives(problem, u, *sample)
    oracle = Sample(problem, u, sample)
    expected = oracle.derivatives(oracle.u)
    inputs_only = sum(leaf.numel() for leaf in tree_leaves(sample) if isinstance(leaf, Tensor))
    assert found.A.shape == (expected.A.shape[0], found.H.shape[0])
    torch.testing.assert_close(found.A, expected.A)
    torch.testing.assert_close(found.H, expected.H)
    torch.testing.assert_close(found.B, expected.B[:, :inputs_only])
    torch.testing.assert_close(found.C, expected.C[:, :inputs_only])
    slope = oracle.derivatives(oracle.u).A
    torch.testing.assert_close(found.multipliers, oracle.least_squares_multipliers(oracle.u))
    assert found.multipliers.shape == (slope.shape[0],)
    torch.testing.assert_close(torch.cat(list(found.B_by_input.values()), 1), found.B)
    torch.testing.assert_close(torch.cat(list(found.C_by_input.values()), 1), found.C)
    torch.testing.assert_close(found.structured.hessian.to_dense()[0], found.H)


def test_a_lesson_types_eqn_3() -> None:
    Q, mu = BY_NAME["portfolio"].inputs(1, 3)
    u = solve(Portfolio(), Q, mu[0], in_dims=None).u
    d = derivatives(Portfolio(), u, Q, mu[0])
    inverse = torch.linalg.inv(d.H)
    schur = torch.linalg.inv(d.A @ inverse @ d.A.T)
    slope = inverse @ d.A.T @ schur @ (d.A @ inverse @ d.B - d.C) - inverse @ d.B
    torch.testing.assert_close(slope, eqn3(d))
    by_q, by_mu = jacobian(Portfolio(), Q, mu[0], in_dims=None)
    torch.testing.assert_close(slope, torch.cat([by_q.reshape(4, 16), by_mu], 1))
    assert set(d.B_by_input) == {"Q", "mu"}


def test_without_constraints_the_tensors_are_empty() -> None:
    x = draw(2, 5, seed=1)
    d = derivatives(GeometricMedian(), solve(GeometricMedian(), x, in_dims=None).u, x)
    assert (d.A.shape, d.C.shape, d.multipliers.shape) == ((0, 2), (0, 10), (0,))
    assert (d.B.shape, d.H.shape) == ((2, 10), (2, 2))


def test_show_prints_every_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    x = draw(2, 3, seed=1)
    d = derivatives(Marginals(), solve(Marginals(), x, in_dims=None).u, x)
    assert d.show() is None
    text = capsys.readouterr().out
    assert str(d) in text
    for line in (
        "A = D_Y h (5 x 6)",
        "B = D_XY L (6 x 6)",
        "C = D_X h (5 x 6)",
        "H = D_YY L (6 x 6)",
        "λ = from",
        "A H^-1 A' (5 x 5)\n    (1 dependent row in A",
        "|A Dy + C|",
    ):
        assert line in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "u", [torch.zeros(3, dtype=torch.float64), torch.zeros(2), (torch.zeros(2).double(),), 0.0]
)
def test_derivatives_at_a_point_of_the_wrong_kind(u: Any) -> None:
    with pytest.raises(idf.SolutionError):
        derivatives(GeometricMedian(), u, draw(2, 5, seed=1))

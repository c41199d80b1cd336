"""The yardstick of `check` and `compare`, held against the oracle of the test suite and against closed forms.

Both are dense and in float64, but written apart from each other: torch.func there, plain autograd here.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics.declared import Declared, double, moving_names
from implicitdiff.diagnostics.reference import Direction, Reference, polish, relative_error
from implicitdiff.layer import DeclarativeLayer
from tests.cases import BY_NAME
from tests.oracles import dense_vjp, gradient_null_vectors
from tests.oracles.compare import compare_modulo


class Mixed(idf.Problem):
    """A Parameter, a shared input, a dict input, and constraints that depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        self.ridge = torch.tensor(0.5)

    def objective(self, u: Tensor, Q: Tensor, data: dict[str, Tensor]) -> Tensor:
        curved = 0.5 * u @ (Q @ Q.mT) @ u + self.ridge * (u**2).sum() + self.weight * torch.cosh(u).sum()
        return curved - data["mu"] @ u

    def equality(self, u: Tensor, Q: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total = u.sum() - data["total"]
        return total, torch.stack([2 * total, u[0] - data["mu"][1] * u[1]])

    def init(self, Q: Tensor, data: dict[str, Tensor]) -> Tensor:
        return torch.zeros_like(data["mu"])


def mixed_inputs() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(4, 4, **draw), {"mu": torch.randn(3, 4, **draw), "total": torch.randn(3, **draw)}


IN_DIMS = (None, {"mu": 0, "total": 0})


def solved(problem: idf.Problem, inputs: tuple[Any, ...], start: Any, in_dims: Any = IN_DIMS) -> Any:
    u, step = polish(Declared(problem, inputs, in_dims, start))
    assert step < 1e-12
    return u


def test_gradients_agree_with_the_oracle():
    problem, inputs = double(Mixed()), mixed_inputs()
    u = solved(problem, inputs, torch.zeros(3, 4))
    reference = Reference(Declared(problem, inputs, IN_DIMS, u))
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = reference.vjp(v)
    truth = dense_vjp(problem, u, v, inputs, IN_DIMS).leaves()
    null = gradient_null_vectors(problem, u, inputs, IN_DIMS)
    assert [t.shape for t in found] == [t.shape for t in truth]
    assert compare_modulo(found, truth, null) < 1e-10
    assert moving_names(problem, inputs) == ("Q", "data['mu']", "data['total']", "Parameter weight")


@pytest.mark.parametrize(
    "name", ["pooling-welsch", "dense-qp-in-dim-1", "tuple-constrained", "dependent-data", "many-tensors"]
)
def test_gradients_agree_with_the_oracle_over_the_table(name):
    case = BY_NAME[name]
    problem = case.solvable()
    inputs = (
        case.make_inputs(batch=2) if case.consistent is None else case.consistent(*case.make_inputs(batch=2))
    )
    with torch.no_grad():
        u = DeclarativeLayer(problem, in_dims=case.in_dims)(*inputs)
    v = torch.utils._pytree.tree_map(lambda leaf: torch.cos(3 * leaf), u)
    reference = Reference(Declared(problem, inputs, case.in_dims, u))
    truth = dense_vjp(problem, u, v, inputs, case.in_dims).leaves()
    assert relative_error(reference.vjp(v), truth, reference.null_directions()) < 1e-9


def test_dependent_constraints_and_the_directions_they_leave_open():
    problem, inputs = double(Mixed()), mixed_inputs()
    reference = Reference(Declared(problem, inputs, IN_DIMS, solved(problem, inputs, torch.zeros(3, 4))))
    found = reference.matrices(1)
    assert found.null.shape == (3, 1)
    torch.testing.assert_close(found.null.mT @ found.jacobian, torch.zeros(1, 4, dtype=torch.float64))
    assert found.singular_ratio < 1e-15
    # Both copies of the total move with the input in the same way: no gradient is left open.
    assert reference.null_directions().shape[0] == 0


def test_null_space_by_products_is_that_of_the_dense_matrix():
    problem, inputs = double(Mixed()), mixed_inputs()
    reference = Reference(Declared(problem, inputs, IN_DIMS, torch.ones(3, 4)))
    dense, by_products = reference.matrices(2).null, reference._null_by_products(2)
    torch.testing.assert_close(dense @ dense.mT, by_products @ by_products.mT, atol=1e-12, rtol=0)


def test_kkt_residual_certifies_and_refuses():
    problem, inputs = double(Mixed()), mixed_inputs()
    reference = Reference(Declared(problem, inputs, IN_DIMS, solved(problem, inputs, torch.zeros(3, 4))))
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    right = [reference.direction(b, v[b].double()) for b in range(3)]
    assert reference.kkt_residual(right, v) < 1e-14
    for wrong in (
        Direction(right[1].w * 1.001, right[1].s, right[1].multipliers),
        Direction(right[1].w, right[1].s + 1e-3, right[1].multipliers),
        Direction(right[1].w * float("nan"), right[1].s, right[1].multipliers),
    ):
        assert not reference.kkt_residual([right[0], wrong, right[2]], v) < 1e-5


class Flat(idf.Problem):
    """A minimum along a line: H is singular."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u.sum() - x.sum()) ** 2

    def init(self, x: Tensor) -> Tensor:
        return x


def test_a_singular_system_gives_nan_and_no_error():
    x = torch.tensor([[1.0, 2.0]])
    assert all(bool(g.isnan().all()) for g in Reference(Declared(Flat(), (x,), 0, x)).vjp(torch.ones(1, 2)))
    assert polish(Declared(Flat(), (x,), 0, x))[1] == float("inf")


class Entropy(idf.Problem):
    """softmax(x): minimise sum u log u - x'u on the simplex."""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return (u * u.log()).sum() - x @ u

    def equality(self, u: Tensor, x: Tensor) -> Tensor:
        return u.sum() - 1

    def init(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 1 / x.numel())


def test_entries_that_underflowed_carry_no_gradient():
    x = torch.tensor([[0.3, -0.2, -2000.0, 0.1]], dtype=torch.float64)
    u = x.softmax(1)
    assert float(u[0, 2]) == 0
    reference = Reference(Declared(Entropy(), (x,), 0, u))
    v = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    (found,) = reference.vjp(v)
    torch.testing.assert_close(found, u * (v - (u * v).sum(1, keepdim=True)), atol=1e-15, rtol=1e-12)


def test_one_sample_and_float32_inputs():
    x = torch.tensor([0.3, -0.2, 0.1])
    u, step = polish(Declared(Entropy(), (x,), None, torch.full((3,), 1 / 3)))
    assert u.dtype == torch.float64
    assert u.shape == (3,)
    assert step < 1e-12
    torch.testing.assert_close(u, x.double().softmax(0))


def test_relative_error_is_per_tensor_modulo_directions_and_keeps_nan():
    truth = [torch.tensor([1.0, 0.0]).double(), torch.tensor([1e-6]).double()]
    assert relative_error([truth[0] + 1e-3, truth[1]], truth, torch.zeros(0, 3).double()) == pytest.approx(
        1e-3
    )
    assert relative_error([truth[0], truth[1] * 1.5], truth, torch.zeros(0, 3).double()) == pytest.approx(0.5)
    along = torch.tensor([[0.0, 0.0, 1.0]]).double()
    assert relative_error([truth[0], truth[1] * 1.5], truth, along) < 1e-9
    broken = relative_error([truth[0], truth[1] * float("nan")], truth, torch.zeros(0, 3).double())
    assert broken != broken


def test_double_reaches_plain_attributes_and_leaves_the_original_alone():
    problem = Mixed()
    problem.kept = [torch.ones(2), 3]
    twin = double(problem)
    assert (twin.ridge.dtype, twin.weight.dtype, twin.kept[0].dtype, twin.kept[1]) == (
        *[torch.float64] * 3,
        3,
    )
    assert (problem.ridge.dtype, problem.weight.dtype) == (torch.float32, torch.float32)

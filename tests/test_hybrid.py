"""The `hessian` hook: declared structure against the dense formula, sums with automatic differentiation, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import jacfwd, jacrev, vmap

import implicitdiff as idf
from implicitdiff.operators import simplified
from tests.equation_problems import draw

O = idf.operators


class Cumulated(idf.Problem):
    """A diagonal H that the graph does not prove, because of an operation without a rule; w is a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(1 + draw(5, seed=3).abs())

    def objective(self, u, x):
        return (self.w * torch.cosh(u)).sum() - (torch.cumsum(x, 0) * u).sum()

    def hessian(self, u, multipliers, x):
        assert multipliers is None
        return O.Diagonal((self.w * torch.cosh(u))[None])

    def init(self, x):
        return x * 0


class Hybrid(idf.Problem):
    """Structure for the quartic terms, automatic differentiation for the rest; two variables."""

    def rest(self, u, A):
        return 0.2 * torch.cosh(torch.cumsum(A @ u["a"], 0) + u["t"]).sum()

    def objective(self, u, A, b):
        quartic = 1.5 * (u["a"] ** 2).sum() + 0.25 * (u["a"] ** 4).sum() + 2 * u["t"] ** 2
        return quartic - b @ u["a"] + self.rest(u, A)

    def hessian(self, u, multipliers, A, b):
        diagonal = torch.cat([3 + 3 * u["a"] ** 2, 4 * torch.ones_like(u["t"])[None]])
        return O.Sum((O.Diagonal(diagonal[None]), O.Autodiff(lambda v: self.rest(v, A), u)))

    def init(self, A, b):
        return {"a": b * 0, "t": b[0] * 0}


class Constrained(idf.Problem):
    """Low rank plus diagonal and what the nonlinear constraint adds, by its multiplier; the constraints in a dict."""

    def objective(self, u, A, b):
        return (u**2).sum() + 0.1 * torch.cosh(A @ u).sum() - b @ u

    def equality(self, u, A, b):
        return {"sum": u.sum() - 1, "ball": (u[:2] ** 2).sum() - 0.5}

    def hessian(self, u, multipliers, A, b):
        terms = O.LowRankPlusDiagonal(u.new_full((1, 1), 2.0), A.T[None], 0.1 * torch.cosh(A @ u)[None])
        curved = torch.cat([(-2 * multipliers["ball"]).expand(2), 0 * u[2:]])
        return O.Sum((terms, O.Diagonal(curved[None])))

    def init(self, A, b):
        return b * 0 + 0.3


class Chain(idf.Problem):
    """A tridiagonal H declared as a band."""

    def objective(self, u, x):
        return 0.5 * ((u - x) ** 2).sum() + torch.cosh(torch.diff(u)).sum()

    def hessian(self, u, multipliers, x):
        steps = torch.cosh(torch.diff(u))
        none = torch.zeros_like(u[:1])
        below, above = torch.cat([none, -steps]), torch.cat([-steps, none])
        bands = torch.stack([below, 1 - below - above, above])
        return O.Banded(bands[None, None, :, :, None, None], (len(u),), 0, (), 1, 1)

    def init(self, x):
        return x * 0


CASES: dict[str, tuple[idf.Problem, tuple[Tensor, ...], Any, str, str]] = {
    "diagonal": (Cumulated(), (0.3 * draw(2, 5),), 0, "diagonal", "divide"),
    "sum": (Hybrid(), (draw(4, 3), draw(2, 3, seed=1)), (None, 0), "sum", "cholesky"),
    "constrained": (Constrained(), (draw(3, 6), draw(2, 6, seed=1)), (None, 0), "sum", "schur"),
    "band": (Chain(), (draw(2, 40),), 0, "banded", "cholesky"),
}


def flat(u: Any) -> Tensor:
    leaves = list(u.values()) if isinstance(u, dict) else [u]
    return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], 1)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_dense_formula(name: str) -> None:
    problem, given, in_dims, kind, solver = CASES[name]
    report = idf.explain(problem, *given, in_dims=in_dims)
    assert (report.hessian.kind, report.solver) == (kind, solver)
    assert f"declared by {type(problem).__name__}.hessian" in report.hessian.reason
    inputs = [tensor.clone().requires_grad_() for tensor in given]
    wanted = [*inputs, *problem.parameters()]
    declared = idf.DeclarativeLayer(problem, in_dims=in_dims)
    dense = idf.DeclarativeLayer(problem, in_dims=in_dims, backward="dense")
    grads = []
    for layer in (declared, dense):
        u = flat(layer(*inputs))
        v = draw(*u.shape, seed=5)
        grads.append(torch.autograd.grad(u, wanted, v, create_graph=True))
    lean = torch.autograd.grad(flat(declared(*inputs)), wanted, v)
    for mine, theirs, plain in zip(*grads, lean, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(plain, theirs, rtol=1e-10, atol=1e-11)

    second = [torch.autograd.grad(sum(g.pow(2).sum() for g in found), wanted) for found in grads]
    for mine, theirs in zip(*second, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)

    def layer_of(*tensors: Tensor) -> Tensor:
        return flat(declared(*tensors))

    assert gradcheck(layer_of, inputs, check_forward_ad=True, fast_mode=True)
    assert idf.check(problem, *given, in_dims=in_dims).ok


def test_a_long_chain_is_solved_as_a_band() -> None:
    x = draw(1, 3000).requires_grad_()
    assert idf.explain(Chain(), x.detach()).solver == "tridiagonal"
    u = idf.DeclarativeLayer(Chain())(x)
    (found,) = torch.autograd.grad(u[0, 1500], x)
    (truth,) = torch.autograd.grad(idf.DeclarativeLayer(Chain(), linear_solver="cg")(x)[0, 1500], x)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)


def test_many_variables_with_a_term_by_products_are_solved_by_conjugate_gradients() -> None:
    class Large(idf.Problem):
        """600 variables, one term of H known by its products."""

        def rest(self, u):
            return 0.1 * torch.cosh(torch.cumsum(u, 0)[-1] / 20)

        def objective(self, u, x):
            return torch.cosh(u).sum() + self.rest(u) - x @ u

        def hessian(self, u, multipliers, x):
            return O.Sum((O.Diagonal(torch.cosh(u)[None]), O.Autodiff(self.rest, u)))

        def init(self, x):
            return x * 0

    x = draw(2, 600).requires_grad_()
    assert idf.explain(Large(), x.detach()).solver == "cg"
    (found,) = torch.autograd.grad(idf.DeclarativeLayer(Large())(x).pow(2).sum(), x)
    (truth,) = torch.autograd.grad(idf.DeclarativeLayer(Large(), backward="dense")(x).pow(2).sum(), x)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)


def test_transforms_and_compile() -> None:
    problem, (A, b), _, _, _ = CASES["constrained"]
    one = idf.DeclarativeLayer(problem, in_dims=None)
    dense = idf.DeclarativeLayer(problem, in_dims=None, backward="dense")
    truth = jacrev(dense, argnums=0)(A, b[0])
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(one, argnums=0)(A, b[0]), truth, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(vmap(one, in_dims=(None, 0))(A, b)[1], dense(A, b[1]), rtol=1e-10, atol=1e-11)
    (leaf,) = (b.clone().requires_grad_(),)
    layer = idf.DeclarativeLayer(problem, in_dims=(None, 0))
    compiled = torch.compile(lambda b: layer(A, b).square().sum(), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(leaf), leaf)
    (expected,) = torch.autograd.grad(layer(A, leaf).square().sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


class Wrong(Cumulated):
    """Right at u = 0 alone: sample 0 of the test has x = 0."""

    def hessian(self, u, multipliers, x):
        return O.Diagonal((self.w * (torch.cosh(u) + torch.sinh(u) ** 2))[None])

    def solve(self, x):
        return torch.asinh(torch.cumsum(x, 1) / self.w)


class WrongSign(Constrained):
    """The textbook's sign of the multipliers."""

    def hessian(self, u, multipliers, A, b):
        return super().hessian(u, {"ball": -multipliers["ball"]}, A, b)


def test_a_contradiction_is_an_error_that_names_the_samples() -> None:
    x = torch.stack([torch.zeros(5, dtype=torch.float64), draw(5), torch.zeros(5, dtype=torch.float64)])
    x.requires_grad_()
    u = idf.DeclarativeLayer(Wrong())(x)
    with pytest.raises(
        idf.StructureError, match=r"Wrong.hessian contradicts the declared functions in sample 1 of 3"
    ):
        u.sum().backward()
    (found,) = torch.autograd.grad(idf.DeclarativeLayer(Wrong(), backward="dense")(x).sum(), x)
    assert bool(torch.isfinite(found).all())
    with pytest.raises(idf.StructureError, match=r"WrongSign.hessian contradicts"):
        idf.DeclarativeLayer(WrongSign(), in_dims=(None, 0))(*CASES["constrained"][1])


def test_what_the_hook_may_not_return() -> None:
    def problem(result: Any) -> idf.Problem:
        class Returned(Cumulated):
            def hessian(self, u, multipliers, x):
                return result(u)

        return Returned()

    x = draw(2, 5)
    for result, words in (
        (lambda u: torch.diag(u), "returned a tensor: return one of"),
        (lambda u: O.Diagonal(u[None, :4]), "size 4"),
        (lambda u: O.Diagonal(u.expand(3, 5)), "batch 3"),
        (lambda u: O.Dense(torch.outer(u, u + 1)[None], symmetric=False), "not symmetric"),
        (lambda u: O.MatrixFree(lambda v: v * u, 5, 1, u.dtype, u.device), "known by a product"),
    ):
        with pytest.raises(idf.ProblemDefinitionError, match=words):
            idf.DeclarativeLayer(problem(result))(x)
    with pytest.raises(idf.StructureError, match="do not fit together"):
        O.Sum((O.Diagonal(x), O.Diagonal(x[:, :4])))
    with pytest.raises(idf.StructureError, match="at least one"):
        O.Sum(())
    with pytest.raises(idf.OptionError, match=r"Cumulated.hessian: .*woodbury"):
        idf.DeclarativeLayer(Cumulated(), linear_solver="woodbury")(x)


def terms() -> dict[str, tuple[O.LinearOperator, ...]]:
    scaled, diagonal = O.ScaledIdentity(draw(2), 6), O.Diagonal(draw(2, 6, seed=1))
    shared = O.LowRankPlusDiagonal(draw(1, 1, seed=2), draw(1, 6, 2, seed=3), draw(2, 2, seed=4))
    lopsided = O.LowRankPlusDiagonal(draw(2, 6, seed=5), draw(2, 6, 1), draw(2, 1), draw(2, 6, 1, seed=6))
    narrow = O.Banded(draw(2, 2, 3, 3, 1, 1), (3, 2), 0, (1,), 1, 1, symmetric=False)
    wide = O.Banded(draw(1, 2, 4, 3, 1, 1, seed=2), (3, 2), 0, (1,), 1, 2, symmetric=False)
    blocks = O.BlockDiagonal(draw(2, 3, 2, 2), (3, 2), (0,), symmetric=False)
    others = O.BlockDiagonal(draw(1, 3, 2, 2, seed=1), (3, 2), (0,), symmetric=False)
    return {
        "diagonal": (scaled, diagonal),
        "low-rank-plus-diagonal": (O.Sum((shared, diagonal)), lopsided, scaled),
        "banded": (narrow, wide, diagonal),
        "block-diagonal": (blocks, others, scaled),
        "dense": (narrow, shared, diagonal),
    }


@pytest.mark.parametrize("kind", terms())
def test_sums_are_the_sum_of_their_terms_and_of_the_kind_of_their_terms(kind: str) -> None:
    parts = terms()[kind]
    total = O.Sum(parts)
    dense = sum(part.to_dense() for part in parts)
    assert isinstance(dense, Tensor)
    vector = draw(3, 2, 6, seed=9)
    truth = torch.einsum("bij,rbj->rbi", dense, vector)
    one = simplified(total)
    assert one.kind == kind
    for operator in (total, one):
        torch.testing.assert_close(operator.to_dense().expand_as(dense), dense, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(operator.matvec(vector), truth, rtol=1e-12, atol=1e-13)
        across = torch.einsum("bji,rbj->rbi", dense, vector)
        torch.testing.assert_close(operator.transpose().matvec(vector), across, rtol=1e-12, atol=1e-13)


def test_terms_known_by_products_stay_so_unless_they_are_written_out() -> None:
    u = draw(4)
    term = O.Autodiff(lambda v: (v**4).sum() + (v[0] * v[1]) ** 2, u)
    truth = torch.autograd.functional.hessian(lambda v: (v**4).sum() + (v[0] * v[1]) ** 2, u)
    torch.testing.assert_close(term.to_dense()[0], truth, rtol=1e-12, atol=1e-13)
    total = O.Sum((O.Diagonal(draw(1, 4, seed=1)), term, O.ScaledIdentity(draw(1, seed=2), 4)))
    kept = simplified(total)
    assert isinstance(kept, O.Sum)
    assert [part.kind for part in kept.terms] == ["diagonal", "autodiff"]
    assert simplified(total, write_out=True).kind == "dense"
    torch.testing.assert_close(simplified(total, write_out=True).to_dense(), total.to_dense())

"""Lessons: Eqn. 3 factor by factor and the walkthrough say what is true, in lines that fit."""

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.derivatives import eqn3
from implicitdiff.diagnostics.walkthrough import LARGE, steps, text
from implicitdiff.problems import OptimalTransport, RobustPooling


class Allocation(idf.Problem):
    """minimise over u  sum_i u_i^4 / 4 + u'Q u / 2 - x'u   s.t.  a'u = b"""

    def objective(self, u: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (u**4).sum() / 4 + 0.5 * (u.cumsum(0) ** 2).sum() - x @ u

    def equality(self, u: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a @ u - b

    def init(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return b * a / (a @ a)

    def example(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return (
            torch.randn(2, 3, generator=generator),
            1 + torch.rand(2, 3, generator=generator),
            torch.rand(2, generator=generator),
        )


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_eqn3_is_the_jacobian() -> None:
    inputs = tuple(x.double()[0] for x in Allocation().example())
    u = idf.solve(Allocation(), *inputs, in_dims=None, optimality_tol=1e-12).u
    found = idf.derivatives(Allocation(), u, *inputs)
    jacobian = torch.cat(
        [part.reshape(3, -1) for part in idf.jacobian(Allocation(), *inputs, in_dims=None)], 1
    )
    assert torch.allclose(found.Dy, jacobian, rtol=1e-9, atol=1e-12)
    walked = eqn3.walk(found.A, found.B, found.C, found.H)
    formulas = [factor.formula for factor in walked.factors]
    assert formulas[:3] == ["H^-1 B", "H^-1 A'", "A H^-1 A'"]
    assert walked.left_over is not None
    assert walked.left_over < 1e-12


def test_eqn3_without_constraints() -> None:
    H, B = draw(3, 3), draw(3, 4)
    H = H @ H.mT + torch.eye(3, dtype=H.dtype)
    walked = eqn3.walk(H.new_zeros(0, 3), B, H.new_zeros(0, 4), H)
    assert torch.allclose(H @ walked.Dy, -B)
    assert walked.left_over is None
    assert [factor.remark for factor in walked.factors] == ["", ""]
    singular = eqn3.walk(H.new_zeros(0, 3), B, H.new_zeros(0, 4), torch.ones_like(H))
    assert "not locally unique" in singular.factors[0].remark


def test_eqn3_with_a_singular_hessian_solves_the_two_equations() -> None:
    A, B, C = draw(2, 3), draw(3, 4), draw(2, 4)
    H = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=A.dtype))
    walked = eqn3.walk(A, B, C, H)
    assert "singular" in walked.factors[0].remark
    assert torch.allclose(A @ walked.Dy, -C)
    # H Dy + B has to lie in the range of A'.
    rest = H @ walked.Dy + B
    assert (rest - A.mT @ torch.linalg.lstsq(A.mT, rest).solution).abs().max() < 1e-12


def test_eqn3_with_dependent_constraints() -> None:
    A, B = draw(2, 4), draw(4, 3)
    A = torch.cat([A, A[:1] + A[1:]])
    H = torch.eye(4, dtype=A.dtype) * 2
    C = torch.cat([draw(2, 3), draw(2, 3).sum(0, keepdim=True)])
    walked = eqn3.walk(A, B, C, H)
    assert "1 dependent row in A" in walked.factors[2].remark
    assert torch.allclose(A @ walked.Dy, -C)
    assert walked.left_over == pytest.approx(0, abs=1e-12)


def test_large_matrices_are_cut() -> None:
    shown = eqn3.matrix_text(draw(20, 30) * 1e-7)
    assert len(shown.splitlines()) == 9
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.splitlines()[-1].strip() == "..."
    assert eqn3.matrix_text(torch.zeros(0, 3)).strip() == "(empty)"
    assert "-0" not in eqn3.matrix_text(-torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("problem", "in_dims"),
    [(Allocation(), 0), (OptimalTransport(2.0), 0), (RobustPooling("welsch", 2.0), 0)],
    ids=["allocation", "transport", "pooling"],
)
def test_walkthrough(problem: idf.Problem, in_dims: int, capsys: pytest.CaptureFixture[str]) -> None:
    idf.walkthrough(problem, *problem.example(), in_dims=in_dims)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    found = steps(problem)
    assert shown.strip() == text(found)
    assert len(found) == 6
    difference = float(found[-1].text.rpartition(":")[2])
    assert difference < 1e-9
    assert ("Lagrangian" in found[1].heading) is problem.declares("equality")
    assert ("A Dy(x) + C = 0" in found[2].text) is problem.declares("equality")
    report = idf.explain(problem, *problem.example())
    assert f"Solver: {report.solver}" in found[4].text.replace("\n", " ")
    assert found[4].text.split()[0] == "Multiplied"
    assert all(line[:30] in found[4].text for line in report.derivation)


def test_walkthrough_of_a_large_problem_stays_in_symbols() -> None:
    found = steps(RobustPooling("pseudo-huber"), torch.randn(1, 2, LARGE))
    assert "are not made here" in found[3].text
    assert "random v" not in found[5].text


def test_walkthrough_names_what_has_no_rule() -> None:
    found = steps(Allocation())
    assert "Without a rule: aten.cumsum.default" in found[4].text
    assert "test_walkthrough.py" in found[4].text.replace("\n", "")


def test_walkthrough_needs_inputs() -> None:
    class Bare(RobustPooling):
        example = idf.Problem.example

    with pytest.raises(idf.ProblemDefinitionError, match="example"):
        idf.walkthrough(Bare())

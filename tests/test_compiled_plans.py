"""compile=True: the emitted code through torch.compile gives the gradients that it gives eagerly, or says why not.

Most tests take a backend that needs no C++ compiler and half a second instead of many.
"""

import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics.held import plan_of
from implicitdiff.graph.calls import Emitted
from implicitdiff.problems import RobustPooling
from implicitdiff.structured import compiled as compiled_module
from implicitdiff.structured.compiled import Compiled, build
from tests.cases import BY_NAME
from tests.test_emitted_code import given_by_name

PLANS = """pooling-pseudo-huber pooling-huber pooling-truncated-quadratic pooling-quadratic ridge portfolio
    transport smoothing several-outputs tuple-variable exponential-constraints quadratic-transport
    many-tensors""".split()
LAYERS = ("pooling-alpha-parameter", "transport")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile with a backend that runs the captured graph; the list has what was handed to it."""
    handed: list[Any] = []
    real = torch.compile

    def recorded(function: Any, **options: Any) -> Any:
        handed.append(function)
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", recorded)
    return handed


def gradients(layer: idf.DeclarativeLayer, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The solution and its gradients for everything that can have one."""
    inputs = tuple(
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in inputs
    )
    leaves = [t for t in (*inputs, *layer.parameters()) if isinstance(t, Tensor) and t.requires_grad]
    found, _ = torch.utils._pytree.tree_flatten(layer(*inputs))
    total = sum(
        (torch.cos(torch.arange(1.0, 1 + u.numel(), dtype=u.dtype)).reshape(u.shape) * u).sum() for u in found
    )
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*(u.detach() for u in found), *(torch.zeros(()) if g is None else g for g in grads)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_the_compiled_code_gives_what_the_same_code_gives_eagerly(
    name: str, without_inductor: list[Any]
) -> None:
    case = BY_NAME[name]
    inputs = case.make_inputs()
    plan = plan_of(case.problem(), inputs, case.in_dims).plan
    _, values, _ = given_by_name((case.problem(), inputs, case.in_dims))
    written = next(iter(plan.writer.known.values()))
    arguments = [values[name].clone() for name in written.arguments]
    program = build(written.emitted.source, plan.writer.namespace)
    expected = written.emitted.call(*arguments)
    for _ in range(2):
        for a, b in zip(program(*arguments), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert all(torch.equal(a, values[n]) for a, n in zip(arguments, written.arguments, strict=True))
    assert without_inductor, "nothing was compiled"


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_compiled_layer_are_those_of_the_other(name: str, without_inductor: list[Any]) -> None:
    case = BY_NAME[name]
    inputs = case.make_inputs()
    eager = idf.DeclarativeLayer(case.solvable(), in_dims=case.in_dims)
    expected = gradients(eager, inputs)
    layer = idf.DeclarativeLayer(eager.problem, in_dims=case.in_dims, compile=True)
    for _ in range(2):  # the second call runs the compiled code alone
        assert_equal(gradients(layer, inputs), expected)
    assert without_inductor, "nothing was compiled"


def test_other_batch_sizes_compile_once_more_and_no_further(without_inductor: list[Any]) -> None:
    case = BY_NAME["pooling-pseudo-huber"]
    problem = case.solvable()
    eager = idf.DeclarativeLayer(problem)
    layer = idf.DeclarativeLayer(problem, compile=True)
    torch._dynamo.utils.counters.clear()
    graphs = []
    for batch in (3, 5, 7, 4):
        inputs = case.make_inputs(batch=batch)
        assert_equal(gradients(layer, inputs), gradients(eager, inputs))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] > graphs[0] > 0
    assert graphs[1] == graphs[2] == graphs[3]


def test_derivatives_of_derivatives_are_right(without_inductor: list[Any]) -> None:
    case = BY_NAME["pooling-pseudo-huber"]
    (x,) = case.make_inputs(batch=2)
    layer = idf.DeclarativeLayer(case.solvable(), compile=True)
    gradients(layer, (x,))
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(layer, (x,))
    jacobian = torch.func.jacrev(layer)(x.detach())
    torch.testing.assert_close(torch.func.jacfwd(layer)(x.detach()), jacobian)


def test_inside_torch_compile_the_option_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["pooling-pseudo-huber"]
    inputs, problem = case.make_inputs(), case.solvable()
    monkeypatch.setattr(compiled_module, "build", lambda *_: pytest.fail("compiled twice"))
    layer = idf.DeclarativeLayer(problem, compile=True)
    outer = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = inputs[0].clone().requires_grad_()
    y = inputs[0].clone().requires_grad_()
    u, expected = outer(x), idf.DeclarativeLayer(problem)(y)
    torch.testing.assert_close(u, expected)
    grads = [torch.autograd.grad(out.sin().sum(), leaf)[0] for out, leaf in ((u, x), (expected, y))]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_other_backwards_are_not_compiled_and_say_so() -> None:
    for backward in ("dense", "matrix-free", "approximate", "unrolled"):
        with pytest.warns(idf.FallbackWarning, match=f"nothing is compiled.*{backward}"):
            idf.DeclarativeLayer(RobustPooling(), backward=backward, compile=True)
    x = torch.tensor([[0.5, 1.0, 1.5, 3.0], [0.0, 1.0, 4.0, 9.0]], dtype=torch.float64)
    with pytest.warns(idf.FallbackWarning, match="sort"):
        gradients(idf.DeclarativeLayer(Sorted(), compile=True), (x,))


class Sorted(idf.Problem):
    """minimise over u  sum (sort(u) - x)^2"""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        return ((torch.sort(u).values - x) ** 2).sum()

    def init(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.sum()

    def solve(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings(
    "ignore:.torch._prims_common.check. is deprecated:FutureWarning"
)  # torch's own code
@pytest.mark.parametrize("n", [40] if shutil.which("g++") or shutil.which("clang++") else [])
def test_inductor_s_code_gives_the_same_gradients(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test with a C++ compiler; where there is none it does not exist."""
    monkeypatch.setattr("implicitdiff.structured.writer.COMPILED", frozenset(["backward"]))
    problem = RobustPooling("pseudo-huber").double()
    x = torch.randn(3, 6, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = idf.DeclarativeLayer(problem, compile=True)
    expected = gradients(idf.DeclarativeLayer(problem), (x,))
    for _ in range(2):
        assert_equal(gradients(layer, (x,)), expected)


# -------------------------------------------------------------------- what cannot be compiled


@pytest.mark.filterwarnings(
    "ignore:.torch._prims_common.check. is deprecated:FutureWarning"
)  # torch's own code
def test_without_a_compiler_it_runs_eagerly_and_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    problem = RobustPooling("pseudo-huber").double()
    x = torch.rand(2, 6, 5, dtype=torch.float64)
    expected = gradients(idf.DeclarativeLayer(problem), (x,))
    layer = idf.DeclarativeLayer(problem, compile=True)
    with pytest.warns(idf.FallbackWarning, match=r"runs eagerly, with equal results: .*[Cc]ompiler"):
        found = gradients(layer, (x,))
    assert_equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert_equal(gradients(layer, (x,)), expected)


def test_what_a_compiler_refuses_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise RuntimeError("\nno rule for this\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(
        idf.FallbackWarning, match="f runs eagerly, with equal results: RuntimeError: no rule for this$"
    ):
        assert emitted_square()(torch.tensor([3.0]))[0].item() == 15.0


def test_results_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *a: tuple(2 * t for t in function(*a)))
    function = emitted_square()
    with pytest.warns(idf.FallbackWarning, match="its results differ"):
        assert function(torch.tensor([3.0]))[0].item() == 15.0
    assert function(torch.tensor([2.0]))[0].item() == 8.0


def emitted_square() -> Compiled:
    source = 'def f(x):\n    """x^2 + 2 x"""\n    t1 = x * x\n    return t1 + 2.0 * x,\n'
    return Compiled(Emitted(source, lambda x: (x * x + 2.0 * x,)), {"torch": torch})


def test_a_stretch_is_as_long_as_it_can_be(without_inductor: list[Any]) -> None:
    """What reads nothing of a stretch goes in front of it; solvers, and what is not worth a call, stay outside."""
    source = """def f(v, u):
    t1 = u * v
    t1.add_(1.0)
    factor = solvers.Divide().factor(operators.Diagonal(u))
    w = factor.solve(v)
    status = factor.status
    t2 = (t1 * w).exp()
    del t1
    return t2 * u, -w, status
"""
    from implicitdiff import operators, solvers

    scope = {"torch": torch, "solvers": solvers, "operators": operators}
    u, v = torch.rand(2, 3) + 1.0, torch.rand(2, 3)
    found = build(source, scope)(v, u)
    eager: dict[str, Any] = dict(scope)
    exec(source, eager)
    for a, b in zip(found, eager["f"](v, u), strict=True):
        torch.testing.assert_close(a, b)
    assert [function.__name__ for function in without_inductor] == ["stretch_3"]

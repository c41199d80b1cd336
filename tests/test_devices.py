"""The layer on every device of the machine: the same numbers as on the host, and no tensor anywhere else.

Every call runs with the meta device as torch's default. A tensor that the library makes without saying where has no
values then and mixes with nothing, so that a forgotten device shows on a machine that has the host alone.
"""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

import implicitdiff as idf
from implicitdiff.diagnostics.backward_cost import backward_cost
from implicitdiff.diagnostics.held import plan_of
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.module_cases import CASES as MODULES
from tests.module_cases import Case
from tests.small_problems import Portfolio, Quartic, draw
from tests.test_backward_failures import Flat
from tests.test_second_order import BUILT_IN, PATHS, Path, double_backward

HOST, META = torch.device("cpu"), torch.device("meta")
every_path = pytest.mark.parametrize("path", [*BUILT_IN, *PATHS], ids=lambda path: path.name)
TWICE = [path for path in (*BUILT_IN, *PATHS) if path.name in ("cg-full", "lu-transport", "unrolled-quartic")]
TWICE += [path for path in PATHS if path.name in ("woodbury-pooling", "schur-portfolio", "dense-quartic")]
MADE = re.compile(
    r"torch\.(?:zeros|ones|full|empty|eye|arange|tensor|as_tensor|linspace)\((?:[^()]|\([^()]*\))*\)"
)


def layer_of(path: Path, device: torch.device) -> idf.DeclarativeLayer:
    """A copy, since problems of a path may share a Parameter."""
    problem = copy.deepcopy(path.make()).to(device)
    return idf.DeclarativeLayer(problem, in_dims=path.in_dims, **path.options)


def moved(values: Any, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(value.detach().to(device) for value in values)


def same(found: Any, expected: Any, device: torch.device) -> None:
    """The numbers that the host found, on the device that was asked for."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.device == device
        torch.testing.assert_close(a, b.to(device), rtol=1e-9, atol=1e-9)


def on_both(prepare: Callable[[torch.device], Callable[[], Any]], device: torch.device) -> Any:
    """What `prepare` made ready, run on the host as it is, and on the device with torch's default device elsewhere."""
    expected = prepare(HOST)()
    ready = prepare(device)
    with META:
        found = ready()
    same(found, expected, device)
    return found


@every_path
def test_solution_and_gradients_on_every_path(path: Path, device: torch.device) -> None:
    def prepare(where: torch.device) -> Callable[[], Any]:
        layer = layer_of(path, where)
        free = [tensor.requires_grad_() for tensor in moved(path.tensors, where)]

        def run() -> tuple[Tensor, ...]:
            u = layer(*path.build(*free))
            weight = torch.linspace(0.5, 1.5, u.numel(), dtype=u.dtype, device=where).reshape(u.shape)
            return u.detach(), *torch.autograd.grad((weight * u * u).sum(), [*free, *layer.parameters()])

        return run

    on_both(prepare, device)


@pytest.mark.parametrize("path", TWICE, ids=lambda path: path.name)
def test_forward_mode_vmap_and_second_derivatives(path: Path, device: torch.device) -> None:
    def prepare(where: torch.device) -> Callable[[], Any]:
        layer = layer_of(path, where)
        free = moved(path.tensors, where)
        along = tuple(torch.sin(3 * tensor + 1) for tensor in free)
        stacked = tuple(torch.stack([tensor, 1.1 * tensor]) for tensor in free)

        def score(*tensors: Tensor) -> Tensor:
            return (layer(*path.build(*tensors)) ** 3).sum()

        return lambda: (
            *jvp(score, free, along),
            vmap(score)(*stacked),
            *double_backward(score, free, along),
        )

    on_both(prepare, device)


@pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)
def test_solve_with_a_start_and_its_report(case: Case, device: torch.device) -> None:
    """Every field of a Solution, with and without a start, the last batch empty."""

    def prepare(where: torch.device) -> Callable[[], Any]:
        layer = case.layer(optimizer=idf.optimizers.Newton()).to(where)
        inputs = moved(case.inputs(3, 1), where)
        dims = case.in_dims if isinstance(case.in_dims, tuple) else (case.in_dims,) * len(inputs)
        empty = [x[:0] if dim == 0 else x for x, dim in zip(inputs, dims, strict=True)]

        def run() -> list[Tensor]:
            first = layer.solve(*inputs)
            found = (first, layer.solve(*inputs, init=first.u.detach()), layer.solve(*empty))
            fields = ("u", "value", "status", "iterations", "residual")
            return [getattr(solution, name).detach() for solution in found for name in fields]

        return run

    on_both(prepare, device)


@pytest.mark.parametrize("linear_solver", ["auto", "schur", "lu", "ldl"])
@pytest.mark.parametrize("max_iter", [2, 50])
def test_newton(linear_solver: str, max_iter: int, device: torch.device) -> None:
    """Two steps are too few: what is compared then are the failures."""

    def prepare(where: torch.device) -> Callable[[], Any]:
        layer = idf.DeclarativeLayer(
            Quartic().to(where),
            in_dims=(0, None),
            optimizer=idf.optimizers.Newton(max_iter=max_iter),
            linear_solver=linear_solver,
            on_failure="zero",
        )
        inputs = moved((draw(3, 3, seed=3), draw(3, seed=4, scale=0.2, shift=1.0)), where)

        def run() -> tuple[Tensor, ...]:
            with idf.record():
                found = layer.solve(*inputs)
            return found.u.detach(), found.status, found.iterations, found.residual

        return run

    u = on_both(prepare, device)[0]
    assert bool((u == 0).all(1).any()) == (max_iter == 2)


@pytest.mark.parametrize("policy", ["warn", "nan", "zero", "damp"])
def test_records_of_failures(policy: str, device: torch.device) -> None:
    """Sample 1 has a solution that is not unique: its derivative fails, and the record says so."""
    logs = []

    def prepare(where: torch.device) -> Callable[[], Any]:
        layer = idf.DeclarativeLayer(Flat(), on_failure=policy)
        (x,) = moved((torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64),), where)
        x.requires_grad_()

        def run() -> tuple[Tensor, ...]:
            with idf.record() as log, warnings.catch_warnings():
                warnings.simplefilter("ignore", idf.OptimalityWarning)
                found = torch.autograd.grad((layer(x) ** 2).sum(), x)
            logs.append([(event.kind, event.samples) for event in log])
            return tuple(grad.nan_to_num(1e6) for grad in found)

        return run

    on_both(prepare, device)
    assert logs[0] == logs[1]
    assert any(samples == (1,) for _, samples in logs[0]), logs


def test_jacobian_and_derivatives(device: torch.device) -> None:
    def prepare(where: torch.device) -> Callable[[], Any]:
        Q, mu = moved((torch.diag(draw(4, seed=1) ** 2 + 1) + 0.1, draw(2, 4, seed=2)), where)

        def run() -> tuple[Tensor, ...]:
            rows = idf.jacobian(Portfolio(), Q, mu, in_dims=(None, 0))
            u = idf.solve(Portfolio(), Q, mu, in_dims=(None, 0)).u
            found = idf.derivatives(Portfolio(), u[0].detach(), Q, mu[0])
            return (*rows, found.A, found.B, found.C, found.H, found.multipliers)

        return run

    on_both(prepare, device)


BUILT = {
    "pooling": (lambda: RobustPooling("welsch", alpha=2.0), lambda: (draw(2, 3, 5, seed=1),)),
    "transport": (OptimalTransport, lambda: (draw(2, 3, 4, seed=2),)),
}


@pytest.mark.parametrize("name", BUILT)
def test_explain_is_the_same_with_data_and_without(name: str, device: torch.device) -> None:
    """On the host, on the device, on shapes alone; and the code that it shows makes no tensor just anywhere."""
    make, draws = BUILT[name]
    expected = idf.explain(make().double(), *moved(draws(), HOST))
    problem = make().double().to(device)
    given, shapes_only, unfilled = moved(draws(), device), moved(draws(), META), make().double().to(META)
    with META:
        found = idf.explain(problem, *given)
        shapes = idf.explain(problem, *shapes_only)
        other = idf.explain(unfilled, *shapes_only)
    assert str(found) == str(expected) == str(shapes) == str(other)
    assert [call for call in MADE.findall(found.code) if "device=" not in call] == []


@pytest.mark.parametrize("name", BUILT)
def test_check_and_compare(name: str, device: torch.device) -> None:
    make, draws = BUILT[name]
    problem, inputs = make().double().to(device), moved(draws(), device)
    with META:
        report = idf.check(problem, *inputs)
        table = idf.compare(problem, *inputs, rounds=1)
    assert report.ok, report
    assert all(
        row.seconds is not None and row.error is not None and row.error < 1e-8 for row in table.rows
    ), table


def test_an_iterative_solver_is_counted_where_the_data_are(device: torch.device) -> None:
    problem = RobustPooling("pseudo-huber", alpha=0.8).double().to(device)
    x = draw(2, 3, 5, seed=1).detach()
    given = [x.to(device), x.to(META)]
    with META:
        costs = [backward_cost(problem, plan_of(problem, (data,), 0, "matrix-free")) for data in given]
    assert all(cost.how.startswith("counted on") and cost.flops > 0 for cost in costs)


def test_a_problem_that_lies_elsewhere_is_refused_by_name(device: torch.device) -> None:
    x = draw(2, 3, 5, seed=1).detach().to(device)
    layer = idf.DeclarativeLayer(RobustPooling("pseudo-huber", alpha=0.8).double().to(META))
    with pytest.raises(
        idf.InputError, match=rf"\(x\) are on {device}, .*self\.alpha on meta.*\.to\('{device}'\)"
    ):
        layer(x)
    layer = idf.DeclarativeLayer(OptimalTransport(gamma=2.0).double().to(device), in_dims=(0, None, None))
    masses = [torch.full((size,), 1 / size, dtype=torch.float64, device=META) for size in (3, 5)]
    with pytest.raises(idf.InputError, match=rf"got M {device}, .* meta, .* meta: move them"):
        layer(x, *masses)


def test_inputs_on_another_device_than_the_problem_of_this_machine(device: torch.device) -> None:
    """A layer that was moved, with inputs that were not: one error, by name, or the result where they lie together."""
    x = draw(2, 3, 5, seed=1).detach()
    layer = idf.DeclarativeLayer(RobustPooling("pseudo-huber", alpha=0.8).double()).to(device)
    if device == HOST:
        assert layer(x).device == HOST
    else:
        with pytest.raises(idf.InputError, match=rf"are on {HOST}, .*self\.alpha on {device}"):
            layer(x)

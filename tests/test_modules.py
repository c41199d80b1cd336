"""The layer as a module: state_dict, copies, dtypes and devices, activation checkpointing, autocast."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import implicitdiff as idf
from implicitdiff.layer import DeclarativeLayer
from implicitdiff.layer.prepare import prepare
from tests.module_cases import BY_NAME, CASES, Case, plain, run
from tests.small_problems import draw

DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: Any) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-11, "atol": 1e-12}))


def shift_parameters(layer: torch.nn.Module) -> None:
    """Other values for every Parameter, in place."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.25).add_(0.05)


@every_case
def test_the_cases_are_what_they_are_for(case: Case) -> None:
    """Otherwise the tests below would miss a path."""
    layer, inputs = case.layer(), case.inputs(2, 1)
    plan = prepare(layer.problem, inputs, layer.options).plan
    assert (not plan.analysis.fallbacks) == case.structured
    assert list(layer.parameters())
    u, *grads = run(layer, inputs)
    assert all(bool(grad.abs().max() > 1e-4) for grad in grads), "a gradient of zero would compare equal"
    assert bool((layer.solve(*inputs).status == idf.Status.OK).all())
    assert torch.autograd.gradcheck(layer.problem.objective, (u[0], *(_sample(case, inputs))))


def _sample(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dims = case.in_dims if isinstance(case.in_dims, tuple) else (case.in_dims,) * len(inputs)
    return tuple(x if dim is None else x[0] for x, dim in zip(inputs, dims, strict=True))


# state_dict


@every_case
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_carries_everything_that_learns(case: Case, assign: bool) -> None:
    source, target, inputs = case.layer(), case.layer(), case.inputs(2, 1)
    before = run(target, inputs)  # a plan is there already, made for the old values
    shift_parameters(source)
    expected = run(source, inputs)
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream)  # weights_only: nothing but tensors is in it
    assert set(state) == {f"problem.{name}" for name, _ in source.problem.named_parameters()}
    target.load_state_dict(state, assign=assign)
    same(run(target, inputs), expected)
    assert not torch.allclose(before[0], expected[0]), "the Parameters did not matter"


def test_buffers_of_the_built_ins_are_in_the_state_dict() -> None:
    inputs = BY_NAME["pooling"].inputs(2, 1)
    wide, narrow = DeclarativeLayer(idf.problems.RobustPooling(alpha=3.0)), None
    narrow = DeclarativeLayer(idf.problems.RobustPooling(alpha=0.3))
    expected = run(wide, inputs)
    assert not torch.allclose(run(narrow, inputs)[0], expected[0])
    narrow.load_state_dict(wide.state_dict())
    same(run(narrow, inputs), expected)


# Copies


@every_case
@pytest.mark.parametrize("used", [False, True])
def test_a_deepcopy_is_equal_and_on_its_own(case: Case, used: bool) -> None:
    layer, inputs = torch.nn.Sequential(case.layer(on_failure="warn", optimality_tol=1e-6)), case.inputs(2, 1)
    first = run(layer[0], inputs) if used else None
    twin = copy.deepcopy(layer)
    assert twin[0].options == layer[0].options
    same(run(twin[0], inputs), first or run(layer[0], inputs))
    kept = run(layer[0], inputs)
    shift_parameters(twin)
    same(run(layer[0], inputs), kept)
    assert not torch.allclose(run(twin[0], inputs)[0], kept[0])
    shift_parameters(layer)
    same(run(twin[0], inputs), run(layer[0], inputs))


# Dtypes and devices


@every_case
def test_a_layer_changes_its_dtype_and_back(case: Case) -> None:
    layer, inputs = case.layer(), case.inputs(2, 1)
    expected = run(layer, inputs)
    parameters = list(layer.parameters())
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.float64, 1e-6), (torch.float32, 2e-3)):
        layer.to(dtype)
        found = run(layer, plain(inputs, dtype=dtype))
        assert {tensor.dtype for tensor in found} == {dtype}
        # Going to float32 and back rounds the Parameters.
        same(tuple(t.double() for t in found), expected, rtol=tolerance, atol=tolerance / 10)
        assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))


@every_case
def test_a_parameter_of_another_dtype_than_the_inputs(case: Case) -> None:
    """Float32 inputs of a float64 Parameter, as when a frozen precision is kept: the inputs decide."""
    layer, inputs = case.layer(), case.inputs(2, 1)
    expected = run(layer, inputs)
    found = run(layer, plain(inputs, dtype=torch.float32))
    assert [t.dtype for t in found[: 1 + len(inputs)]] == [torch.float32] * (1 + len(inputs))
    assert {t.dtype for t in found[1 + len(inputs) :]} == {torch.float64}
    same(tuple(t.double() for t in found), expected, rtol=2e-3, atol=2e-4)


@every_case
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_moves_to_a_device(case: Case, device: str) -> None:
    layer, inputs = case.layer(), case.inputs(2, 1)
    expected = run(layer, inputs)
    layer.to(device, torch.float64)
    found = run(layer, plain(inputs, device=torch.device(device)))
    assert {str(tensor.device) for tensor in found} == {device}
    same(tuple(t.cpu() for t in found), expected, rtol=1e-8, atol=1e-9)
    layer.to("cpu")
    same(run(layer, inputs), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_layer_says_what_to_do(dtype: torch.dtype) -> None:
    case = BY_NAME["running"]
    layer = case.layer().to(dtype)
    with pytest.raises(idf.InputError, match=r"float\(\)|autocast"):
        layer(*plain(case.inputs(2, 1), dtype=dtype))


class Positive(torch.nn.Module):
    """What keeps a Parameter positive."""

    def forward(self, value: Tensor) -> Tensor:
        return torch.nn.functional.softplus(value)


@pytest.mark.parametrize(
    ("name", "parameter"), [("pooling", "alpha"), ("quartic", "theta"), ("running", "theta")]
)
def test_a_parametrised_problem(name: str, parameter: str) -> None:
    """torch's parametrisations turn the Parameter into a property; what learns is the tensor behind it."""
    case = BY_NAME[name]
    bound, free = case.layer(), case.layer()
    parametrize.register_parametrization(bound.problem, parameter, Positive())
    value = getattr(free.problem, parameter)
    slope = torch.sigmoid(value.detach().clone())
    with torch.no_grad():
        value.copy_(torch.nn.functional.softplus(value))
    inputs = case.inputs(2, 1)
    weight = torch.linspace(0.5, 1.5, 2 * case.entries, dtype=torch.float64).reshape(2, -1)
    found, expected = ((weight * layer(*inputs) ** 2).sum() for layer in (bound, free))
    same((found,), (expected,))
    behind = bound.problem.parametrizations[parameter].original
    moved = (torch.autograd.grad(expected, value)[0] * slope,)
    same(torch.autograd.grad(found, behind), moved)


# Activation checkpointing


class Counted(torch.nn.Module):
    """A layer whose solves are counted, between two ordinary operations, returning all that is differentiable."""

    def __init__(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.layer = case.layer()
        self.solves = 0
        solve = type(self.layer.problem).solve if self.layer.problem.declares("solve") else None
        if solve is not None:
            monkeypatch.setattr(type(self.layer.problem), "solve", self._counting(solve))

    def _counting(self, solve: Callable[..., Any]) -> Callable[..., Any]:
        def counted(problem: idf.Problem, *inputs: Tensor) -> Any:
            self.solves += 1
            return solve(problem, *inputs)

        return counted

    def forward(self, first: Tensor, *rest: Tensor) -> Tensor:
        solution = self.layer.solve(torch.tanh(first), *rest)
        leaves = torch.utils._pytree.tree_leaves(solution.equality_multipliers)
        multipliers = [leaf.reshape(len(first), -1).square().sum(1) for leaf in leaves if leaf is not None]
        loss = torch.stack([solution.u.flatten(1).pow(3).sum(1), solution.value, *multipliers]).exp()
        return loss.sum()


@every_case
def test_checkpointing_recomputes_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = Counted(case, monkeypatch), case.inputs(2, 1)
    leaves = (*inputs, *net.parameters())
    # The first call of the layer, and so the tracing, happens under the hooks of the checkpoint.
    found = torch.autograd.grad(checkpoint(net, *inputs, use_reentrant=False), leaves)
    solves = net.solves
    expected = torch.autograd.grad(net(*inputs), leaves)
    same(found, expected)
    if net.layer.problem.declares("solve"):
        assert (solves, net.solves) == (2, 3), "plain checkpointing solves once more in the backward"


@every_case
def test_checkpointing_to_the_end_and_twice_through(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = Counted(case, monkeypatch), case.inputs(2, 1)
    leaves = (*inputs, *net.parameters())
    once = torch.autograd.grad(net(*inputs), leaves, create_graph=True)
    curved = torch.autograd.grad(sum((grad**2).sum() for grad in once), leaves)
    with set_checkpoint_early_stop(False):
        outer = checkpoint(lambda *x: checkpoint(net, *x, use_reentrant=False), *inputs, use_reentrant=False)
        found = torch.autograd.grad(outer, leaves, create_graph=True)
        same(found, once)
        same(
            torch.autograd.grad(sum((grad**2).sum() for grad in found), leaves), curved, rtol=1e-8, atol=1e-9
        )


@every_case
def test_saved_tensors_may_be_stored_elsewhere(case: Case) -> None:
    layer, inputs = case.layer(), case.inputs(2, 1)
    packed = []

    def pack(tensor: Tensor) -> bytes:
        stream = io.BytesIO()
        torch.save(tensor.detach(), stream)
        packed.append(tensor.shape)
        return stream.getvalue()

    expected = run(layer, inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda data: torch.load(io.BytesIO(data))):
        found = run(layer, inputs)
    same(found, expected)
    assert inputs[0].shape in packed
    with torch.autograd.graph.save_on_cpu():
        same(run(layer, inputs), expected)


class Potential(idf.Problem):
    """minimise over u  |D q(u)|^2 / 2 + |u - x|^2 with q = sum u^4 / 12: a declaration that uses torch.func itself."""

    def objective(self, u, x):
        slope = torch.func.grad(lambda v: (v**4).sum() / 12)(u)
        return (slope**2).sum() / 2 + ((u - x) ** 2).sum()

    def init(self, x):
        return torch.func.grad(lambda v: (v * v).sum() / 2)(x)


class Solved(Potential):
    """The same without a start point: its structure is known from the solver, Newton's method."""

    init = idf.Problem.init

    def solve(self, x):
        def slope(u: Tensor) -> Tensor:
            return torch.func.grad(lambda v: ((v**3 / 3) ** 2).sum() / 2 + ((v - x) ** 2).sum())(u)

        u = x
        for _ in range(20):
            value, curvature = torch.func.jvp(slope, (u,), (torch.ones_like(u),))
            u = u - value / curvature
        return u


@pytest.mark.parametrize("problem", [Potential, Solved])
def test_hooks_that_use_torch_func_under_checkpointing(problem: type[idf.Problem]) -> None:
    """torch.func refuses to run while there are hooks on saved tensors."""
    x = draw(2, 3, seed=1)
    expected = torch.autograd.grad((DeclarativeLayer(problem())(x) ** 3).sum(), x)
    u = checkpoint(DeclarativeLayer(problem()), x, use_reentrant=False)
    same(torch.autograd.grad((u**3).sum(), x), expected)


# Autocast


class Between(torch.nn.Module):
    """A float32 network with the layer inside: under autocast its first input arrives in half precision."""

    def __init__(self, case: Case, size: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = case.layer().float()
        self.before, self.after = torch.nn.Linear(size, size), torch.nn.Linear(case.entries, 2)

    def forward(self, first: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        u = self.layer(self.before(first), *rest)
        return u, self.after(u.flatten(1))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_around_a_network(case: Case, dtype: torch.dtype, inside: bool) -> None:
    inputs = plain(case.inputs(4, 1), dtype=torch.float32)
    net = Between(case, inputs[0].shape[-1])
    leaves = (*inputs, *net.parameters())
    exact_u, exact = net(*inputs)
    expected = torch.autograd.grad(exact.square().sum(), leaves)
    with torch.autocast("cpu", dtype=dtype):
        u, out = net(*inputs)
        loss = out.float().square().sum()
        found = torch.autograd.grad(loss, leaves) if inside else None
    found = found or torch.autograd.grad(loss, leaves)
    # One input from the Linear is half; those that are shared are float32: together they are float32.
    assert u.dtype == (dtype if len(inputs) == 1 else torch.float32)
    assert out.dtype == dtype
    assert [g.dtype for g in found] == [torch.float32] * len(leaves)
    same((u.float(), *found), (exact_u, *expected), rtol=0.08, atol=0.05 * float(expected[0].abs().max()))


@every_case
def test_autocast_takes_all_floating_inputs_to_float32_together(case: Case) -> None:
    """Whatever each of them is: the same as casting by hand, in the values and in every gradient."""
    layer, inputs = case.layer().float(), case.inputs(2, 1)
    half = plain(inputs, dtype=torch.bfloat16)
    if case.name == "transport":  # rounded marginals would not have equal totals
        half = (half[0], *plain(inputs[1:], dtype=torch.float32))
    expected = run(layer, plain(half, dtype=torch.float32))
    for dtypes in ("given", "mixed with float64"):
        given = plain(half)
        if dtypes != "given":
            given = (given[0], *plain(given[1:], dtype=torch.float64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            u = layer(*given)
            all_half = {x.dtype for x in given} == {torch.bfloat16}
            assert u.dtype == (torch.bfloat16 if all_half else torch.float32)
            same((u.float(),), expected[:1], rtol=1e-2, atol=1e-2)
            found = run(layer, given)
        assert [g.dtype for g in found[1:]] == [t.dtype for t in (*given, *layer.parameters())]
        same(tuple(g.float() for g in found), expected, rtol=3e-2, atol=3e-2)


@every_case
def test_autocast_changes_nothing_for_float32(case: Case) -> None:
    """No product inside runs in half precision: not in the solver, the backward or the value."""
    layer, inputs = case.layer().float(), plain(case.inputs(2, 1), dtype=torch.float32)
    solution, expected = layer.solve(*inputs), run(layer, inputs)
    exact = torch.autograd.grad(solution.value.sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.solve(*inputs)
        same(run(layer, inputs), expected, rtol=1e-6, atol=1e-7)
    # The value is an ordinary function of u: as for any, torch wants its backward outside of the region.
    slopes = torch.autograd.grad(found.value.sum(), inputs)
    same((found.u, found.value, *slopes), (solution.u, solution.value, *exact), rtol=1e-6, atol=1e-7)


@every_case
def test_autocast_leaves_float64_alone(case: Case) -> None:
    layer, inputs = case.layer(), case.inputs(2, 1)
    expected = run(layer, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(layer, inputs)
        solution = layer.solve(*inputs)
    same(found, expected)
    assert solution.value.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        same(run(layer, inputs), expected)


@every_case
def test_checkpointing_under_autocast(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recomputation happens outside of the region, in the dtypes of the region."""
    net, inputs = Counted(case, monkeypatch), case.inputs(2, 1)
    net.float()
    given = plain(inputs, dtype=torch.float32)
    leaves = (*given, *net.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direct, kept = net(*given), checkpoint(net, *given, use_reentrant=False)
    same(torch.autograd.grad(kept, leaves), torch.autograd.grad(direct, leaves), rtol=1e-5, atol=1e-6)

"""torch.compile of models that contain a layer: values, gradients, one graph, and nothing stale."""

import gc
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import implicitdiff as idf
from implicitdiff.problems import OptimalTransport, RobustPooling
from tests.recorded_problems import NumpyQuartic, Pair, Quartic, quartic_inputs

DTYPE = torch.float64
# Inductor needs a C++ compiler for what surrounds the layer; where there is none its tests do not exist.
BACKENDS = ["eager", "aot_eager", *(["inductor"] if shutil.which("g++") or shutil.which("clang++") else [])]


@pytest.fixture(autouse=True)
def _no_graphs_left():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def derivatives(model, inputs, parameters):
    """The output of a model, and the gradients of a loss for all inputs and parameters."""
    tensors = (*inputs, *parameters)
    for tensor in tensors:
        tensor.grad = None
    outputs = torch.utils._pytree.tree_leaves(model(*inputs))
    sum((i + 1.5) * (y**2 + y).sum() for i, y in enumerate(outputs)).backward()
    return [*(y.detach() for y in outputs), *(tensor.grad for tensor in tensors)]


def assert_equal(found, expected, tolerance=1e-12):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Network(torch.nn.Module):
    """A layer between two others."""

    def __init__(self, problem=NumpyQuartic):
        super().__init__()
        torch.manual_seed(1)
        self.encode = torch.nn.Linear(4, 3, dtype=DTYPE)
        self.layer = idf.DeclarativeLayer(problem(), in_dims=(0, None))
        self.decode = torch.nn.Linear(3, 2, dtype=DTYPE)

    def forward(self, z, a):
        return self.decode(torch.tanh(self.layer(torch.tanh(self.encode(z)), a)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", [Quartic, NumpyQuartic])
def test_a_network_is_one_graph(backend, problem):
    model = Network(problem)
    z = torch.randn(5, 4, dtype=DTYPE, requires_grad=True)
    inputs, parameters = (z, quartic_inputs()[1]), list(model.parameters())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        expected = derivatives(model, inputs, parameters)
        assert_equal(derivatives(compiled, inputs, parameters), expected)
    assert counter.frame_count == 1
    assert torch._dynamo.explain(model)(*inputs).graph_break_count == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_built_in_problems(backend):
    torch.manual_seed(0)
    alpha = torch.nn.Parameter(torch.tensor(1.3, dtype=DTYPE))
    pooling = idf.DeclarativeLayer(RobustPooling("pseudo-huber", alpha=alpha))
    transport = idf.DeclarativeLayer(OptimalTransport(gamma=2.0))
    points = torch.randn(2, 3, 7, dtype=DTYPE, requires_grad=True)
    cost = torch.rand(3, 4, 5, dtype=DTYPE, requires_grad=True)
    rows = torch.rand(3, 4, dtype=DTYPE).softmax(1).requires_grad_()
    columns = torch.rand(3, 5, dtype=DTYPE).softmax(1).requires_grad_()
    for layer, inputs in ((pooling, (points,)), (transport, (cost, rows, columns))):
        expected = derivatives(layer, inputs, list(layer.parameters()))
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        assert_equal(derivatives(compiled, inputs, list(layer.parameters())), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", ["steep", "flat"])
def test_pytrees_constants_and_solve(backend, mode):
    layer = idf.DeclarativeLayer(Pair(), in_dims=(0, None))
    p = torch.randn(4, 3, dtype=DTYPE, requires_grad=True)
    q = torch.randn(4, 2, dtype=DTYPE, requires_grad=True)

    def everything(p, q):
        found = layer.solve({"p": p, "q": q}, mode)
        assert found.equality_multipliers is None
        return found.u, found.value

    expected = derivatives(everything, (p, q), ())
    assert_equal(
        derivatives(torch.compile(everything, backend=backend, fullgraph=True), (p, q), ()), expected
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_function_solve_and_the_multipliers(backend):
    problem, inputs = Quartic(), quartic_inputs()
    newton = idf.optimizers.Newton(max_iter=40)

    def everything(x, a):
        found = idf.solve(problem, x, a, in_dims=(0, None), optimizer=newton, optimality_tol=1e-6)
        return found.u, found.equality_multipliers, found.value

    expected = derivatives(everything, inputs, [problem.theta])
    compiled = torch.compile(everything, backend=backend, fullgraph=True)
    assert_equal(derivatives(compiled, inputs, [problem.theta]), expected)


@pytest.mark.parametrize("backward", ["dense", "matrix-free", "approximate"])
def test_every_backward(backward):
    layer = idf.DeclarativeLayer(Quartic(), in_dims=(0, None), backward=backward)
    inputs, parameters = quartic_inputs(), list(layer.parameters())
    expected = derivatives(layer, inputs, parameters)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_equal(derivatives(compiled, inputs, parameters), expected, 1e-9)


def test_an_unrolled_solve_in_torch():
    class Ridge(idf.Problem):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.tensor(0.5, dtype=DTYPE))

        def objective(self, u, x, a):
            return ((u - x) ** 2).sum() + self.theta * (u @ a) ** 2

        def solve(self, x, a):
            u = x
            for _ in range(60):
                u = u - 0.2 * (2 * (u - x) + 2 * self.theta * (u * a).sum(1, keepdim=True) * a)
            return u

        def init(self, x, a):
            return x

    layer = idf.DeclarativeLayer(Ridge(), in_dims=(0, None), backward="unrolled")
    inputs, parameters = quartic_inputs(), list(layer.parameters())
    expected = derivatives(layer, inputs, parameters)
    exact = derivatives(idf.DeclarativeLayer(layer.problem, in_dims=(0, None)), inputs, parameters)
    found = derivatives(torch.compile(layer, backend="aot_eager", fullgraph=True), inputs, parameters)
    assert_equal(found, expected)
    assert_equal(found, exact, 1e-6)


def test_a_hand_written_vjp():
    layer = idf.DeclarativeLayer(RobustPooling("pseudo-huber"), backward="hand")
    inputs = (torch.randn(2, 3, 7, dtype=DTYPE, requires_grad=True),)
    expected = derivatives(layer, inputs, ())
    assert_equal(derivatives(torch.compile(layer, backend="aot_eager", fullgraph=True), inputs, ()), expected)


def test_one_graph_for_all_batch_sizes():
    layer = idf.DeclarativeLayer(NumpyQuartic(), in_dims=(0, None))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for batch in (5, 2, 9, 3, 4):
        inputs, parameters = quartic_inputs(batch, seed=batch), list(layer.parameters())
        expected = derivatives(layer, inputs, parameters)
        assert_equal(derivatives(compiled, inputs, parameters), expected)
    assert counter.frame_count == 2  # one for 5, one for any number


TRANSFORMS = {
    "grad": lambda f: grad(lambda x, a: f(x, a).pow(3).sum(), argnums=(0, 1)),
    "jacrev": lambda f: jacrev(f, argnums=1),
    "jacfwd": lambda f: jacfwd(f, argnums=1),
    "jvp": lambda f: lambda x, a: jvp(f, (x, a), (x * x, a * 2)),
    "hessian": lambda f: hessian(lambda x, a: f(x, a).pow(3).sum(), argnums=1),
    "reverse over reverse": lambda f: jacrev(jacrev(lambda x, a: f(x, a).pow(3).sum(), argnums=1), argnums=1),
    "forward over forward": lambda f: jacfwd(jacfwd(lambda x, a: f(x, a).pow(3).sum(), argnums=1), argnums=1),
    "vmap": lambda f: vmap(f, in_dims=(0, None)),
    "per sample": lambda f: vmap(grad(lambda x, a: f(x[None], a).pow(3).sum(), argnums=(0, 1)), in_dims=(0, None)),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_inside_compile(transform, backend):
    layer = idf.DeclarativeLayer(NumpyQuartic(), in_dims=(0, None))
    x, a = (tensor.detach() for tensor in quartic_inputs(4))
    if transform == "vmap":
        x = torch.stack([x, 1.5 * x])
    function = TRANSFORMS[transform](layer)
    found = torch.compile(function, backend=backend, fullgraph=True)(x, a)
    leaves = torch.utils._pytree.tree_leaves
    assert_equal(leaves(found), leaves(function(x, a)), 1e-11)


def test_an_ensemble_inside_compile():
    layers = [idf.DeclarativeLayer(NumpyQuartic(theta=theta), in_dims=(0, None)) for theta in (0.4, 0.9, 1.7)]
    parameters, buffers = stack_module_state(layers)
    x, a = (tensor.detach() for tensor in quartic_inputs())

    def one(parameters, buffers):
        return functional_call(layers[0], (parameters, buffers), (x, a))

    def loss(parameters):
        return vmap(one)(parameters, buffers).pow(3).sum()

    found = torch.compile(vmap(one), backend="aot_eager", fullgraph=True)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([layer(x, a) for layer in layers]), rtol=1e-12, atol=1e-12)
    slope = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)(parameters)
    each = [torch.autograd.grad(layer(x, a).pow(3).sum(), layer.problem.theta)[0] for layer in layers]
    torch.testing.assert_close(slope["problem.theta"], torch.stack(each), rtol=1e-10, atol=1e-10)


def test_under_autocast():
    layer = idf.DeclarativeLayer(RobustPooling("pseudo-huber"))
    x = torch.randn(2, 3, 7, dtype=torch.bfloat16, requires_grad=True)

    def model(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    expected = derivatives(model, (x,), ())
    found = derivatives(torch.compile(model, backend="aot_eager", fullgraph=True), (x,), ())
    assert found[0].dtype == torch.bfloat16
    assert_equal(found, expected)


# ---------------------------------------------------------------- nothing stale, nothing lost


def test_a_changed_attribute_is_seen():
    layer = idf.DeclarativeLayer(Quartic(), in_dims=(0, None))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs, parameters = quartic_inputs(), list(layer.parameters())
    before = derivatives(compiled, inputs, parameters)
    for weight in (3.0, 0.5, 3.0):
        layer.problem.weight = weight
        after = derivatives(compiled, inputs, parameters)
        assert_equal(after, derivatives(layer, inputs, parameters))
        assert not torch.allclose(after[0], before[0], rtol=1e-3)
    with torch.no_grad():
        layer.problem.theta.mul_(4.0)
        layer.problem.offsets[0].mul_(-5.0)
    assert_equal(derivatives(compiled, inputs, parameters), derivatives(layer, inputs, parameters))


def test_a_changed_attribute_out_of_a_guards_reach_raises():
    class Deep(Quartic):
        def __init__(self):
            super().__init__()
            self.options = {("key",): 2.0}

        def objective(self, u, x, a):
            return super().objective(u, x, a) + self.options[("key",)] * (u * u).sum()

    layer = idf.DeclarativeLayer(Deep(), in_dims=(0, None))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = quartic_inputs()
    compiled(*inputs)
    layer.problem.options[("key",)] = 3.0
    with pytest.raises(idf.ImplicitDiffError, match="attribute of Deep has changed"):
        compiled(*inputs)


def test_another_layer_of_the_same_class_is_another_graph():
    first, second = (idf.DeclarativeLayer(Quartic(theta=t), in_dims=(0, None)) for t in (0.5, 2.5))
    inputs = quartic_inputs()
    compiled = torch.compile(lambda layer, x, a: layer(x, a), backend="aot_eager", fullgraph=True)
    for layer in (first, second, first):
        torch.testing.assert_close(compiled(layer, *inputs), layer(*inputs), rtol=1e-12, atol=1e-12)


def test_options_belong_to_the_graph():
    problem, inputs = Quartic(), quartic_inputs()

    def run(options, x, a):
        return idf.solve(problem, x, a, in_dims=(0, None), **options).u

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    damped = {"kkt": idf.KKTOptions(trust_region=0.7)}
    for options in ({"backward": "auto"}, damped, {"backward": "approximate"}):
        x, a = inputs
        (found,) = torch.autograd.grad(compiled(options, x, a).pow(3).sum(), a, allow_unused=True)
        (expected,) = torch.autograd.grad(run(options, x, a).pow(3).sum(), a, allow_unused=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        (exact,) = torch.autograd.grad(run({}, x, a).pow(3).sum(), a)
        assert options == {"backward": "auto"} or (expected - exact).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_failure_in_a_graph_has_its_own_class_and_names_the_sample(backend):
    class Wrong(NumpyQuartic):
        def solve(self, x, a):
            u = super().solve(x, a).clone()
            u[2] += 1.0
            return u

    x, a = quartic_inputs()
    layer = idf.DeclarativeLayer(Wrong(), in_dims=(0, None))
    with pytest.raises(idf.NotOptimalError, match="sample 2 of 5"):
        torch.compile(layer, backend=backend, fullgraph=True)(x, a)
    marked = idf.DeclarativeLayer(Wrong(), in_dims=(0, None), on_failure="nan")
    found = derivatives(
        torch.compile(marked, backend=backend, fullgraph=True), (x, a), [marked.problem.theta]
    )
    expected = derivatives(marked, (x, a), [marked.problem.theta])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert found[0][2].isnan().all()
    assert found[0][[0, 1, 3, 4]].isfinite().all()


def test_a_singular_backward_raises_in_a_graph():
    class Flat(idf.Problem):
        def objective(self, u, x):
            return (u.sum() - x.sum()) ** 2 + 0.0 * (u * u).sum()

        def init(self, x):
            return x

    layer = idf.DeclarativeLayer(Flat())
    x = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(idf.SingularError):
        y.sum().backward()


def test_records_see_what_happens_in_a_graph():
    class Wrong(NumpyQuartic):
        def solve(self, x, a):
            return super().solve(x, a) + 1.0

    layer = idf.DeclarativeLayer(Wrong(), in_dims=(0, None), on_failure="zero")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = quartic_inputs()
    compiled(*inputs)
    with idf.record() as log:
        compiled(*inputs)
    assert {event.kind for event in log} == {"NOT_OPTIMAL"}


def test_a_compiled_layer_can_be_freed():
    layer = idf.DeclarativeLayer(Quartic(), in_dims=(0, None))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(*quartic_inputs()).sum().backward()
    gone = []
    torch.utils.weak.weakref.finalize(layer.problem, gone.append, True)
    torch.compiler.reset()
    del layer, compiled
    gc.collect()
    assert gone


def test_without_init_the_first_call_has_to_be_eager():
    class Blind(NumpyQuartic):
        init = idf.Problem.init

    layer = idf.DeclarativeLayer(Blind(), in_dims=(0, None))
    inputs, parameters = quartic_inputs(), list(layer.parameters())
    with pytest.raises(Exception, match="call the layer once on real tensors"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    torch.compiler.reset()
    expected = derivatives(layer, inputs, parameters)
    assert_equal(
        derivatives(torch.compile(layer, backend="aot_eager", fullgraph=True), inputs, parameters), expected
    )


def test_a_tensor_out_of_reach_is_refused():
    class Hidden(Quartic):
        def __init__(self):
            super().__init__()
            self.table = {("a", 1): torch.tensor(2.0, dtype=DTYPE)}

        def objective(self, u, x, a):
            return super().objective(u, x, a) * self.table["a", 1]

    layer = idf.DeclarativeLayer(Hidden(), in_dims=(0, None))
    inputs = quartic_inputs()
    expected = layer(*inputs)
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

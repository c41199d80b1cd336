"""The door: in_dims as in torch.vmap, and a named error for everything that is wrong with the inputs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import implicitdiff as idf
from implicitdiff.inputs import Bound, bind, check_finite
from tests.tracing import data


class Two(idf.Problem):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(data(3))

    def objective(self, u, x, y=None, *rest):
        return u.sum()

    def init(self, x, y=None, *rest):
        return x.clone()


class One(idf.Problem):
    def objective(self, u, x):
        return u.sum()

    def init(self, x):
        return x.clone()


def test_batched_and_shared_leaves() -> None:
    x, q = data(5, 3), data(3, 4)
    bound = bind(Two(), (x, q), (0, None))
    assert (bound.names, bound.batched, bound.batch, bound.unbatched) == (("x", "y"), (True, False), 5, False)
    assert bound.leaves[0] is x
    assert bound.leaves[1] is q
    assert bound.sample_shapes == ((3,), (3, 4))
    assert (bound.dtype, bound.device) == (torch.float64, torch.device("cpu"))
    assert bound.tensor_names == ("self.weight",)
    assert bound.checked


@pytest.mark.parametrize(("dim", "position"), [(0, 0), (1, 1), (2, 2), (-1, 2), (-3, 0)])
def test_the_batch_axis_comes_to_the_front_as_in_vmap(dim: int, position: int) -> None:
    x = data(2, 3, 4)
    bound = bind(One(), (x,), dim)
    seen: list[torch.Tensor] = []
    torch.func.vmap(lambda s: seen.append(s) or s.sum(), in_dims=dim)(x)
    assert bound.sample_shapes[0] == tuple(seen[0].shape)
    assert bound.batch == x.shape[position]
    torch.testing.assert_close(bound.leaves[0], torch.func.vmap(lambda s: s * 1, in_dims=dim)(x))
    assert bound.leaves[0].data_ptr() == x.data_ptr(), "a view, not a copy"


def test_a_prefix_reaches_into_pytrees() -> None:
    inputs = ({"a": data(4, 5), "b": (data(5, 2), data(3))}, data(5))
    bound = bind(Two(), inputs, ({"b": (0, None), "a": 1}, 0))
    assert bound.names == ("x['a']", "x['b'][0]", "x['b'][1]", "y")
    assert bound.batched == (True, True, False, True)
    assert bound.sample_shapes == ((4,), (2,), (3,), ())
    bound = bind(Two(), (inputs[0]["b"][:1], data(5)), [(0,), 0])
    assert bound.names == ("x[0]", "y")


@pytest.mark.parametrize("in_dims", [None, (None, None), ({"a": None}, None)])
def test_none_everywhere_is_one_sample(in_dims: Any) -> None:
    bound = bind(Two(), ({"a": data(3)}, data(3, 4)), in_dims)
    assert bound.unbatched
    assert bound.batch == 1
    assert bound.batched == (False, False)
    assert [tuple(x.shape) for x in bound.leaves] == [(3,), (3, 4)]
    expanded = bound.expanded()
    assert expanded[0]["a"].shape == (1, 3)


def test_expanded_and_sample_are_what_the_hooks_expect() -> None:
    x, q = data(3, 5), data(3, 4)
    bound = bind(Two(), ({"x": x, "power": 2}, q, "mode"), ({"x": 1, "power": None}, None, None))
    first, second, mode = bound.expanded()
    torch.testing.assert_close(first["x"], x.T)
    assert first["power"] == 2
    assert second.shape == (5, 3, 4)
    assert second.stride(0) == 0
    assert mode == "mode"
    torch.testing.assert_close(bound.sample(3)[0]["x"], x[:, 3])
    assert bound.sample(3)[1] is q


def test_constants_are_kept_with_their_positions() -> None:
    bound = bind(Two(), (data(5, 3), {"n": 2, "s": "l1", "z": None, "t": torch.float32}, 1.5, True))
    assert bound.constants == ((1, 2), (2, "l1"), (3, None), (4, torch.float32), (5, 1.5), (6, True))
    assert bound.names == ("x",)
    hash(bound.constants)
    with_true = bind(Two(), (data(5, 3), True)).signature
    assert with_true != bind(Two(), (data(5, 3), 1)).signature, "1 and True may branch differently"


def test_integer_and_boolean_tensors_are_leaves() -> None:
    bound = bind(Two(), (data(5, 3), torch.arange(5), torch.ones(5, dtype=torch.bool)))
    assert [leaf.dtype for leaf in bound.leaves] == [torch.float64, torch.int64, torch.bool]
    assert bound.dtype == torch.float64
    alone = bind(One(), (torch.arange(4),))
    assert alone.dtype == torch.get_default_dtype()
    assert bind(Two(), (torch.arange(4),)).dtype == torch.float64, "that of the Problem's tensors"


def test_empty_batch() -> None:
    bound = bind(Two(), (data(0, 3), data(3)), (0, None))
    assert (bound.batch, bound.unbatched) == (0, False)
    assert bound.expanded()[1].shape == (0, 3)


@pytest.mark.parametrize(
    ("inputs", "in_dims", "message"),
    [
        ((data(5, 3), data(4, 3)), 0, r"input x has 5 samples along axis 0, input y has 4 along axis 0"),
        ((data(5, 3), data(3, 4)), (0, 1), r"input y has 4 along axis 1.*None"),
        ((data(5, 3), data()), 0, r"input y has shape \(\), so its rank 0 is too low .*in_dims = 0.*None"),
        ((data(3),), 1, r"input x has shape \(3,\), so its rank 1 is too low"),
        ((data(3),), -2, "rank 1 is too low"),
        ((data(5, 3), data(5).float()), 0, r"share their dtype, got x torch.float64, y torch.float32"),
        ((torch.complex(data(5), data(5)),), 0, "input x is complex"),
        ((data(5, 3).to_sparse(),), 0, "dense tensor"),
        ((data(5, 3),), (0, 0), r"in_dims has 2 entries, but there are 1 inputs \(x\)"),
        ((data(5, 3),), "0", "in_dims has to be an int, None, or a tuple"),
        ((data(5, 3),), True, "in_dims has to be an int, None, or a tuple"),
        ((data(5, 3),), ((0, 0),), "in_dims for input x is .*no prefix"),
        (({"a": data(5)},), ({"b": 0},), "in_dims for input x is .*no prefix"),
        (({"a": data(5)},), ({"a": "0"},), r"in_dims for input x\['a'\] is '0'"),
        (((data(5),),), ((0, 0),), "no prefix"),
        ((), 0, r"takes at least 1 inputs after the variable, got 0"),
        ((2.0, None), None, "no inputs that are tensors"),
        ((np.zeros(3),), 0, r"input x is a numpy ndarray: pass torch.as_tensor\(x\)"),
        ((data(5), object()), 0, "input y is a object"),
        ((data(5), torch.nn.Linear(1, 1)), 0, "keep anything else as an attribute"),
    ],
)
def test_wrong_inputs(inputs: Any, in_dims: Any, message: str) -> None:
    with pytest.raises(idf.InputError, match=message):
        bind(Two(), inputs, in_dims)


def test_number_of_inputs_is_that_of_the_objective() -> None:
    with pytest.raises(idf.InputError, match=r"One\.objective\(u, x\) takes 1 inputs .* got 2"):
        bind(One(), (data(5), data(5)))
    with pytest.raises(idf.InputError, match=r"One\.objective\(u, x\) takes 1 inputs .* got 0"):
        bind(One(), ())

    class NoInputs(idf.Problem):
        def objective(self, u):
            return (u**2).sum()

        def init(self):
            return torch.zeros(3)

    with pytest.raises(idf.InputError, match="no inputs that are tensors"):
        bind(NoInputs(), ())
    assert bind(Two(), (data(5),) * 4).names == ("x", "y", "rest[0]", "rest[1]")


def test_devices_have_to_agree() -> None:
    with FakeTensorMode():
        there = torch.ones(5, device="cuda", dtype=torch.float64)
    with pytest.raises(idf.InputError, match="share their device, got x cpu, y cuda:0"):
        bind(Two(), (data(5), there))


def test_not_a_problem() -> None:
    with pytest.raises(idf.ProblemDefinitionError, match="expected a Problem, got function"):
        bind(lambda x: x, (data(5),))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_input_and_samples(bad: float) -> None:
    word = "NaN" if bad != bad else "inf"
    x, y = data(5, 3), data(3, 5)
    y[0, 1] = y[2, 4] = bad
    with pytest.raises(idf.InputError, match=rf"input y contains {word} in samples 1, 4 \(2 of 5\): mask"):
        bind(Two(), (x, y), (0, 1))
    with pytest.raises(idf.InputError, match=rf"input y \(shape \(3, 5\)\) contains {word} in 2 entries"):
        bind(Two(), (x, y), (0, None))
    x[3, 0] = bad
    with pytest.raises(idf.InputError, match=rf"input x contains {word} in sample 3: mask"):
        bind(Two(), (x, y), (0, None))


def test_large_and_integer_values_are_finite() -> None:
    largest = torch.finfo(torch.float32).max
    assert bind(One(), (torch.full((5, 3), largest),)).checked, "the sum overflows, the values do not"
    bind(Two(), (data(5), torch.full((5,), torch.iinfo(torch.int64).max)))


def test_values_are_not_read_where_there_are_none() -> None:
    problem, bad = Two(), torch.full((2, 3), float("nan"), dtype=torch.float64)
    assert not bind(problem, (data(5, 3).to("meta"),)).checked
    with FakeTensorMode() as mode:
        assert not bind(problem, (mode.from_tensor(data(5, 3)),)).checked
    found: list[Bound] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        found.append(bind(problem, (x,)))
        return x.sum()

    torch.func.vmap(inside)(torch.stack([bad, bad]))
    torch.func.grad(inside)(bad)
    make_fx(inside)(bad)
    assert [bound.checked for bound in found] == [False] * 3
    assert [bound.batch for bound in found] == [2] * 3
    check_finite(["x"], [bad.to("meta")], [True])
    with pytest.raises(idf.InputError, match=r"input x contains NaN in samples 0, 1 \(2 of 2\)"):
        check_finite(["x"], [bad], [True])


def test_meta_inputs_are_bound_like_others() -> None:
    bound = bind(Two(), (torch.empty(5, 3, device="meta"), torch.empty(3, device="meta")), (0, None))
    assert bound.device.type == "meta"
    assert bound.sample_shapes == ((3,), (3,))


def test_signature_is_that_of_the_trace_not_of_the_call() -> None:
    problem = Two()
    key = bind(problem, (data(5, 3),)).signature
    assert bind(problem, (data(7, 3, seed=1),)).signature == key, "neither batch size nor values"
    assert hash(bind(problem, (data(5, 3),)).signature) == hash(key)
    others = [
        bind(problem, (data(5, 4),)),
        bind(problem, (data(5, 3).float(),)),
        bind(problem, (data(5, 3),), None),
        bind(problem, ({"a": data(5, 3)},)),
        bind(problem, (data(5, 3), 1)),
        bind(problem, (data(5, 3), 2)),
        bind(problem, (data(5, 3).to("meta"),)),
    ]
    keys = [key, *(bound.signature for bound in others)]
    torch.set_default_dtype(torch.float64)
    try:
        keys.append(bind(problem, (data(5, 3),)).signature)
    finally:
        torch.set_default_dtype(torch.float32)
    problem.eval()
    keys.append(bind(problem, (data(5, 3),)).signature)
    assert len(set(keys)) == len(keys)

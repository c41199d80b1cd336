"""What a Problem holds: its tensors by name, and a key that changes with everything else it can read."""

import dataclasses
import enum
import functools
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import implicitdiff as idf
from implicitdiff.attributes import problem_signature, scan
from implicitdiff.graph.skeleton import skeleton

FACTOR = 2.0
TABLE = {"a": 1}
WEIGHT = torch.ones(3)


def helper(u):
    return u * FACTOR


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Settings:
    eps: float = 0.5
    tensor: Any = None


class Plain:
    """An object of the user's own class."""

    def __init__(self, eps: float) -> None:
        self.eps = eps


class Holder(idf.Problem):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, value)

    def objective(self, u, x):
        return (helper(u) * x).sum() * TABLE["a"] + (WEIGHT * u).sum()

    def init(self, x):
        return x


def closure_over(value: Any) -> Any:
    return lambda u: u * value


def changed(old: Any, new: Any) -> bool:
    """Whether the key sees that an attribute changed from old to new."""
    problem = Holder(value=old)
    before = problem_signature(problem)
    assert problem_signature(problem) == before
    assert hash(problem_signature(problem)) == hash(before)
    problem.value = new
    return problem_signature(problem) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (1.0, 1.5),
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ("a", "b"),
        (None, 0),
        ([1, 2], [1, 3]),
        ([1, 2], (1, 2)),
        ({"a": 1}, {"b": 1}),
        ({"a": {"b": [1.0]}}, {"a": {"b": [2.0]}}),
        ({1, 2}, {1, 3}),
        (Colour.RED, Colour.BLUE),
        (torch.float32, torch.float64),
        (Settings(0.5), Settings(0.25)),
        (SimpleNamespace(eps=1.0), SimpleNamespace(eps=2.0)),
        (np.arange(3), np.arange(3) + 1),
        (np.arange(3), np.arange(3.0)),
        (np.float64(1), np.float64(2)),
        (slice(0, 2), slice(0, 3)),
        (torch.sin, torch.cos),
        (lambda u: u, lambda u: 2 * u),
        (closure_over(1.0), closure_over(2.0)),
        (closure_over(torch.ones(3)), closure_over(torch.ones(3))),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (torch.nn.Tanh(), torch.nn.Sigmoid()),
        (torch.nn.Dropout(0.1), torch.nn.Dropout(0.2)),
        (torch.ones(3), torch.ones(4)),
        (torch.ones(3), torch.ones(3).double()),
        (torch.ones(3), 1.0),
        (Plain(1.0), Plain(1.0)),
    ],
)
def test_key_sees_changed_attributes(old: Any, new: Any) -> None:
    assert changed(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (1.5, 1.5),
        (float("nan"), float("nan")),
        ([1, {"a": 2.0}], [1, {"a": 2.0}]),
        (Settings(0.5), Settings(0.5)),
        (np.arange(3), np.arange(3)),
        (torch.zeros(3), torch.ones(3)),  # a value of an argument of the graph
        (closure_over(2.0), closure_over(2.0)),
    ],
)
def test_key_is_equal_for_equal_contents(old: Any, new: Any) -> None:
    assert not changed(old, new)


def test_key_sees_changes_in_place() -> None:
    plain, array, items = Plain(1.0), np.zeros(2), [1]
    problem = Holder(
        plain=plain, array=array, items=items, net=torch.nn.Linear(2, 2), calls=closure_over(items)
    )
    seen = {problem_signature(problem)}
    plain.eps = 2.0
    seen.add(problem_signature(problem))
    array[1] = 1.0
    seen.add(problem_signature(problem))
    items.append(2)
    seen.add(problem_signature(problem))
    problem.net.eval()
    seen.add(problem_signature(problem))
    problem.eval()
    seen.add(problem_signature(problem))
    problem.net.register_forward_hook(lambda *a: None)
    seen.add(problem_signature(problem))
    assert len(seen) == 7


def test_key_sees_globals_and_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Holder()
    seen = {problem_signature(problem)}
    for name, value in (("FACTOR", 3.0), ("TABLE", {"a": 2}), ("WEIGHT", torch.ones(3))):
        monkeypatch.setitem(globals(), name, value)
        seen.add(problem_signature(problem))
    assert len(seen) == 4
    assert any(tensor is WEIGHT for tensor in scan(problem).captured)


def test_key_sees_sharing() -> None:
    shared, own = torch.ones(3), torch.ones(3)
    assert problem_signature(Holder(a=shared, b=shared)) != problem_signature(Holder(a=shared, b=own))
    assert scan(Holder(a=shared, b=shared)).names == ("self.a",)


def test_swapped_parameter_is_the_one_that_is_found() -> None:
    problem = Holder(weight=torch.nn.Parameter(torch.ones(3)))
    problem.weight = torch.nn.Parameter(torch.zeros(3))
    assert scan(problem).tensors[0] is problem.weight


def test_order_is_that_of_named_parameters() -> None:
    class Deep(idf.Problem):
        def __init__(self) -> None:
            super().__init__()
            self.b = torch.nn.Parameter(torch.zeros(1))
            self.net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
            self.a = torch.nn.Parameter(torch.zeros(2))

        def objective(self, u, x):
            return u.sum()

    problem = Deep()
    assert scan(problem).names == tuple(f"self.{name}" for name, _ in problem.named_parameters())
    assert all(a is b for a, b in zip(scan(problem).tensors, problem.parameters(), strict=True))


def test_cycles_end() -> None:
    problem = Holder()
    problem.me = [problem]
    problem.method = problem.objective
    problem_signature(problem)
    twin = skeleton(problem, {})
    assert twin is not problem
    assert twin.me[0] is twin
    assert twin.method.__self__ is twin


def test_skeleton_replaces_every_tensor_and_shares_what_was_shared() -> None:
    pair = [torch.ones(3), (torch.zeros(2),)]
    problem = Holder(
        pair=pair, again=pair, ordered=OrderedDict(w=torch.ones(1)), settings=Settings(1.0, torch.ones(2)),
        space=SimpleNamespace(t=torch.ones(4)), net=torch.nn.Linear(2, 3), plain=Plain(1.0),
        partial=functools.partial(torch.mul, torch.ones(5)),
    )  # fmt: skip
    found = scan(problem)
    assert len(found.names) == 8
    fresh = [torch.full_like(t, 7.0) for t in found.tensors]
    twin = skeleton(problem, {id(t): f for t, f in zip(found.tensors, fresh, strict=True)})
    assert [id(t) for t in scan(twin).tensors] == [id(t) for t in fresh]
    assert scan(twin).names == found.names
    assert twin.pair is twin.again
    assert twin.pair is not pair
    assert isinstance(twin.ordered, OrderedDict)
    assert isinstance(twin.settings, Settings)
    assert twin.plain is problem.plain
    assert isinstance(problem.net.weight, torch.nn.Parameter)
    torch.testing.assert_close(twin.net(torch.zeros(2)), torch.full((3,), 7.0))
    torch.testing.assert_close(twin.partial(torch.tensor(2.0)), torch.full((5,), 14.0))

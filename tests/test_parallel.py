"""One layer in many places: threads, the workers of a DataLoader, spawned processes, DistributedDataParallel."""

import gc
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from implicitdiff import plan as plans
from implicitdiff.graph import record, trace
from implicitdiff.layer import DeclarativeLayer
from implicitdiff.problems import RobustPooling
from implicitdiff.structured.writer import Writer
from tests.module_cases import BY_NAME, CASES, Case, run

WORLD = 2
HOST = "127.0.0.1"
PATIENCE = 60.0  # seconds until something that waits for another process gives up
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def differs(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether two results of `run` are more than rounding apart."""
    return any(not torch.allclose(f, e, rtol=1e-10, atol=1e-12) for f, e in zip(found, expected, strict=True))


def together(work: Callable[[int], Any], count: int) -> list[Any]:
    """What work(0), ..., work(count - 1) return, each in a thread of its own, all started at the same moment."""
    barrier = threading.Barrier(count, timeout=PATIENCE)

    def started(index: int) -> Any:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(started, range(count)))


# Threads


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns every 10 microseconds, so that a race that can be lost is lost."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def wrong_calls(layer: DeclarativeLayer, case: Case, calls: int) -> list[tuple[int, int]]:
    """(thread, call) of every call, two threads at once, whose u or gradients are not those of the serial call."""
    # Different data and batch sizes, so that an array that one thread holds and the other overwrites shows.
    draws = [
        [case.inputs(2 + thread + number, 10 * thread + number) for number in range(3)] for thread in (0, 1)
    ]
    expected = [[run(layer, inputs) for inputs in own] for own in draws]

    def work(thread: int) -> list[tuple[int, int]]:
        pairs = list(zip(draws[thread], expected[thread], strict=True))
        return [
            (thread, call)
            for call in range(calls)
            if differs(run(layer, pairs[call % 3][0]), pairs[call % 3][1])
        ]

    return [wrong for found in together(work, 2) for wrong in found]


@every_case
def test_two_threads_in_one_layer(case: Case) -> None:
    assert wrong_calls(case.layer(), case, calls=40) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pooling", "running"])
def test_two_threads_with_a_thousand_calls_each(name: str) -> None:
    assert wrong_calls(BY_NAME[name].layer(), BY_NAME[name], calls=1000) == []


@every_case
def test_the_backward_runs_in_another_thread(case: Case) -> None:
    """As for a backward of several devices; the layer is fresh, so that part of the plan is written there."""
    inputs = case.inputs(2, 1)
    expected = run(case.layer(), inputs)
    layer = case.layer()
    u = layer(*inputs)
    weight = torch.linspace(0.5, 1.5, u.numel(), dtype=u.dtype).reshape(u.shape)
    leaves = (*inputs, *layer.parameters())
    found = together(lambda _: torch.autograd.grad((weight * u**2).sum(), leaves, retain_graph=True), 2)
    assert not any(differs(one, expected[1:]) for one in found)


@pytest.mark.usefixtures("hasty")
@every_case
def test_first_calls_race(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads make the first call at the same moment: graphs are recorded and functions emitted one at a time."""
    inputs = case.inputs(2, 1)
    expected = run(case.layer(), inputs)
    inside: list[int] = []
    crowds: dict[str, set[int]] = {}

    def watch(where: Any, name: str) -> None:
        original = getattr(where, name)

        def watched(*arguments: Any) -> Any:
            inside.append(threading.get_ident())
            crowds.setdefault(name, set()).add(len(set(inside)))
            try:
                return original(*arguments)
            finally:
                inside.remove(threading.get_ident())

        monkeypatch.setattr(where, name, watched)

    watch(trace, "record")
    watch(Writer, "_write")
    for _ in range(3):
        layer = case.layer()
        found = together(lambda _, layer=layer: run(layer, inputs), 4)
        assert not any(differs(one, expected) for one in found)
    stages = ["record", "_write"] if case.structured else ["record"]
    assert crowds == {stage: {1} for stage in stages}, "two threads were in it at once"


@pytest.mark.usefixtures("hasty")
def test_first_calls_of_different_problems_race_with_plain_work() -> None:
    """Tracing in one thread must not show in modules and functions that other threads run meanwhile."""
    expected = {case.name: run(case.layer(), case.inputs(2, 1)) for case in CASES}
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    ordinary = torch.func.hessian(lambda x: net(x).sum())(x)
    busy = threading.Event()

    def work(index: int) -> bool:
        if index < len(CASES):
            case = CASES[index]
            try:
                return not any(
                    differs(run(case.layer(), case.inputs(2, 1)), expected[case.name]) for _ in range(3)
                )
            finally:
                if index == 0:
                    busy.set()
        right = True
        while not busy.is_set():
            right &= bool(torch.allclose(torch.func.hessian(lambda x: net(x).sum())(x), ordinary))
        return right

    assert together(work, len(CASES) + 1) == [True] * (len(CASES) + 1)


def test_racing_threads_end_with_one_plan() -> None:
    """Whoever derives a plan, all threads use the same one afterwards."""
    cache, owner = plans._Cache(4), torch.nn.Identity()
    made = threading.Barrier(3, timeout=PATIENCE)

    def make() -> object:
        made.wait()  # all three are past the look-up
        return object()

    found = together(lambda _: cache.get(owner, "key", make), 3)
    assert len({id(one) for one in found}) == 1
    assert cache.get(owner, "key", make) is found[0]


# Processes


class Solutions(Dataset):
    """A data set whose items are solved in the worker: (u, gradients) of a batch made from the index."""

    def __init__(self, layers: list[DeclarativeLayer]) -> None:
        self.layers = layers

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(
            tuple(t.detach() for t in run(layer, case.inputs(2, index)))
            for layer, case in zip(self.layers, CASES, strict=True)
        )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str) -> None:
    layers = [case.layer() for case in CASES]
    data = Solutions(layers)
    expected = [data[index] for index in range(len(data))]  # the plans exist before the workers are made
    loader = DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context=method, timeout=PATIENCE
    )
    found = list(loader)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert not any(differs(tuple(f), e) for f, e in zip(one, other, strict=True))


def test_a_fork_while_another_thread_traces() -> None:
    """The child inherits the lock as it is; the thread that would release it is not there."""
    case = BY_NAME["quartic"]
    inputs = case.inputs(2, 1)
    held, leave = threading.Event(), threading.Event()

    def trace_for_long() -> None:
        with record.LOCK:
            held.set()
            leave.wait(PATIENCE)

    tracer = threading.Thread(target=trace_for_long)
    expected = run(case.layer(), inputs)
    tracer.start()
    assert held.wait(PATIENCE)
    threading.Timer(0.5, leave.set).start()
    loader = DataLoader(
        Solutions([one.layer() for one in CASES]),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="fork",
        timeout=PATIENCE / 4,
    )
    first = next(iter(loader))
    leave.set()
    tracer.join()
    assert not differs(run(case.layer(), inputs), expected)
    assert not differs(tuple(first[0]), run(CASES[0].layer(), CASES[0].inputs(2, 0)))


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    """Two spawned processes."""
    with ProcessPoolExecutor(WORLD, get_context("spawn"), initializer=_quiet) as pool:
        yield pool


def _quiet() -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")


def _run_pickled(pickled: bytes, names: list[str], seed: int) -> list[tuple[Any, ...]]:
    layers = pickle.loads(pickled)
    found = [run(layer, BY_NAME[name].inputs(2, seed)) for name, layer in zip(names, layers, strict=True)]
    return [tuple(t.detach().numpy() for t in one) for one in found]


def test_layers_pickled_into_a_spawned_worker(workers: ProcessPoolExecutor) -> None:
    """As they are, after a call, and as a pickle of a copy made there."""
    names = [case.name for case in CASES]
    layers = [case.layer(on_failure="warn") for case in CASES]
    expected = []
    for layer, case in zip(layers, CASES, strict=True):
        with torch.no_grad():
            next(layer.parameters()).mul_(1.1)  # values that no constructor gives
        expected.append(run(layer, case.inputs(2, 5)))
    found = workers.submit(_run_pickled, pickle.dumps(layers), names, 5).result(PATIENCE)
    for one, other in zip(found, expected, strict=True):
        assert not differs(tuple(map(torch.from_numpy, one)), other)


# DistributedDataParallel


class Net(torch.nn.Module):
    """A Linear before the layer, so that gradients pass through its inputs, and a layer with a buffer after it.

    The inputs that are shared are Parameters of the net.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        first, *rest = case.inputs(2 * WORLD, 3)
        self.before = torch.nn.Linear(first.shape[-1], first.shape[-1]).double()
        with torch.no_grad():
            self.before.weight.copy_(torch.eye(first.shape[-1]) * 0.9 + 0.05)
            self.before.bias.fill_(0.02)
        self.layer = case.layer()
        self.pool = DeclarativeLayer(RobustPooling(alpha=0.5))  # alpha is a buffer, which is broadcast
        self.marginals = case.name == "transport"
        self.rest = torch.nn.ParameterList([torch.nn.Parameter(x.detach()) for x in rest])

    def forward(self, first: Tensor) -> Tensor:
        rest = [torch.softmax(x, 0) if self.marginals else x for x in self.rest]
        u = self.layer(self.before(first), *rest).flatten(1)
        return torch.cat([u, self.pool(u[:, None])], 1)


def _train(net: torch.nn.Module, data: Tensor) -> None:
    """Three steps of SGD on a loss that is a mean over the samples."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    for step in range(3):
        optimizer.zero_grad()
        u = net(data + 0.1 * step)
        weight = torch.linspace(0.5, 1.5, u.shape[1], dtype=u.dtype)
        ((weight * u) ** 2).sum(1).mean().backward()
        optimizer.step()


def _rank(port: int, rank: int, names: list[str]) -> dict[str, list[Any]]:
    """One of the two processes: it sees its half of the data. The Parameters afterwards."""
    store = distributed.TCPStore(HOST, port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    try:
        found = {}
        for name in names:
            net = Net(BY_NAME[name])
            data = BY_NAME[name].inputs(2 * WORLD, 3)[0].detach()
            _train(DistributedDataParallel(net), data[2 * rank : 2 * rank + 2])
            found[name] = [p.detach().numpy() for p in net.parameters()]
        distributed.barrier()
        return found
    finally:
        distributed.destroy_process_group()
        gc.collect()


def test_two_processes_train_as_one(workers: ProcessPoolExecutor) -> None:
    store = distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # a port that is free
    names = [case.name for case in CASES]
    ranks = [workers.submit(_rank, store.port, rank, names) for rank in range(WORLD)]
    results = [rank.result(PATIENCE) for rank in ranks]
    for case in CASES:
        net = Net(case)
        start = [p.detach().clone() for p in net.parameters()]
        _train(net, case.inputs(2 * WORLD, 3)[0].detach())
        alone = tuple(p.detach() for p in net.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(alone, start, strict=True)), (
            "something did not learn"
        )
        for result in results:
            torch.testing.assert_close(
                tuple(map(torch.from_numpy, result[case.name])), alone, rtol=1e-10, atol=1e-12
            )

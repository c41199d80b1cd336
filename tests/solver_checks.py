"""What the tests of the solvers share: which solver takes which row of the table, numpy oracles, comparisons.

In: tests/operator_cases.py. Out: PAIRS and the helpers. Next: tests/test_solvers.py.
"""

import numpy as np
import torch
from torch import Tensor

from implicitdiff.operators import (
    Block,
    Diagonal,
)
from implicitdiff.solvers import (
    SOLVERS,
    Factorization,
    LinearSolver,
    PseudoInverse,
)
from implicitdiff.status import Status
from tests.operator_cases import TABLE
from tests.operator_draws import Draw

ALL: dict[str, LinearSolver] = {**SOLVERS, "eigh": PseudoInverse()}
CPU = torch.device("cpu")


def pairs() -> list[tuple[str, str]]:
    """(solver, row) wherever the solver takes the row's operator."""
    taken = []
    for name, solver in ALL.items():
        for row in TABLE:
            operator, twin = row.build(Draw(3))
            if solver.reject(operator) is not None:
                continue
            # Conjugate gradients promise nothing for an indefinite matrix; test_cg_gives_up covers those.
            if name == "cg" and np.linalg.eigvalsh(twin).min() < -1e-12:
                continue
            if name == "gmres" and row.singular:  # its probe says so: test_gmres
                continue
            taken.append((name, row.name))
    return taken


PAIRS = pairs()


def right_hand_side(twin: np.ndarray, samples: int, lead: tuple[int, ...], singular: bool) -> Tensor:
    """Random right-hand sides; in the range of a singular matrix."""
    rhs = np.random.default_rng(1).normal(size=(*lead, samples, twin.shape[-1]))
    return torch.from_numpy(apply(twin, rhs) if singular else rhs)


def apply(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    matrices = np.broadcast_to(matrices, (vectors.shape[-2], *matrices.shape[1:]))
    return np.einsum("bij,...bj->...bi", matrices, vectors)


def oracle(twin: np.ndarray, rhs: np.ndarray, singular: bool, cut: float = 1e-10) -> np.ndarray:
    return apply(np.linalg.pinv(twin, rcond=cut) if singular else np.linalg.inv(twin), rhs)


def close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual.double().numpy() / scale, expected / scale, rtol=0, atol=tolerance)


def statuses(factorization: Factorization) -> list[Status]:
    return [Status(code) for code in factorization.status.tolist()]


def plan_block(plan: Tensor) -> Block:
    rows, columns = plan.shape[1:]
    kernel = torch.cat([torch.ones(rows), -torch.ones(columns)])
    return Block(
        ((Diagonal(plan.sum(2)), plan), (plan.mT, Diagonal(plan.sum(1)))), (rows, columns), (kernel,)
    )


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest number of entries of any tensor made while it is active (views aside)."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result

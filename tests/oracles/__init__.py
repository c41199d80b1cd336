"""The dense truth that every structured result is held against: Eqn. 3 by torch.func on the declared
functions of one sample.

Nothing of the library but a Problem's declared hooks is used: no structure, no batching, no emitted code.
Reading order: linalg.py, sample.py, dense.py, compare.py, newton.py. What is held against it is in
tests/cases/.
"""

from tests.oracles.compare import compare_modulo, relative_error
from tests.oracles.dense import (
    Gradients,
    dense_constraint_jacobian,
    dense_hessian,
    dense_vjp,
    dense_vjp_at,
    eqn3,
    gradient_null_vectors,
    kkt_matrix,
    kkt_solution,
)
from tests.oracles.newton import NewtonResult, newton_solution, solved
from tests.oracles.sample import Derivatives, Sample

__all__ = [
    "Derivatives",
    "Gradients",
    "NewtonResult",
    "Sample",
    "compare_modulo",
    "dense_constraint_jacobian",
    "dense_hessian",
    "dense_vjp",
    "dense_vjp_at",
    "eqn3",
    "gradient_null_vectors",
    "kkt_matrix",
    "kkt_solution",
    "newton_solution",
    "relative_error",
    "solved",
]

"""Linear solvers: how each kind of matrix is inverted, factored once and solved many times.

In: operators. Out: ``choose`` picks a solver, ``LinearSolver.factor`` returns a ``Factorization`` with a
status for each sample. Start reading at ``base.py``; ``select.py`` is where the choice is made.
"""

from implicitdiff.solvers.banded_cholesky import BandedCholesky
from implicitdiff.solvers.base import Cost, Factorization, LinearSolver, relative_residual
from implicitdiff.solvers.block_cholesky import BlockCholesky
from implicitdiff.solvers.cg import ConjugateGradients
from implicitdiff.solvers.cholesky import Cholesky
from implicitdiff.solvers.divide import Divide
from implicitdiff.solvers.gmres import GMRES
from implicitdiff.solvers.kronecker import KroneckerSolver
from implicitdiff.solvers.ldl import LDL
from implicitdiff.solvers.lu import LU
from implicitdiff.solvers.pseudo_inverse import PseudoInverse
from implicitdiff.solvers.schur import Schur
from implicitdiff.solvers.schur_cg import SchurConjugateGradients
from implicitdiff.solvers.select import PLANNED, SOLVERS, Choice, candidates, choose, solver_named
from implicitdiff.solvers.sparse_lu import SparseLU
from implicitdiff.solvers.tridiagonal import Tridiagonal
from implicitdiff.solvers.woodbury import Woodbury

__all__ = [
    "GMRES",
    "LDL",
    "LU",
    "PLANNED",
    "SOLVERS",
    "BandedCholesky",
    "BlockCholesky",
    "Choice",
    "Cholesky",
    "ConjugateGradients",
    "Cost",
    "Divide",
    "Factorization",
    "KroneckerSolver",
    "LinearSolver",
    "PseudoInverse",
    "Schur",
    "SchurConjugateGradients",
    "SparseLU",
    "Tridiagonal",
    "Woodbury",
    "candidates",
    "choose",
    "relative_residual",
    "solver_named",
]

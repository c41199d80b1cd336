"""The built-in optimizers, for `optimizer=` of the layer: frozen objects that hold options and no state.

A plan with its inputs and a start come in, one point per sample goes out. Next: default.py, which chooses one where
none is asked for, newton.py and lbfgs.py, and forward.py, which runs an optimizer or the problem's own `solve`.
"""

from implicitdiff.optimizers.anderson import Anderson
from implicitdiff.optimizers.augmented import AugmentedLagrangian
from implicitdiff.optimizers.combined import Chain, MultiStart
from implicitdiff.optimizers.default import default_optimizer
from implicitdiff.optimizers.from_scipy import SciPy
from implicitdiff.optimizers.interior import InteriorPoint
from implicitdiff.optimizers.lbfgs import LBFGS
from implicitdiff.optimizers.least_squares import GaussNewton, LevenbergMarquardt
from implicitdiff.optimizers.limits import Progress
from implicitdiff.optimizers.line_search import Wolfe
from implicitdiff.optimizers.newton import Newton
from implicitdiff.optimizers.projected import ProjectedGradient

__all__ = [
    "LBFGS",
    "Anderson",
    "AugmentedLagrangian",
    "Chain",
    "GaussNewton",
    "InteriorPoint",
    "LevenbergMarquardt",
    "MultiStart",
    "Newton",
    "Progress",
    "ProjectedGradient",
    "SciPy",
    "Wolfe",
    "default_optimizer",
]

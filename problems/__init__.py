"""The built-in problems, and the place to look for how to write one.

`robust_pooling.py` and `optimal_transport.py` declare the two case studies of Gould et al., "Exploiting
Problem Structure in Deep Declarative Networks"; the other files are their penalties and forward solvers.
"""

from .optimal_transport import OptimalTransport
from .penalties import PENALTIES
from .robust_pooling import RobustPooling

__all__ = ["PENALTIES", "OptimalTransport", "RobustPooling"]

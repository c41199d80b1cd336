"""The built-in problems, and the place to look for how to write one.

`robust_pooling.py` and `optimal_transport.py` declare the two case studies of Gould et al., "Exploiting
Problem Structure in Deep Declarative Networks"; the other files are their penalties and forward solvers.
`discrete.py` holds discrete problems, solvers for a `combinatorial.DiscreteLayer`, which are loaded on first use.
"""

import importlib
import typing

from .optimal_transport import OptimalTransport
from .penalties import PENALTIES
from .robust_pooling import RobustPooling

if typing.TYPE_CHECKING:
    from .discrete import (
        GlobeTour,
        GraphMatching,
        KeypointMatching,
        RetrievalRanking,
        SubsetSelection,
        TerrainPath,
    )

__all__ = [
    "PENALTIES",
    "GlobeTour",
    "GraphMatching",
    "KeypointMatching",
    "OptimalTransport",
    "RetrievalRanking",
    "RobustPooling",
    "SubsetSelection",
    "TerrainPath",
]


def __getattr__(name: str) -> typing.Any:
    """The discrete problems load the discrete half, with networkx and SciPy's optimisers: half a second."""
    if name in __all__:
        return getattr(importlib.import_module(".discrete", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

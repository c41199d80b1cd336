"""The layer: a problem in, a differentiable module out. Start reading at `module.py`, then `prepare.py`."""

from implicitdiff.layer.implicit import implicit
from implicitdiff.layer.module import DeclarativeLayer, solve

__all__ = ["DeclarativeLayer", "implicit", "solve"]

"""The built-in optimizers, for `optimizer=` of the layer: frozen objects that hold options and no state.

A plan with its inputs and a start come in, one point per sample goes out. Next: newton.py, the default, and
forward.py, which chooses between an optimizer and the problem's own `solve`.
"""

from implicitdiff.optimizers.newton import Newton

__all__ = ["Newton"]

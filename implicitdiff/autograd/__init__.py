"""The solution as a differentiable function: one autograd.Function for the layer, one for the linear solve behind it.

In: a `Call` (a plan and the tensors of one call of a layer). Out: outputs that autograd, torch.func and forward mode
can differentiate. Start reading at `call.py`, then `kkt.py` and `implicit.py`.
"""

from implicitdiff.autograd.call import Call
from implicitdiff.autograd.implicit import ImplicitFunction
from implicitdiff.autograd.kkt import KKTSolve
from implicitdiff.autograd.options import KKTOptions

__all__ = ["Call", "ImplicitFunction", "KKTOptions", "KKTSolve"]

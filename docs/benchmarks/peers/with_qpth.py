"""qpth, a batched interior-point method for QPs, differentiated through its KKT system.

It wants at least one inequality: one that is never active is given to it. Installed without its dependencies
(`pip install --no-deps qpth`), as its metadata asks for an older NumPy than it needs.
"""

import torch
from qpth.qp import QPFunction
from torch import Tensor

from benchmarks.work import Forward, Work


def layer(work: Work) -> Forward:
    """min u'Q u / 2 + q'u  s.t.  A u = b."""
    solve = QPFunction(verbose=-1, check_Q_spd=False)
    batch, m, _ = work.size
    idle = torch.zeros(batch, 1, m, dtype=work.u.dtype)
    bound = torch.ones(batch, 1, dtype=work.u.dtype)

    def forward(Q: Tensor, q: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return solve(Q, q, idle, bound, A, b)

    return forward

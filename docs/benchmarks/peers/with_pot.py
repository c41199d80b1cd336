"""POT: the plan of Sinkhorn's algorithm, differentiated through its iterations (50 of them), sample by sample."""

import ot
import torch
from torch import Tensor

from benchmarks.work import Forward, Work

ITERATIONS = 50


def layer(work: Work) -> Forward:
    """min <M, P> + 1/gamma sum P log P with both marginals: POT's `reg` is 1/gamma."""
    regularisation = 1 / float(work.problem.gamma)

    def forward(M: Tensor, r: Tensor, c: Tensor) -> Tensor:
        plans = [
            ot.sinkhorn(r[k], c[k], M[k], regularisation, numItermax=ITERATIONS, stopThr=0.0, warn=False)
            for k in range(len(M))
        ]
        return torch.stack(plans)

    return forward

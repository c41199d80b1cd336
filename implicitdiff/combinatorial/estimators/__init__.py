"""Estimators: replacements for the derivative of a discrete solver, and losses whose gradient is exact.

In: costs and cotangents. Out: gradients. Any estimator works with any solver. Start reading at ``../estimator.py``.
"""

from implicitdiff.combinatorial.estimator import Estimator
from implicitdiff.combinatorial.estimators.adaptive_imle import AdaptiveIMLE
from implicitdiff.combinatorial.estimators.blackbox import Blackbox
from implicitdiff.combinatorial.estimators.fenchel_young import FenchelYoungLoss
from implicitdiff.combinatorial.estimators.identity import Identity
from implicitdiff.combinatorial.estimators.imle import IMLE
from implicitdiff.combinatorial.estimators.lpgd import LPGD
from implicitdiff.combinatorial.estimators.perturbed import Perturbed
from implicitdiff.combinatorial.estimators.spo_plus import SPOPlusLoss
from implicitdiff.combinatorial.estimators.straight_through import StraightThrough

__all__ = [
    "IMLE",
    "LPGD",
    "AdaptiveIMLE",
    "Blackbox",
    "Estimator",
    "FenchelYoungLoss",
    "Identity",
    "Perturbed",
    "SPOPlusLoss",
    "StraightThrough",
]

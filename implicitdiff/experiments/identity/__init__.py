"""The experiments of Sahoo et al., "Backpropagation through Combinatorial Algorithms: Identity with Projection Works".

In: names of families, seeds, a folder. Out: there, numbers as CSV, a page of tables, and figures of cost collapse.
`reproduce_identity` is what the command line calls; ``families/`` has one file for each experiment.
"""

from implicitdiff.experiments.identity.reproduce import FAMILIES, reproduce_identity

__all__ = ["FAMILIES", "reproduce_identity"]

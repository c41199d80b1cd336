"""The translation rules, one file per family of aten operations.

In: an aten operation with its arguments as `Value`s. Out: its `Value`. Importing this package registers all rules.
"""

from implicitdiff.graph.rules import create, gather, index, matmul, pointwise, reduce, view

__all__ = ["create", "gather", "index", "matmul", "pointwise", "reduce", "view"]

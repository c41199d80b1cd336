"""What the matrices of a problem are: the classification of H, A and S, and the record of it that `explain` prints."""

from implicitdiff.structure.report import Analysis, Fallback, MatrixReport

__all__ = ["Analysis", "Fallback", "MatrixReport"]

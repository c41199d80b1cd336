"""The demonstration, `implicitdiff demo` or `make demo`: explain two problems, compare backward passes, train.

Nothing comes in; reports and test accuracies go out. Reading order: main.py, digits.py, comparison.py, training.py.
"""

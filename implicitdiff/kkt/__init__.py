"""The KKT system: the formula (one copy), numbers, symbols, and the choice between the routes.

Start with `formula.py`; `route.py` decides, `symbolic.py` writes the solve as refs, `lowering.py` turns forms into
calls of operators and solvers, `saddle.py` is what the emitted code calls where a matrix has to be formed.
"""

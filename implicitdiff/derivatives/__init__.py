"""Derivatives of a traced problem: by automatic differentiation (exact, dense), and in structured form."""

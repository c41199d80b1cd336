"""The structured plan: answers about a problem by code emitted from its proved structure.

`plan.py` is the plan, `writer.py` writes and runs its functions, `outputs.py` says what each function computes,
`report.py` what was found.
"""

"""The paper's hand-written backward passes, kept as they were: the reference that never changes.

fig2.py is robust pooling, fig4.py optimal transport. They import nothing of the library.
"""

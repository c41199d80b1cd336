"""Published experiments, at sizes that one processor core reproduces in minutes.

In: names, seeds, a folder. Out: tables and figures. ``identity/`` is the one for discrete layers.
"""

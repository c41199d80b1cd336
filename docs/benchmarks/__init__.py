"""Benchmarks, `make bench`: what the derived backward passes cost beside hand-written ones and other libraries.

Reading order: work.py (what one benchmark is), works.py and byhand.py (the list of them), methods.py (what is
raced), race.py (how it is measured); then the reports: comparison.py, targets.py, growth.py, choice.py.
Tables and pictures are written by output.py and plots.py; __main__.py runs all of it.
"""

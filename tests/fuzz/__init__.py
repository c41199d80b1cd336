"""Random programs with a planted structure: scope.py and values.py write them, terms.py plants, generator.py
assembles.

check.py holds a plan against the dense formula, worker.py runs many programs in a process, test_fuzz.py
starts workers.
"""

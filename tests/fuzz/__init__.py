"""Random programs with a planted structure: scope.py and values.py write them, terms.py plants, generator.py
assembles.

check.py holds a plan against the dense formula, worker.py runs many programs in a process, campaign.py
starts workers and adds up (`make fuzz`), test_fuzz.py holds a small campaign to its goals.
"""

"""The tests, a package so that they can share oracles and cases by `from tests import ...`."""

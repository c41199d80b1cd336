"""Tests of the built-in problems: solutions, multipliers, penalties, and the hand-written gradients."""

"""Tests of the discrete half."""

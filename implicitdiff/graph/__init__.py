"""From the declared functions to aten graphs of one sample, and from those to the own representation.

Comes in: a Problem and its bound inputs. Goes out: a ``Trace``, then a ``Program``. Start with ``trace.py``,
go on with ``translate.py``.
"""

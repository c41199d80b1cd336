"""From the declared functions to aten graphs of one sample.

Comes in: a Problem and its bound inputs. Goes out: a ``Trace``. Start with ``trace.py``; ``skeleton.py`` and
``lines.py`` serve it.
"""

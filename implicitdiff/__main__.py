"""`python -m implicitdiff`, the same as the command `implicitdiff`.

Next: `cli/main.py`.
"""

from implicitdiff.cli import main

main()

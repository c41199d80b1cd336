"""The commands, one file each; see `cli/main.py`."""

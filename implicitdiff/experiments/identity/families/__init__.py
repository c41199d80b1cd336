"""One file per family."""

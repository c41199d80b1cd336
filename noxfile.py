"""Nox sessions: the tests with the pinned torch and with the oldest supported one, and the checks of `make lint`.

`nox` runs the tests and the checks as `make` does; `nox -s oldest` is for what may depend on the release of torch.
What follows `--` goes to pytest: `nox -s oldest -- tests/test_layer.py`.
"""

import os
import tempfile
from pathlib import Path

import nox

OLDEST_TORCH = "2.6.0"  # as in pyproject.toml: `torch>=2.6`
TORCH_OWN = ("torch", "sympy")  # a release of torch asks for one release of sympy
LINT = ("ruff check .", "ruff format --check .", "mypy", "lint-imports")

nox.options.sessions = ["tests", "lint"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, with the versions of constraints.txt."""
    session.install("-c", "constraints.txt", "-e", ".[demo,test]")
    _pytest(session)


@nox.session
def oldest(session: nox.Session) -> None:
    """All tests with the oldest torch.

    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the small build, without the CUDA libraries.
    """
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [pin for pin in pins if pin.partition("==")[0] not in TORCH_OWN]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join([*kept, f"torch=={OLDEST_TORCH}", ""]), encoding="utf-8")
        session.install("-c", str(constraints), "-e", ".[demo,test]")
    _pytest(session)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (rules and format), mypy, import-linter."""
    session.install("-c", "constraints.txt", "-e", ".[demo,test,lint]")
    for check in LINT:
        session.run(*check.split())


def _pytest(session: nox.Session) -> None:
    # More threads than cores make small tensors slower, as in the Makefile.
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    session.run("python", "-m", "pytest", *session.posargs, env={"OMP_NUM_THREADS": threads})

"""The tutorials run as a learner would run them; what they claim is asserted in them."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TUTORIALS = sorted((Path(__file__).resolve().parent.parent / "docs" / "tutorials").glob("*.py"))


@pytest.fixture(autouse=True)
def default_dtype_of_its_own() -> Iterator[None]:
    """A tutorial may set torch's default dtype for itself."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def run(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(path)
    assert capsys.readouterr().out.strip(), "a tutorial shows something"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_checks_what_it_says(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\nassert ") + source.count("assert_close(") >= 3


def test_a_false_claim_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("x = 1\nassert x == 2\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        run(path)

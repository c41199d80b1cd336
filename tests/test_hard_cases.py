"""Each row of the table of bad inputs and hard cases (tests/hard_cases.py) gives the error or the result promised."""

import pytest

from tests.hard_cases import ROWS, Hard


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_hard_case(row: Hard) -> None:
    if row.error is not None:
        with pytest.raises(row.error, match=row.words or None):
            row.run()
        return
    assert row.result is not None
    row.result(row.run())


def test_the_table_is_as_long_as_promised() -> None:
    names = [row.name for row in ROWS]
    assert len(names) >= 40
    assert len(set(names)) == len(names)
    assert all((row.error is None) != (row.result is None) for row in ROWS)

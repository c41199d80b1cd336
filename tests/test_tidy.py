"""Emitted statements while they are rewritten: what is written in place shares its memory with no other name."""

import ast
from collections.abc import Sequence

import torch
from torch import Tensor

from implicitdiff.graph.statements import Body, Shape, Statement
from implicitdiff.graph.tidy import _share, tidied
from implicitdiff.graph.trees import simplified

WHOLE = Shape(1, (3, 4), True)
ROW = Shape(1, (3,), True)
COLUMN = Shape(1, (4,), True)


def run(statements: Sequence[str], results: Sequence[str], **given: Tensor) -> list[Tensor]:
    """The results of a function with these statements."""
    body = "\n".join(f"    {line}" for line in [*statements, f"return [{', '.join(results)}]"])
    scope = {"torch": torch}
    exec(f"def f({', '.join(given)}):\n{body}", scope)
    found: list[Tensor] = scope["f"](**given)  # type: ignore[operator]
    return found


def draws() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for name in "abc"}


def body_of(lines: Sequence[tuple[str, str, bool]], results: Sequence[str]) -> Body:
    statements = [Statement(target, simplified(text), in_place) for target, text, in_place in lines]
    shapes = dict.fromkeys(("a", "b", "c", *(target for target, *_ in lines)), WHOLE)
    return Body(statements, [simplified(text) for text in results], shapes, ("a", "b", "c"), counter=9)


def test_what_a_value_written_in_place_begins_with_is_not_shared() -> None:
    """t1 = a * b is changed later: neither may t3 become t1, nor both be another name's memory."""
    lines = [("t1", "a * b", False), ("t1", "t1.add_(c)", True), ("t3", "a * b", False)]
    for order in (lines, [lines[0], lines[2], lines[1]], [lines[2], lines[0], lines[1]]):
        body = body_of(order, ["t1", "t3 * c", "c * 2.0"])
        _share(body, {"t1"})
        given = draws()
        a, b, c = given["a"], given["b"], given["c"]
        found = run([s.text for s in body.statements], [ast.unparse(r) for r in body.results], **given)
        for actual, expected in zip(found, (a * b + c, a * b * c, 2.0 * c), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-15)
        text = [s.text for s in body.statements]
        assert "t1 = a * b" in text
        assert "t3 = a * b" in text


def test_the_same_expression_elsewhere_is_shared() -> None:
    """The rule above is about what is written to: the shared product is one statement otherwise."""
    body = body_of([("t2", "(a * b).exp()", False), ("t3", "(a * b) + c", False)], ["t2", "t3"])
    _share(body)
    assert [s.text for s in body.statements] == ["t9 = a * b", "t2 = t9.exp()", "t3 = t9 + c"]


def tidied_run(lines: Sequence[tuple[str, str]], result: str, **given: Tensor) -> tuple[list[str], Tensor]:
    shapes = {
        "a": WHOLE,
        "b": WHOLE,
        "r": ROW,
        "q": COLUMN,
        "t1": WHOLE,
        "t2": WHOLE,
        "t3": WHOLE,
        "t4": WHOLE,
    }
    statements, results = tidied(lines, [result], shapes, tuple(given))
    text = [line.text for line in statements]
    return text, run(text, results, **given)[0]


def test_a_product_of_small_factors_is_added_without_being_made() -> None:
    """a large value takes the sum, also where it is subtracted; the outer product is formed inside addcmul_."""
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(2, *size, generator=generator)
        for name, size in (("a", (3, 4)), ("r", (3,)), ("q", (4,)))
    }
    outer = "r[..., :, None] * q[..., None, :]"
    for last, sign in (("t2 - t1", -1.0), ("t2 + t1", 1.0), ("t1 + t2", 1.0)):
        lines = [("t1", "a * q[..., None, :]"), ("t2", outer), ("t3", last)]
        # a second reading keeps t1 from moving inline
        text, found = tidied_run(
            [("t4", "a.exp()"), *[(t, e.replace("a *", "t4 *")) for t, e in lines]], "t3", **given
        )
        a, r, q = given["a"], given["r"], given["q"]
        torch.testing.assert_close(found, r[:, :, None] * q[:, None, :] + sign * a.exp() * q[:, None, :])
        assert any("addcmul_(r[..., :, None], q[..., None, :])" in line for line in text), text
        assert not any(line.endswith(f"= {outer}") for line in text), text


def test_a_difference_that_cannot_turn_its_sign_is_written_into_the_other_term() -> None:
    given = {name: torch.rand(2, 3, 4) + 0.5 for name in ("a", "b")}
    lines = [("t1", "a.exp()"), ("t2", "a * b"), ("t3", "t2 - t1")]
    text, found = tidied_run(lines, "t3", **given)
    torch.testing.assert_close(found, given["a"] * given["b"] - given["a"].exp())
    assert text == ["t1 = (a * b).sub_(a.exp())"] or text[-1].endswith("sub_(t1)"), text

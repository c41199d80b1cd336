"""Runs every Python snippet of the README and of docs/, and compares the output that the text shows.

The blocks marked `python` in one document run in order in one namespace, as a reader would type them. A block
marked `text` that directly follows a `python` block is what that block prints, character by character (blanks
at the ends of lines aside). Other blocks (`bash`, unmarked) are not touched.
"""

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """One `python` block: its source, the line where that starts, and the output shown for it, if any."""

    source: str
    line: int
    shown: str | None


def snippets(text: str) -> list[Snippet]:
    """The `python` blocks of a Markdown text, each with the `text` block that directly follows it."""
    found = []
    blocks = list(FENCE.finditer(text))
    for position, block in enumerate(blocks):
        if block[1] != "python":
            continue
        shown = None
        if position + 1 < len(blocks):
            follower = blocks[position + 1]
            if follower[1] == "text" and not text[block.end() : follower.start()].strip():
                shown = follower[2]
        found.append(Snippet(block[2], text.count("\n", 0, block.start(2)) + 1, shown))
    return found


def trimmed(text: str) -> list[str]:
    """The lines without the blanks at their ends, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run(path: Path, name: str) -> None:
    """Runs the snippets of one document in a module of their own.

    Args:
        path: The Markdown file. Each block is compiled under this name and padded to its line, so that a
            traceback, and a report that quotes the user's file, points into the document.
        name: The name of the module, already in `sys.modules`: classes defined in a snippet can then be
            copied and looked up like any other.
    """
    namespace = vars(sys.modules[name])
    for snippet in snippets(path.read_text(encoding="utf-8")):
        code = compile("\n" * (snippet.line - 1) + snippet.source, str(path), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if snippet.shown is not None:
            place = f"{path.name}, the output of the block at line {snippet.line}"
            assert trimmed(printed.getvalue()) == trimmed(snippet.shown), place


def documents() -> list[Path]:
    """The README and every page below docs/ that holds a Python snippet."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if snippets(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_run_and_print_what_is_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"snippets_of_{path.stem.replace('-', '_')}"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    run(path, name)


def test_readme_has_snippets() -> None:
    assert snippets((ROOT / "README.md").read_text(encoding="utf-8"))


def test_links_between_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setitem(sys.modules, "page", ModuleType("page"))
    page.write_text("```python\na = 1\n```\ntext\n\n```python\nprint(a + 1)\n```\n\n```text\n2\n```\n")
    run(page, "page")
    page.write_text("```python\nprint(1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match="line 2"):
        run(page, "page")

"""Diagnostics, the frame of every page: head, style sheet and script inside one file.

In: sections as HTML. Out: a whole document. Used by `page.py`, and by the reports of discrete layers.
"""

from collections.abc import Iterable
from functools import cache
from html import escape
from importlib.resources import files


def document(
    title: str, summary: str, top: str, sections: Iterable[tuple[str, str]], script: str = ""
) -> str:
    """One page; `title`, `summary` and the names of the sections are plain text, the rest is HTML."""
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{text}\n</section>" for name, text in sections)
    running = f"<script>\n{script}</script>\n" if script else ""
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<link rel='icon' href='data:,'>\n<title>{escape(title)}: implicit derivative</title>\n"
        f"<style>\n{asset('page.css')}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"<p class='summary'>{escape(summary)}</p>\n{top}\n{body}\n</main>\n{running}</body>\n</html>\n"
    )


def framed(page: str, height: int = 720) -> str:
    """The page inside a notebook's cell, where its style and script touch nothing else."""
    style = f"width: 100%; height: {height}px; border: 1px solid #d5dbe3; border-radius: 8px"
    return (
        f'<iframe title="implicitdiff report" srcdoc="{escape(page, quote=True)}" style="{style}"></iframe>'
    )


def rows(pairs: Iterable[tuple[str, str]]) -> str:
    """Rows of a table with a heading each, from plain texts."""
    return "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in pairs
    )


@cache
def asset(name: str) -> str:
    """A style sheet or script that lies beside this file."""
    return files("implicitdiff.diagnostics.page").joinpath(name).read_text(encoding="utf-8")

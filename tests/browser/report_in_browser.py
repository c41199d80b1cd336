"""The report in a real browser: `make test-browser`, which installs one. Not collected by `make test`.

Loads without console errors and without asking the network for anything, answers clicks and keys, fits a desktop and
a phone. Screenshots go to out/browser/.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright

import implicitdiff as idf
from implicitdiff.problems import OptimalTransport, RobustPooling

SHOTS = Path("out/browser")
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class Sorted(idf.Problem):
    """minimise over u |u - x|^2 + (the smallest u)^2"""

    def objective(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return ((u - x) ** 2).sum() + torch.sort(u)[0][0] ** 2

    def init(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


REPORTS = {
    "pooling": lambda: idf.explain(RobustPooling(), torch.rand(2, 4, 6)),
    "transport": lambda: idf.explain(OptimalTransport(), torch.rand(2, 4, 6)),
    "fallback": lambda: idf.explain(Sorted(), torch.rand(2, 9)),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = os.environ.get("BROWSER_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", REPORTS)
def test_page(browser: Browser, tmp_path: Path, name: str, size: str, scheme: str) -> None:
    source = tmp_path / f"{name}.html"
    source.write_text(REPORTS[name]().to_html(), encoding="utf-8")
    page = browser.new_page(viewport=SIZES[size], color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(source.as_uri())
    _expand(page)
    _explore(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"], (
        "wider than the screen"
    )
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}-{size}-{scheme}.png", full_page=True)
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def _expand(page: Page) -> None:
    """Every folded part opens."""
    for part in page.locator("details:not([open]) > summary").all():
        part.click()
    assert page.locator("details:not([open])").count() == 0


def _explore(page: Page) -> None:
    """A node says what it is, by mouse and by keyboard; the buttons zoom and come back."""
    node, facts = page.locator(".node.variable").first, page.locator("#facts")
    before = facts.inner_text()
    node.click()
    chosen = facts.inner_text()
    assert chosen != before
    assert "u" in chosen
    page.locator(".node.result").first.focus()
    assert facts.inner_text() != chosen
    drawing = page.locator("#network")
    whole = drawing.get_attribute("viewBox")
    page.locator("#closer").click()
    closer = drawing.get_attribute("viewBox")
    assert closer is not None
    assert whole is not None
    assert float(closer.split()[2]) < float(whole.split()[2])
    page.locator("#all").click()
    assert [float(k) for k in (drawing.get_attribute("viewBox") or "").split()] == [
        float(k) for k in whole.split()
    ]


def test_a_notebook_frame_shows_the_page(browser: Browser, tmp_path: Path) -> None:
    source = tmp_path / "notebook.html"
    source.write_text(f"<body>{REPORTS['pooling']()._repr_html_()}</body>", encoding="utf-8")
    page = browser.new_page(viewport=SIZES["desktop"])
    page.goto(source.as_uri())
    assert page.frame_locator("iframe").locator("h1").inner_text() == "RobustPooling"
    page.close()

"""The report as a page: what it draws is what the derivatives are, it is well formed, and it escapes every text."""

import html.parser
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import implicitdiff as idf
from implicitdiff.diagnostics.drawn import drawing_of
from implicitdiff.diagnostics.held import plan_of
from implicitdiff.diagnostics.page.network import network
from implicitdiff.graph.drawing import DrawnNode
from implicitdiff.problems import OptimalTransport, RobustPooling
from implicitdiff.structure.drawing import Pattern
from implicitdiff.torch_private import pytree

VOID = {"meta", "link"}


class Chain(idf.Problem):
    """Fast & more < than: minimise over u |u - x|^2 + |D u|^2 s.t. u_0 = u_3 and a weighted sum is fixed"""

    def objective(self, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return ((u - x) ** 2).sum() + ((u[1:] - u[:-1]) ** 2).sum()

    def equality(self, u: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return u[0] - u[3], (w * u).sum() - 1

    def init(self, x: Tensor, w: Tensor) -> Tensor:
        return x.clone()


class Pair(idf.Problem):
    """minimise over a, b a'a + |b|^4 + (sum a)(sum b), for a of 3 and b of 2 entries"""

    def objective(self, u: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        a, b = u
        return a.square().sum() + b.square().sum().square() + a.sum() * b.sum() + (x * a).sum()

    def init(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), torch.ones_like(x[:2])


class Sorted(idf.Problem):
    """minimise over u |u - x|^2 + (the smallest u)^2"""

    def objective(self, u: Tensor, x: Tensor) -> Tensor:
        smallest = torch.sort(u)[0][0]
        return ((u - x) ** 2).sum() + smallest**2

    def init(self, x: Tensor) -> Tensor:
        return x.clone()


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) + 0.1


CASES = {
    "pooling": (RobustPooling(), (draw(2, 4, 6),)),
    "transport": (OptimalTransport(), (draw(2, 3, 5),)),
    "chain": (Chain(), (draw(2, 7), draw(2, 7))),
    "pair": (Pair(), (draw(2, 3),)),
}


def patterns(problem: idf.Problem, inputs: tuple[Tensor, ...]) -> dict[str, Pattern]:
    found = drawing_of(plan_of(problem, inputs, 0).plan)
    return {pattern.name: pattern for pattern in found.patterns}


@pytest.mark.parametrize("name", CASES)
def test_patterns_are_those_of_the_derivatives(name: str) -> None:
    problem, inputs = CASES[name]
    one = tuple(tensor[0] for tensor in inputs)
    found = patterns(problem, inputs)
    # any point with u > 0 will do: the pattern holds everywhere
    u = pytree.tree_map(lambda leaf: leaf.double().abs() + 0.3, problem.init(*one))
    exact = idf.derivatives(problem, u, *one)
    for matrix, true in (("H", exact.H), ("A", exact.A)):
        if matrix in found:
            cells = torch.tensor(found[matrix].cells)
            assert not found[matrix].cropped
            assert cells.shape == true.shape
            assert torch.equal(cells > 0, true != 0), f"{matrix} of {name}"


def test_the_schur_complement_of_a_transport_plan() -> None:
    found = patterns(*CASES["transport"])["S"]
    expected = torch.ones(8, 8)
    expected[:3, :3], expected[3:, 3:] = torch.eye(3), torch.eye(5)
    assert torch.equal(torch.tensor(found.cells) > 0, expected > 0)
    assert found.blocks == (("diagonal", "full"), ("full", "diagonal"))
    assert found.kept == 3 + 15 + 5


def test_kept_numbers() -> None:
    pooling = patterns(*CASES["pooling"])["H"]
    assert dict(pooling.parts) == {"diagonal": 1, "low-rank factor": 24, "low-rank weights": 6}
    assert patterns(*CASES["transport"])["A"].kept == 0


def test_long_axes_are_cut_and_the_numbers_are_not() -> None:
    found = patterns(OptimalTransport(), (draw(1, 40, 60),))
    assert found["H"].cropped
    assert len(found["H"].cells) <= 36
    assert found["H"].kept == 2400
    assert len(found["A"].cells[0]) == len(found["H"].cells), "A and H cut the variable alike"


def test_every_use_is_an_edge_that_goes_down() -> None:
    nodes = drawing_of(plan_of(*CASES["transport"], 0).plan).nodes
    source = network(nodes)
    assert source.count("class='edge'") == sum(len(set(node.arguments)) for node in nodes)
    assert source.count("<g class='node ") == len(nodes)
    tops = {
        key: float(y)
        for key, y in re.findall(r"id='node-([^']+)'.*?<rect x='[-\d.]+' y='([-\d.]+)'", source, re.DOTALL)
    }
    assert all(tops[argument] < tops[node.key] for node in nodes for argument in node.arguments)


def test_nodes_say_what_their_derivative_is() -> None:
    nodes = {node.formula: node for node in drawing_of(plan_of(*CASES["pooling"], 0).plan).nodes}
    difference = nodes["u_j - x_ji"]
    assert difference.structure == "linear in u; D_u: one entry of u for each"
    assert difference.axes == "j = 4, i = 6"
    assert nodes["x_ji"].structure == "does not depend on the variables"


def test_an_operation_without_a_rule_is_marked_with_its_line() -> None:
    nodes = drawing_of(plan_of(Sorted(), (draw(2, 5),), 0).plan).nodes
    (marked,) = [node for node in nodes if node.role == "uncovered"]
    assert marked.title == "sort"
    assert "smallest = torch.sort(u)[0][0]" in marked.formula
    page = idf.explain(Sorted(), draw(2, 5)).to_html()
    assert "smallest = torch.sort(u)[0][0]" in page
    assert "No pattern is proved" in page


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", [*CASES, "sorted"])
def test_pages_are_well_formed_and_need_no_network(name: str) -> None:
    problem, inputs = CASES.get(name, (Sorted(), (draw(2, 5),)))
    found = idf.explain(problem, *inputs)
    page = found.to_html()
    parser = _Tags()
    parser.feed(page)
    assert parser.open == []
    assert found.solver in parser.text
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert "://" not in page


def test_texts_are_escaped() -> None:
    page = idf.explain(CASES["chain"][0], *CASES["chain"][1]).to_html()
    assert "& more < than" not in page
    assert "&amp; more &lt; than" in page
    hostile = DrawnNode("a'b", "operation", "<script>", "x' onload='y", "", "", ())
    assert "<script>" not in network([hostile])
    assert "x' onload" not in network([hostile])


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    frame = idf.explain(CASES["pair"][0], *CASES["pair"][1])._repr_html_()
    assert frame.startswith("<iframe")
    assert frame.count('"') % 2 == 0
    assert "&lt;!DOCTYPE html&gt;" in frame


def test_the_style_and_the_script_are_installed_with_the_package() -> None:
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    kept = settings["tool"]["setuptools"]["package-data"]["implicitdiff"]
    assert {f"diagnostics/page/*{suffix}" for suffix in (".css", ".js")} <= set(kept)

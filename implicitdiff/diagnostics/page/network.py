"""Diagnostics, the graph of the declared functions as SVG: inputs above, results below.

In: `DrawnNode`s. Out: SVG text, zoomed and dragged by `page.js`. Layers are topological generations; within a layer
nodes are sorted by where their neighbours lie (Sugiyama, Tagawa and Toda 1981, the barycentre method).
"""

from collections.abc import Sequence
from html import escape

import networkx as nx

from implicitdiff.graph.drawing import DrawnNode

_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 52, 18, 46, 16
_LETTER = 7.2  # width of a letter of the 12 px monospaced font
_SWEEPS = 6
_LANE = 10.0  # room for an edge that passes a layer


def network(nodes: Sequence[DrawnNode]) -> str:
    """The SVG; each node is a group that can be focused, with its facts as data attributes."""
    known = {node.key: node for node in nodes}
    chains, layers = _ordered(nodes)
    widths = {key: _width(known[key]) if key in known else _LANE for layer in layers for key in layer}
    total = max((sum(widths[k] + _GAP_X for k in layer) for layer in layers), default=0) + 2 * _MARGIN
    places: dict[str, tuple[float, float]] = {}
    for level, layer in enumerate(layers):
        x = (total - sum(widths[k] + _GAP_X for k in layer) + _GAP_X) / 2
        for key in layer:
            places[key] = (x + widths[key] / 2, _MARGIN + level * (_HEIGHT + _GAP_Y))
            x += widths[key] + _GAP_X
    height = 2 * _MARGIN + len(layers) * (_HEIGHT + _GAP_Y) - _GAP_Y
    edges = [_edge([places[key] for key in chain], chain[0], chain[-1]) for chain in chains]
    boxes = [_box(known[key], places[key], widths[key]) for layer in layers for key in layer if key in known]
    return (
        f"<svg id='network' class='network' viewBox='0 0 {total:.0f} {height:.0f}' "
        f"data-width='{total:.0f}' data-height='{height:.0f}' role='group' "
        "aria-label='graph of the declared functions'>"
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
        "orient='auto-start-reverse'><path d='M0 0 8 4 0 8z'/></marker></defs>"
        f"<g>{''.join(edges)}{''.join(boxes)}</g></svg>"
    )


def _ordered(nodes: Sequence[DrawnNode]) -> tuple[list[list[str]], list[list[str]]]:
    """(the chain of places that each edge goes through, the layers); a long edge has a lane in each layer it passes."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(node.key for node in nodes)
    graph.add_edges_from((argument, node.key) for node in nodes for argument in node.arguments)
    level = _levels(graph)
    last = max(level.values(), default=0)
    level.update({node.key: last for node in nodes if node.role == "result"})
    chains = []
    for start, end in list(graph.edges):
        lanes = [f"{start} to {end} at {k}" for k in range(level[start] + 1, level[end])]
        level.update({lane: level[start] + 1 + k for k, lane in enumerate(lanes)})
        chains.append([start, *lanes, end])
        graph.remove_edge(start, end)
        nx.add_path(graph, chains[-1])
    layers: list[list[str]] = [[] for _ in range(last + 1)]
    for key in graph.nodes:
        layers[level[key]].append(key)
    for sweep in range(_SWEEPS):
        near = graph.predecessors if sweep % 2 == 0 else graph.successors
        rank = {key: k / max(1, len(layer)) for layer in layers for k, key in enumerate(layer)}
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            where = {key: [rank[other] for other in near(key)] for key in layer}
            layer.sort(key=lambda key: sum(where[key]) / len(where[key]) if where[key] else rank[key])
            rank.update({key: k / max(1, len(layer)) for k, key in enumerate(layer)})
    return chains, layers


def _levels(graph: "nx.DiGraph[str]") -> dict[str, int]:
    """What is given stands just above its first use, not all of it in the first row."""
    level: dict[str, int] = {}
    for depth, layer in enumerate(nx.topological_generations(graph)):
        level.update(dict.fromkeys(layer, depth))
    for key in reversed(list(nx.topological_sort(graph))):
        uses = [level[use] for use in graph.successors(key)]
        if uses and not graph.in_degree(key):
            level[key] = max(0, min(uses) - 1)
    return level


def _width(node: DrawnNode) -> float:
    longest = max(len(node.title), len(_short(node.axes)), len(_tag(node)))
    return max(64.0, longest * _LETTER + 20)


def _short(text: str) -> str:
    return text if len(text) <= 26 else text[:25] + "…"


def _tag(node: DrawnNode) -> str:
    """The structure in two or three words, for the box."""
    if node.role in ("variable", "input", "tensor", "constant"):
        return {"input": "input", "variable": "variable", "tensor": "parameter"}.get(node.role, "constant")
    if "does not depend" in node.structure:
        return "constant in u"
    return _short(node.structure.partition("D_u: ")[2] or node.structure)


def _box(node: DrawnNode, place: tuple[float, float], width: float) -> str:
    middle, y = place
    x = middle - width / 2
    facts = " ".join(
        f"data-{name}='{escape(text, quote=True)}'"
        for name, text in (
            ("title", node.title),
            ("formula", node.formula),
            ("axes", node.axes),
            ("structure", node.structure),
            ("role", node.role),
        )
    )
    constant = " still" if "does not depend" in node.structure else ""
    return (
        f"<g class='node {node.role}{constant}' id='node-{escape(node.key, quote=True)}' tabindex='0' role='button' "
        f"aria-label='{escape(f'{node.title}: {node.structure}', quote=True)}' {facts}>"
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{_HEIGHT}' rx='6'/>"
        f"<text class='title' x='{middle:.1f}' y='{y + 17:.1f}'>{escape(node.title)}</text>"
        f"<text x='{middle:.1f}' y='{y + 32:.1f}'>{escape(_short(node.axes)) or 'scalar'}</text>"
        f"<text class='tag' x='{middle:.1f}' y='{y + 46:.1f}'>{escape(_tag(node))}</text></g>"
    )


def _edge(points: Sequence[tuple[float, float]], of: str, to: str) -> str:
    """A curve from the bottom of the first place to the top of the last, straight through the lanes between."""
    x, y = points[0][0], points[0][1] + _HEIGHT
    path = [f"M{x:.1f} {y:.1f}"]
    for k, (x1, top) in enumerate(points[1:], start=1):
        y1 = top - 1 if k == len(points) - 1 else top
        bend = (y1 - y) / 2
        path.append(f"C{x:.1f} {y + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}")
        if k < len(points) - 1:
            path.append(f"V{top + _HEIGHT:.1f}")
            x, y = x1, top + _HEIGHT
    return (
        f"<path class='edge' data-from='{escape(of, quote=True)}' data-to='{escape(to, quote=True)}' "
        f"d='{''.join(path)}' marker-end='url(#tip)'/>"
    )

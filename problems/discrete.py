"""Ready-made discrete problems: paths, matchings, tours, subsets and rankings, each a solver with example costs.

In: sizes. Out: solvers of ``implicitdiff.combinatorial``, for a `DiscreteLayer` with any estimator. They are what the
experiments of the identity paper are made of. Next: `robust_pooling.py`, for problems that are declared.
"""

import math

import torch
from torch import Tensor

from implicitdiff.combinatorial import TSP, Assignment, GridShortestPath, QuadraticAssignment, Ranking, TopK
from implicitdiff.errors import OptionError

EXAMPLES = 3


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TerrainPath(GridShortestPath):
    """min <w, y> over the paths from corner to corner of a map whose cells are terrains, w >= 0 the cost of a cell.

    The shortest paths of Vlastelica et al. (2020) and Sahoo et al. (2023), on maps that are drawn here: five terrains
    in smooth patches, with the costs of the published maps.

    Args:
        height, width: of the map, in cells.
    """

    COSTS = (0.8, 1.2, 5.3, 7.7, 9.2)

    def __init__(self, height: int = 12, width: int = 12) -> None:
        super().__init__(height, width)

    def maps(self, count: int, generator: torch.Generator) -> Tensor:
        """Terrains (count, height, width), whole numbers from 0 to 4: a blurred noise cut at its quintiles."""
        height, width = self.cell_counts
        home = generator.device
        noise = torch.randn(count, 1, height + 2, width + 2, generator=generator, device=home)
        smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1).flatten(1)
        cuts = torch.quantile(smooth, torch.linspace(0, 1, 6, device=home)[1:-1], dim=1)
        terrains = (smooth[None] > cuts[:, :, None]).sum(0)
        # Which terrain is common along the way is drawn anew for each map.
        order = torch.rand(count, 5, generator=generator, device=home).argsort(1)
        return order.gather(1, terrains).reshape(count, height, width)

    def true_costs(self, terrains: Tensor) -> Tensor:
        """The costs of terrains, at most 1."""
        table = torch.tensor(self.COSTS, device=terrains.device) / max(self.COSTS)
        return table[terrains]

    @property
    def cell_counts(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.cost_shape
        return int(height or 0), int(width or 0)

    def example(self) -> tuple[Tensor]:
        """The true costs of three maps."""
        return (self.true_costs(self.maps(EXAMPLES, _generator())),)


class KeypointMatching(Assignment):
    """min <W, Y> over the one-to-one matchings of the keypoints of two images, W (n, n) from their descriptors.

    Args:
        points: n.
    """

    def __init__(self, points: int = 8) -> None:
        if points < 1:
            raise OptionError(f"points={points} of KeypointMatching: expected a positive integer")
        super().__init__()
        self.cost_shape = (points, points)

    def example(self) -> tuple[Tensor]:
        """Minus the inner products of descriptors with noisy, permuted copies of themselves."""
        generator = _generator()
        points, home = int(self.cost_shape[0] or 0), generator.device
        seen = torch.randn(EXAMPLES, points, 6, generator=generator, device=home)
        again = seen + 0.5 * torch.randn(EXAMPLES, points, 6, generator=generator, device=home)
        order = torch.rand(EXAMPLES, points, generator=generator, device=home).argsort(1)
        return (-seen @ again.gather(1, order[:, :, None].expand_as(again)).mT,)


class GraphMatching(QuadraticAssignment):
    """min <w, y> over the matchings of two sets of n <= 8 points, with costs of pairs of points and pairs of edges.

    Every pair of points is an edge: once in the first set, in both directions in the second. Build w with `join`, and
    take Y out of a solution with `split`.

    Args:
        points: n.
    """

    def __init__(self, points: int = 5) -> None:
        both = [(i, j) for i in range(points) for j in range(points) if i != j]
        super().__init__(points, [(i, j) for i, j in both if i < j], both)

    def lengths(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The lengths of all edges, as edges of the first and of the second set; positions (*batch, n, d)."""
        found = []
        for edges in (self.first, self.second):
            tail, head = (positions[..., edges[:, end], :] for end in (0, 1))
            found.append(torch.linalg.vector_norm(head - tail, dim=-1))
        return found[0], found[1]

    def example(self) -> tuple[Tensor]:
        """Unary costs of noise, edge costs of differences in length between points and their permuted copies."""
        generator = _generator()
        home = generator.device
        order = torch.randperm(self.nodes, generator=generator, device=home)
        positions = torch.randn(EXAMPLES, self.nodes, 2, generator=generator, device=home)
        (first, _), (_, second) = self.lengths(positions), self.lengths(positions[:, order])
        unary = torch.randn(EXAMPLES, self.nodes, self.nodes, generator=generator, device=home)
        return (self.join(unary, (first[:, :, None] - second[:, None, :]).abs()),)


class GlobeTour(TSP):
    """min <w, y> over the round trips through n cities on the globe, w the lengths of all edges i < j.

    Args:
        cities: n >= 3.
    """

    def __init__(self, cities: int = 6) -> None:
        super().__init__(cities)

    def chords(self, positions: Tensor) -> Tensor:
        """Lengths (*batch, n (n - 1) / 2) of the straight lines between positions (*batch, n, 3), differentiable."""
        difference = positions[..., self.tail, :] - positions[..., self.head, :]
        return torch.linalg.vector_norm(difference, dim=-1)

    def example(self) -> tuple[Tensor]:
        """The chords between random places on the unit sphere."""
        generator = _generator()
        places = torch.randn(EXAMPLES, self.cities, 3, generator=generator, device=generator.device)
        return (self.chords(torch.nn.functional.normalize(places, dim=-1)),)


class SubsetSelection(TopK):
    """max <w, y> over the subsets of k of n: the words that explain a rating, the ones of a discrete code.

    Args:
        size: n.
        k: how many are selected.
    """

    def __init__(self, size: int = 12, k: int = 4) -> None:
        if not 1 <= k <= size:
            raise OptionError(f"k={k} of SubsetSelection: expected 1 <= k <= {size}")
        super().__init__(k, sense="max")
        self.cost_shape = (size,)

    def example(self) -> tuple[Tensor]:
        """Normal scores."""
        generator = _generator()
        size = int(self.cost_shape[0] or 0)
        return (torch.randn(EXAMPLES, size, generator=generator, device=generator.device),)


class RetrievalRanking(Ranking):
    """The ranks of n candidates by their scores, 1 for the best: min <w, y> over the permutations of 1..n.

    Args:
        size: n.
    """

    def __init__(self, size: int = 10) -> None:
        if size < 1:
            raise OptionError(f"size={size} of RetrievalRanking: expected a positive integer")
        super().__init__()
        self.cost_shape = (size,)

    def example(self) -> tuple[Tensor]:
        """Cosines of a query with random candidates."""
        generator = _generator()
        size = int(self.cost_shape[0] or 0)
        angles = math.pi * torch.rand(EXAMPLES, size, generator=generator, device=generator.device)
        return (torch.cos(angles),)


__all__ = [
    "GlobeTour",
    "GraphMatching",
    "KeypointMatching",
    "RetrievalRanking",
    "SubsetSelection",
    "TerrainPath",
]

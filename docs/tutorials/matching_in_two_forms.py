"""Matching in two forms: entropic optimal transport, differentiated implicitly, and assignment, by identity.

Run it with `python docs/tutorials/matching_in_two_forms.py`, or cell by cell in an editor that knows `# %%`. One
network learns to match descriptors of points; its last layer is either of the two halves of the library.
"""

import torch
from torch import Tensor, nn

import implicitdiff as idf
import implicitdiff.combinatorial as co
from implicitdiff.problems import OptimalTransport

# %% [markdown]
# # 1. The same question, twice
#
# n points are seen twice, each time through noise and in another order. A network turns what is seen into descriptors,
# the descriptors give costs M (n, n), and a solver says who belongs to whom:
#
#     assignment   Y(M) = argmin <M, Y>                       over permutation matrices,
#     transport    P(M) = argmin <M, P> + <P, log P - 1> / g  over doubly stochastic matrices (scaled by 1/n).
#
# The second is the first with an entropy term, which makes it smooth. For g to infinity the transport plan tends to the
# assignment.

POINTS, FEATURES, NUISANCE, TRAINING, TEST = 8, 6, 6, 240, 200
generator = torch.Generator().manual_seed(0)
mixing = torch.randn(FEATURES + NUISANCE, FEATURES + NUISANCE, generator=generator)


def scenes(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(first view, second view, true matching): views (count, n, FEATURES + NUISANCE), matching (count, n, n)."""
    truth = torch.randn(count, POINTS, FEATURES, generator=generator)
    order = torch.rand(count, POINTS, generator=generator).argsort(1)
    second = truth.gather(1, order[:, :, None].expand_as(truth))
    views = []
    for seen in (truth, second):
        noisy = seen + 0.3 * torch.randn(seen.shape, generator=generator)
        other = 2 * torch.randn(count, POINTS, NUISANCE, generator=generator)
        views.append(torch.cat((noisy, other), 2) @ mixing)
    matching = (
        nn.functional.one_hot(order, POINTS).float().mT
    )  # [i, j] = 1: the second view's j is the first's i
    return views[0], views[1], matching


train, test = scenes(TRAINING), scenes(TEST)


def descriptors() -> nn.Module:
    """The same network for both forms, from the same start."""
    torch.manual_seed(1)
    width = FEATURES + NUISANCE
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, FEATURES))


def costs(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """One minus the cosine of descriptors, (batch, n, n)."""
    first, second = (nn.functional.normalize(net(view), dim=2) for view in (a, b))
    return 1 - first @ second.mT


# %% [markdown]
# # 2. The implicit form
#
# Transport is declared by its objective and constraints. The library finds that H is diagonal, that the constraints are
# row and column sums, and solves Eqn. 3 with that structure: the gradient is exact.

transport = idf.DeclarativeLayer(OptimalTransport(gamma=10.0))
example = costs(descriptors(), train[0][:2], train[1][:2]).detach()
explained = idf.explain(OptimalTransport(gamma=10.0), example)
print(explained, "\n")
assert explained.hessian.kind == "diagonal"

# %% [markdown]
# # 3. The discrete form
#
# Assignment is a solver of SciPy's. Its derivative is zero almost everywhere, so there is nothing exact to compute: the
# backward pass is the negative identity, after a projection that takes out what cannot change the answer. A permutation
# has fixed row and column sums, so a constant added to a row or a column of M changes nothing; 2n - 1 directions.

assignment = co.DiscreteLayer(co.Assignment(), co.Identity(margin=co.Rademacher(0.1)))
discrete = idf.explain(assignment, example)
print(discrete, "\n")
assert discrete.proved
assert discrete.fixed == 2 * POINTS - 1
assert idf.check(assignment, example).ok

# %% [markdown]
# Both backward passes end in the same subspace: the gradient for M of either layer has row and column sums of zero.
# Transport knows it because a constant added to a row of M is taken up by that row's multiplier; identity because it
# was projected.

for layer in (transport, assignment):
    M = example.double().requires_grad_()
    chosen = torch.linspace(0, 1, M.numel(), dtype=M.dtype).reshape(M.shape).sin()
    (layer(M) * chosen).sum().backward()
    sums = torch.cat((M.grad.sum(1), M.grad.sum(2))).abs().max()
    print(f"gradient for M: largest entry {M.grad.abs().max():.2g}, largest row or column sum {sums:.2g}")
    assert sums < 1e-6 * M.grad.abs().max(), "both gradients are centred"

# %% [markdown]
# # 4. Training with each
#
# The loss is the squared difference to the true matching, the same for both; the plan has row sums 1/n, hence the
# factor.


def accuracy(net: nn.Module) -> float:
    """The share of points that assignment matches rightly on test scenes; both nets are used in the same way."""
    with torch.no_grad():
        found = co.Assignment()(costs(net, test[0], test[1]))
    return float((found * test[2]).sum() / test[2].sum())


def fit(layer: nn.Module, scale: float) -> nn.Module:
    """A network trained through a layer."""
    net = descriptors()
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(8):
        for batch in torch.arange(TRAINING).split(24):
            a, b, matching = (part[batch] for part in train)
            optimiser.zero_grad()
            (scale * layer(costs(net, a, b)) - matching).square().sum((1, 2)).mean().backward()
            optimiser.step()
    return net


before = accuracy(descriptors())
by_transport = accuracy(fit(transport, POINTS))
by_assignment = accuracy(fit(assignment, 1.0))
print(
    f"points matched rightly: untrained {before:.0%}, transport {by_transport:.0%}, assignment {by_assignment:.0%}"
)
assert by_transport > before + 0.2
assert by_assignment > before + 0.2

# %% [markdown]
# # 5. When to take which
#
# `compare` speaks of both. For transport it compares ways to the same, exact gradient: error and time. For assignment
# it compares replacements that differ: solver calls, and how far a step along each of them moves the solution.

print(idf.compare(OptimalTransport(gamma=10.0), example, backwards=("auto", "hand", "dense"), rounds=3), "\n")
compared = idf.compare(assignment, example, rounds=3)
print(compared)
assert compared.rows[0].calls == 1

# %% [markdown]
# Transport has an exact gradient, a temperature to choose, and a solution that is never a matching. Assignment has a
# matching at training time as at test time, one call of a solver, nothing to choose, and a gradient that is a direction
# rather than a derivative. Where the loss needs a decision (a cost of a discrete outcome, a solver without a smooth
# relative), take the second; where the value of a gradient matters (bilevel problems, sensitivities), the first.

"""Bilevel optimisation: hyperparameters learnt by gradient descent and by Newton's method through the solution.

Run it with `python docs/tutorials/bilevel.py`, or cell by cell in an editor that knows `# %%`. Two outer problems,
the ridge weights of a regression and the width alpha of a robust pooling; both need derivatives of an argmin.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, hessian, jvp

import implicitdiff as idf
from implicitdiff.problems import RobustPooling

torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# # 1. The ridge weights of a regression
#
# The inner problem fits coefficients u to training data, each with a ridge weight exp(w_k) of its own:
#
#     u(w) = argmin_u  |X u - y|^2 / 2  +  sum_k exp(w_k) u_k^2 / 2.
#
# The outer problem asks which w predicts best on data that the fit has not seen:
#
#     min_w  g(w) = |X_v u(w) - y_v|^2 / (2 n_v)  +  |w|^2 / 100,      averaged over the folds.
#
# The last term keeps the weight of a useless coefficient finite. The inner problem is declared for one sample,
# here one fold. That is all the layer needs.


class Ridge(idf.Problem):
    """minimise over u  |X u - y|^2 / 2 + sum_k exp(w_k) u_k^2 / 2"""

    def objective(self, u: Tensor, X: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return ((X @ u - y) ** 2).sum() / 2 + (w.exp() * u * u).sum() / 2

    def init(self, X: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(w)


# Ten features, of which three matter; four folds of 16 training and 12 validation rows each.
FOLDS, TRAINING, VALIDATION, FEATURES = 4, 16, 12, 10
coefficients = torch.zeros(FEATURES)
coefficients[:3] = torch.tensor([1.5, -2.0, 1.0])


def observed(rows: int) -> tuple[Tensor, Tensor]:
    """(X, y) of every fold, with noise on y."""
    X = torch.randn(FOLDS, rows, FEATURES, generator=generator)
    return X, X @ coefficients + torch.randn(FOLDS, rows, generator=generator)


X, y = observed(TRAINING)
X_v, y_v = observed(VALIDATION)

# The folds are the batch, the weights are shared by it: the gradient for w will be the sum over the folds.
fit = idf.DeclarativeLayer(Ridge(), in_dims=(0, 0, None))


def validation_loss(w: Tensor) -> Tensor:
    """g(w), by the layer."""
    u = fit(X, y, w)  # (folds, features)
    missed = (X_v @ u[:, :, None])[:, :, 0] - y_v
    return missed.square().mean() / 2 + w.square().sum() / 100


# %% [markdown]
# ## Is the gradient right, and the Hessian?
#
# This inner problem happens to have a closed form, which torch differentiates by itself. Derivatives of the layer
# come from the implicit function theorem instead: from the optimality condition at u(w), whatever found u.


def closed_form_loss(w: Tensor) -> Tensor:
    """g(w), with u = (X'X + diag exp w)^-1 X'y written out."""
    factor = torch.linalg.cholesky(X.mT @ X + torch.diag(w.exp()))
    u = torch.cholesky_solve(X.mT @ y[:, :, None], factor)
    missed = (X_v @ u)[:, :, 0] - y_v
    return missed.square().mean() / 2 + w.square().sum() / 100


start = torch.zeros(FEATURES)
torch.testing.assert_close(validation_loss(start), closed_form_loss(start))
torch.testing.assert_close(grad(validation_loss)(start), grad(closed_form_loss)(start))
torch.testing.assert_close(hessian(validation_loss)(start), hessian(closed_form_loss)(start))

# The Hessian times a direction alone costs a few solves with the same small matrix, never a Hessian in w.
direction = torch.randn(FEATURES, generator=generator)
product = jvp(grad(validation_loss), (start,), (direction,))[1]
torch.testing.assert_close(product, hessian(validation_loss)(start) @ direction)


# %% [markdown]
# ## Descent on the outer problem, twice
#
# Gradient descent sees slopes only, so a coefficient that hardly matters hardly moves. Newton's method divides by
# the curvature. Far from the minimum the outer Hessian need not be positive definite: its eigenvalues are then taken
# by magnitude. A step that does not lower g is halved.


def newton(loss: Callable[[Tensor], Tensor], at: Tensor, tolerance: float = 1e-10) -> tuple[Tensor, int]:
    """A stationary point of a function of a vector, and the number of steps to it."""
    for step in range(100):
        slope = grad(loss)(at)
        if slope.abs().max() < tolerance:
            return at, step
        curvature, axes = torch.linalg.eigh(hessian(loss)(at))
        move = -axes @ ((axes.mT @ slope) / curvature.abs().clamp_min(1e-6))
        here, length = loss(at), 1.0
        while length > 1e-8 and loss(at + length * move) > here + 1e-14:
            length /= 2
        at = at + length * move
    raise AssertionError("Newton's method did not arrive")


def descend(loss: Callable[[Tensor], Tensor], at: Tensor, rate: float, steps: int) -> Tensor:
    """Plain gradient descent: the layer inside a torch optimiser, as in any training loop."""
    parameter = torch.nn.Parameter(at.clone())
    optimiser = torch.optim.SGD([parameter], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(parameter).backward()
        optimiser.step()
    return parameter.detach()


DESCENT_STEPS = 60
by_newton, steps = newton(validation_loss, start)
by_gradient = descend(validation_loss, start, rate=2.0, steps=DESCENT_STEPS)

losses = [float(validation_loss(w)) for w in (start, by_gradient, by_newton)]
slopes = [float(grad(validation_loss)(w).abs().max()) for w in (start, by_gradient, by_newton)]
names = ("all equal to 1", f"{DESCENT_STEPS} gradient steps", f"{steps} Newton steps")
print("ridge weights           g(w)      largest slope")
for name, reached, left in zip(names, losses, slopes, strict=True):
    print(f"  {name:20s}  {reached:.6f}  {left:.1e}")

assert losses[2] < losses[0], "the learnt weights predict better than the first guess"
assert losses[2] <= losses[1] + 1e-9, "no worse than gradient descent"
assert steps < 25, "in a fraction of the steps"
assert slopes[2] < 1e-10, "and to rounding"
assert slopes[1] < slopes[0] / 10, "gradient descent is on its way to the same place"
assert torch.linalg.eigvalsh(hessian(validation_loss)(by_newton)).min() > 0, "which is a minimum"

# The weights tell what the data tell: features without influence are held at zero, the others are left alone.
assert by_newton[:3].max() < by_newton[3:].mean()

# %% [markdown]
# # 2. The width alpha of a robust pooling
#
# A cloud of points with outliers is pooled by the minimiser of sum_j 1 - exp(-|u - x_j|^2 / (2 alpha^2)). A small
# alpha ignores the outliers and, if too small, most of the points; a large one gives the mean. The best alpha depends
# on noise and outliers, so let clouds with known centres say. This inner problem has no closed form.

CLOUDS, POINTS, OUTLIERS = 24, 20, 6
centres = torch.randn(CLOUDS, 2, generator=generator)
clouds = centres[:, :, None] + 0.4 * torch.randn(CLOUDS, 2, POINTS, generator=generator)
clouds[:, :, :OUTLIERS] += 3 + torch.randn(CLOUDS, 2, OUTLIERS, generator=generator)  # all to one side

pool = idf.DeclarativeLayer(RobustPooling("welsch", alpha=None), in_dims=(0, None))


def pooling_error(log_alpha: Tensor) -> Tensor:
    """Mean squared distance to the centres; log_alpha (1,), so that alpha stays positive."""
    return (pool(clouds, log_alpha[0].exp()) - centres).square().sum(1).mean()


# %% [markdown]
# Slope and curvature of an argmin's error, held against differences of the solver itself.

wide = torch.tensor([0.8])
slope, curvature = grad(pooling_error)(wide)[0], hessian(pooling_error)(wide)[0, 0]
h = 1e-4
ahead, here, behind = (pooling_error(wide + t) for t in (h, 0.0, -h))
torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)
torch.testing.assert_close(curvature, (ahead - 2 * here + behind) / h**2, rtol=1e-4, atol=1e-5)

# %% [markdown]
# The same two methods as above. Newton's method only needs the function.

best, steps = newton(pooling_error, wide)
followed = descend(pooling_error, wide, rate=1.0, steps=40)

mean_error = float((clouds.mean(2) - centres).square().sum(1).mean())
errors = {
    "mean of the points": mean_error,
    f"alpha = {float(wide.exp()):.3f}": float(pooling_error(wide)),
    f"alpha = {float(followed.exp()):.3f}, 40 gradient steps": float(pooling_error(followed)),
    f"alpha = {float(best.exp()):.3f}, {steps} Newton steps": float(pooling_error(best)),
}
print("robust pooling                          error")
for name, error in errors.items():
    print(f"  {name:36s}  {error:.5f}")

assert pooling_error(best) < 0.5 * pooling_error(wide) < mean_error
assert grad(pooling_error)(best).abs().max() < 1e-10
assert hessian(pooling_error)(best)[0, 0] > 0
assert steps < 15
torch.testing.assert_close(followed, best, rtol=0.0, atol=0.05)

# %% [markdown]
# Both layers were differentiated twice without a word about it: `grad`, `hessian` and `jvp` of torch.func, and
# `backward()`, go through them as through any other operation. What was solved in the backward pass, and why:

print(idf.explain(fit.problem, X, y, start, in_dims=(0, 0, None)))

torch.set_default_dtype(torch.float32)

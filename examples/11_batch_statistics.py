"""11. Batch statistics: what is an example's gradient where there is none?

All scripts so far used that the loss is a mean of ℓ_n(θ), each of which depends on one example:
then the Fisher is a mean of squares of the examples' gradients. Batch normalisation subtracts the
mean of the batch and divides by its deviation, and that is no longer so.
"""

import numpy as np

from kfac_np import Dense, Exact, FullMatrix, Objective, Rng, Sequential, SquaredError, get_backend
from kfac_np.errors import ShapeError
from kfac_np.layers import BatchNorm
from kfac_np.products import ggn_product
from kfac_np.statistics import Scale
from kfac_np.trees import axpy, ravel, tree_map, unravel

backend = get_backend("numpy", "float64")
N = 6
net = Sequential(Dense(3, 4), BatchNorm(4), Dense(4, 2))
params = net.init(Rng(0), backend)
x, t = Rng(1).normal((N, 3), backend), Rng(2).normal((N, 2), backend)
objective = Objective(net, SquaredError())
e = objective.evaluate(params, x, t)

# ------------------------------------------------------------------------------------------------
# 1. Every example moves every output, and one example alone has no variance

other = x.copy()
other[0] += 1.0
moved = np.abs(net.forward(params, other)[0] - e.outputs).max(axis=1)
print("1. outputs when example 0 moves:", " ".join(f"{m:.2f}" for m in moved))
assert moved.min() > 0
try:
    net.forward(params, x[:1])
except ShapeError as error:
    print(f"     alone: {error}")

# ------------------------------------------------------------------------------------------------
# 2. The gradient of the batch's loss is an ordinary gradient, and `backward` goes through the
# statistics. Two things can be called the gradient of example n, and they are not the same:
#
#     the derivative of its loss ℓ_n, which goes through all examples' rows of the first layer
#     its rows of Σ g āᵀ, which come from all examples' losses: `per_example`

direction = tree_map(lambda w: Rng(3).normal(w.shape, backend), params)
ahead, behind = (objective.value(axpy(h, direction, params), x, t) for h in (1e-5, -1e-5))
slope = ravel(direction) @ ravel(e.gradient())
assert np.isclose((ahead - behind) / 2e-5, slope, rtol=1e-6)

g = e.output_gradient()
rows = e.backward(g)[0].per_example()  # (N, 4, 4), of the first layer
losses = np.stack([e.backward(g * (np.arange(N) == n)[:, None])[0].gradient() for n in range(N)])
assert np.allclose(rows.sum(axis=0), losses.sum(axis=0))
apart = np.linalg.norm(rows - losses) / np.linalg.norm(losses)
print(f"2. the two add up to the same gradient, and differ by {100 * apart:.0f} %")

# ------------------------------------------------------------------------------------------------
# 3. Curvature. F = (1/M) Σ JᵀBJ squares derivatives of loss terms, and those are of the first kind.
# The library therefore carries every term of the batch back on its own: N · 2 vectors, not 2.


def full(vectors, scale):
    """The whole matrix from some vectors."""
    statistics = e.backward(vectors)
    return FullMatrix().moments(statistics, scale)["full"]["matrix"]


(each,) = Exact().vectors(e, Rng(0))
F = full(each, e.scale)
products = [ggn_product(e, unravel(column, params)) for column in np.eye(len(F))]
assert np.allclose(F, np.stack([ravel(p) for p in products]))  # exact: J by jvp, no statistics

columns = np.stack([np.eye(2)[k] * np.ones((N, 1)) for k in range(2)])  # as if there were no norm
naive = full(columns, Scale(N, N))
error = np.linalg.norm(naive - F) / np.linalg.norm(F)
print(
    f"3. vectors backpropagated: {len(each)}; with rows taken for gradients F is off by {error:.0%}"
)
assert error > 0.1

# ------------------------------------------------------------------------------------------------
# 4. After training the statistics are frozen, to those of the training data. From then on examples
# are on their own again, and have gradients:

fixed = objective.evaluation(params, x)
assert np.allclose(fixed.network.forward(params, x[:1])[0], e.outputs[:1])
one, all_of_them = (fixed.evaluate(params, x[:n], t[:n]) for n in (1, N))
(alone,) = (s.gradient() for s in one.backward(one.output_gradient())[:1])
s = all_of_them.backward(all_of_them.output_gradient())[0]
assert np.allclose(alone, s.per_example()[0])
print(f"4. frozen: examples coupled? {e.scale.coupled} before, {all_of_them.scale.coupled} after")

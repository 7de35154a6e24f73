"""4. A natural gradient step: what it does that a gradient step cannot.

Gradient descent subtracts a multiple of ∇L from θ. The units do not even match: if a parameter is
measured in 1/metre, its derivative is in metres. Change the units and the path changes, although
the problem is the same. The natural gradient F⁻¹ ∇L is free of this. This script shows where that
shows, and why one must not take it too literally.
"""

import numpy as np

from kfac_np import (
    KFAC,
    SGD,
    BlockDiagonal,
    Dense,
    Exact,
    FullMatrix,
    KFACBlock,
    Logistic,
    Objective,
    Rng,
    Sequential,
    SoftmaxCrossEntropy,
    SquaredError,
    Tanh,
    get_backend,
)
from kfac_np.errors import DivergenceError
from kfac_np.optimizers import LevenbergMarquardt
from kfac_np.products import quadratic_forms
from kfac_np.trees import axpy, inner, scale, tree_map

random = np.random.default_rng(0)
backend = get_backend("numpy", "float64")


# ------------------------------------------------------------------------------------------------
# 1. A badly scaled valley
#
# Linear regression on three inputs that were measured in kilometres, metres and centimetres. The
# loss is a quadratic bowl, and its curvature in the three directions differs by a factor 10⁸.

N = 60
length = random.standard_normal((N, 3))  # what there is to be measured
x = length * np.asarray([0.01, 1.0, 100.0])
t = length @ np.asarray([[1.0], [2.0], [-1.0]])

regression = Objective(Dense(3, 1, bias=False), SquaredError())
start = np.zeros((1, 3))
at = regression.evaluate(start, x, t)

H = FullMatrix().estimate(at, Exact(), Rng(0))["full"]["matrix"]
curvatures = np.linalg.eigvalsh(H)
assert curvatures[-1] / curvatures[0] > 1e7

# Gradient descent must take steps short enough for the steepest direction, 2 / λ_max at most, and
# then hardly moves along the flattest:

rate = 1 / curvatures[-1]
theta, losses = start, []
for _ in range(1000):
    e = regression.evaluate(theta, x, t)
    losses.append(e.value)
    theta = axpy(-rate, e.gradient(), theta)

# The natural gradient divides by the curvature in every direction. On a quadratic bowl F is the
# Hessian, and one step of length 1 reaches the bottom, whatever the scales:

natural = FullMatrix().matrix({"full": {"matrix": H}}, start).solve(at.gradient())
after = regression.value(axpy(-1.0, natural, start), x, t)

print("1. linear regression, curvatures", ", ".join(f"{c:.0e}" for c in curvatures))
print(f"     at the start                     {losses[0]:.1e}")
print(f"     after 1000 gradient steps        {losses[-1]:.1e}")
print(f"     after 1 natural gradient step    {after:.1e}")
assert after < 1e-20
assert losses[-1] > 0.1 * losses[0]


# ------------------------------------------------------------------------------------------------
# 2. Steepest, measured in what?
#
# The gradient is the direction in which L falls fastest for a given length of the step, and length
# is √Σ δᵢ². The natural gradient measures a step by how far the model's *predictions* move: by the
# Kullback-Leibler divergence between the probabilities before and after. For short steps
#
#     KL(p_θ ‖ p_{θ+δ}) ≈ ½ δᵀ F δ
#
# which is where F comes from. A classifier, some direction δ, and shorter and shorter steps:

classify = Objective(Sequential(Dense(3, 5), Tanh(), Dense(5, 4)), SoftmaxCrossEntropy())
params = classify.network.init(Rng(1), backend)
inputs = random.standard_normal((N, 3))
e = classify.evaluate(params, inputs, random.integers(0, 4, N))


def log_softmax(z):
    """Logarithms of the probabilities."""
    return z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))


direction = tree_map(lambda w: random.standard_normal(w.shape), params)
bend = float(quadratic_forms(e, [direction])[0, 0])
print("\n2. KL divergence against ½ δᵀFδ\n     length          KL      ½ δᵀFδ    ratio")
for length_of_step in (1.0, 0.1, 0.01, 0.001):
    moved = axpy(length_of_step, direction, params)
    before = log_softmax(e.outputs)
    now = log_softmax(classify.network.forward(moved, inputs)[0])
    divergence = np.mean(np.sum(np.exp(before) * (before - now), axis=1))
    model = 0.5 * length_of_step**2 * bend
    print(
        f"     {length_of_step:6.3f}   {divergence:9.2e}   {model:9.2e}   {divergence / model:.4f}"
    )
assert abs(divergence / model - 1) < 0.01


# ------------------------------------------------------------------------------------------------
# 3. The same function in other coordinates
#
# Two networks that compute the same function. The first has tanh units. The second has logistic
# units, σ(u) = (1 + tanh(u/2)) / 2, hence tanh(s) = 2 σ(2s) - 1: double the first layer's weights,
# double the second layer's and move its bias, and nothing has changed but the coordinates. The
# second also gets its inputs in other units, and its first layer undoes it.


def step(objective, params, x, t, kind):
    """One step: plain gradient, or natural gradient by undamped K-FAC; the outputs after it."""
    e = objective.evaluate(params, x, t)
    direction = e.gradient()
    if kind == "K-FAC":
        curvature = BlockDiagonal(KFACBlock())
        moments = curvature.estimate(e, Exact(), Rng(0))
        factors, _ = curvature.factorise(moments, damping=0.0)
        direction = curvature.solve(factors, direction)
    return objective.network.forward(axpy(-0.1, direction, params), x)[0]


with_tanh = Objective(Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), SquaredError())
with_logistic = Objective(Sequential(Dense(3, 4), Logistic(), Dense(4, 2)), SquaredError())

x = random.standard_normal((N, 3))
t = random.standard_normal((N, 2))
units = np.asarray([0.1, 1.0, 30.0])

W1, _, W2 = with_tanh.network.init(Rng(2), backend)
V1 = 2 * np.concatenate([W1[:, :3] / units, W1[:, 3:]], axis=1)
V2 = np.concatenate([2 * W2[:, :4], W2[:, 4:] - W2[:, :4].sum(axis=1, keepdims=True)], axis=1)
one, other = (W1, (), W2), (V1, (), V2)

same = with_tanh.network.forward(one, x)[0]
assert np.allclose(with_logistic.network.forward(other, x * units)[0], same)

print("\n3. one step in two coordinate systems: how differently the outputs move")
differ = {}
for kind in ("gradient", "K-FAC"):
    moved = step(with_tanh, one, x, t, kind) - same
    moved_too = step(with_logistic, other, x * units, t, kind) - same
    differ[kind] = np.linalg.norm(moved_too - moved) / np.linalg.norm(moved)
    print(f"     {kind:8s}  {differ[kind]:9.1e}   of the movement")
assert differ["gradient"] > 1
assert differ["K-FAC"] < 1e-8

# The full natural gradient is unchanged by any change of coordinates, in the limit of small steps.
# K-FAC keeps the changes that matter most in practice: any invertible affine map of a layer's
# inputs and of its outputs. Choice of units, centring, whitening, tanh or logistic: all the same.
# (Not every relative of K-FAC does: EKFAC, whose eigenvalues fit better, does not keep units.)


# ------------------------------------------------------------------------------------------------
# 4. How far to believe it
#
# The step -F⁻¹ ∇L goes to the bottom of a quadratic model of L. Where F is nearly flat the bottom
# is far away, outside the region where the model means anything. Damping, F + λ I, keeps the step
# shorter in just those directions. Let ρ be what L really lost over what the model promised:

e = with_tanh.evaluate(one, x, t)
gradient = e.gradient()
full = FullMatrix()
moments = full.estimate(e, Exact(), Rng(0))
print("\n4. damping λ    length of step   promised      real        ρ")
rho = {}
for damping in (1e-6, 1e-4, 1e-2, 1.0):
    factors, _ = full.factorise(moments, damping)
    delta = scale(-1.0, full.solve(factors, gradient))
    form = float(quadratic_forms(e, [delta])[0, 0])
    squared = float(inner(delta, delta))
    promised = 0.5 * (form + damping * squared) + float(inner(gradient, delta))
    real = with_tanh.value(axpy(1.0, delta, one), x, t) - e.value
    rho[damping] = real / promised
    numbers = f"{squared**0.5:14.3f}  {promised:9.4f}  {real:9.4f}  {rho[damping]:8.3f}"
    print(f"   {damping:8.0e}    {numbers}")
assert rho[1e-6] < rho[1e-4] < 0 < rho[1e-2] < rho[1.0]
assert rho[1.0] > 0.75

# With little damping the promise is worthless. With much the step is short and L loses more than
# was promised (ρ tends to 2 as λ grows: the model counts ½ λ‖δ‖² as a cost, which it is not). The
# optimiser makes a rule of it (Levenberg and Marquardt): where ρ > 3/4 it lowers λ, where ρ < 1/4
# it raises it. The right λ is then found on the way, and changes as training goes on.


# ------------------------------------------------------------------------------------------------
# 5. All together
#
# Train a tanh network on a smooth function: once with inputs of equal scale, once in the units from
# above, starting from the same function. Gradient descent may choose its best rate for each of the
# two. K-FAC has its default settings, but for statistics of all examples, because these are few,
# and a small given λ at the start and no floor: both would be the mean curvature, or a part of it,
# which grows with the units.

objective = Objective(Sequential(Dense(3, 20), Tanh(), Dense(20, 1)), SquaredError())
x = random.standard_normal((200, 3))
t = np.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:]
equal = objective.network.init(Rng(3), backend)
unequal = (equal[0] / np.append(units, 1.0), *equal[1:])  # the last column is the bias
STEPS = 100


def train(optimizer, params, x):
    """The loss after so many steps on the full batch."""
    state = optimizer.init(params)
    for _ in range(STEPS):
        state, _ = optimizer.step(state, x, t)
    return objective.value(state.params, x, t)


def best_descent(params, x):
    """Gradient descent at its best rate."""
    losses = []
    for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1):
        try:
            losses.append(train(SGD(objective, rate, momentum=0.0), params, x))
        except DivergenceError:  # that rate was too much; the library says so
            continue
    return min(losses)


damping = LevenbergMarquardt(initial=0.01, floor=0.0)
kfac = KFAC(objective, damping=damping, statistics_fraction=1.0)
results = {
    "gradient descent": [best_descent(equal, x), best_descent(unequal, x * units)],
    "K-FAC": [train(kfac, equal, x), train(kfac, unequal, x * units)],
}
before = objective.value(equal, x, t)
assert np.isclose(before, objective.value(unequal, x * units, t))
print(f"\n5. {STEPS} steps             equal units   unequal units")
print(f"     loss at the start  {before:11.2e} {before:15.2e}")
for name, (first, second) in results.items():
    print(f"     {name:18s} {first:11.2e} {second:15.2e}")
assert max(results["K-FAC"]) < 0.2 * min(results["gradient descent"])

# (The two numbers of K-FAC are not the same, because λI is not the same in all coordinates.)

"""12. Uncertainty: how sure is a network where it has seen nothing?

A trained network gives a number for every input, also for those that are like none it was trained
on, and no sign that it is guessing. The curvature that K-FAC trains with knows better: along
directions of the parameters without curvature, the data have nothing to say.

    python examples/12_how_sure_is_a_network.py [--plot FILE.png]
"""

import argparse
import importlib.util

import numpy as np

from kfac_np import (
    KFAC,
    BlockDiagonal,
    Dense,
    FullMatrix,
    Objective,
    Rng,
    Sequential,
    SoftmaxCrossEntropy,
    SquaredError,
    Tanh,
    get_backend,
)
from kfac_np.applications import Laplace, fit_curvature
from kfac_np.curvature import EKFAC, DiagonalBlock

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--plot", metavar="FILE", help="draw bands and probabilities (needs matplotlib)"
)
options = parser.parse_args()
backend = get_backend("numpy", "float64")

# ------------------------------------------------------------------------------------------------
# 1. One weight, by hand
#
# For t = w x + noise of deviation σ and a prior N(0, 1/δ) on w, Bayes' rule is a line: w is
# Gaussian, of precision P = Σ x²/σ² + δ. The first term is the curvature of the sum of the losses.

x, t = np.asarray([[1.0], [2.0]]), np.asarray([[1.1], [1.9]])
line = Objective(Dense(1, 1, bias=False), SquaredError())
sigma, delta = 0.1, 4.0
P = (1.0**2 + 2.0**2) / sigma**2 + delta
w = np.asarray([[(1.0 * 1.1 + 2.0 * 1.9) / sigma**2 / P]])
fit = fit_curvature(line, w, [(x, t)], FullMatrix())
by_hand = Laplace(line, fit, prior_precision=delta, noise=sigma)
prediction = by_hand.predict(np.asarray([[10.0]]))
assert np.isclose(prediction.output_variance[0, 0], 10.0**2 / P)
assert np.isclose(prediction.variance[0, 0], 10.0**2 / P + sigma**2)
print(f"1. at x = 10: {prediction.mean[0, 0]:.2f} ± {prediction.variance[0, 0] ** 0.5:.2f}")

# For a network the same formula, with its Gauss-Newton matrix at the trained parameters for Σ x²,
# is Laplace's approximation. It is what Bayes' rule says of the network *linearised* there.

# ------------------------------------------------------------------------------------------------
# 2. A curve with a gap in the data


def curve(x):
    return np.sin(1.6 * x) + 0.3 * x


draws = np.random.default_rng(0)
x = np.concatenate([draws.uniform(-4.0, -1.2, 40), draws.uniform(1.4, 3.6, 30)])[:, None]
t = curve(x) + 0.2 * draws.standard_normal(x.shape)
N = len(x)
objective = Objective(Sequential(Dense(1, 30), Tanh(), Dense(30, 1)), SquaredError())


def trained(objective, x, t, l2, steps):
    """By K-FAC with its defaults, all data in every step."""
    optimizer = KFAC(objective, l2=l2)
    state = optimizer.init(objective.network.init(Rng(1), backend))
    for _ in range(steps):
        state, _ = optimizer.step(state, x, t)
    return state.params


# A prior of precision δ is an ℓ2 term δ σ²/N: here δ is 1, and σ taken to be 0.2.

params = trained(objective, x, t, 0.2**2 / N, 150)
residual = np.sqrt(2 * objective.value(params, x, t))
print(f"2. {N} points with noise of 0.2; residuals of {residual:.2f}")

# ------------------------------------------------------------------------------------------------
# 3. Neither δ nor σ need be known: the marginal likelihood p(data | δ, σ), of which the posterior
# is a part, is largest where they fit the data. It has a single maximum, and `tuned` is there.

fit = fit_curvature(objective, params, [(x, t)], FullMatrix())
tuned = Laplace(objective, fit, prior_precision=1.0, noise=1.0).tuned()
print("3. log p(data | δ, σ)          σ = 0.10      0.20      0.40")
for delta in (0.01, 0.1, 1.0, 10.0):
    row = [Laplace(objective, fit, delta, s).log_marginal_likelihood for s in (0.1, 0.2, 0.4)]
    print(f"     δ = {delta:<18}" + "".join(f"{value:10.1f}" for value in row))
    assert max(row) <= tuned.log_marginal_likelihood
print(
    f"     best: δ = {tuned.prior_precision:.3f}, σ = {tuned.noise:.3f}:"
    f"   {tuned.log_marginal_likelihood:.1f}"
)

# ------------------------------------------------------------------------------------------------
# 4. Bands: narrow at the data, wide in the gap and outside

print("4. deviation of the curve at      x =   -2.5   0.0   2.5   6.0     log p(data)")
places = np.asarray([[-2.5], [0.0], [2.5], [6.0]])
for name, curvature in {
    "full": FullMatrix(),
    "K-FAC": BlockDiagonal(),
    "EKFAC": EKFAC(),
    "diagonal": BlockDiagonal(DiagonalBlock()),
}.items():
    fitted = fit_curvature(objective, params, [(x, t)], curvature)
    posterior = Laplace(objective, fitted).tuned()
    deviations = posterior.predict(places).output_variance[:, 0] ** 0.5
    if name != "diagonal":
        assert deviations[1] > 2 * max(deviations[0], deviations[2])
    print(
        f"     {name:30}"
        + "".join(f"{d:6.2f}" for d in deviations)
        + f"{posterior.log_marginal_likelihood:16.1f}"
    )

# ------------------------------------------------------------------------------------------------
# 5. Why not draw weights, and run the network with them?
#
# Because the Gaussian is wide where the data are silent, and the network is not linear that far
# out: at the data themselves, where every good network is right, the drawn ones are wrong.

grid = np.linspace(-6.0, 6.0, 241)[:, None]
networks = [tuned.sample(Rng(0).child(i)) for i in range(200)]
drawn = np.stack([objective.network.forward(theta, grid)[0][:, 0] for theta in networks])
at_data = np.stack([objective.network.forward(theta, x)[0] for theta in networks])
spread = np.sqrt(((at_data - t) ** 2).mean(axis=(1, 2)))
linear = np.sqrt(tuned.predict(x).output_variance.mean())
print(f"5. at the data the linearised network is off by {linear:.2f} (one deviation)")
print(f"     networks of drawn weights by {np.median(spread):.2f} (median of 200)")
assert np.median(spread) > 2 * linear

# ------------------------------------------------------------------------------------------------
# 6. Classes: a confident network is confident everywhere

angle = draws.uniform(0, np.pi, 120)
side = np.arange(120) % 2
moons = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (1 - 2 * side)[:, None]
moons += np.stack([side - 0.5, 0.25 * (2 * side - 1) * -1], axis=1) * [1.0, -1.0]
moons += 0.12 * draws.standard_normal(moons.shape)
classifier = Objective(Sequential(Dense(2, 20), Tanh(), Dense(20, 2)), SoftmaxCrossEntropy())
theta = trained(classifier, moons, side, 1.0 / 120, 60)
classes = Laplace(
    classifier, fit_curvature(classifier, theta, [(moons, side)], FullMatrix())
).tuned()
far = np.asarray([[-6.0, 6.0], [6.0, 6.0]])
before, after = (classes.predict(far, link=link).mean.max(axis=1) for link in ("map", "probit"))
print("6. confidence at two points far from all data")
print("     network  ", "  ".join(f"{p:.3f}" for p in before))
print("     posterior", "  ".join(f"{p:.3f}" for p in after))
assert (after < before).all()


def draw(path):
    """Bands of the curve, what drawn weights make of it, and probabilities of the classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 8.2), layout="constrained")
    (bands, samples), planes = figure.subplots(2, 2)
    p = tuned.predict(grid)
    mean, f, total = p.mean[:, 0], p.output_variance[:, 0] ** 0.5, p.variance[:, 0] ** 0.5
    for widths, shade, label in ((2 * total, 0.2, "and noise"), (2 * f, 0.4, "of the curve")):
        low, high, look = mean - widths, mean + widths, {"color": "#3f7fbf", "linewidth": 0}
        bands.fill_between(
            grid[:, 0], low, high, alpha=shade, label=f"2 deviations {label}", **look
        )
    for line in drawn[:25]:
        samples.plot(grid[:, 0], line, color="#c1272d", alpha=0.4, linewidth=0.8)
    for axes, title in (
        (bands, "the linearised network"),
        (samples, "25 networks of drawn weights"),
    ):
        axes.plot(grid[:, 0], curve(grid[:, 0]), color="0.4", linestyle=":", label="the truth")
        axes.plot(grid[:, 0], mean, color="black", linewidth=1.4, label="the trained network")
        axes.scatter(x[:, 0], t[:, 0], s=9, color="black", zorder=3)
        axes.set(xlim=(-6, 6), ylim=(-5, 5), title=title)
    bands.legend(fontsize=8, loc="upper left")
    ticks = np.linspace(-4.0, 4.0, 121)
    points = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    for axes, (title, link) in zip(
        planes, {"the trained network": "map", "the posterior": "probit"}.items(), strict=True
    ):
        probability = classes.predict(points, link=link).mean[:, 1].reshape(121, 121)
        levels = np.linspace(0.0, 1.0, 11)
        shown = axes.contourf(ticks, ticks, probability, levels, cmap="RdBu_r", alpha=0.9)
        for k, marker in ((0, "o"), (1, "s")):
            axes.scatter(*moons[side == k].T, s=9, color="black", marker=marker)
        axes.set_title(f"probability of the squares' class: {title}")
    figure.colorbar(shown, ax=planes, shrink=0.9)
    figure.savefig(path, dpi=110)


if options.plot and importlib.util.find_spec("matplotlib"):
    draw(options.plot)
    print("wrote", options.plot)

# Exercises
#
# 1. `fit.select(["2"])` is a posterior of the last layer alone. Draw its bands. Where are they as
#    wide as those of all layers, where not, and why can they not open in the gap as these do?
# 2. Give the weights and the biases of the first layer prior precisions of their own (an array for
#    path "0"), and find by `log_marginal_likelihood` which of them should be larger. What does that
#    say about the places where the tanh units bend?

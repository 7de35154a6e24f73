"""13. Which training images does this mistake come from?

A network takes a 1 for a 0. Some training images made it so, and others nearly prevented it. To
find out which, one could take each image away in turn and train again: as many trainings as there
are images. Influence functions answer from one: a gradient for each image, and a curvature.

    python examples/13_where_a_mistake_comes_from.py [--plot FILE.png]
"""

import argparse
import importlib.util

import numpy as np

from kfac_np import Adam, Dense, Objective, Rng, Sequential, SoftmaxCrossEntropy, Tanh, get_backend
from kfac_np.applications import Influence, MeanEigenvalue, extremes, fit_curvature, leave_one_out
from kfac_np.curvature import FullMatrix
from kfac_np.data import digits
from kfac_np.figures.influential import Panel, Row, draw_influential
from kfac_np.losses import SquaredError

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--plot", metavar="FILE", help="draw the images (needs matplotlib)")
options = parser.parse_args()

backend = get_backend("numpy", "float64")
random = np.random.default_rng(0)

# ------------------------------------------------------------------------------------------------
# 1. Where the answer can be checked: linear regression
#
# θ is the minimum of L(θ) = (1/N) Σ ℓ_t(θ) + (η/2)‖θ‖². Without example t the gradient at θ is
# -g_t / N, no longer 0, and a step of Newton's method from there is + B⁻¹ g_t / N, where B is the
# Hessian of L. The loss of a query q has gradient g_q at θ, and so changes by about
#
#     + g_qᵀ B⁻¹ g_t / N.
#
# A positive score means: without t the loss of q would be higher, so t helps.

N, eta = 40, 0.01
x = random.standard_normal((N, 3))
t = x @ np.asarray([[1.0], [-2.0], [0.5]]) + random.standard_normal((N, 1))
phi = np.hstack([x, np.ones((N, 1))])


def minimum(kept):
    """The minimum without some examples; the others keep their weight of 1/N."""
    B = phi[kept].T @ phi[kept] / N + eta * np.eye(4)
    return np.linalg.solve(B, phi[kept].T @ t[kept] / N).T


regression = Objective(Dense(3, 1), SquaredError())
theta = minimum(np.arange(N))
fit = fit_curvature(regression, theta, [(x, t)], FullMatrix())
influence = Influence(regression, fit, damping=eta)  # the weight decay is part of B
query = x[:1], t[:1]

scores = influence.scores(query, (x, t))[0] / N
newton = leave_one_out(influence, query, (x, t))[0]
again = [
    regression.value(minimum(np.delete(np.arange(N), i)), *query) - regression.value(theta, *query)
    for i in range(N)
]
print("1. Linear regression: change of a query's loss without an example")
print("   example   trained again   leave_one_out   score / N")
for i in (0, 1, 2):
    print(f"   {i:7}   {again[i]:13.5f}   {newton[i]:13.5f}   {scores[i]:9.5f}")
assert np.allclose(newton, again, rtol=1e-9, atol=1e-12)

# Scores are of first order: they leave out that B itself loses the example, and that a loss is not
# straight. For an example among 40 that matters, for one among 10,000 hardly. `leave_one_out` does
# not leave it out, and is exact for linear regression.
assert np.corrcoef(scores, again)[0, 1] > 0.99

# ------------------------------------------------------------------------------------------------
# 2. A network, and thirty wrong labels
#
# A real mistake has a reason. We plant some: 30 of 500 images get another label.

data = digits()
x, t = backend.asarray(data.x_train[:500]), backend.asarray(data.t_train[:500])
x_test, t_test = backend.asarray(data.x_test), backend.asarray(data.t_test)
planted = random.choice(500, 30, replace=False)
t[planted] = (t[planted] + random.integers(1, 10, 30)) % 10

objective = Objective(Sequential(Dense(64, 20), Tanh(), Dense(20, 10)), SoftmaxCrossEntropy())
eta = 1e-3


def trained(kept):
    """Parameters after training on some of the images, always from the same start."""
    adam = Adam(objective, rate=0.03, l2=eta)
    state = adam.init(objective.network.init(Rng(0), backend))
    for _ in range(150):
        state, _ = adam.step(state, x[kept], t[kept])
    return state.params


def outputs(params):
    """What the network says of the test images, and its losses."""
    z, _ = objective.network.forward(params, x_test, None)
    return z.argmax(axis=1), objective.loss.value(z, t_test)


everything = np.arange(500)
params = trained(everything)
predicted, losses = outputs(params)
mistakes = np.flatnonzero(predicted != t_test)
print(f"\n2. 500 images, 30 with a wrong label: {len(mistakes)} of {len(t_test)} test images wrong")

# ------------------------------------------------------------------------------------------------
# 3. From the mistake to the images
#
# B is 1,510 × 1,510 here, but K-FAC is what one would take for a network of any size. It is damped
# by a tenth of each layer's mean eigenvalue.

fit = fit_curvature(objective, params, [(x, t)])
influence = Influence(objective, fit, MeanEigenvalue(0.1))
asked = mistakes[:5]
scores = influence.scores((x_test[asked], t_test[asked]), (x, t))
found = extremes(scores, 10)

# Is it true? Train without the ten most harmful images of a query, without the ten most helpful
# ones, and without ten of any kind.

print("\n3. loss of a mistake    as it is   without its 10    its 10       10 random")
print("                                   most harmful    most helpful    images")
removed = random.choice(500, 10, replace=False)
at_random = outputs(trained(np.setdiff1d(everything, removed)))[1]
table = []
for q, test in enumerate(asked[:3]):
    without = [outputs(trained(np.setdiff1d(everything, some[q])))[1][test] for some in found]
    table.append((losses[test], without[1], without[0], at_random[test]))
    name = f"a {t_test[test]}, taken for {predicted[test]}"
    print(f"   {name:19s} {table[-1][0]:9.2f} {table[-1][1]:16.2f} {table[-1][2]:15.2f}"
          f" {table[-1][3]:9.2f}")  # fmt: skip
now, less_harm, less_help, any_ten = np.asarray(table).mean(axis=0)
assert less_harm < 0.5 * min(now, any_ten)
assert less_help > 2.0 * max(now, any_ten)

# ------------------------------------------------------------------------------------------------
# 4. Images that a fit depends on for themselves
#
# g_tᵀ B⁻¹ g_t is the self-influence: how much the loss of an image rises when it is left out. It is
# large for images that nothing else speaks for. Among those are the wrong labels.

own = influence.self_influence((x, t))
suspects = extremes(own, 30).helpful
caught = np.isin(suspects, planted).sum()
print(f"\n4. Of the 30 images with the largest self-influence {caught} have a planted label")
assert caught >= 20


# ------------------------------------------------------------------------------------------------
# 5. Look at them


def draw(path):
    """Mistakes beside their most helpful and most harmful training images."""
    image = data.image_shape
    rows = []
    for q, test in enumerate(asked):
        said = f"{t_test[test]}, taken for {predicted[test]}\nloss {losses[test]:.2f}"
        panels = [
            [
                Panel(
                    x[i].reshape(image),
                    f"{t[i]}{' (planted)' if i in planted else ''}: {scores[q, i] / 500:+.2g}",
                )
                for i in some[q, :4]
            ]
            for some in found
        ]
        rows.append(Row(Panel(x_test[test].reshape(image), said), *panels))
    draw_influential(rows, "500 digits, 30 with a wrong label").savefig(path, dpi=110)


if options.plot and importlib.util.find_spec("matplotlib"):
    draw(options.plot)
    print("wrote", options.plot)

# ------------------------------------------------------------------------------------------------
# Exercises
#
# a. Replace K-FAC in part 3 by no curvature at all: with `damping=1e6` B is as good as a multiple
#    of I, and scores are products of gradients. Which images come out on top now, and what does
#    training without them do? (Look at the lengths of their gradients.)
# b. Scores for the sum of all test losses are the sum of the scores: `scores.sum(axis=0)` with all
#    test images as queries. Take away the 30 most harmful images by this sum, train again, and
#    compare the number of mistakes with that after taking away the 30 images of part 4.

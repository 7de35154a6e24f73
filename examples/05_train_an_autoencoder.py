"""5. Train an autoencoder: K-FAC, SGD and Adam, for the same number of steps and the same seconds.

An autoencoder squeezes an image through a narrow layer, the code, and tries to restore it. Deep
ones are hard for gradient descent: the layers near the code pass derivatives of very different
sizes. They are what K-FAC was first shown on. Here 64 pixels go through a code of 6 numbers.

    python examples/05_train_an_autoencoder.py [--quick] [--plot FILE.png]

The demo of this project (`make demo`) does the same with larger images and a deeper network.
"""

import argparse
import importlib.util

import numpy as np

from kfac_np import KFAC, SGD, Adam, Rng, describe, get_backend
from kfac_np.data import ConstantBatch, digits
from kfac_np.training.loop import Supply, start, train
from kfac_np.training.models import autoencoder
from kfac_np.training.plots import plot_images

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--quick", action="store_true", help="a few steps only")
parser.add_argument("--plot", metavar="FILE", help="draw reconstructions (needs matplotlib)")
options = parser.parse_args()
STEPS = 15 if options.quick else 200


# ------------------------------------------------------------------------------------------------
# 1. Data, network, loss
#
# The package brings 1797 handwritten digits of 8 × 8 pixels. Data live on the host, as NumPy
# arrays. A backend says where the computation happens and in which precision; `asarray` moves them
# there. (With "cupy" in place of "numpy" the rest of this script would run on a GPU.)

data = digits()
backend = get_backend("numpy", "float32")
x = backend.asarray(data.x_train)
x_test = backend.asarray(data.x_test)
print(data)

# The inputs are the targets. A pixel in [0, 1] is taken as a probability, and the loss is the
# sigmoid cross-entropy, summed over the pixels and averaged over the images. Hidden units are
# logistic, the code is linear, and the initial weights are sparse: all as published.

objective = autoencoder((64, 32, 16, 6))

# Which layers are there, what curvature does each get, and what does it cost?

kfac = KFAC(objective)
params = objective.network.init(Rng(0), backend)
print(describe(objective.network, params, kfac.curvature, (64,)))


# ------------------------------------------------------------------------------------------------
# 2. One step of K-FAC, looked at closely
#
# An optimiser is a frozen bundle of settings. Its state is a value like any other: `step` takes one
# and returns the next, together with a report of what happened.

state = kfac.init(params)
next_state, report = kfac.step(state, x[:500, :], x[:500, :])
print("\none step of K-FAC")
print(f"     loss before the step         {report.loss:8.2f}")
print(f"     λ, and γ of the factors      {report.damping:8.2f} {report.gamma:8.2f}")
print(f"     length α along the proposal  {report.alpha:8.2f}")
print(f"     the quadratic model promised {report.model_decrease:8.2f}")
print(f"     layers refreshed             {', '.join(report.refreshed)}")
print(
    f"     loss after the step          {objective.value(next_state.params, x[:500], x[:500]):8.2f}"
)
assert next_state.step == state.step + 1 == 1

# The old state is still what it was, so that a step can be repeated, bit for bit:

repeated, _ = kfac.step(state, x[:500, :], x[:500, :])
assert np.array_equal(repeated.params[0], next_state.params[0])


# ------------------------------------------------------------------------------------------------
# 3. The comparison
#
# `Supply` cuts the data into shuffled minibatches, the same for everybody. `train` is a generator:
# it does a step whenever it is asked for one, and runs a clock during steps only. SGD and Adam
# were tuned: their rates are the best of 0.001, 0.003, 0.01, 0.03, 0.1 and 0.3, after 200 as after
# 400 steps. K-FAC was not.

supply = Supply(x, x, ConstantBatch(500))
optimizers = {
    "K-FAC": kfac,
    "SGD, Nesterov": SGD(objective, rate=0.1, momentum=0.9),
    "Adam": Adam(objective, rate=0.03),
}


def run(optimizer, seconds):
    """Train for STEPS steps, and on until so many seconds; the positions at both."""
    after_steps = None
    for step in train(optimizer, supply, start(optimizer, backend)):
        if step.position.step == STEPS:
            after_steps = step.position
        if after_steps is not None and step.position.seconds >= seconds:
            return after_steps, step.position
    raise AssertionError("train goes on for ever")


print(f"\n                     {STEPS} steps           as many seconds as K-FAC took")
print("                  loss       ms a step   steps      loss   on test images")
budget, by_steps, reconstructed = 0.0, {}, {}
for name, optimizer in optimizers.items():
    after_steps, after_time = run(optimizer, budget)
    budget = budget or after_steps.seconds
    by_steps[name] = objective.value(after_steps.state.params, x, x)
    trained = after_time.state.params
    print(
        f"{name:15s} {by_steps[name]:7.2f} {1000 * after_steps.seconds / STEPS:13.2f}"
        f" {after_time.step:9d} {objective.value(trained, x, x):9.2f}"
        f" {objective.value(trained, x_test, x_test):10.2f}"
    )
    z, _ = objective.network.forward(trained, x_test)
    reconstructed[name] = 1 / (1 + np.exp(-z))  # logits to probabilities

at_start = objective.value(params, x, x)
print(f"(at the start   {at_start:7.2f})")
assert by_steps["K-FAC"] < min(by_steps["SGD, Nesterov"], by_steps["Adam"]) < at_start

# Both halves of the table matter: per step it tells how much a step knows, per second whether that
# was worth its price.


# ------------------------------------------------------------------------------------------------
# 4. What it has learned
#
# Test images, by writers whom the network has never seen, and what comes out behind the code of six
# numbers. A character a pixel:


def picture(image):
    """Eight lines of text."""
    shades = np.asarray(list(" .:-=+*#%@"))
    levels = np.clip((10 * image).astype(int), 0, 9).reshape(8, 8)
    return ["".join(2 * shade for shade in row) for row in shades[levels]]


chosen = [0, 1, 5, 8]
print("\ntest images, and what K-FAC's network makes of them")
for images in (data.x_test, reconstructed["K-FAC"]):
    for line in zip(*(picture(images[i]) for i in chosen), strict=True):
        print("   ", "   ".join(line).rstrip())

if options.plot and importlib.util.find_spec("matplotlib"):
    rows = {"test image": data.x_test[:12], **{k: v[:12] for k, v in reconstructed.items()}}
    plot_images(options.plot, rows, data.image_shape, "digits, autoencoder 32-16-6")
    print("wrote", options.plot)

# Where to go from here: `kfac-np train --help` for runs with checkpoints and records,
# docs/architecture.md for how a step is made, docs/adding.md for a layer or a loss of your own.

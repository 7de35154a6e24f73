"""14. Which weights does a network need? Those whose work no others can take over.

The loss around a minimum is ½ δᵀ H δ higher than there, H its curvature. To remove weight q is to
move to where θ_q = 0, and there are three answers to what that costs:

    magnitude                   θ_q²              as if H were the identity
    optimal brain damage        ½ θ_q² H_qq       the others stay where they are
    optimal brain surgeon       ½ θ_q² / [H⁻¹]_qq    the others move to where it costs least

    python examples/14_which_weights_are_needed.py [--plot FILE.png]
"""

import argparse

import numpy as np

from kfac_np import KFAC, Dense, Objective, Rng, Sequential, SoftmaxCrossEntropy, Tanh, get_backend
from kfac_np.applications import fit_curvature, prune
from kfac_np.applications.compensating import compensation
from kfac_np.applications.saliency import group_costs, weight_costs
from kfac_np.curvature import BlockDiagonal, DiagonalBlock, FullMatrix
from kfac_np.data import digits
from kfac_np.losses import SquaredError

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
options = parser.parse_args()
backend = get_backend("numpy", "float64")

# ------------------------------------------------------------------------------------------------
# 1. A line through points, where the quadratic model is the loss itself. Inputs 0 and 1 are almost
# the same, input 2 is another one. The weights of 0 and 1 are large, that of 2 is small.

seed = np.random.default_rng(0)
x = seed.standard_normal((200, 3))
x[:, 1] = x[:, 0] + 0.1 * seed.standard_normal(200)
t = (x @ [2.0, 1.5, 0.5])[:, None]
linear = Objective(Dense(3, 1, bias=False), SquaredError())
w = np.linalg.lstsq(x, t)[0].T
fit = fit_curvature(linear, w, [(x, t)], FullMatrix())
print("1. what it costs to remove a weight of", " ".join(f"{value:.1f}" for value in w[0]))
for method in ("magnitude", "obd", "obs"):
    costs = weight_costs(fit.matrix, fit.operand, method)[""][0]
    print(f"     {method:10s}", " ".join(f"{cost:8.4f}" for cost in costs))
surgeon = weight_costs(fit.matrix, fit.operand)[""][0]
assert np.argmin(surgeon) == 1, "input 0 takes over what input 1 did"
delta = compensation(fit.matrix, fit.operand, {"": np.asarray([[False, True, False]])})[""]
loss = linear.value(w + delta, x, t)
print(f"   without it the weights are {np.round((w + delta)[0], 2)}, and the loss is {loss:.4f}")
assert abs(loss - linear.value(w, x, t) - surgeon[1]) < 1e-10  # as it was promised

# ------------------------------------------------------------------------------------------------
# 2. A network. H is too large to be inverted; K-FAC's G ⊗ A is not. A says which hidden units are
# alike, and so the next layer can do without one of them: a column of W̄ goes, and with it the row
# of the layer before that made it. The network becomes smaller, not just emptier.

data = digits()
x, t = backend.asarray(data.x_train), backend.asarray(data.t_train)
network = Sequential(Dense(64, 60), Tanh(), Dense(60, 30), Tanh(), Dense(30, 10))
objective = Objective(network, SoftmaxCrossEntropy())
kfac = KFAC(objective, l2=1e-3)
state = kfac.init(network.init(Rng(0), backend))
for _ in range(25):
    state, _ = kfac.step(state, x, t)


def accuracy(objective, params):
    z = objective.network.forward(params, backend.asarray(data.x_test))[0]
    return float(np.mean(np.argmax(z, axis=1) == data.t_test))


whole = accuracy(objective, state.params)
fits = {
    "K-FAC": fit_curvature(objective, state.params, [(x, t)]),
    "diagonal": fit_curvature(objective, state.params, [(x, t)], BlockDiagonal(DiagonalBlock())),
}
ways = {"K-FAC": "obs", "diagonal": "obs", "magnitude": "magnitude"}
shares, curves = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9), {}
print(f"2. test accuracy {whole:.3f}; without a part of the parameters, and nothing trained again:")
print("     " + " " * 10 + "".join(f"{share:7.0%}" for share in shares))
for name, method in ways.items():
    fit, curves[name] = fits.get(name, fits["K-FAC"]), []
    for share in shares:
        smaller = prune(objective, fit, share, remove="inputs", method=method)
        curves[name].append(accuracy(smaller.objective, smaller.params))
    print(f"     {name:10s}" + "".join(f"{value:7.3f}" for value in curves[name]))
smaller = prune(objective, fits["K-FAC"], 0.7, remove="inputs")
print(f"   70 % smaller: {smaller.objective.network}")
assert curves["K-FAC"][3] > 0.95 * whole > max(curves["diagonal"][3], curves["magnitude"][3])

# ------------------------------------------------------------------------------------------------
# 3. Is it the choice of the units, or that the others move? Both can be had apart: the hidden units
# that the second layer reads are chosen by either rule, and the rest compensates or stays. What
# matters most is that the rest moves: of a few dozen units, alike as they are, any will do.

layer = fits["K-FAC"].select(["2"])
W, block, units = layer.operand["2"], layer.matrix.blocks["2"], [[unit] for unit in range(60)]
damping = 0.01 * float(block.trace()) / W.size
orders = {
    "by K-FAC": np.argsort(group_costs(block, W, units, 1, "obs", damping)),
    "by magnitude": np.argsort(group_costs(block, W, units, 1, "magnitude")),
}
numbers, apart = (10, 20, 30, 40, 50), {}
print("3. test accuracy without so many of 60 units:  ", " ".join(f"{n:6d}" for n in numbers))
for chosen, order in orders.items():
    for moves in (True, False):
        name = f"chosen {chosen}, the rest {'compensates' if moves else 'stays'}"
        apart[name] = []
        for number in numbers:
            gone = np.zeros(W.shape, dtype=bool)
            gone[:, order[:number]] = True
            delta = compensation(layer.matrix, {"2": W}, {"2": gone}, damping)["2"]
            params = layer.insert({"2": W + delta if moves else np.where(gone, 0.0, W)})
            apart[name].append(accuracy(objective, params))
        print(f"     {name:42s}", " ".join(f"{value:6.3f}" for value in apart[name]))

moved, stayed = (np.asarray([apart[n][3] for n in apart if w in n]) for w in ("compen", "stays"))
assert moved.min() > stayed.max()

if options.plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, curve), style in zip(curves.items(), ("ko-", "rs--", "b^:"), strict=True):
        left.plot([0, *shares], [whole, *curve], style, label=name, markersize=5)
    left.set(xlabel="share of the parameters removed", ylabel="test accuracy")
    for (name, curve), style in zip(apart.items(), ("ko-", "ko:", "b^-", "b^:"), strict=True):
        right.plot([0, *numbers], [whole, *curve], style, label=name, markersize=5)
    right.set(xlabel="hidden units removed, of 60")
    for axes in (left, right):
        axes.legend(frameon=False, loc="lower left", fontsize=9)
        axes.grid(True, color="0.9")
    figure.savefig(options.plot, dpi=110)
    print(f"wrote {options.plot}")

# Exercises
#
# 1. In part 1, remove inputs 1 and 2 together. Is the cost the sum of the two? Compute it from H⁻¹,
#    and then by least squares. (`compensation` takes a mask with both.)
# 2. Give `prune` rounds=5 and batches=[(x, t)], and the curvature is fitted anew on the way. How
#    far does it get now? Then train what is left for five steps of K-FAC.

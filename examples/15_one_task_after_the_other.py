"""15. Can a network learn something new without forgetting what it knew?

After task 1 the parameters are θ₁, and task 1's loss around them is about ½ (θ - θ₁)ᵀ C₁ (θ - θ₁)
higher. That is all a later task has to know of it: its loss plus this penalty is about the loss of
both. How good "about" is depends on what C₁ keeps of the curvature.

    python examples/15_one_task_after_the_other.py [--plot FILE.png]
"""

import argparse

import numpy as np

from kfac_np import Adam, Dense, Objective, Rng, Sequential, SoftmaxCrossEntropy, Tanh, get_backend
from kfac_np.applications import ewc, fit_curvature, merge_networks, online_laplace
from kfac_np.curvature import BlockDiagonal, DiagonalBlock, FullMatrix
from kfac_np.data import digits
from kfac_np.losses import SquaredError

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--plot", metavar="FILE", help="draw the accuracies (needs matplotlib)")
options = parser.parse_args()
backend = get_backend("numpy", "float64")

# ------------------------------------------------------------------------------------------------
# 1. Least squares: the quadratic model is the loss. Learned one after the other, two data sets give
# what both together give, exactly; with the diagonal of the curvature they do not.

seed = np.random.default_rng(0)
truth = seed.standard_normal((3, 1))
parts = []
for n in (20, 30):
    x = seed.standard_normal((n, 3)) @ seed.standard_normal((3, 3))
    parts.append((x, x @ truth + 0.3 * seed.standard_normal((n, 1))))
linear = Objective(Dense(3, 1, bias=False), SquaredError())
(x1, t1), (x2, t2) = parts
joint = np.linalg.lstsq(np.concatenate([x1, x2]), np.concatenate([t1, t2]))[0].T
first, second = (np.linalg.lstsq(x, t)[0].T for x, t in parts)
print("1. distance to the solution of both data sets together")
print(f"     the second alone              {np.linalg.norm(second - joint):.1e}")
kinds = {"diagonal": BlockDiagonal(DiagonalBlock()), "full": FullMatrix()}
for name, kind in kinds.items():
    penalty = online_laplace(fit_curvature(linear, first, [parts[0]], kind), terms=30)
    hessian = 30 * np.concatenate([penalty.product(row[None, :]) for row in np.eye(3)])
    w = np.linalg.solve(x2.T @ x2 + hessian, x2.T @ t2 + hessian @ first.T).T
    print(f"     the second after the first, C {name:8s} {np.linalg.norm(w - joint):.1e}")
assert np.linalg.norm(w - joint) < 1e-12
fits = [
    fit_curvature(linear, theta, [part], FullMatrix())
    for theta, part in zip((first, second), parts, strict=True)
]
merged = merge_networks(*fits)
print(f"     each alone, then merged       {np.linalg.norm(merged - joint):.1e}")

# ------------------------------------------------------------------------------------------------
# 2. A network, and five tasks: digits with their pixels in another order each time. It has the data
# of one task at a time. What it remembers of the others is a fitted curvature, 40 kB each.

data, tasks, steps = digits(), 5, 150
orders = [Rng(7, "task", task).permutation(64) for task in range(tasks)]
network = Sequential(Dense(64, 60), Tanh(), Dense(60, 10))
objective = Objective(network, SoftmaxCrossEntropy())
t = backend.asarray(data.t_train)


def accuracy(params, order):
    z = network.forward(params, backend.asarray(data.x_test[:, order]))[0]
    return float(np.mean(np.argmax(z, axis=1) == data.t_test))


def learn(kind, strength):
    """Accuracy on each task (columns) after each task was learned (rows)."""
    params, fits, found = network.init(Rng(0), backend), [], np.full((tasks, tasks), np.nan)
    for task, order in enumerate(orders):
        x = backend.asarray(data.x_train[:, order])
        penalty = ewc(*fits, strength=strength, online=True) if fits else None
        adam = Adam(objective, rate=3e-3, penalty=penalty)
        state = adam.init(params)
        for step in range(steps):
            rows = slice(step % 5 * 300, step % 5 * 300 + 300)
            state, _ = adam.step(state, x[rows], t[rows])
        params = state.params
        if kind is not None:
            fits.append(fit_curvature(objective, params, [(x[:500], t[:500])], kind))
        found[task, : task + 1] = [accuracy(params, o) for o in orders[: task + 1]]
    return found


runs = {
    "nothing": learn(None, 0.0),
    "diagonal": learn(BlockDiagonal(DiagonalBlock()), 30.0),
    "K-FAC": learn(BlockDiagonal(), 10.0),
}
print("2. what is remembered: accuracy on each task after the fifth, and their mean")
for name, found in runs.items():
    row = " ".join(f"{value:.2f}" for value in found[-1])
    print(f"     {name:10s} {row}   {found[-1].mean():.3f}")
means = [found[-1].mean() for found in runs.values()]
assert means[2] > means[1] > means[0]

if options.plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, 3, sharey=True), runs.items(), strict=True):
        for task in range(tasks):
            shade = str(0.8 * task / tasks)
            learned = range(task + 1, tasks + 1)
            axes.plot(learned, found[task:, task], "o-", color=shade, label=f"task {task + 1}")
        axes.set(title=f"remembered by {name}", xlabel="tasks learned", xticks=range(1, tasks + 1))
        axes.grid(True, color="0.9")
    figure.axes[0].set(ylabel="test accuracy on each task", ylim=(0.0, 1.0))
    figure.axes[2].legend(frameon=False, loc="lower left", ncols=2)
    figure.savefig(options.plot, dpi=110)
    print(f"wrote {options.plot}")

# Exercises
#
# 1. `strength` weighs old against new. Try 1 and 1000 with K-FAC: which tasks suffer at each end,
#    and why is 1 what a Bayesian would take for tasks of equal size?
# 2. With `ewc(..., online=False)` each task pulls towards its own θ_i, not all to the last one.
#    Add a third data set to part 1: which of the two is exact there, and what does the other count
#    twice?

"""8. The three assumptions of KFC as pictures, and what each of them loses.

KFC turns the block of a convolution into a Kronecker product by assuming three things:

    IAD   activations and derivatives are independent
    SH    spatial homogeneity: means are the same everywhere, second moments depend on displacement
    SUD   spatially uncorrelated derivatives: E[g_t g_t'ᵀ] = 0 for t ≠ t'

    python examples/08_three_assumptions_as_pictures.py [--plot FILE.png]
"""

import argparse
import importlib.util

import numpy as np

from kfac_np import Dense, Exact, Objective, Rng, Sequential, SoftmaxCrossEntropy, Tanh, get_backend
from kfac_np.curvature import Assumption, convolution_block
from kfac_np.data import digits
from kfac_np.layers import Conv, Flatten

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--plot", metavar="FILE", help="draw the blocks (needs matplotlib)")
options = parser.parse_args()

# ------------------------------------------------------------------------------------------------
# 1. A block small enough to look at: 2 channels out, 3 × 3 taps and a bias, hence 20 × 20

backend = get_backend("numpy", "float64")
data = digits()
x = backend.asarray(data.x_train[:200].reshape(200, 8, 8, 1))
net = Sequential(Conv(1, 2, (3, 3), padding="same"), Tanh(), Flatten(), Dense(128, 10))
e = Objective(net, SoftmaxCrossEntropy()).evaluate(
    net.init(Rng(0), backend), x, backend.asarray(data.t_train[:200])
)
(vectors,) = Exact().vectors(e, Rng(0))
statistics = e.backward(vectors)[0]

# ------------------------------------------------------------------------------------------------
# 2. The block as it would be if assumptions held; the batch stands for the distribution

IAD, SH, SUD = Assumption.IAD, Assumption.SH, Assumption.SUD
sets = {
    "exact": Assumption.NONE,
    "IAD": IAD,
    "IAD, SH": IAD | SH,
    "IAD, SUD": IAD | SUD,
    "IAD, SUD, SH of g": IAD | SUD | Assumption.SH_DERIVATIVES,  # `expand` of the library
    "IAD, SH, SUD": Assumption.KFC,
    "the same and SUA": Assumption.KFC | Assumption.SUA,  # distinct pixels uncorrelated, too
}
blocks = {
    name: convolution_block(statistics, e.scale, assumed).to_dense()
    for name, assumed in sets.items()
}
exact = blocks["exact"]
error = {n: np.linalg.norm(b - exact) / np.linalg.norm(exact) for n, b in blocks.items()}


def second_to_first(block):
    """How far a block is from a Kronecker product: singular values of its rearrangement."""
    rows = block.reshape(2, 10, 2, 10).transpose(0, 2, 1, 3).reshape(4, 100)
    first, second, *_ = np.linalg.svd(rows, compute_uv=False)
    return second / first


print("assumed               relative error   trace   from a Kronecker product")
for name, block in blocks.items():
    trace = np.trace(block) / np.trace(exact)
    print(f"{name:20s}  {error[name]:14.3f}  {trace:6.2f}   {second_to_first(block):24.1e}")

# Independence costs little here. The other two cost about half of the block each: digits are empty
# at the border, so that pixels there are not like those of the middle, and derivatives at different
# locations are correlated. What is bought is in the last column: only with SUD and SH of g is the
# block a Kronecker product (theorem 1 of the paper), and its inverse that of two small matrices.

assert error["IAD"] < 0.1 < error["IAD, SH"]
assert second_to_first(blocks["IAD, SH, SUD"]) < 1e-12 < 1e-2 < second_to_first(blocks["IAD, SUD"])

# ------------------------------------------------------------------------------------------------
# 3. Look at them. Above the blocks, below what is wrong with them, all in one scale


def draw(path, names):
    """Blocks, and blocks minus the exact one; dots mark negative entries, for prints in grey."""
    from matplotlib.colors import FuncNorm
    from matplotlib.figure import Figure

    limit = max(abs(blocks[n]).max() for n in names)
    root = (lambda v: np.sign(v) * np.sqrt(abs(v)), lambda v: np.sign(v) * v**2)
    figure = Figure(figsize=(2.3 * len(names) + 0.8, 5.7), layout="constrained")
    figure.suptitle("200 digits, block of a convolution 3 × 3 of 1 to 2 channels")
    grid = figure.subplots(2, len(names), sharex=True, sharey=True)
    for name, (above, below) in zip(names, grid.T, strict=True):
        for axes, m in ((above, blocks[name]), (below, blocks[name] - exact)):
            image = axes.imshow(m, cmap="RdBu_r", norm=FuncNorm(root, -limit, limit))
            axes.scatter(*np.nonzero(m.T + 0.002 * limit < 0), s=1.5, color="black", linewidths=0)
            axes.axhline(9.5, color="0.5", linewidth=0.8)
            axes.axvline(9.5, color="0.5", linewidth=0.8)
        above.set_title(name)
        below.set_title(f"{name} - exact: {100 * error[name]:.0f} %", fontsize=9)
        below.set_xticks([4, 9, 14, 19], ["taps", "bias"] * 2)
        below.set_xlabel("weights of channel 1, 2")
    for axes in grid[:, 0]:
        axes.set_yticks([4, 9, 14, 19], ["taps", "bias"] * 2)
        axes.set_ylabel("weights of channel 1, 2")
    figure.colorbar(image, ax=grid, label="entry, on a scale of roots; dots: negative", shrink=0.8)
    figure.savefig(path, dpi=110)


if options.plot and importlib.util.find_spec("matplotlib"):
    draw(options.plot, ["exact", "IAD", "IAD, SH", "IAD, SUD", "IAD, SH, SUD"])
    print("wrote", options.plot)

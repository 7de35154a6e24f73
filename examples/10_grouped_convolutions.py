"""10. Grouped convolutions: each group is a layer of its own, and has factors of its own.

With groups, a channel of the output sees some channels of the input only; depthwise is the extreme,
one channel a group. It is tempting to make one A and one G, averaged over the groups, since those
of all groups have the same size. This script shows what that costs.
"""

import numpy as np

from kfac_np import (
    BlockDiagonal,
    Exact,
    ExactBlock,
    KFACBlock,
    Objective,
    Rng,
    SquaredError,
    get_backend,
)
from kfac_np.layers import Conv
from kfac_np.trees import axpy

# ------------------------------------------------------------------------------------------------
# 1. A grouped convolution is several convolutions side by side. Its parameters have an axis for it:

backend = get_backend("numpy", "float64")
grouped = Conv(4, 4, (3, 3), padding=1, groups=2)
W = grouped.init(Rng(0), backend)  # (groups, c_out / groups, taps · c_in / groups + 1)
x = Rng(1).normal((60, 6, 6, 4), backend) * np.asarray([2.0, 1.0, 0.3, 0.2])  # unequal channels
one = Conv(2, 2, (3, 3), padding=1)
halves = [one.forward(W[i], x[..., 2 * i : 2 * i + 2])[0] for i in (0, 1)]
assert np.allclose(grouped.forward(W, x)[0], np.concatenate(halves, axis=-1))
print(f"1. parameters {W.shape}: two convolutions with 2 channels in and 2 out")

# ------------------------------------------------------------------------------------------------
# 2. Factors of each group, and their averages
#
# Squared error at every location: the case where K-FAC by `expand` is exact (script 9), so that
# nothing but the treatment of groups can go wrong.

teacher = grouped.init(Rng(2), backend)
t = grouped.forward(teacher, x)[0]
objective = Objective(grouped, SquaredError())
e = objective.evaluate(W, x, t)


def estimate(block):
    """Moments of the layer that is the whole network."""
    return BlockDiagonal(block).estimate(e, Exact(), Rng(0))[""]


moments, exact = estimate(KFACBlock()), estimate(ExactBlock())["block"]
A, G = moments["A"], moments["G"]  # (groups, 19, 19), (groups, 2, 2)
A_mean, G_mean = A.mean(axis=0), G.mean(axis=0)

print("2. relative error of a group's block   own factors   averaged ones")
P = A.shape[1] * G.shape[1]  # 38 parameters a group
for i, inputs in enumerate(("large", "small")):
    block = exact[i * P : (i + 1) * P, i * P : (i + 1) * P]
    own, averaged = (
        np.linalg.norm(np.kron(*factors) - block) / np.linalg.norm(block)
        for factors in ((G[i], A[i]), (G_mean, A_mean))
    )
    print(f"     group {i}, {inputs} inputs {own:24.1e} {averaged:15.2f}")
    assert own < 1e-12 < 0.4 < averaged

# ------------------------------------------------------------------------------------------------
# 3. A step of length 1 against -F⁻¹ ∇L. The loss is a quadratic bowl: with the right curvature one
# step ends at its bottom, where the teacher is.

gradient = e.gradient()
right = np.linalg.inv(G) @ gradient @ np.linalg.inv(A)
wrong = np.linalg.inv(G_mean) @ gradient @ np.linalg.inv(A_mean)
print(f"3. loss at the start                       {e.value:9.1e}")
for name, direction in (("own factors", right), ("averaged ones", wrong)):
    after = objective.value(axpy(-1.0, direction, W), x, t)
    print(f"     after a step with {name:16s} {after:13.1e}")
    assert (after < 1e-20) == (direction is right)
assert after > 0.5 * e.value

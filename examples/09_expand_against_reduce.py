"""9. Expand against reduce: two ways to merge T locations, and when each of them is exact.

Script 3 had statistics written down by hand. Here they come from convolutions. All networks are
linear and the loss is the squared error, so that nothing is lost but by merging locations:

    expand   every location is an example (KFC)           A = mean of ā_t ā_tᵀ,  G = Σ g_t g_tᵀ
    reduce   an example's locations are merged first      â = mean of ā_t,       ĝ = Σ_t g_t
"""

import numpy as np

from kfac_np import (
    BlockDiagonal,
    Dense,
    Exact,
    ExactBlock,
    KFACBlock,
    Objective,
    Rng,
    Sequential,
    SquaredError,
    get_backend,
)
from kfac_np.curvature import expand, reduce
from kfac_np.errors import CurvatureError
from kfac_np.layers import Conv, GlobalAveragePool

backend = get_backend("numpy", "float64")


def block(e, kind, layer):
    """A layer's block of the exact Fisher, in the form that `kind` gives it."""
    curvature = BlockDiagonal(kind)
    moments = curvature.estimate(e, Exact(), Rng(0))
    return curvature.matrix(moments, e.params).blocks[layer].to_dense()


def errors(size, *layers, layer=0):
    """Relative errors of expand and of reduce for a layer, the first unless told otherwise."""
    net = Sequential(*layers)
    x = Rng(1).normal((8, size, size, 2), backend)
    t = backend.zeros((8, *net.output_shape(x.shape[1:])))
    e = Objective(net, SquaredError()).evaluate(net.init(Rng(0), backend), x, t)
    exact, found = block(e, ExactBlock(), layer), []
    for rule in (expand, reduce):
        try:
            merged = block(e, KFACBlock(sharing=rule), layer)
            found.append(np.linalg.norm(merged - exact) / np.linalg.norm(exact))
        except CurvatureError:  # reduce is not defined for a loss at every location
            found.append(np.nan)
    return found


# ------------------------------------------------------------------------------------------------
# 1. A loss at every location: an output pixel has its own target, and g is 0 but at one location.
# Then Σ_t g_t ā_tᵀ has one term, and to take locations for examples is no approximation.
#
# 2. The mean over locations, then a linear map: every location has the same g_t = ĝ / T. Then
# Σ_t g_t ā_tᵀ = ĝ âᵀ, and it is `reduce` that is exact. The padding does not matter: it is part of
# the patches.
#
# 3. Two convolutions before the mean. For the second nothing has changed, but what comes back to
# the first is not the same everywhere: a pixel at the border is seen by fewer taps of the second.
# The border is a smaller part of a larger image, and so is the error.

conv, second = Conv(2, 3, (3, 3), padding=1), Conv(3, 3, (3, 3), padding=1)
head = GlobalAveragePool(), Dense(3, 3)
table = {
    "1. a loss at every location": errors(6, conv),
    "2. mean, linear head": errors(6, conv, *head),
    "3. the second of two, 6 × 6": errors(6, conv, second, *head, layer=1),
    "   the first of two, 6 × 6": errors(6, conv, second, *head),
    "   the first of two, 12 × 12": errors(12, conv, second, *head),
    "   the first of two, 24 × 24": errors(24, conv, second, *head),
}
print("relative error                         expand    reduce")
for name, (by_expand, by_reduce) in table.items():
    shown = "  refused" if np.isnan(by_reduce) else f"{by_reduce:9.1e}"
    print(f"{name:36s} {by_expand:9.1e} {shown}")

each, pooled, second, *deeper = table.values()
assert each[0] < 1e-14 < 0.5 < pooled[0]
assert max(pooled[1], second[1]) < 1e-14
inexact = [by_reduce for _, by_reduce in deeper]
assert 0.2 > inexact[0] > inexact[1] > inexact[2] > 0.005
print(f"the border costs reduce {', '.join(f'{100 * e:.1f} %' for e in inexact)}")

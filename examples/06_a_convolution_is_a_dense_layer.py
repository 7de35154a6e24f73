"""6. From dense to convolution: a convolution is a dense layer on patches.

Scripts 1 to 3 were about layers s = W̄ ā. Here an image is cut into patches, each patch becomes a
row ā, and a convolution turns out to be the layer of script 1, used at T places at once.
"""

import itertools

import numpy as np

from kfac_np.layers import Conv

random = np.random.default_rng(0)

# ------------------------------------------------------------------------------------------------
# 1. Unfold
#
# Images are (N, height, width, channels): channels last, so that a patch's row is a slice. A kernel
# of 3 × 3 taps looks at location t of the padded image, moves on by the stride of 2, and so on:

N, size, c_in, c_out, k, stride = 4, 7, 2, 3, 3, 2
x = random.standard_normal((N, size, size, c_in))
padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
corners = list(itertools.product(range(0, size, stride), repeat=2))  # one for each location
patches = [padded[:, i : i + k, j : j + k, :].reshape(N, -1) for i, j in corners]
patches = np.stack(patches, axis=1)  # (N, T, taps · channels)
a = np.concatenate([patches, np.ones((N, len(corners), 1))], axis=2)  # ā: with a 1 for the bias
T = a.shape[1]

# ------------------------------------------------------------------------------------------------
# 2. Forward: one matrix product. Its textbook definition is a sum over taps and channels:

W_bar = random.standard_normal((c_out, k * k * c_in + 1))
y = (a @ W_bar.T).reshape(N, 4, 4, c_out)

kernel, bias = W_bar[:, :-1].reshape(c_out, k, k, c_in), W_bar[:, -1]
textbook = np.zeros_like(y)
for t, u, p, q in itertools.product(range(4), range(4), range(k), range(k)):
    textbook[:, t, u] += padded[:, t * stride + p, u * stride + q] @ kernel[:, p, q].T
assert np.allclose(y, textbook + bias)

layer = Conv(c_in, c_out, (3, 3), stride=2, padding=1)
y_library, cache = layer.forward(W_bar, x)
assert np.allclose(y_library, y)
print(f"1. {N} images of {size}×{size}×{c_in}: {T} patches each, ā is {a.shape}")
print(f"2. y = W̄ ā, {W_bar.shape} times ā: {y.shape}, as the library has it")

# ------------------------------------------------------------------------------------------------
# 3. Backward: the first moment of (ā, g), now summed over locations as well
#
#     ∂L/∂W̄ = Σ_n Σ_t g_nt ā_ntᵀ

g = np.cos(y)  # of L = Σ sin(y)
gradient = np.einsum("nto,ntd->od", g.reshape(N, T, c_out), a)
dx, statistics = layer.backward(W_bar, cache, g)
assert np.allclose(statistics.a, a)
assert np.allclose(statistics.gradient(), gradient)


def value(W_bar, x):
    """L."""
    return np.sum(np.sin(layer.forward(W_bar, x)[0]))


dw, moved = random.standard_normal(W_bar.shape), random.standard_normal(x.shape)
ahead, behind = (value(W_bar + h * dw, x + h * moved) for h in (1e-6, -1e-6))
error = abs((ahead - behind) / 2e-6 - np.sum(gradient * dw) - np.sum(dx * moved))
assert error < 1e-7
print(f"3. ∂L/∂W̄ = Σ g āᵀ; differs from finite differences by {error:.0e}")

# ------------------------------------------------------------------------------------------------
# 4. What is new: T. Patches overlap, so that ā holds most pixels several times. The library keeps
# x, and unfolds some images at a time, as many as a budget allows, wherever ā is asked for:

small = Conv(c_in, c_out, (3, 3), stride=2, padding=1, budget_bytes=1)
_, in_parts = small.backward(W_bar, small.forward(W_bar, x)[1], g)
assert np.allclose(in_parts.gradient(), gradient)
parts = sum(1 for _ in in_parts.chunks())
print(f"4. ā has {a.size} numbers, x {x.size}; the same gradient in {parts} parts")

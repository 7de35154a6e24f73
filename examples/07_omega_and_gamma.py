"""7. Ω and Γ: the Kronecker factors of a convolution, and why there are two ways to write them.

The Fisher block of a convolution is (1/M) Σ vec(U) vec(U)ᵀ with U = Σ_t g_t ā_tᵀ, a sum over T
locations: no Kronecker product. KFC makes one of it, Γ ⊗ Ω. What was assumed is for script 8.
"""

import numpy as np

from kfac_np import (
    BlockDiagonal,
    Dense,
    Exact,
    KFACBlock,
    Objective,
    Rng,
    Sequential,
    SoftmaxCrossEntropy,
    Tanh,
    get_backend,
)
from kfac_np.curvature import Assumption, kfc_factors, pi_trace, plain
from kfac_np.layers import Conv, GlobalAveragePool
from kfac_np.matrices import KroneckerMatrix

# ------------------------------------------------------------------------------------------------
# 1. By hand, from the statistics of the one backward pass
#
# The derivatives are those of the exact Fisher: K = 3 vectors an image, one for each class.

net = Sequential(Conv(2, 4, (3, 3), padding=1), Tanh(), GlobalAveragePool(), Dense(4, 3))
backend = get_backend("numpy", "float64")
params = net.init(Rng(0), backend)
x, t = Rng(1).normal((20, 6, 6, 2), backend), Rng(2).integers(0, 3, (20,))
e = Objective(net, SoftmaxCrossEntropy()).evaluate(params, x, t)
(vectors,) = Exact().vectors(e, Rng(0))
s = e.backward(vectors)[0]  # of the convolution: ā (N, T, 19), g (K, N, T, 4)
N, T = s.num_examples, s.num_locations

# The paper sums over locations on one side and averages on the other:
#
#     Ω = E[Σ_t ā_t ā_tᵀ]          Γ = (1/T) E[Σ_t g_t g_tᵀ]

Omega = np.einsum("nti,ntj->ij", s.a, s.a) / N
Gamma = np.einsum("knti,kntj->ij", s.g, s.g) / N / T

# The library takes every location for an example, so that A is a mean like that of a dense layer:

moments = BlockDiagonal(KFACBlock()).estimate(e, Exact(), Rng(0))["0"]
A, G = moments["A"], moments["G"]
assert np.allclose(Omega, T * A)
assert np.allclose(Gamma, G / T)
assert np.allclose(np.kron(Gamma, Omega), np.kron(G, A))
print(f"1. Ω is {Omega.shape}, Γ {Gamma.shape}; the block that they stand for is 76 × 76")
print(f"   corner of Ω: {Omega[-1, -1]:.0f} (the number of locations), of A: {A[-1, -1]:.0f}")
print(f"   Ω = {T} A, Γ = G / {T}, and Γ ⊗ Ω = G ⊗ A")

# Under the paper's name and with its scale the pair is there, too (for small networks):

paper = kfc_factors(s, e.scale, Assumption.IAD | Assumption.SUD | Assumption.SH_DERIVATIVES)
assert np.allclose(paper.A, Omega)
assert np.allclose(paper.G, Gamma)

# ------------------------------------------------------------------------------------------------
# 2. Who notices the split? Only their product approximates anything, so nobody should. Damping by
# π, √(tr A/dim A) against √(tr G/dim G), does not, and exact damping does not. Adding the same γ²
# to both factors does: then the result depends on a convention.


def step(A, G, rule, gamma=0.1):
    """(G + γ_G I)⁻¹ V (A + γ_A I)⁻¹ for V the gradient."""
    damping_a, damping_g = rule(A, G, gamma)
    left = np.linalg.inv(G + damping_g * np.eye(len(G)))
    return left @ e.gradient()[0] @ np.linalg.inv(A + damping_a * np.eye(len(A)))


print("2. how much a step changes when A, G become Ω, Γ")
changes = {}
for rule in (pi_trace, plain):
    first, second = step(A, G, rule), step(Omega, Gamma, rule)
    changes[rule] = np.linalg.norm(second - first) / np.linalg.norm(first)
    print(f"     damping by {rule.__name__:9s} {changes[rule]:9.1e}")
exact = [KroneckerMatrix(*pair).solve(e.gradient()[0], 0.01) for pair in ((A, G), (Omega, Gamma))]
assert np.allclose(*exact)
assert changes[pi_trace] < 1e-12 < 0.1 < changes[plain]

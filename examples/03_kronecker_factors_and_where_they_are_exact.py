"""3. Kronecker factors: what they replace, where they are exact, and by how much they are not.

A layer with d_in inputs and d_out outputs has P = d_out · (d_in + 1) parameters. Its block of the
Fisher has P² entries, and inverting it takes of the order of P³ operations: for 1000 inputs and
1000 outputs that is a million squared, eight terabytes in double precision. K-FAC replaces the
block by a Kronecker product of two matrices, with 1001² and 1000² entries. This script measures
the price.
"""

import numpy as np

from kfac_np import (
    BlockDiagonal,
    Dense,
    Exact,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    Objective,
    Rng,
    Sequential,
    SoftmaxCrossEntropy,
    SquaredError,
    Tanh,
    get_backend,
)
from kfac_np.curvature import expand, reduce
from kfac_np.statistics import AffineStatistics, Scale
from kfac_np.trees import leaves, scale

random = np.random.default_rng(0)
backend = get_backend("numpy", "float64")


def distance(one, other):
    """Relative difference of two matrices, in the Frobenius norm."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


# ------------------------------------------------------------------------------------------------
# 1. What a Kronecker product does
#
# G ⊗ A is the matrix of blocks G_ij · A. As a linear map it is nothing mysterious: it multiplies a
# matrix V from both sides. Only the order in which V becomes a vector must be agreed upon. This
# library goes row by row, as NumPy's `reshape` does, and then, for symmetric A and G,
#
#     (G ⊗ A) vec(V) = vec(G V A)        (G ⊗ A)⁻¹ vec(V) = vec(G⁻¹ V A⁻¹)
#
# (Papers that go column by column write A ⊗ G for the same map.)

A = random.standard_normal((4, 4))
G = random.standard_normal((3, 3))
A, G = A @ A.T, G @ G.T
V = random.standard_normal((3, 4))
assert np.allclose(np.kron(G, A) @ V.reshape(-1), (G @ V @ A).reshape(-1))

by_halves = np.linalg.inv(G) @ V @ np.linalg.inv(A)  # inverts a 3 × 3 and a 4 × 4 matrix ...
at_once = np.linalg.solve(np.kron(G, A), V.reshape(-1))  # ... instead of a 12 × 12 one
assert np.allclose(by_halves.reshape(-1), at_once)
print("1. (G ⊗ A) vec(V) = vec(G V A), and the inverse likewise\n")


# ------------------------------------------------------------------------------------------------
# 2. One example: exact
#
# Script 1 found that the gradient of one example is g āᵀ. Row by row its vector is g ⊗ ā, so that
# the example's share of the Fisher is
#
#     (g ⊗ ā)(g ⊗ ā)ᵀ = (g gᵀ) ⊗ (ā āᵀ)
#
# already a Kronecker product. With K vectors backpropagated, Σ_k g_k g_kᵀ takes the place of g gᵀ.
# For one example, then, K-FAC loses nothing:


def blocks(objective, params, x, t, block):
    """One matrix for each dense layer: the exact Fisher in the form that `block` gives it."""
    e = objective.evaluate(params, x, t)
    curvature = BlockDiagonal(block)
    moments = curvature.estimate(e, Exact(), Rng(0))
    return [b.to_dense() for b in leaves(curvature.matrix(moments, params).blocks)]


def table(title, objective, params, x, t, kfac=KFACBlock()):  # noqa: B008 - a frozen dataclass
    """Print and return how far the K-FAC blocks are from the exact ones."""
    exact = blocks(objective, params, x, t, ExactBlock())
    approximate = blocks(objective, params, x, t, kfac)
    errors = [distance(k, f) for k, f in zip(approximate, exact, strict=True)]
    print(f"     {title:38s}" + "".join(f"{e:10.1e}" for e in errors))
    return errors


classify = Objective(Sequential(Dense(3, 5), Tanh(), Dense(5, 4)), SoftmaxCrossEntropy())
params = classify.network.init(Rng(2), backend)
x = random.standard_normal((50, 3))
t = random.integers(0, 4, 50)

print("2.-4. relative error of each layer's block")
assert max(table("2. one example", classify, params, x[:1], t[:1])) < 1e-12


# ------------------------------------------------------------------------------------------------
# 3. Many examples: exact where derivatives do not depend on inputs
#
# The mean over examples is where something happens. K-FAC replaces the mean of products by the
# product of means:
#
#     E[g gᵀ ⊗ ā āᵀ]  ≈  E[g gᵀ] ⊗ E[ā āᵀ] = G ⊗ A
#
# The two agree when g gᵀ and ā āᵀ are uncorrelated over the examples. A deep linear network with
# squared error is such a case: the vectors backpropagated are columns of the identity, every layer
# multiplies them by a fixed matrix, and so they are the same for every example.

linear = Objective(Sequential(Dense(3, 5), Dense(5, 4), Dense(4, 2)), SquaredError())
params_linear = linear.network.init(Rng(3), backend)
t_linear = random.standard_normal((50, 2))
errors = table("3. deep linear network, 50 examples", linear, params_linear, x, t_linear)
assert max(errors) < 1e-12


# ------------------------------------------------------------------------------------------------
# 4. Many examples: inexact, by exactly the covariance
#
# A tanh makes g depend on x, and a softmax does too. What K-FAC then leaves out has a name: it is
# the covariance over the examples of the two matrices,
#
#     E[g gᵀ ⊗ ā āᵀ] - G ⊗ A = E[(g gᵀ - G) ⊗ (ā āᵀ - A)]
#
# with g gᵀ standing for one example's Σ_k g_k g_kᵀ. We can form it, and find it is all there is:

errors = table("4. tanh and softmax, 50 examples", classify, params, x, t)

e = classify.evaluate(params, x, t)
(vectors,) = Exact().vectors(e, Rng(0))
statistics = e.backward(vectors)[0]  # the first layer's: ā (N, 1, 4), g (K, N, 1, 5)
a, g = statistics.a[:, 0, :], statistics.g[:, :, 0, :]
aa = np.einsum("ni,nj->nij", a, a)  # each example's ā āᵀ
gg = np.einsum("kni,knj->nij", g, g)  # each example's Σ g gᵀ
A, G = aa.mean(axis=0), gg.mean(axis=0)
covariance = sum(np.kron(q - G, p - A) for p, q in zip(aa, gg, strict=True)) / 50

exact = blocks(classify, params, x, t, ExactBlock())[0]
kfac = blocks(classify, params, x, t, KFACBlock())[0]
assert np.allclose(kfac, np.kron(G, A))
assert np.allclose(exact - kfac, covariance)
assert np.isclose(errors[0], np.linalg.norm(covariance) / np.linalg.norm(exact))

# The more the network bends over the range of the inputs, the more g depends on x. Scaling the
# weights up bends it more; scaling them down makes it more and more linear, and the error small:

print("\n   the same with all weights multiplied")
errors = [
    table(f"   by {factor}", classify, scale(factor, params), x, t)
    for factor in (0.01, 0.1, 1.0, 3.0)
]
assert errors[0][0] < 0.01
assert errors[0][0] < errors[1][0] < errors[2][0] < errors[3][0]

# One thing is kept however bad the rest: where the mean of ā āᵀ or of g gᵀ is asked for alone, the
# factors are exact by construction. With a bias, the last entry of ā is 1, and the block of the
# bias alone is E[g gᵀ · 1] = G:

bias = np.arange(3, 20, 4)  # row-major: the last column of the (5, 4) parameter matrix
assert np.allclose(exact[np.ix_(bias, bias)], kfac[np.ix_(bias, bias)])


# ------------------------------------------------------------------------------------------------
# 5. What else is left out: everything between layers
#
# A block-diagonal curvature drops the covariance of different layers' gradients, which is a second
# approximation, made before Kronecker comes in. Here is how much of the full matrix it keeps:

F = FullMatrix().matrix(FullMatrix().estimate(e, Exact(), Rng(0)), params).to_dense()
kept = np.zeros_like(F)
start = 0
for block in blocks(classify, params, x, t, ExactBlock()):
    stop = start + len(block)
    kept[start:stop, start:stop] = block
    start = stop
assert np.allclose(kept[:20, :20], F[:20, :20])
between = distance(kept, F)
print(f"\n5. relative error of dropping the blocks between layers: {between:.2f}")
assert 0 < between < 1


# ------------------------------------------------------------------------------------------------
# 6. Weights that are used at several places
#
# In a sequence or an image one weight matrix meets T inputs an example: s_t = W̄ ā_t. Its gradient
# is a sum, U_n = Σ_t g_t ā_tᵀ, and the exact block is the mean of vec(U_n) vec(U_n)ᵀ, which is no
# Kronecker product even for one example. There are two ways to make it one; which is right depends
# on what happens to the T outputs.
#
#   expand: every location counts as an example; A is the mean of ā_t ā_tᵀ over examples and
#           locations, G = (1/M) Σ g_t g_tᵀ with M loss terms.
#   reduce: an example's locations are merged first, into â = mean of ā_t and ĝ = Σ_t g_t.
#
# For a linear model the two are exact in one case each: expand, if every location has a loss of
# its own; reduce, if the outputs are averaged before the loss. Statistics can be written down by
# hand, so we need no network. With squared error the vectors backpropagated are unit vectors.

N, T, d_in, d_out = 6, 5, 3, 2
a = random.standard_normal((N, T, d_in))
unit = np.eye(d_out)

# A loss at every location: M = N · T terms, each backpropagated on its own (K = T · d_out
# vectors, of which each is a unit vector at one location and zero at the others).
g_own = np.einsum("st,ki->skti", np.eye(T), unit).reshape(T * d_out, 1, T, d_out)
own = AffineStatistics(a, np.broadcast_to(g_own, (T * d_out, N, T, d_out)))

# The mean over locations, then a loss: M = N terms, and each location gets 1/T of the vector.
g_mean = np.broadcast_to(unit[:, None, None, :] / T, (d_out, N, T, d_out))
pooled = AffineStatistics(a, np.ascontiguousarray(g_mean))


def sharing_error(statistics, terms, sharing):
    """Relative error of the K-FAC block that these statistics give."""
    scale = Scale(terms=terms, examples=N)
    kfac, exact = KFACBlock(sharing=sharing), ExactBlock()
    moments = kfac.input_moments(statistics, scale) | kfac.moments(statistics, scale)
    approximate = kfac.matrix(moments, (d_out, d_in)).to_dense()
    return distance(
        approximate, exact.matrix(exact.moments(statistics, scale), (d_out, d_in)).to_dense()
    )


print(f"\n6. relative error with {T} locations      expand    reduce")
one_term_each = sharing_error(own, N * T, expand)
print(f"     a loss at every location       {one_term_each:9.1e}   refused")
by_expand, by_reduce = (sharing_error(pooled, N, rule) for rule in (expand, reduce))
print(f"     a loss of the locations' mean  {by_expand:9.1e} {by_reduce:9.1e}")
assert one_term_each < 1e-12
assert by_reduce < 1e-12
assert by_expand > 0.1

# `reduce` is not defined for a loss at every location. The library says so rather than compute
# something:

try:
    sharing_error(own, N * T, reduce)
except ValueError as error:
    print(f"     ({error})")
else:
    raise AssertionError("reduce should have refused")

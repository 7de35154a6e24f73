"""2. The Fisher three ways: by its definition, by columns, by sampling. And one way it is not.

A classifier gives each input probabilities p(t | x, θ). The Fisher information matrix says how far
these probabilities move when the parameters do, and it is the curvature that K-FAC approximates:

    F = (1/N) Σ_n E_{t ~ p(·|x_n, θ)} [∇ log p(t | x_n, θ)  ∇ log p(t | x_n, θ)ᵀ]

The expectation is over targets that the *model* would give, not over those in the training set.
Overlooking this is the most common mistake about it; section 4 shows how much it matters.

The network here has few enough parameters to write every matrix down.
"""

import numpy as np

from kfac_np import (
    Dense,
    Empirical,
    Exact,
    FullMatrix,
    MonteCarlo,
    Objective,
    Rng,
    Sequential,
    SoftmaxCrossEntropy,
    Tanh,
    get_backend,
)
from kfac_np.products import ggn_product, quadratic_forms
from kfac_np.trees import leaves, ravel, unravel

N, C = 40, 3  # examples and classes
random = np.random.default_rng(0)
backend = get_backend("numpy", "float64")

net = Sequential(Dense(2, 4), Tanh(), Dense(4, C))
loss = SoftmaxCrossEntropy()  # ℓ(z, t) = -log p(t), p = softmax(z)
objective = Objective(net, loss)

params = net.init(Rng(1), backend)
x = random.standard_normal((N, 2))
t = (x[:, 0] * x[:, 1] > 0).astype(int) + (x[:, 0] > 1)  # the labels of the training set: 0, 1, 2

at = objective.evaluate(params, x, t)  # the network at θ, on this batch
P = ravel(params).size
print(f"{N} examples, {C} classes, {P} parameters: F is {P} × {P}\n")


def distance(one, other):
    """Relative difference of two matrices, in the Frobenius norm."""
    return np.linalg.norm(one - other) / np.linalg.norm(other)


# ------------------------------------------------------------------------------------------------
# 1. By the definition
#
# The expectation over targets is a sum of C terms. For each class c pretend that it is every
# example's target, compute all gradients of -log p(c | x_n), and weigh their outer products by
# p(c | x_n).
#
# `backward` gives the statistics of every layer; `per_example` turns them into one gradient an
# example. Flattened and put side by side they are the rows ∇ℓ_n of an array (N, P).


def per_example_gradients(vectors):
    """Rows of Jₙᵀ vₙ for vectors of the outputs' shape (N, C)."""
    statistics = at.backward(vectors)
    return np.concatenate([s.per_example().reshape(N, -1) for s in leaves(statistics)], axis=1)


z = at.outputs
p = np.exp(z) / np.sum(np.exp(z), axis=1, keepdims=True)  # (N, C)

by_definition = np.zeros((P, P))
for c in range(C):
    everyone_is_c = np.full(N, c)
    rows = per_example_gradients(loss.gradient(z, everyone_is_c))
    by_definition += (rows * p[:, c : c + 1]).T @ rows / N

# Under the model's own targets the gradient's mean is zero: the probabilities already are what
# they are. F is therefore the covariance of the gradient.

mean = sum(
    (per_example_gradients(loss.gradient(z, np.full(N, c))) * p[:, c : c + 1]).mean(axis=0)
    for c in range(C)
)
assert np.allclose(mean, 0)
print("1. by definition: trace of F =", round(float(np.trace(by_definition)), 6))


# ------------------------------------------------------------------------------------------------
# 2. By columns
#
# The parameters act on ℓ through z only, so ∇ℓ_n = J_nᵀ ∂ℓ/∂z with J_n = ∂z_n/∂θ, and
#
#     F = (1/N) Σ_n J_nᵀ B_n J_n,    B_n = E_t[∂ℓ/∂z ∂ℓ/∂zᵀ] = diag(p_n) - p_n p_nᵀ,
#
# where B_n, the Fisher of the output alone, is also the Hessian ∂²ℓ/∂z²: hence F is the
# generalised Gauss-Newton matrix too. Now split B_n = S_n S_nᵀ. Each column of S_n is a vector that
# can be backpropagated like a gradient, and the outer products of what arrives add up to F. The
# library's losses know a factor S; for softmax it is diag(√p) - p √pᵀ.

S = loss.fisher_factor(z)  # (C, N, C): column k of every S_n
B = np.einsum("kni,knj->nij", S, S)
assert np.allclose(B, np.einsum("ni,ij->nij", p, np.eye(C)) - np.einsum("ni,nj->nij", p, p))

by_columns = np.zeros((P, P))
for column in S:
    rows = per_example_gradients(column)
    by_columns += rows.T @ rows / N
assert np.allclose(by_columns, by_definition, rtol=1e-10, atol=1e-14)

# This is the Fisher type `Exact`; `FullMatrix` is the "curvature" that approximates nothing.


def fisher(kind, seed=0):
    """The whole Fisher matrix of one kind, by the library."""
    moments = FullMatrix().estimate(at, kind, Rng(seed))
    return FullMatrix().matrix(moments, params).to_dense()


F = fisher(Exact())
assert np.allclose(F, by_definition, rtol=1e-10, atol=1e-14)
print(f"2. by columns: relative difference from the definition {distance(F, by_definition):.0e}")

# A whole F is rarely needed. A product F v takes one pass forward (J v), a small multiplication by
# B_n, and one pass back; the number vᵀ F v takes the pass forward alone.

v = random.standard_normal(P)
Fv = ravel(ggn_product(at, unravel(v, params)))
quadratic = float(quadratic_forms(at, [unravel(v, params)])[0, 0])
assert np.allclose(Fv, F @ v)
assert np.isclose(quadratic, v @ F @ v)


# ------------------------------------------------------------------------------------------------
# 3. By sampling
#
# C backward passes are cheap for 3 classes and dear for 784 pixels. Instead of all targets, draw
# K from the model and backpropagate ∂ℓ(z, t̃)/∂z / √K. One draw an example is right on average; for
# K-FAC that is enough: it averages over the examples and over the steps. The error falls like 1/√K.

print("3. by sampling: relative error of F, mean of 20 repetitions")
print("       K    error   error · √K")
errors = {}
for K in (1, 4, 16, 64, 256):
    errors[K] = np.mean([distance(fisher(MonteCarlo(K), seed), F) for seed in range(20)])
    print(f"     {K:3d}  {errors[K]:7.4f}  {errors[K] * K**0.5:7.3f}")
assert 0.8 < errors[256] * 16 / errors[1] < 1.25  # 256 samples: sixteen times closer


# ------------------------------------------------------------------------------------------------
# 4. The empirical Fisher, which is something else
#
# It is tempting to save the sampling: the gradients of the training targets are there anyway, so
# take (1/N) Σ ∇ℓ_n ∇ℓ_nᵀ. This is called the empirical Fisher. No expectation over the model is
# left in it, and no number of samples will bring it closer to F. It comes near F only where the
# training targets are distributed as the model says. Let us see how much it depends on them: with
# the labels as they are; with labels drawn from the model; with the labels that the model finds
# least likely.


def empirical(targets):
    """The empirical Fisher for these training targets."""
    e = objective.evaluate(params, x, targets)
    return FullMatrix().matrix(FullMatrix().estimate(e, Empirical(), Rng(0)), params).to_dense()


labels = {
    "the training labels": t,
    "drawn from the model": loss.sample_targets(Rng(5), z),
    "the least likely ones": np.argmin(p, axis=1),
}
print("4. the empirical Fisher\n     labels                 error   trace / trace F")
far = {}
for name, targets in labels.items():
    E = empirical(targets)
    far[name] = distance(E, F)
    print(f"     {name:21s} {far[name]:6.2f}   {np.trace(E) / np.trace(F):6.2f}")

# Drawn labels make it the Monte-Carlo Fisher with K = 1. The others do not:

assert far["drawn from the model"] < 2 * errors[1]
assert far["the least likely ones"] > 2 * far["drawn from the model"]

# Where it goes most wrong is at the end of training. Make the model sure of itself and right, by
# labelling every input with its most likely class and scaling up the last layer: the gradients at
# the training targets are then smaller than those at the targets that the model expects. E is too
# small, and a step E⁻¹ ∇L too long.

print("     a model that is right: labels = its most likely class")
print("     last layer ×   trace F    trace E   ratio")
ratios = []
for factor in (1, 4, 16):
    sure = (params[0], (), factor * params[2])
    z_sure = net.forward(sure, x)[0]
    e = objective.evaluate(sure, x, np.argmax(z_sure, axis=1))
    traces = [
        float(np.trace(FullMatrix().estimate(e, kind, Rng(0))["full"]["matrix"]))
        for kind in (Exact(), Empirical())
    ]
    ratios.append(traces[1] / traces[0])
    print(f"     {factor:8d}     {traces[0]:8.4f}   {traces[1]:8.4f}  {ratios[-1]:6.2f}")
assert ratios[0] > ratios[1] > ratios[2]

# The empirical Fisher has its uses, and the library offers it as `Empirical()`. It is not an
# approximation of F. From here on F means `Exact()`, or `MonteCarlo()` where that is cheaper.

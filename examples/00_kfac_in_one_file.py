"""K-FAC in one file: algorithm 2 of Martens & Grosse (2015), in NumPy and nothing else.

The natural gradient is F⁻¹∇h, with F the Fisher matrix. F has a row for every parameter of the
network, far too many to invert it. K-FAC keeps only one diagonal block for each layer, and
approximates the block by the Kronecker product of two small matrices:

    layer       s = W ā, where ā is the layer's input with a 1 appended, and g = ∂ℓ/∂s
    gradient    E[g āᵀ]
    block       E[ggᵀ ⊗ āāᵀ] ≈ G ⊗ A, where A = E[āāᵀ] and G = E[ggᵀ]               §3
    inverse     (G ⊗ A)⁻¹ vec V = vec(G⁻¹ V A⁻¹), where vec goes row by row         §4.2

Sections are those of arXiv:1503.05671. Left out are its search for γ (§6.6; here γ = √(λ + η)), its
average of the iterates (§8) and its block-tridiagonal inverse (§4.3).
"""

import time
from itertools import pairwise
from math import ceil, sqrt

import numpy as np

ETA = 1e-5  # η, the coefficient of the penalty (η/2)‖θ‖²
T1, T3 = 5, 20  # steps between updates of λ, and between inversions
TAU1, TAU2 = 1 / 8, 1 / 4  # fractions of the mini-batch: for A and G, and for the exact F
OMEGA1 = (19 / 20) ** T1  # λ is multiplied or divided by it

# --- The network: a list W of matrices [W b], with tanh between the layers, and ½‖z - t‖² ---------


def forward(W, x):
    """Outputs z, and the input ā of each layer."""
    inputs = []
    for w in W:
        inputs.append(np.column_stack([x, np.ones(len(x))]))
        s = inputs[-1] @ w.T
        x = np.tanh(s)
    return s, inputs  # no tanh after the last layer


def backward(W, inputs, g):
    """∂ℓ/∂s of each layer, from g = ∂ℓ/∂z."""
    derivatives = [g]
    for w, a in zip(W[:0:-1], inputs[:0:-1]):
        g = (g @ w[:, :-1]) * (1 - a[:, :-1] ** 2)  # tanh' = 1 - tanh²
        derivatives.insert(0, g)
    return derivatives


def jvp(W, inputs, V):
    """J v, the derivative of the outputs as W moves along V."""
    ds = 0.0
    for w, v, a in zip(W, V, inputs):
        ds = (ds * (1 - a[:, :-1] ** 2)) @ w[:, :-1].T + a @ v.T
    return ds


def inner(U, V):
    return sum(np.sum(u * v) for u, v in zip(U, V))


def evaluate(W, x, t):
    """h(θ) = mean loss + (η/2)‖θ‖², its gradient, and the input ā of each layer."""
    z, inputs = forward(W, x)
    h = np.sum((z - t) ** 2) / (2 * len(x)) + ETA / 2 * inner(W, W)
    derivatives = backward(W, inputs, z - t)
    gradient = [g.T @ a / len(x) + ETA * w for g, a, w in zip(derivatives, inputs, W)]
    return h, gradient, inputs


# --- The optimisers: generators of the network after each step, and of h before it ----------------


def damped_inverses(A, G, gamma):
    """(A + πγI)⁻¹ and (G + (γ/π)I)⁻¹, π² = (tr A / dim A) / (tr G / dim G)."""
    pi = sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
    damped_A, damped_G = A + pi * gamma * np.eye(len(A)), G + gamma / pi * np.eye(len(G))
    return np.linalg.inv(damped_A), np.linalg.inv(damped_G)


def kfac(W, batches, damping, random):
    """Algorithm 2, starting with λ = `damping`."""
    A, G, last = [0.0] * len(W), [0.0] * len(W), []
    for k, (x, t) in enumerate(batches, start=1):
        h, gradient, inputs = evaluate(W, x, t)

        # §5: moving averages of A and G. Here g comes from a second backward pass, with targets
        # drawn from the model instead of t. The model is Gaussian: they are z + noise.
        part = [a[: ceil(TAU1 * len(x))] for a in inputs]
        noise = random.standard_normal((len(part[0]), len(W[-1])))
        decay = min(1 - 1 / k, 0.95)
        for i, (a, g) in enumerate(zip(part, backward(W, part, -noise))):
            A[i] = decay * A[i] + (1 - decay) * (a.T @ a) / len(a)
            G[i] = decay * G[i] + (1 - decay) * (g.T @ g) / len(g)

        # §4.2, §6.3: the proposal Δ = -F̂⁻¹∇h. Every T3 steps the inverses are computed anew.
        if k <= 3 or k % T3 == 0:
            gamma = sqrt(damping + ETA)
            inverses = [damped_inverses(*factors, gamma) for factors in zip(A, G)]
        proposal = [-inv_G @ v @ inv_A for v, (inv_A, inv_G) in zip(gradient, inverses)]

        # §6.4, §7: the update δ = αΔ + μδ₀ that minimises M(δ) = ½ δᵀ(F + (λ + η)I)δ + ∇hᵀδ + h,
        # where F is exact. It takes no backward pass: here uᵀFv = E[(Ju)ᵀ(Jv)] (appendix C).
        directions = [proposal, *last]
        part = [a[: ceil(TAU2 * len(x))] for a in inputs]
        J = [jvp(W, part, v) for v in directions]
        F = np.array([[np.sum(p * q) / len(p) for p in J] for q in J])
        gram = np.array([[inner(u, v) for u in directions] for v in directions])
        slope = np.array([inner(gradient, v) for v in directions])
        alpha_mu = np.linalg.solve(F + (damping + ETA) * gram, -slope)
        update = [np.tensordot(alpha_mu, layer, axes=1) for layer in zip(*directions)]
        W, last = [w + d for w, d in zip(W, update)], [update]

        # §6.5: λ by Levenberg-Marquardt; ρ is the change of h over the change that M predicts.
        if k % T1 == 0:
            rho = (evaluate(W, x, t)[0] - h) / (0.5 * slope @ alpha_mu)
            damping *= OMEGA1 if rho > 3 / 4 else 1 / OMEGA1 if rho < 1 / 4 else 1
        yield W, h, damping


def sgd(W, batches, rate, momentum):
    update = [0.0] * len(W)
    for x, t in batches:
        h, gradient, _ = evaluate(W, x, t)
        update = [momentum * d - rate * v for d, v in zip(update, gradient)]
        W = [w + d for w, d in zip(W, update)]
        yield W, h


# --- An autoencoder of spots: images made from three numbers, through a code of three numbers -----


def spots(random, n, side=12):
    x, y, width = random.uniform([2, 2, 0.8], [side - 3, side - 3, 2.5], (n, 3)).T[:, :, None]
    row, column = np.divmod(np.arange(side**2), side)
    return np.exp(-((row - x) ** 2 + (column - y) ** 2) / (2 * width**2))


if __name__ == "__main__":
    random, sizes = np.random.default_rng(0), (144, 64, 32, 3, 32, 64, 144)
    weights = [random.standard_normal((n, m)) / sqrt(m) for m, n in pairwise(sizes)]
    start = [np.column_stack([w, np.zeros(len(w))]) for w in weights]
    batches, test = [[spots(random, 500)] * 2 for _ in range(200)], [spots(random, 2000)] * 2
    # The rate of SGD is the best of 0.01, 0.02, 0.03 and 0.05.
    runs = {"K-FAC": kfac(start, batches, 1.0, random), "SGD": sgd(start, batches, 0.03, 0.9)}
    for name, run in runs.items():
        began = time.perf_counter()
        for k, (W, *_) in enumerate(run, start=1):
            if k in (1, 3, 10, 30, 100, 200):
                seconds, loss = time.perf_counter() - began, evaluate(W, *test)[0]
                print(f"{name:5} after {k:3} steps, {seconds:4.1f} s: test loss {loss:.3f}")

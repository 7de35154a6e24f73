"""1. A layer by hand: forward, backward, and what a backward pass should hand out.

A neural network is a chain of functions, and training it needs the chain rule. This script builds
one layer with nothing but NumPy, then shows the same layer in `kfac_np`. The one thing to take
away is in section 4: a backward pass of this library does not return a gradient. It returns the
two arrays that the gradient is made of, because curvature is made of the same two.

Run it: every claim is an `assert`, or a small table.
"""

import numpy as np

from kfac_np import Dense, Objective, Sequential, SquaredError, Tanh
from kfac_np.trees import axpy

random = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------
# 1. Forward
#
# A fully connected layer maps an input vector x to y = W x + b. A batch holds N inputs as rows of
# one array, of shape (N, d_in), so that the layer is one matrix product:

N, d_in, d_out = 5, 3, 2
x = random.standard_normal((N, d_in))
W = random.standard_normal((d_out, d_in))
b = random.standard_normal(d_out)
y = x @ W.T + b  # shape (N, d_out)

# Two parameters, a matrix and a vector, would make two of every formula that follows. There is an
# old remedy: append a 1 to every input, and the bias as one more column to the matrix.
#
#     ā = [x; 1]        W̄ = [W b]        y = W̄ ā

a = np.concatenate([x, np.ones((N, 1))], axis=1)  # (N, d_in + 1)
W_bar = np.concatenate([W, b[:, None]], axis=1)  # (d_out, d_in + 1)
assert np.allclose(a @ W_bar.T, y)

# From here on a layer has one parameter, W̄. This is what the library's layer does, too. It gives
# back its output and a cache of what the way back will need, here simply ā:

layer = Dense(d_in, d_out)
y_library, cache = layer.forward(W_bar, x)
assert np.allclose(y_library, y)
assert np.allclose(cache, a)
print(f"1. forward: inputs {x.shape}, parameters {W_bar.shape}, outputs {y.shape}")


# ------------------------------------------------------------------------------------------------
# 2. Backward
#
# Somewhere above this layer a number L is computed from its outputs. Suppose someone tells us
# g = ∂L/∂y, an array of the shape of y. What is ∂L/∂x, and what is ∂L/∂W̄?
#
# Move one example's input by dx, and its output moves by W dx, hence L by g · (W dx) = (Wᵀ g) · dx.
# Move the parameters by dW̄, and each output moves by dW̄ ā, hence L by g · (dW̄ ā), which is the
# sum over all entries of dW̄ times the entries of g āᵀ. All examples add up:
#
#     ∂L/∂x_n = Wᵀ g_n              ∂L/∂W̄ = Σ_n g_n ā_nᵀ


def number(W_bar, x):
    """L: some number made of the outputs, here the sum of their sines."""
    a = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return float(np.sum(np.sin(a @ W_bar.T)))


g = np.cos(y)  # ∂L/∂y
grad_x = g @ W
grad_w = g.T @ a  # the sum over n, as a matrix product


# A derivative that was not compared with differences is a guess. The central difference
# (f(v + h) - f(v - h)) / 2h has an error of order h², here about 1e-10:


def differences(f, at, h=1e-5):
    """Derivative of the number f(v) at v = `at`, entry by entry."""
    out = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[i] = h
        out[i] = (f(at + step) - f(at - step)) / (2 * h)
    return out


error_x = np.max(np.abs(grad_x - differences(lambda v: number(W_bar, v), x)))
error_w = np.max(np.abs(grad_w - differences(lambda V: number(V, x), W_bar)))
assert max(error_x, error_w) < 1e-8
print(f"2. backward: differs from finite differences by {max(error_x, error_w):.0e} at most")


# ------------------------------------------------------------------------------------------------
# 3. Forward once more, with directions
#
# The map from (dx, dW̄) to the movement of y is linear; call it J. Its formula is the product rule:
#
#     dy = W dx + dW̄ ā
#
# In the library it is called `jvp`, Jacobian-vector product. `backward` is the same linear map
# transposed. So there is a test that needs neither differences nor a tolerance to argue about:
# for any direction v and any u,
#
#     ⟨u, J v⟩ = ⟨Jᵀ u, v⟩

dx = random.standard_normal(x.shape)
dw = random.standard_normal(W_bar.shape)
u = random.standard_normal(y.shape)

Jv = layer.jvp(W_bar, cache, dx, dw)
Jt_u_x, statistics = layer.backward(W_bar, cache, u)
Jt_u_W = statistics.gradient()

left = np.sum(u * Jv)
right = np.sum(Jt_u_x * dx) + np.sum(Jt_u_W * dw)
assert np.isclose(left, right, rtol=1e-12)
print(f"3. adjoints: ⟨u, Jv⟩ = {left:.12f}, ⟨Jᵀu, v⟩ = {right:.12f}")

# A backward pass reads the cache and writes nothing. That matters more here than elsewhere: K-FAC
# carries several sets of vectors back through one forward pass. Twice is the same as once:

again, _ = layer.backward(W_bar, cache, u)
assert np.array_equal(again, Jt_u_x)


# ------------------------------------------------------------------------------------------------
# 4. What a backward pass hands out
#
# Look at the gradient once more: Σ_n g_n ā_nᵀ. It needs ā and g, and nothing else about the layer.
# `backward` therefore returns the pair itself, and calls it the layer's statistics:

dx_library, statistics = layer.backward(W_bar, cache, g)
assert np.allclose(dx_library, grad_x)
assert np.allclose(statistics.a[:, 0, :], a)  # the middle axis: one location, see script 3
assert np.allclose(statistics.g[:, 0, :], g)

# The gradient is the pair's first moment. Having the pair and not the sum, we can also ask for
# each example's own gradient, or for second moments:

assert np.allclose(statistics.gradient(), grad_w)
assert np.allclose(statistics.per_example().sum(axis=0), grad_w)
A = a.T @ a / N  # mean of ā āᵀ, shape (d_in + 1, d_in + 1)
G = g.T @ g / N  # mean of g gᵀ, shape (d_out, d_out)

# A and G are the two factors of K-FAC. Which g they should be made of is the subject of script 2,
# what they approximate that of script 3. The point here is that they came out of an ordinary
# backward pass: the layer knows nothing about curvature, and whoever computes curvature needs to
# know nothing about layers.

print("4. one backward pass, many uses:")
print("     Σ g āᵀ        the gradient         ", statistics.gradient().shape)
print("     g_n ā_nᵀ      each example's own   ", statistics.per_example().shape)
print("     mean of ā āᵀ  Kronecker factor A   ", A.shape)
print("     mean of g gᵀ  Kronecker factor G   ", G.shape)


# ------------------------------------------------------------------------------------------------
# 5. From layers to a network
#
# Chaining layers is a loop, and the way back is the loop reversed. Here it is for two dense layers
# with a tanh between them; tanh has no parameters, and its derivative is 1 - tanh².

net = Sequential(Dense(3, 4), Tanh(), Dense(4, 2))
params = (random.standard_normal((4, 4)), (), random.standard_normal((2, 5)))
W1, _, W2 = params


def with_one(v):
    """[v; 1]."""
    return np.concatenate([v, np.ones((len(v), 1))], axis=1)


h = np.tanh(with_one(x) @ W1.T)  # forward ...
z = with_one(h) @ W2.T
g2 = np.cos(z)  # ... and back, with L = Σ sin(z)
gradient_2 = g2.T @ with_one(h)
g1 = (g2 @ W2[:, :-1]) * (1 - h**2)
gradient_1 = g1.T @ with_one(x)

# `Sequential` is that loop. Its parameters, cache and statistics are tuples, an entry a layer:

z_library, cache = net.forward(params, x)
_, statistics = net.backward(params, cache, np.cos(z_library))
assert np.allclose(z_library, z)
assert np.allclose(statistics[0].gradient(), gradient_1)
assert statistics[1] == ()  # tanh has no parameters, so nothing to say
assert np.allclose(statistics[2].gradient(), gradient_2)
print("5. a network of two layers by hand agrees with Sequential")


# ------------------------------------------------------------------------------------------------
# 6. A loss, and who divides
#
# So far everything was a sum over examples. A training loss is a mean. If every function divided
# by whatever it thought proper, nobody could say what the scale of a gradient is; so in this
# library losses return one value an example, `backward` returns sums, and one object divides: the
# objective.
#
#     L(θ) = (1/N) Σ_n ½ ‖z_n - t_n‖²

objective = Objective(net, SquaredError())
t = random.standard_normal((N, 2))
at_start = objective.evaluate(params, x, t)
assert np.isclose(at_start.value, np.mean(0.5 * np.sum((z - t) ** 2, axis=1)))

gradient = at_start.gradient()  # a tuple like the parameters
numeric = differences(lambda V: objective.value((V, (), W2), x, t), W1)
assert np.allclose(gradient[0], numeric, atol=1e-8)

# Gradient descent is then two lines. A dozen examples of a curve, and a table:

x = np.linspace(-2, 2, 12)[:, None]
t = np.sin(2 * x)
objective = Objective(Sequential(Dense(1, 10), Tanh(), Dense(10, 1)), SquaredError())
params = (random.standard_normal((10, 2)), (), 0.3 * random.standard_normal((1, 11)))

print("6. gradient descent on sin(2x)\n     step     loss")
losses = []
for step in range(1001):
    evaluation = objective.evaluate(params, x, t)
    losses.append(evaluation.value)
    if step in (0, 10, 100, 1000):
        print(f"     {step:4d}  {losses[-1]:7.4f}")
    params = axpy(-0.1, evaluation.gradient(), params)  # params - 0.1 * gradient
assert losses[-1] < 0.1 * losses[0]

# It goes down, slowly. To do better one has to know how the loss bends: that is script 2.

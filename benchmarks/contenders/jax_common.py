"""Networks, losses and batches in JAX, for both contenders that use it."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders.child import Setup
from benchmarks.workloads import Network

JAX = {"jax": "pip install 'jax==0.8.2' 'jaxlib==0.8.2'"}


def forward(network: Network, params: Any, x: Any) -> Any:
    """Outputs, written so that kfac-jax recognises the layers."""
    import jax
    from jax import numpy as jnp

    activation = jnp.tanh if network.activation == "tanh" else jax.nn.relu
    convolutions = len(network.channels)
    if convolutions:
        x = x.reshape(-1, *network.image)
    for i, (w, b) in enumerate(params):
        if i < convolutions:
            x = jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.lax.reduce_window(
                x + b, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
                ((0, 0), (1, 1), (1, 1), (0, 0)),
            )  # fmt: skip
        else:
            x = x.reshape(x.shape[0], -1) @ w + b
        if i < len(params) - 1 and i not in network.linear:
            x = activation(x)
    return x


def mean_loss(network: Network, l2: float, register: bool) -> Any:
    """Loss of parameters and a batch, with weight decay."""
    import jax
    from jax import numpy as jnp

    def value(params: Any, batch: Any) -> Any:
        x, t = batch
        z = forward(network, params, x)
        if network.loss == "sigmoid":
            terms = jnp.sum(jax.nn.softplus(z) - t * z, axis=-1)
        else:
            terms = -jnp.take_along_axis(jax.nn.log_softmax(z), t[:, None], axis=1)[:, 0]
        if register:
            import kfac_jax

            if network.loss == "sigmoid":
                kfac_jax.register_multi_bernoulli_predictive_distribution(z, t)
            else:
                kfac_jax.register_softmax_cross_entropy_loss(z, t)
        squares = sum(jnp.sum(p * p) for p in jax.tree.leaves(params))
        return terms.mean() + 0.5 * l2 * squares

    return value


def start(setup: Setup) -> tuple[Any, Any]:
    """Parameters and batch on the device."""
    import jax
    import numpy as np
    from jax import numpy as jnp

    from benchmarks.problems import problem

    if setup.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if setup.device == "cuda":
        precision = "tensorfloat32" if setup.tf32 else "highest"
        jax.config.update("jax_default_matmul_precision", precision)
    numbers = problem(setup.workload, setup.dtype)
    kernels = _kernels(setup.workload.network)
    params = []
    for i, (weights, bias) in enumerate(numbers.layers):
        convolves = i < len(kernels)
        kernel = np.moveaxis(weights.reshape(kernels[i]), 0, -1) if convolves else weights.T
        params.append((jnp.array(kernel), jnp.array(bias)))
    return params, (jnp.asarray(numbers.x), jnp.asarray(numbers.t))


def layers_of(network: Network, params: Any) -> Any:
    """Weights and biases as `benchmarks.problems` has them."""
    import numpy as np

    kernels = _kernels(network)
    arrays = []
    for i, (weights, bias) in enumerate(params):
        weights = np.asarray(weights)
        if i < len(kernels):
            weights = np.moveaxis(weights, -1, 0).reshape(kernels[i][0], -1)
        else:
            weights = weights.T
        arrays.append((weights, bias))
    return arrays


def _kernels(network: Network) -> list[tuple[int, ...]]:
    kernels, depth = [], network.image[2]
    for width in network.channels:
        kernels.append((width, network.kernel, network.kernel, depth))
        depth = width
    return kernels

"""Plain SGD in JAX: the floor under kfac-jax."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.contenders.jax_common import JAX, layers_of, mean_loss, start


def build(setup: Setup) -> Running:
    """One compiled step of SGD with Nesterov's momentum; buffers are reused."""
    import functools

    import jax
    from jax import numpy as jnp

    w = setup.workload
    params, batch = start(setup)
    gradient = jax.grad(mean_loss(w.network, 0.0, register=False))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def move(params: Any, velocity: Any, batch: Any) -> tuple[Any, Any]:
        g = gradient(params, batch)
        velocity = jax.tree.map(lambda v, d: w.momentum * v + d, velocity, g)
        params = jax.tree.map(
            lambda p, v, d: p - w.sgd_rate * (d + w.momentum * v), params, velocity, g
        )
        return params, velocity

    now = {"params": params, "velocity": jax.tree.map(jnp.zeros_like, params)}

    def step() -> str:
        now["params"], now["velocity"] = move(now["params"], now["velocity"], batch)
        jax.block_until_ready(now["params"])
        return ""

    return Running(step, lambda: layers_of(w.network, now["params"]))


if __name__ == "__main__":
    serve(JAX, build, "jax jaxlib numpy")

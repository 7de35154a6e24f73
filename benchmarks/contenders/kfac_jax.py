"""kfac-jax: K-FAC."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.contenders.jax_common import JAX, layers_of, mean_loss, start


def build(setup: Setup) -> Running:
    """One compiled step of `kfac_jax.Optimizer`, its state kept here."""
    import jax
    import kfac_jax

    w = setup.workload
    params, batch = start(setup)
    exact = setup.options.get("statistics") == "exact"
    settings: dict[str, Any] = {}
    if w.model == "exact":
        settings |= {"use_adaptive_learning_rate": True, "use_adaptive_momentum": True}
    else:
        settings["learning_rate_schedule"] = lambda _: w.rate
        settings["momentum_schedule"] = lambda _: w.momentum
    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(mean_loss(w.network, w.l2, register=True)),
        l2_reg=w.l2,
        damping_schedule=lambda _: w.damping,
        num_burnin_steps=0,
        estimation_mode="fisher_exact" if exact else "fisher_gradients",
        curvature_update_period=1,
        inverse_update_period=w.refresh,
        multi_device=False,
        **settings,
    )
    key = jax.random.PRNGKey(0)
    state = optimizer.init(params, key, batch)
    now = {"params": params, "state": state, "key": key, "step": 0}

    def step() -> str:
        k = now["step"]
        now["key"], key = jax.random.split(now["key"])
        now["params"], now["state"], _ = optimizer.step(
            now["params"], now["state"], key, batch=batch, global_step_int=k
        )
        jax.block_until_ready(now["params"])
        now["step"] = k + 1
        return "refresh" if k % w.refresh == 0 else ""

    return Running(step, lambda: layers_of(w.network, now["params"]))


if __name__ == "__main__":
    kfac_jax = {"kfac_jax": "pip install 'kfac-jax==0.0.8' 'jax==0.8.2' 'jaxlib==0.8.2'"}
    serve(JAX | kfac_jax, build, "jax jaxlib kfac-jax numpy")

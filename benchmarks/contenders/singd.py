"""SINGD: the inverse-free relative of K-FAC, dense factors, empirical Fisher, every step."""

from __future__ import annotations

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.contenders.torch_common import TORCH, Model

INSTALL = "pip install singd"


def build(setup: Setup) -> Running:
    """`SINGD` with `kfac_like=True`: it has no inverses to refresh, its factors move each step."""
    from singd.optim.optimizer import SINGD

    model = Model.of(setup)
    w = setup.workload
    optimizer = SINGD(
        model.network,
        lr=w.rate,
        momentum=w.momentum,
        damping=w.damping,
        T=1,
        kfac_like=True,
        normalize_lr_cov=True,
    )

    def step() -> str:
        optimizer.zero_grad(set_to_none=True)
        model.loss(model.network(model.x), model.t).backward()
        optimizer.step()
        model.wait()
        return ""

    return Running(step, model.layers)


if __name__ == "__main__":
    serve(TORCH | {"singd.optim.optimizer": INSTALL}, build, "torch singd numpy")

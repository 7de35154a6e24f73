"""kfac-pytorch: factors from the gradients themselves (empirical Fisher)."""

from __future__ import annotations

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.contenders.torch_common import TORCH, Model

INSTALL = "pip install git+https://github.com/gpauloski/kfac-pytorch"


def build(setup: Setup) -> Running:
    """`KFACPreconditioner` before `torch.optim.SGD`, with inverses; √λ is added to both factors."""
    import torch
    from kfac.enums import ComputeMethod
    from kfac.preconditioner import KFACPreconditioner

    model = Model.of(setup, channels_last=False)
    w = setup.workload
    model.network.train()
    preconditioner = KFACPreconditioner(
        model.network,
        factor_update_steps=1,
        inv_update_steps=w.refresh,
        damping=w.damping**0.5,
        factor_decay=0.95,
        kl_clip=1e30,  # None, which its documentation allows, is refused
        lr=w.rate,
        compute_method=ComputeMethod.INVERSE,
    )
    optimizer = torch.optim.SGD(model.network.parameters(), lr=w.rate, momentum=w.momentum)

    def step() -> str:
        kind = "refresh" if preconditioner.steps % w.refresh == 0 else ""
        optimizer.zero_grad(set_to_none=True)
        model.loss(model.network(model.x), model.t).backward()
        preconditioner.step()
        optimizer.step()
        model.wait()
        return kind

    return Running(step, model.layers)


if __name__ == "__main__":
    serve(TORCH | {"kfac.preconditioner": INSTALL}, build, "torch kfac_pytorch numpy")

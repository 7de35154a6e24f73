"""ASDL: one sampled target for softmax; it samples none for sigmoid outputs: empirical there."""

from __future__ import annotations

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.contenders.torch_common import TORCH, Model

# `asdl` on PyPI is something else.
INSTALL = "pip install asdfghjkl"


def build(setup: Setup) -> Running:
    """`KfacGradientMaker` before `torch.optim.SGD`."""
    import torch
    from asdl import FISHER_EMP, FISHER_MC
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig
    from torch.nn import functional

    if setup.device == "cpu":
        # It marks ranges for a GPU's profiler, which raises where PyTorch was built without CUDA.
        torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    model = Model.of(setup, channels_last=False)
    w = setup.workload
    sigmoid = w.network.loss == "sigmoid"
    config = PreconditioningConfig(
        data_size=w.batch,
        damping=w.damping,
        ema_decay=0.05,
        curvature_upd_interval=1,
        preconditioner_upd_interval=w.refresh,
    )
    maker = KfacGradientMaker(model.network, config, FISHER_EMP if sigmoid else FISHER_MC)
    output = maker.setup_model_call(model.network, model.x)
    loss = functional.binary_cross_entropy_with_logits if sigmoid else functional.cross_entropy
    maker.setup_loss_call(loss, output, model.t)
    optimizer = torch.optim.SGD(model.network.parameters(), lr=w.rate, momentum=w.momentum)

    def step() -> str:
        kind = "refresh" if maker.state["step"] % w.refresh == 0 else ""
        optimizer.zero_grad(set_to_none=True)
        maker.forward_and_backward()
        optimizer.step()
        model.wait()
        return kind

    return Running(step, model.layers)


if __name__ == "__main__":
    serve(TORCH | {"asdl": INSTALL}, build, "torch asdfghjkl numpy")

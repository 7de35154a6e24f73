"""Plain SGD in PyTorch: the floor under every PyTorch K-FAC."""

from __future__ import annotations

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.contenders.torch_common import TORCH, Model


def build(setup: Setup) -> Running:
    """`torch.optim.SGD` with Nesterov's momentum, images channels-last."""
    import torch

    model = Model.of(setup)
    w = setup.workload
    optimizer = torch.optim.SGD(
        model.network.parameters(), lr=w.sgd_rate, momentum=w.momentum, nesterov=True
    )

    def step() -> str:
        optimizer.zero_grad(set_to_none=True)
        model.loss(model.network(model.x), model.t).backward()
        optimizer.step()
        model.wait()
        return ""

    return Running(step, model.layers)


if __name__ == "__main__":
    serve(TORCH, build, "torch numpy")

"""curvlinops: a K-FAC operator made anew each step (no moving average), inverted when due."""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.contenders.torch_common import TORCH, Model

INSTALL = "pip install curvlinops-for-pytorch"


def build(setup: Setup) -> Running:
    """`KFACLinearOperator` and `KFACInverseLinearOperator` before `torch.optim.SGD`.

    Losses are sums here, as the library's scale of a mean over outputs is another one: N (F + λI).
    """
    import torch
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    model = Model.of(setup)
    w = setup.workload
    params = list(model.network.parameters())
    sigmoid = w.network.loss == "sigmoid"
    loss = (torch.nn.BCEWithLogitsLoss if sigmoid else torch.nn.CrossEntropyLoss)(reduction="sum")
    optimizer = torch.optim.SGD(params, lr=w.rate, momentum=w.momentum)
    data = [(model.x, model.t)]
    count = itertools.count()
    inverse: Any = None

    def step() -> str:
        nonlocal inverse
        k = next(count)
        factors = KFACLinearOperator(
            model.network,
            loss,
            params,
            data,
            check_deterministic=False,
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
            num_data=w.batch,
            seed=k,
        )
        factors.compute_kronecker_factors()
        refresh = k % w.refresh == 0
        if refresh:
            inverse = KFACInverseLinearOperator(
                factors, damping=w.batch * w.damping, use_heuristic_damping=True
            )
        optimizer.zero_grad(set_to_none=True)
        loss(model.network(model.x), model.t).backward()
        natural = inverse @ [p.grad for p in params]
        for p, g in zip(params, natural, strict=True):
            p.grad = g.reshape(p.shape)
        optimizer.step()
        model.wait()
        return "refresh" if refresh else ""

    return Running(step, model.layers)


if __name__ == "__main__":
    serve(TORCH | {"curvlinops": INSTALL}, build, "torch curvlinops-for-pytorch numpy")

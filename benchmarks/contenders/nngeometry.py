"""NNGeometry: K-FAC matrices from one sampled target, averaged here, inverted when due."""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.contenders.child import Running, Setup, serve
from benchmarks.contenders.torch_common import TORCH, Model

INSTALL = "pip install nngeometry"


class WholeBatch:
    """A data set that is one batch, handed over as it is instead of collected row by row."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: Any) -> Any:
        return (self.x.detach(),)


def build(setup: Setup) -> Running:
    """`PMatKFAC` before `torch.optim.SGD`; the sampled log-likelihood is given as its function."""
    import torch
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatKFAC
    from nngeometry.object.vector import PVector

    model = Model.of(setup, channels_last=False)
    w = setup.workload
    layers = LayerCollection.from_model(model.network)
    optimizer = torch.optim.SGD(model.network.parameters(), lr=w.rate, momentum=w.momentum)
    count = itertools.count()

    def log_likelihood(x: Any, *_: Any) -> Any:
        z = model.network(x)
        t = model.sampled(z.detach())
        if w.network.loss == "sigmoid":
            terms = torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="none")
            return -terms.sum(dim=1, keepdim=True)
        return torch.log_softmax(z, dim=1).gather(1, t[:, None])

    generator = TorchHooksJacobianBackend(
        layer_collection=layers, model=model.network, function=log_likelihood
    )
    examples = torch.utils.data.DataLoader(
        WholeBatch(model.x), batch_size=w.batch, collate_fn=lambda batch: batch
    )
    average: Any = None
    inverse: Any = None

    def step() -> str:
        nonlocal average, inverse
        k = next(count)
        new = PMatKFAC(generator=generator, examples=examples)
        if average is None:
            average = new
        else:
            for old, current in zip(average.data.values(), new.data.values(), strict=True):
                for mean, moment in zip(old, current, strict=True):
                    mean.lerp_(moment, 0.05)
        refresh = k % w.refresh == 0
        if refresh:
            inverse = average.inverse(regul=w.damping)
        optimizer.zero_grad(set_to_none=True)
        model.loss(model.network(model.x), model.t).backward()
        natural = inverse.mv(PVector.from_model_grad(model.network)).to_dict()
        for layer, module in generator.l_to_m.items():
            module.weight.grad, module.bias.grad = natural[layer]
        optimizer.step()
        model.wait()
        return "refresh" if refresh else ""

    return Running(step, model.layers)


if __name__ == "__main__":
    serve(TORCH | {"nngeometry.object": INSTALL}, build, "torch nngeometry numpy")

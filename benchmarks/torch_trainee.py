"""PyTorch's Adam and SGD on a network of this library's, for `race.py`; same start and batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kfac_np import layers
from kfac_np.data import BatchState, ConstantBatch
from kfac_np.pytorch import to_state_dict
from kfac_np.training.experiment import Experiment
from kfac_np.training.loop import Supply

SETTINGS = {
    "rate": 1e-3,
    "batch": 64,
    "momentum": 0.9,  # Nesterov's, of SGD
    "steps": None,  # half a cosine down to 0 over so many
    "warmup": 0,  # a linear rise over so many before
    "average": 0.0,  # decay of an average of the iterates, which is what is evaluated
}


class TorchTrainee:
    """Images channels last, optimisers fused, the settings of `SETTINGS`."""

    def __init__(self, method: str, settings: dict[str, Any], experiment: Experiment) -> None:
        import torch

        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            known = ", ".join(SETTINGS)
            raise SystemExit(f"torch-{method}: no setting {', '.join(unknown)}; there are {known}")
        s = {**SETTINGS, **settings}
        supply = experiment.supply
        self.supply = Supply(supply.x, supply.t, ConstantBatch(s["batch"]), supply.seed)
        self.experiment, self.batches, self.number = experiment, BatchState(), 0
        self.network = network_of(experiment)
        weights = list(self.network.parameters())
        if method == "adam":
            self.optimizer: Any = torch.optim.Adam(weights, lr=s["rate"], fused=True)
        else:
            self.optimizer = torch.optim.SGD(
                weights, lr=s["rate"], momentum=s["momentum"], nesterov=True, fused=True
            )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor_of(s))
        self.average = [w.detach().clone() for w in weights] if s["average"] else None
        self.decay = s["average"]

    def step(self) -> int:
        """Do one, and tell its number."""
        import torch
        from torch.nn import functional

        self.number += 1
        self.batches, x, t = self.supply.next(self.batches, self.number)
        self.optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(self.network(torch.from_numpy(x)), torch.from_numpy(t)).backward()
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            decay = min(self.decay, 1.0 - 1.0 / self.number)
            weights = [w.detach() for w in self.network.parameters()]
            torch._foreach_lerp_(self.average, weights, 1.0 - decay)
        return self.number

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the examples that this library's contenders are evaluated on."""
        import torch

        weights = list(self.network.parameters())
        current = [w.detach().clone() for w in weights]
        supply, seen = self.supply, self.experiment.evaluation_examples
        with torch.no_grad():
            if self.average is not None:
                torch._foreach_copy_(weights, self.average)
            loss, accuracy = self._means(supply.x[:seen], supply.t[:seen])
            test_loss, test_accuracy = self._means(*self.experiment.test)
            torch._foreach_copy_(weights, current)
        found = {"loss": loss, "accuracy": accuracy}
        return {**found, "test_loss": test_loss, "test_accuracy": test_accuracy}

    def _means(self, x: Any, t: Any) -> tuple[float, float]:
        import torch
        from torch.nn import functional

        loss = correct = 0.0
        for rows in (slice(i, i + 500) for i in range(0, len(x), 500)):
            z, labels = self.network(torch.from_numpy(x[rows])), torch.from_numpy(t[rows])
            loss += float(functional.cross_entropy(z, labels, reduction="sum"))
            correct += float((z.argmax(1) == labels).sum())
        return loss / len(x), correct / len(x)


def factor_of(s: dict[str, Any]) -> Any:
    """What the rate is multiplied by in step k, from 0."""

    def factor(k: int) -> float:
        rise = min(1.0, (k + 1) / (s["warmup"] + 1))
        if s["steps"] is None:
            return rise
        return rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, k / s["steps"])))

    return factor


def network_of(experiment: Experiment) -> Any:
    """The experiment's network as a module of PyTorch's, with its first parameters."""
    import torch

    layer = experiment.optimizer.objective.network
    state = to_state_dict(layer, experiment.start().state.params, experiment.supply.x.shape[1:])
    network = module(layer)
    network.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in state.items()})
    return network.to(memory_format=torch.channels_last)


def module(layer: Any) -> Any:
    """A layer of this library as a module of PyTorch's, parameters under the same names."""
    from torch import nn

    class Images(nn.Module):
        def forward(self, x: Any) -> Any:  # rows of pixels have channels last
            return x.reshape(-1, *layer.shape).permute(0, 3, 1, 2)

    class Mean(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean((2, 3))

    class Same(nn.Conv2d):
        def forward(self, x: Any) -> Any:  # PyTorch has no "same" padding for strides
            pairs = reversed(layer.geometry(tuple(x.shape[2:])).padding)
            return super().forward(nn.functional.pad(x, [*itertools.chain(*pairs)]))

    class Added(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return x + super().forward(x)

    class Sum(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return self[1](x) + self[0](x)

    def convolution() -> Any:
        plain = layer.stride == 1
        kind, padding = (nn.Conv2d, layer.padding) if plain else (Same, 0)
        sizes = layer.c_in, layer.c_out, layer.kernel, layer.stride
        return kind(*sizes, padding, groups=layer.groups, bias=layer.bias)

    def residual() -> Any:
        if layer.shortcut is None:
            return Added(*map(module, layer.inner.layers))
        return Sum(module(layer.inner), module(layer.shortcut))

    makers: dict[type, Callable[[], Any]] = {
        layers.Sequential: lambda: nn.Sequential(*map(module, layer.layers)),
        layers.Residual: residual,
        layers.Conv: convolution,
        layers.Dense: lambda: nn.Linear(layer.d_in, layer.d_out, bias=layer.bias),
        layers.GroupNorm: lambda: nn.GroupNorm(layer.groups, layer.channels, eps=layer.epsilon),
        layers.MaxPool: lambda: nn.MaxPool2d(layer.window, layer.stride, layer.padding),
        layers.ReLU: nn.ReLU,
        layers.Reshape: Images,
        layers.Flatten: nn.Flatten,
        layers.GlobalAveragePool: Mean,
    }
    if type(layer) not in makers:
        raise SystemExit(f"PyTorch: no module for {layer!r}")
    return makers[type(layer)]()

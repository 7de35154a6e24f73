"""Networks and losses in PyTorch, for all contenders that use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.contenders.child import Setup
from benchmarks.workloads import Network

TORCH = {"torch": "pip install torch"}


@dataclass
class Model:
    """A network with its loss and batch, on the device."""

    network: Any
    x: Any
    t: Any
    setup: Setup
    channels_last: bool

    @classmethod
    def of(cls, setup: Setup, channels_last: bool = True) -> Model:
        """With the workload's start parameters.

        Images are channels-last where the library lets them; some views need the other order.
        """
        import torch

        from benchmarks.problems import problem

        if setup.device == "cpu":
            torch.set_num_threads(setup.threads)
        torch.backends.cuda.matmul.allow_tf32 = setup.tf32
        torch.backends.cudnn.allow_tf32 = setup.tf32
        w = setup.workload
        start = problem(w, setup.dtype)
        device = torch.device(setup.device)
        flat = w.network.sizes[0] if w.network.channels else -1
        modules = _modules(w.network, channels_last)
        network = torch.nn.Sequential(*modules).to(device, getattr(torch, setup.dtype))
        with torch.no_grad():
            for module, (weights, bias) in zip(_affine(network), start.layers, strict=True):
                weights = torch.from_numpy(weights)
                if isinstance(module, torch.nn.Conv2d):
                    c_out, c_in, height, width = module.weight.shape
                    weights = weights.reshape(c_out, height, width, c_in).permute(0, 3, 1, 2)
                elif weights.shape[1] == flat and not channels_last:
                    weights = weights.reshape(-1, *_last_image(w.network)).permute(0, 3, 1, 2)
                    weights = weights.flatten(1)
                module.weight.copy_(weights)
                module.bias.copy_(torch.from_numpy(bias))
        x = torch.from_numpy(start.x)
        t = x if w.network.loss == "sigmoid" else torch.from_numpy(start.t)
        if w.network.channels:
            x = x.reshape(-1, *w.network.image).permute(0, 3, 1, 2)
            if channels_last:
                network = network.to(memory_format=torch.channels_last)
            else:
                x = x.contiguous()
        return cls(network, x.to(device), t.to(device), setup, channels_last)

    def loss(self, z: Any, t: Any) -> Any:
        """Mean over the examples."""
        from torch.nn import functional

        if self.setup.workload.network.loss == "sigmoid":
            return functional.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)
        return functional.cross_entropy(z, t)

    def sampled(self, z: Any) -> Any:
        """Targets drawn from the network's own distribution."""
        import torch

        if self.setup.workload.network.loss == "sigmoid":
            return torch.bernoulli(torch.sigmoid(z))
        return torch.multinomial(torch.softmax(z, dim=1), 1)[:, 0]

    def wait(self) -> None:
        """Until the device is done."""
        if self.setup.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def layers(self) -> Any:
        """Weights and biases as `benchmarks.problems` has them."""
        arrays = []
        network = self.setup.workload.network
        for module in _affine(self.network):
            weights = module.weight.detach().cpu()
            if weights.ndim == 4:
                weights = weights.permute(0, 2, 3, 1).reshape(len(weights), -1)
            elif (
                network.channels and not self.channels_last and weights.shape[1] == network.sizes[0]
            ):
                height, width, depth = _last_image(network)
                weights = weights.reshape(-1, depth, height, width).permute(0, 2, 3, 1).flatten(1)
            arrays.append((weights.numpy(), module.bias.detach().cpu().numpy()))
        return arrays


def _affine(network: Any) -> list[Any]:
    import torch

    return [m for m in network if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]


def _last_image(network: Network) -> tuple[int, int, int]:
    """Height, width and channels after the last pooling."""
    halvings = len(network.channels)
    height, width = (-(-n // 2**halvings) for n in network.image[:2])
    return height, width, network.channels[-1]


def _modules(network: Network, channels_last: bool) -> list[Any]:
    from torch import nn

    class ChannelsLast(nn.Module):
        """Rows in the order of the other contenders; nothing moves if memory already is so."""

        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).flatten(1)

    def activation() -> Any:
        return nn.Tanh() if network.activation == "tanh" else nn.ReLU()

    modules: list[Any] = []
    depth = network.image[2]
    for width in network.channels:
        modules.append(nn.Conv2d(depth, width, network.kernel, padding=network.kernel // 2))
        modules += [nn.MaxPool2d(3, 2, 1), activation()]
        depth = width
    if network.channels:
        modules.append(ChannelsLast() if channels_last else nn.Flatten())
    last = len(network.sizes) - 2
    for i in range(last + 1):
        modules.append(nn.Linear(*network.sizes[i : i + 2]))
        if i < last and i not in network.linear:
            modules.append(activation())
    return modules

"""Weights from PyTorch: the same outputs there and here, and the same weights back.

`tests/data/pytorch.npz` has what PyTorch 2.13 computes; ``python tests/test_pytorch.py`` writes it
anew where PyTorch is installed, and the last test computes it again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numerics import host

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import (
    AveragePool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    Embedding,
    Flatten,
    GroupNorm,
    Layer,
    LayerNorm,
    MaxPool,
    MultiHeadAttention,
    Recurrent,
    ReLU,
    Reshape,
    Residual,
    RMSNorm,
    Sequential,
    Tanh,
    Tied,
)
from kfac_np.pytorch import from_state_dict, to_state_dict

DATA = Path(__file__).parent / "data" / "pytorch.npz"


@dataclass(frozen=True)
class Case:
    """A network here and there; `shape` is that of a batch there, channels first."""

    network: Layer
    there: Callable[[Any], Any]
    shape: tuple[int, ...]
    image: bool = False
    classes: int = 0

    def to_here(self, x: Any) -> Any:
        return np.moveaxis(x, 1, -1) if self.image and x.ndim > 2 else x

    @property
    def input_shape(self) -> tuple[int, ...]:
        rest = self.shape[1:]
        return (*rest[1:], rest[0]) if self.image else rest


CASES: dict[str, Case] = {
    "dense": Case(
        Sequential(Dense(3, 4), Tanh(), Dense(4, 2, bias=False)),
        lambda nn: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)),
        (5, 3),
    ),
    "images": Case(
        Sequential(
            Conv(2, 4, (3, 2), stride=(2, 1), padding=1, groups=2),
            BatchNorm(4),
            ReLU(),
            MaxPool((2, 2)),
            Conv(4, 3, (2, 1), dilation=(1, 1), bias=False),
            GroupNorm(3, 3),
            Flatten(),
            LayerNorm(9),
            Tanh(),
            Dense(9, 2),
        ),
        lambda nn: nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 3, (2, 1), bias=False),
            nn.GroupNorm(3, 3),
            nn.Flatten(),
            nn.LayerNorm(9),
            nn.Tanh(),
            nn.Linear(9, 2),
        ),
        (4, 2, 7, 6),
        image=True,
    ),
    "transposed": Case(
        Sequential(
            ConvTranspose(4, 6, (3, 2), stride=2, padding=1, output_padding=(1, 0), groups=2),
            ConvTranspose(6, 1, (2, 2)),
        ),
        lambda nn: nn.Sequential(
            nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=(1, 0), groups=2),
            nn.ConvTranspose2d(6, 1, 2),
        ),
        (3, 4, 3, 4),
        image=True,
    ),
    "signals": Case(
        Sequential(Conv(2, 3, (3,), padding=1), AveragePool((2,)), Flatten(), Dense(9, 2)),
        lambda nn: nn.Sequential(
            nn.Conv1d(2, 3, 3, padding=1), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(9, 2)
        ),
        (4, 2, 6),
        image=True,
    ),
    "flattened at once": Case(
        Sequential(Flatten(), Dense(12, 2)),
        lambda nn: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)),
        (4, 3, 2, 2),
        image=True,
    ),
    "tokens": Case(
        Sequential(Embedding(5, 4), RMSNorm(4), Flatten(), Dense(12, 2)),
        lambda nn: nn.Sequential(
            nn.Embedding(5, 4), nn.RMSNorm(4, eps=1e-5), nn.Flatten(), nn.Linear(12, 2)
        ),
        (4, 3),
        classes=5,
    ),
    "attention": Case(
        Sequential(MultiHeadAttention(4, 2), Dense(4, 2)),
        lambda nn: nn.Sequential(
            _First(nn, nn.MultiheadAttention(4, 2, batch_first=True), 3), nn.Linear(4, 2)
        ),
        (3, 5, 4),
    ),
    "recurrent": Case(
        Sequential(Recurrent(Sequential(Dense(5, 3), Tanh()), 3), Dense(3, 2)),
        lambda nn: nn.Sequential(_First(nn, nn.RNN(2, 3, batch_first=True), 1), nn.Linear(3, 2)),
        (4, 3, 2),
    ),
}


def _First(nn: Any, module: Any, times: int) -> Any:
    """A module of which the first output counts, its input given several times."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules.update(module._modules)
            self._parameters.update(module._parameters)

        def forward(self, x: Any) -> Any:
            return module(*[x] * times)[0]

    return First()


def computed(case: Case) -> dict[str, Any]:
    """State, inputs and outputs, by PyTorch."""
    import torch

    torch.manual_seed(0)
    model = case.there(torch.nn).double().train()
    for p in model.parameters():  # scales and shifts, too
        torch.nn.init.normal_(p, std=0.7)
    state = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    if case.classes:
        x = torch.randint(case.classes, case.shape)
    else:
        x = torch.randn(case.shape, dtype=torch.float64)
    return {
        "x": x.numpy(),
        "y": model(x).detach().numpy(),
        **{f"state {k}": v for k, v in state.items()},
    }


def stored(name: str) -> dict[str, Any]:
    with np.load(DATA) as file:
        return {k.partition("|")[2]: file[k] for k in file.files if k.startswith(f"{name}|")}


def state_of(arrays: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix("state "): v for k, v in arrays.items() if k.startswith("state ")}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_pytorch(name: str, backend: Backend):
    case, arrays = CASES[name], stored(name)
    params = from_state_dict(case.network, state_of(arrays), case.input_shape, backend)
    x = backend.asarray(np.ascontiguousarray(case.to_here(arrays["x"])))
    y = host(case.network.forward(params, x)[0])
    np.testing.assert_allclose(y, case.to_here(arrays["y"]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_weights_come_back(name: str, backend: Backend):
    case, state = CASES[name], state_of(stored(name))
    params = from_state_dict(case.network, state, case.input_shape, backend)
    back = {k: host(v) for k, v in to_state_dict(case.network, params, case.input_shape).items()}
    expected = {k: v for k, v in state.items() if "running" not in k and "tracked" not in k}
    assert back.keys() == expected.keys()
    for key, value in back.items():
        if name == "recurrent" and "bias_" in key:  # only their sum counts
            value = back["0.bias_ih_l0"] + back["0.bias_hh_l0"]
            expected[key] = state["0.bias_ih_l0"] + state["0.bias_hh_l0"]
        np.testing.assert_array_equal(value, expected[key])


def test_layers_in_layers_and_names_of_ones_own():
    backend = get_backend("numpy", "float64")
    net = Sequential(
        Residual(Sequential(Dense(2, 3), Tanh(), Dense(3, 2))), Tied((Dense(2, 2),), (0, 0))
    )
    params = net.init(Rng(0), backend)
    names = {"0.0": "block.fc1", "0.2": "block.fc2"}
    state = to_state_dict(net, params, (2,), names)
    assert list(state) == [
        "block.fc1.weight", "block.fc1.bias", "block.fc2.weight", "block.fc2.bias",
        "1.0.weight", "1.0.bias",
    ]  # fmt: skip
    back = from_state_dict(net, state, (2,), backend, names)
    trees.map_named(lambda _, p, q: np.testing.assert_array_equal(p, q), params, back)


def test_what_does_not_fit_is_refused_by_name():
    backend = get_backend("numpy", "float64")
    net = Sequential(Dense(2, 3))
    state = {"0.weight": np.ones((3, 2)), "0.bias": np.ones(3)}
    for wrong, error, message in [
        (
            {"fc.weight": np.ones((3, 2))},
            InputError,
            r"layer 0 .*expected '0.weight'.*got fc.weight",
        ),
        ({**state, "1.weight": np.ones(1)}, InputError, r"no layer takes 1\.weight"),
        ({**state, "0.bias": np.ones(2)}, ShapeError, r"0\.bias: expected \(3,\), got \(2,\)"),
    ]:
        with pytest.raises(error, match=message):
            from_state_dict(net, wrong, (2,), backend)
    with pytest.raises(InputError, match="state: expected a Mapping, got None"):
        from_state_dict(net, None, (2,), backend)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="input_shape: expected a tuple, got 2"):
        from_state_dict(net, state, 2, backend)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"params: expected shapes .*\(3, 3\).* got .*\(3, 2\)"):
        to_state_dict(net, (np.ones((3, 2)),), (2,))
    images = Sequential(Conv(1, 2, (1, 1)), Flatten(), Residual(Dense(8, 8)))
    params = images.init(Rng(0), backend)
    with pytest.raises(InputError, match=r"layer 2 .*only Dense undoes it"):
        to_state_dict(images, params, (2, 2, 1))
    shaped = Sequential(Conv(1, 2, (1, 1)), Reshape((4, 2)), Dense(2, 2))
    with pytest.raises(InputError, match=r"layer 1 .*reorder them by hand"):
        to_state_dict(shaped, shaped.init(Rng(0), backend), (2, 2, 1))


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
@pytest.mark.parametrize("name", CASES)
def test_pytorch_still_says_so(name: str):
    for key, value in computed(CASES[name]).items():
        np.testing.assert_allclose(value, stored(name)[key], rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    np.savez(DATA, **{f"{n}|{k}": v for n, c in CASES.items() for k, v in computed(c).items()})

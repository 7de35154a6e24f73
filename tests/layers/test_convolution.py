"""Convolutions of every geometry: laws, independent oracles, errors and memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from geometries import Drawn, convolutions, each, pairs, transposed
from hypothesis import given, settings
from numerics import assert_close, host
from references.networks import apply

from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.backend.numpy_kernels import threads
from kfac_np.curvature import DiagonalBlock, KFACBlock, reduce
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import Conv, ConvTranspose, Dense, Flatten, Sequential
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.statistics import AffineStatistics, GroupedStatistics, Scale
from kfac_np.testing import check_layer

HostArray = np.ndarray[Any, Any]

# All other laws look at hyper-parameters that the case table has; these look at the geometry.
LAWS = ["shape", "adjointness", "vectors", "per_example", "take", "layout", "absent_tangents"]
OTHER_LAWS = ["purity", "finite_differences", "backward_jvp", "single_precision"]

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the oracle is torch"
)


# ------------------------------------------------------------------------------------------ laws


@settings(max_examples=25)
@given(drawn=convolutions())
def test_laws_of_a_convolution(drawn: Drawn):
    """⟨g, J v⟩ = ⟨Jᵀ g, v⟩; gradients of the examples sum to the gradient; and others."""
    check_layer(drawn.layer, drawn.params, drawn.x, laws=LAWS)


@settings(max_examples=25)
@given(drawn=transposed())
def test_laws_of_a_transposed_convolution(drawn: Drawn):
    check_layer(drawn.layer, drawn.params, drawn.x, laws=LAWS)


@settings(max_examples=6)
@given(drawn=convolutions() | transposed())
def test_laws_on_every_backend(backend: Backend, drawn: Drawn):
    check_layer(drawn.layer, *drawn.build(backend), laws=LAWS)


@settings(max_examples=15)
@given(drawn=convolutions() | transposed())
def test_other_laws(drawn: Drawn):
    check_layer(drawn.layer, drawn.params, drawn.x, laws=OTHER_LAWS)


def everything(layer: Conv | ConvTranspose, drawn: Drawn, backend: Backend) -> list[Any]:
    """Whatever a layer can be asked for, moments of its statistics too."""
    params, x = drawn.build(backend)
    y, cache = layer.forward(params, x)
    g, vectors = backend.asarray(drawn.g()), backend.asarray(drawn.g(2))
    dy = layer.jvp(params, cache, 2.0 * x, 0.5 * params)
    ddx, dgradient = layer.backward_jvp(params, cache, g, 2.0 * x, 0.5 * params, 3.0 * g)
    found = [y, dy, ddx, dgradient]
    scale = Scale(len(drawn.x), len(drawn.x), backend.asarray(np.arange(1.0, len(drawn.x) + 1)))
    for v in (g, vectors):
        dx, s = layer.backward(params, cache, v)
        found += [dx, s.gradient(), s.per_example()]
        for block in (KFACBlock(), KFACBlock(sharing=reduce)):
            found += [block.input_moments(s, scale)["A"], block.moments(s, scale)["G"]]
        for group in s.groups if isinstance(s, GroupedStatistics) else (s,):
            found.append(DiagonalBlock().moments(group, scale)["diagonal"])
    return found


@given(drawn=convolutions() | transposed())
def test_chunks_change_nothing(drawn: Drawn):
    """A budget of one byte takes examples one by one; odd ones cut anywhere."""
    backend = get_backend("numpy", "float64")
    whole = everything(dataclasses.replace(drawn.layer, budget_bytes=2**40), drawn, backend)
    for budget in (1, 1001, 4567):
        layer = dataclasses.replace(drawn.layer, budget_bytes=budget)
        for found, expected in zip(everything(layer, drawn, backend), whole, strict=True):
            assert_close(found, expected, 1e-13)


def test_no_vectors(backend: Backend):
    """K = 0, which is what the input-only Fisher asks for."""
    for layer, shape in (
        (Conv(2, 4, (3, 2), stride=2, padding=1, groups=2, budget_bytes=1), (5, 4, 2)),
        (Conv(2, 3, (3,), padding="same", budget_bytes=1), (5, 2)),
        (ConvTranspose(2, 3, (3,), stride=2, budget_bytes=1), (4, 2)),
    ):
        params = layer.init(Rng(0), backend)
        y, cache = layer.forward(params, Rng(1).normal((3, *shape), backend))
        g = Rng(2).normal((2, *y.shape), backend)[:0, ...]
        dx, s = layer.backward(params, cache, g)
        assert dx.shape == (0, 3, *shape)
        assert s.gradient().shape == (0, *params.shape)
        assert s.per_example().shape == (0, 3, *params.shape)
        assert s.num_vectors == 0
        assert KFACBlock().input_moments(s, Scale(3, 3))["A"].shape[-1] == params.shape[-1]


# --------------------------------------------------------------------------------------- oracles


@given(drawn=convolutions() | transposed())
def test_forward_is_the_definition(backend: Backend, drawn: Drawn):
    y, _ = drawn.layer.forward(*drawn.build(backend))
    assert_close(y, apply(drawn.layer, drawn.params, drawn.x))


def kernel_of(layer: Conv | ConvTranspose, params: HostArray) -> tuple[HostArray, HostArray | None]:
    """W̄ as (c_out, *kernel, c_in / groups), and the bias."""
    w = params.reshape(layer.c_out, params.shape[-1])
    bias = w[:, -1] if layer.bias else None
    w = w[:, :-1] if layer.bias else w
    return w.reshape(layer.c_out, *layer.kernel, layer.c_in // layer.groups), bias


def channels_first(torch: Any, x: HostArray | None) -> Any:
    return None if x is None else torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def torch_padded(torch: Any, x: Any, widths: list[tuple[int, int]]) -> Any:
    flat = [w for pair in reversed(widths) for w in pair]
    return torch.nn.functional.pad(x, flat)


@needs_torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(drawn=convolutions())
def test_convolution_against_torch(drawn: Drawn):
    import torch

    layer = drawn.layer
    axes = len(layer.kernel)
    f = getattr(torch.nn.functional, f"conv{axes}d")
    w, bias = kernel_of(layer, drawn.params)
    x = channels_first(torch, drawn.x)
    stride, dilation = each(layer.stride, axes), each(layer.dilation, axes)
    padding: Any = 0
    if layer.padding == "same" and max(stride) == 1:
        padding = "same"
    elif layer.padding == "same":  # which torch does not define
        x = torch_padded(torch, x, list(layer.geometry(drawn.x.shape[1:-1]).padding))
    elif layer.padding != "valid":
        x = torch_padded(torch, x, pairs(layer.padding, axes))
    bias = None if bias is None else torch.from_numpy(bias.copy())
    y = f(x, channels_first(torch, w), bias, stride, padding, dilation, layer.groups)
    expected = np.moveaxis(y.numpy(), 1, -1)
    assert drawn.layer.output_shape(drawn.x.shape[1:]) == expected.shape[1:]
    assert_close(layer.forward(drawn.params, drawn.x)[0], expected)


@needs_torch
@given(drawn=transposed())
def test_transposed_convolution_against_torch(drawn: Drawn):
    """Kernels are turned round there: w[i, o, tap] = W̄[o, (tap from the end, i)]."""
    import torch

    layer = drawn.layer
    axes, groups = len(layer.kernel), layer.groups
    f = getattr(torch.nn.functional, f"conv_transpose{axes}d")
    w, bias = kernel_of(layer, drawn.params)
    w = np.flip(w, axis=tuple(range(1, axes + 1)))
    # (groups, c_out / groups, taps, c_in / groups) to (c_in, c_out / groups, taps)
    split = w.reshape(groups, layer.c_out // groups, *layer.kernel, layer.c_in // groups)
    kernel = np.moveaxis(split, -1, 1).reshape(layer.c_in, layer.c_out // groups, *layer.kernel)
    extra = each(layer.output_padding, axes)
    bias = None if bias is None else torch.from_numpy(bias.copy())
    y = f(
        channels_first(torch, drawn.x),
        torch.from_numpy(kernel.copy()),
        bias,
        each(layer.stride, axes),
        0,
        0,
        groups,
        each(layer.dilation, axes),
    )
    # torch's own padding is symmetric and not negative: cut off here, with zeros for more pixels.
    widths = [
        (-before, extra - after)
        for (before, after), extra in zip(pairs(layer.padding, axes), extra, strict=True)
    ]
    if bias is None:
        y = torch_padded(torch, y, widths)
    else:
        y = torch_padded(torch, y - bias.reshape(-1, *(1,) * axes), widths)
        y = y + bias.reshape(-1, *(1,) * axes)
    expected = np.moveaxis(y.numpy(), 1, -1)
    assert layer.output_shape(drawn.x.shape[1:]) == expected.shape[1:]
    assert_close(layer.forward(drawn.params, drawn.x)[0], expected)


@needs_torch
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_sizes_of_a_transposed_convolution_are_those_of_torch(axes: int):
    """With torch's own padding and output padding, wherever it takes them."""
    import torch

    f = getattr(torch.nn.functional, f"conv_transpose{axes}d")
    for kernel, stride, dilation, padding, n in np.ndindex(3, 3, 2, 3, 3):
        kernel, stride, dilation, n = kernel + 1, stride + 1, dilation + 1, n + 2
        for extra in range(stride):
            layer = ConvTranspose(
                1, 1, (kernel,) * axes, stride, dilation, padding, extra, bias=False
            )
            x, w = torch.ones((1, 1, *(n,) * axes)), torch.ones((1, 1, *(kernel,) * axes))
            expected = (n - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
            if expected < 1:
                with pytest.raises(ShapeError):
                    layer.output_shape((*(n,) * axes, 1))
                continue
            y = f(x, w, None, stride, padding, extra, 1, dilation)
            assert layer.output_shape((*(n,) * axes, 1)) == (*y.shape[2:], 1)


@given(drawn=transposed())
def test_a_transposed_convolution_is_the_adjoint_of_a_strided_one(drawn: Drawn):
    """⟨y, convᵀ(x)⟩ = ⟨conv(y), x⟩ with the weights that the docstring names."""
    layer = dataclasses.replace(drawn.layer, bias=False)
    axes, groups = len(layer.kernel), layer.groups
    weights = drawn.params[..., :-1] if drawn.layer.bias else drawn.params
    c_in, c_out = layer.c_in // groups, layer.c_out // groups
    # Entry (o, (tap, i)) is entry (i, (tap from the end, o)) of the convolution.
    w = weights.reshape(groups, c_out, *layer.kernel, c_in)
    w = np.flip(w, axis=tuple(range(2, axes + 2)))
    other = np.moveaxis(np.moveaxis(w, -1, 1), 2, -1).reshape(groups, c_in, -1)
    z = layer.forward(weights, drawn.x)[0]
    conv = Conv(
        layer.c_out,
        layer.c_in,
        layer.kernel,
        layer.stride,
        layer.dilation,
        layer.padding,
        groups,
        bias=False,
    )
    y = np.random.default_rng(5).standard_normal(z.shape)
    back, _ = conv.forward(other if groups > 1 else other[0], y)
    assert back.shape == drawn.x.shape
    assert float(np.sum(y * z)) == pytest.approx(
        float(np.sum(back * drawn.x)), rel=1e-11, abs=1e-11
    )


def test_same_puts_the_odd_zero_at_the_end():
    assert Conv(1, 1, (4,), padding="same").geometry((7,)).padding == ((1, 2),)
    assert Conv(1, 1, (3,), stride=2, padding="same").geometry((6,)).padding == ((0, 1),)
    assert Conv(1, 1, (1,), stride=3, padding="same").geometry((7,)).padding == ((0, 0),)
    for n in range(1, 12):
        for stride in range(1, 5):
            layer = Conv(1, 1, (4,), stride=stride, dilation=2, padding="same")
            assert layer.output_shape((n, 1)) == (-(-n // stride), 1)


def test_a_kernel_of_one_pixel_is_a_dense_layer(backend: Backend):
    x = Rng(0).normal((3, 4, 5, 2), backend)
    conv, dense = Conv(2, 3, (1, 1)), Dense(2, 3)
    params = conv.init(Rng(1), backend)
    y, cache = conv.forward(params, x)
    z, other = dense.forward(params, x)
    assert_close(y, z)
    for one, two in zip(
        conv.backward(params, cache, y), dense.backward(params, other, y), strict=True
    ):
        if isinstance(one, AffineStatistics):
            one, two = one.per_example(), two.per_example()
        assert_close(one, two)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("make", [Conv, ConvTranspose])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kernel": 3}, "expected kernel to be a tuple of positive integers"),
        ({"kernel": ()}, "expected kernel to be a tuple of positive integers"),
        ({"kernel": (3, 0)}, "expected kernel to be a tuple of positive integers"),
        ({"kernel": (3, 2.0)}, "expected kernel to be a tuple of positive integers"),
        ({"stride": 0}, "expected stride to be a positive integer, or 2 of them"),
        ({"stride": (1, 2, 3)}, "expected stride to be a positive integer, or 2 of them"),
        ({"stride": True}, "expected stride to be a positive integer"),
        ({"dilation": -1}, "expected dilation to be a positive integer"),
        ({"dilation": (1,)}, "expected dilation to be a positive integer, or 2 of them"),
        ({"dilation": 1.5}, "expected dilation to be a positive integer"),
        ({"padding": "SAME"}, "expected padding to be an integer, 2 of them, 2 pairs of them"),
        ({"padding": 0.5}, "expected padding to be an integer"),
        ({"padding": (1,)}, "expected padding to be an integer, 2 of them"),
        ({"padding": ((1, 1), (1, 1), (0, 0))}, "expected padding to be an integer, 2 of them"),
        ({"padding": ((1, 1, 1), (0, 0))}, "expected padding to be an integer"),
        ({"padding": ((1, None), (0, 0))}, "expected padding to be an integer"),
        ({"c_in": 0}, "c_in: expected an integer > 0"),
        ({"c_out": -4}, "c_out: expected an integer > 0"),
        ({"c_in": 4.0}, "c_in: expected an integer > 0"),
        ({"groups": 0}, "groups: expected an integer > 0"),
        (
            {"groups": 3},
            "expected groups to divide c_in and c_out, got 3 groups for 4 and 4 channels",
        ),
        ({"groups": 4, "c_out": 6}, "expected groups to divide c_in and c_out, got 4 groups"),
        ({"budget_bytes": 0}, "expected budget_bytes to be a positive integer or None"),
        ({"budget_bytes": 1e6}, "expected budget_bytes to be a positive integer or None"),
    ],
    ids=str,
)
def test_wrong_hyperparameters(make: type, changed: dict[str, Any], said: str):
    options = {"c_in": 4, "c_out": 4, "kernel": (3, 3), **changed}
    name = next(iter(changed))
    with pytest.raises(InputError, match=rf"^{make.__name__}\b.*{re.escape(said)}") as info:
        make(**options)
    assert "\n" not in str(info.value)
    assert name in str(info.value)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_transposed_convolution_has_no_named_padding(padding: str):
    with pytest.raises(InputError, match=r"^ConvTranspose: expected padding to be an integer"):
        ConvTranspose(1, 1, (3,), padding=padding)


@pytest.mark.parametrize("extra", [-1, 2, (0, 2), (0,), (0, 0, 0), 0.5, "1", True, None])
def test_wrong_output_padding(extra: Any):
    with pytest.raises(InputError, match=r"^ConvTranspose: expected output_padding to be"):
        ConvTranspose(1, 1, (3, 3), stride=2, output_padding=extra)


@pytest.mark.parametrize(
    ("layer", "shape", "said"),
    [
        (Conv(2, 3, (3, 3)), (5, 5, 3), "2 spatial axes, 2), got (N, 5, 5, 3)"),
        (Conv(2, 3, (3, 3)), (5, 2), "2 spatial axes, 2), got (N, 5, 2)"),
        (Conv(2, 3, (3,)), (5, 5, 2), "1 spatial axes, 2), got (N, 5, 5, 2)"),
        (Conv(2, 3, (3, 3)), (2,), "got (N, 2)"),
        (Conv(2, 3, (3, 3)), (0, 5, 2), "got (N, 0, 5, 2)"),
        (Conv(2, 3, (3, 3)), (2, 5, 2), "padded size of at least (3, 3), got (2, 5)"),
        (Conv(2, 3, (3, 3), dilation=2), (5, 4, 2), "at least (5, 5), got (5, 4)"),
        (Conv(2, 3, (1, 1), padding=-2), (4, 9, 2), "to be left of (4, 9) after padding"),
        (Conv(2, 3, (1, 1), padding=((0, 0), (-5, 9))), (4, 4, 2), "to be left of (4, 4)"),
        (Conv(2, 3, (1, 1), padding=((-9, 9), (0, 0))), (4, 4, 2), "to be left of (4, 4)"),
        (ConvTranspose(2, 3, (3, 3)), (5, 5, 3), "2 spatial axes, 2), got (N, 5, 5, 3)"),
        (ConvTranspose(2, 3, (3, 3)), (5, 2), "got (N, 5, 2)"),
        (ConvTranspose(2, 3, (3,), padding=3), (3, 2), "padding leaves something, got (N, 3, 2)"),
    ],
    ids=str,
)
def test_wrong_input_shapes(layer: Conv | ConvTranspose, shape: tuple[int, ...], said: str):
    params = np.zeros((3, 2 * math.prod(layer.kernel) + 1))
    start = rf"^{re.escape(repr(layer))}: expected .*{re.escape(said)}"
    with pytest.raises(ShapeError, match=start):
        layer.output_shape(shape)
    with pytest.raises(ShapeError, match=start):
        layer.forward(params, np.zeros((2, *shape)))


def test_errors_say_where_in_the_network():
    network = Sequential(Conv(1, 2, (3, 3)), Conv(2, 2, (3, 3)), Flatten())
    message = r"^layer 1: Conv\(2, 2, \(3, 3\)\): expected a padded size .*, got \(2, 2\)$"
    with pytest.raises(ShapeError, match=message):
        network.output_shape((4, 4, 1))


@pytest.mark.parametrize("layer", [Conv(2, 4, (3,), groups=2), ConvTranspose(2, 4, (3,), groups=2)])
@pytest.mark.parametrize("params", [np.zeros((4, 4)), np.zeros((2, 2, 3)), (), None, [1.0]])
def test_wrong_parameters(layer: Conv | ConvTranspose, params: Any):
    with pytest.raises(ShapeError, match=r"Conv.*: expected parameters \(2, 2, 4\), got "):
        layer.forward(params, np.zeros((1, 5, 2)))


def test_wrong_initialiser():
    layer = Conv(2, 3, (3,), initializer=lambda rng, d_in, d_out, b: b.zeros((d_in, d_out)))
    message = r"^Conv\(.*: expected the initializer to return shape \(3, 6\), got \(6, 3\)"
    with pytest.raises(ShapeError, match=message):
        layer.init(Rng(0), get_backend())


@pytest.mark.parametrize("layer", [Conv(1, 1, (2,)), ConvTranspose(1, 1, (2,))])
def test_wrong_inputs_of_an_objective(layer: Conv | ConvTranspose):
    objective, params = Objective(layer, SquaredError()), np.zeros((1, 3))
    t = np.zeros((2, *layer.output_shape((4, 1))))
    for x in (
        np.zeros((2, 4, 1), dtype=int),
        np.zeros((2, 4, 1), dtype=np.float32),
        np.full((2, 4, 1), np.nan),
        np.zeros((2, 4, 1), dtype=complex),
        [[[0.0]]],
    ):
        with pytest.raises((InputError, TypeError), match="x"):
            objective.evaluate(params, x, t)


# ---------------------------------------------------------------------------------------- memory


def peak(f: Callable[[], Any]) -> tuple[Any, int]:
    """Result, and the most bytes that were alive besides it (of what was allocated by f)."""
    tracemalloc.start()
    try:
        result = f()
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, most - kept


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("vectors", [None, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_chunk_of_patches_is_alive_at_a_time(
    stride: int, vectors: int | None, number: int, monkeypatch: pytest.MonkeyPatch
):
    """Patches of 50 times the budget, and never more of them alive than the budget.

    Beyond inputs and outputs and (of `backward`) one padded copy of an input or derivative, each
    thread needs at most 1.5 times the budget: a chunk of patches, its product and small sums.
    """
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_cores", lambda: number)
    threads.each(abs, range(number))  # starts them
    n = 100
    layer, shape = Conv(4, 4, (3, 3), stride=stride, padding=1), (16 * stride, 16 * stride, 4)
    patches = n * 16 * 16 * (9 * 4 + 1) * 8
    budget = patches // 50
    allowed = 1.5 * budget * number
    layer = dataclasses.replace(layer, budget_bytes=budget)
    rng = np.random.default_rng(0)
    params, x = rng.standard_normal((4, 37)), rng.standard_normal((n, *shape))
    lead = () if vectors is None else (vectors,)
    g = rng.standard_normal((*lead, n, 16, 16, 4))
    scale = Scale(n, n)

    (y, cache), used = peak(lambda: layer.forward(params, x))
    assert used <= allowed
    (dx, s), used = peak(lambda: layer.backward(params, cache, g))
    copies = math.prod(lead) * n * 8 * 4 * (18 * 18 if stride == 1 else 34 * 34)
    assert used <= copies + allowed
    _, used = peak(s.gradient)
    assert used <= allowed
    for block in (KFACBlock(), KFACBlock(sharing=reduce)):
        _, used = peak(lambda block=block: block.input_moments(s, scale))
        assert used <= allowed
        _, used = peak(lambda block=block: block.moments(s, scale))
        assert used <= 0.5 * budget
    each_example, used = peak(s.per_example)
    assert used <= each_example.nbytes + 1.5 * budget
    assert s.inputs.shape[0] * s.inputs.shape[1] * s.inputs.shape[2] * 8 >= 50 * budget
    assert y.shape == (n, 16, 16, 4)
    assert dx.shape == (*lead, *x.shape)


def test_the_cache_holds_no_patches():
    """One padded copy of the input is kept, of a grouped convolution, too."""
    x = np.random.default_rng(0).standard_normal((8, 16, 16, 6))
    for groups in (1, 3):
        layer = Conv(6, 6, (5, 5), padding=2, groups=groups)
        params = layer.init(Rng(0), get_backend("numpy", "float64"))
        tracemalloc.start()
        y, cache = layer.forward(params, x)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        padded = 8 * 20 * 20 * 6 * 8
        assert kept <= padded + y.nbytes + 20_000
        assert host(cache[0][0].padded).shape == (8, 20, 20, 6 // groups)

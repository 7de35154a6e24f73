"""Whatever the data: an error of this library's, or parameters that are finite."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from optimizer_cases import LAYERS, LOSSES

from kfac_np import trees
from kfac_np.curvature import BlockDiagonal, FullMatrix, KFACBlock
from kfac_np.errors import KfacError
from kfac_np.fisher import Empirical, Exact, InputOnly
from kfac_np.layers import Dense, Layer, Sequential
from kfac_np.objective import Objective
from kfac_np.optimizers import (
    KFAC,
    SGD,
    Adam,
    ConstantDamping,
    CoupledGamma,
    GammaSearch,
    LevenbergMarquardt,
    Optimizer,
    Refresh,
    practical,
    published,
)

SHORT: dict[str, Any] = {"refresh": Refresh(3, first=1)}
OPTIMIZERS: dict[str, Callable[[Objective], Optimizer]] = {
    "published": published,
    "adaptive": lambda o: KFAC(
        o, damping=LevenbergMarquardt(1e-3, interval=1), gamma=GammaSearch(2), **SHORT
    ),
    "undamped": lambda o: KFAC(
        o, damping=ConstantDamping(0.0), gamma=CoupledGamma(), l2=0.0, fisher=Exact(), **SHORT
    ),
    "undamped_eigenbasis": lambda o: KFAC(
        o,
        damping=ConstantDamping(0.0),
        gamma=CoupledGamma(),
        l2=0.0,
        curvature=BlockDiagonal(KFACBlock(exact_damping=True)),
        **SHORT,
    ),
    "full_matrix": lambda o: KFAC(
        o, curvature=FullMatrix(), fisher=Empirical(), damping=LevenbergMarquardt(1e-6), **SHORT
    ),
    "input_only": lambda o: KFAC(o, fisher=InputOnly(), damping=LevenbergMarquardt(1e-6)),
    "practical": lambda o: practical(o, damping=1e-8, **SHORT),
    "practical_undamped": lambda o: practical(
        o, 1.0, damping=0.0, l2=0.0, kl_clip=None, momentum=0.5, **SHORT
    ),
    "practical_adaptive": lambda o: dataclasses.replace(
        practical(o, 2.0, kl_clip=None), damping=LevenbergMarquardt(1e-3, interval=1)
    ),
    "sgd": lambda o: SGD(o, rate=1.0),
    "adam": lambda o: Adam(o, rate=1.0),
}
SCALES = st.sampled_from([0.0, 1e-200, 1e-30, 1e-3, 1.0, 30.0, 1e10, 1e20, 1e160])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Objective, Any, Any, Any, Any]:
    """A network, parameters and a batch, with every degeneracy that a batch can have."""
    dtype = np.dtype(draw(st.sampled_from(["float32", "float64"])))
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    activation = LAYERS[draw(st.sampled_from(sorted(LAYERS)))]
    loss = draw(st.sampled_from(sorted(LOSSES)))
    bias = draw(st.booleans())
    layers: list[Layer] = []
    for m, n in itertools.pairwise(sizes):
        layers += [Dense(m, n, bias=bias), activation]
    network = Sequential(*layers[:-1])

    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale_x, scale_w = draw(SCALES), draw(SCALES)
    n = draw(st.sampled_from([1, 2, 3, 8, 40]))
    x = scale_x * random.standard_normal((n, sizes[0]))
    if draw(st.booleans()):
        x[:, 0] = draw(st.sampled_from([0.0, 1.0, 1e10]))  # a feature without variance
    if draw(st.booleans()):
        x[:] = x[0]  # all examples alike
    params = tuple(
        scale_w * random.standard_normal((layer.d_out, layer.d_in + bias))
        if isinstance(layer, Dense)
        else ()
        for layer in network.layers
    )
    if bias and draw(st.booleans()):
        params[0][0, -1] = -1e4  # a dead or saturated unit
    shape = (n, sizes[-1])
    t = {
        "squared": lambda: draw(SCALES) * random.standard_normal(shape),
        "sigmoid": lambda: random.integers(0, 2, shape).astype(float),
        "softmax": lambda: random.integers(0, shape[1], n),
        "poisson": lambda: random.poisson(2.0, shape).astype(float),
    }[loss]()
    weights = draw(
        st.none() | st.lists(st.sampled_from([0.0, 1e-30, 1.0, 1e30]), min_size=n, max_size=n)
    )

    def as_type(values: Any) -> Any:
        return np.asarray(values, dtype=dtype)

    params = trees.tree_map(as_type, params)
    w = None if weights is None else as_type(weights)
    return (
        Objective(network, LOSSES[loss]),
        params,
        as_type(x),
        t if loss == "softmax" else as_type(t),
        w,
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflows that are caught
@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=40)
@given(problem=problems())
def test_parameters_stay_finite(name: str, problem: Any) -> None:
    """A step that returns has finite parameters, moments and factors, and a finite report."""
    objective, params, x, t, weights = problem
    optimizer = OPTIMIZERS[name](objective)
    steps = 0
    try:
        state = optimizer.init(params)
        for _ in range(7):
            state, report = optimizer.step(state, x, t, weights)
            steps += 1
            for path, leaf in trees.items(optimizer.state_to_tree(state)):
                if isinstance(leaf, np.ndarray | float):
                    assert np.all(np.isfinite(leaf)), path
            values = report.as_dict()
            for key in ("loss", "gradient_norm", "update_norm", "damping", "gamma", "alpha", "mu"):
                assert values[key] is None or math.isfinite(values[key]), key
            if name in ("published", "adaptive", "undamped", "full_matrix", "input_only"):
                assert math.isfinite(values["model_decrease"])
    except KfacError as error:
        event(type(error).__name__)
    event(f"steps: {steps}")

"""What a value is counts, not the type it comes in; what it is not is refused where it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from kfac_np.backend import Rng, get_backend, tf32
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    FullKronecker,
    FullMatrix,
    KFACBlock,
    quality,
)
from kfac_np.data import BatchState, ConstantBatch, GrowingBatch, MiniBatches
from kfac_np.errors import ConfigError, InputError, KfacError
from kfac_np.fisher import Exact, MonteCarlo
from kfac_np.layers import (
    AdaptiveAveragePool,
    AveragePool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    Dropout,
    Embedding,
    FixedNorm,
    GroupNorm,
    LayerNorm,
    LeakyReLU,
    MaxPool,
    MultiHeadAttention,
    Recurrent,
    Reshape,
    RMSNorm,
    Sequential,
    Tanh,
    Tied,
)
from kfac_np.layers.initializers import sparse
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import (
    KFAC,
    SGD,
    Adam,
    Balance,
    Constant,
    ConstantDamping,
    Cosine,
    Exponential,
    FixedRate,
    GammaSearch,
    Inverse,
    IterateAverage,
    LevenbergMarquardt,
    MovingAverage,
    Piecewise,
    QuadraticModel,
    Refresh,
    Schedule,
)
from kfac_np.optimizers.schedules import value_at

N, F, HALF, YES = np.int64, np.float64, np.float32(0.5), np.bool_(True)
OBJECTIVE = Objective(Dense(3, 2), SquaredError())

SAME: list[tuple[Any, Any]] = [
    (Dense(N(3), np.uint8(2), bias=YES), Dense(3, 2)),
    (Embedding(N(3), N(2)), Embedding(3, 2)),
    (
        Conv(N(2), N(4), [N(3), 3], N(2), [1, N(2)], [[0, N(1)], (1, 1)], N(2)),
        Conv(2, 4, (3, 3), 2, (1, 2), ((0, 1), (1, 1)), 2),
    ),
    (Conv(2, 2, [3], budget_bytes=N(99)), Conv(2, 2, (3,), budget_bytes=99)),
    (
        ConvTranspose(2, 2, [3], stride=[N(2)], output_padding=N(1)),
        ConvTranspose(2, 2, (3,), stride=(2,), output_padding=1),
    ),
    (MaxPool([N(2)], [N(1)], N(0)), MaxPool((2,), (1,), 0)),
    (MaxPool(N(2)), MaxPool(2)),
    (AveragePool(2, [1, 1]), AveragePool((2, 2), (1, 1))),
    (AdaptiveAveragePool([N(2)]), AdaptiveAveragePool((2,))),
    (Reshape([N(2), -1]), Reshape((2, -1))),
    (Tied([Tanh()], [N(0), 0]), Tied((Tanh(),), (0, 0))),
    (Sequential([Tanh(), Dense(2, 2)]), Sequential(Tanh(), Dense(2, 2))),
    (Recurrent(Dense(3, 1), N(1)), Recurrent(Dense(3, 1), 1)),
    (MultiHeadAttention(N(4), N(2), causal=YES), MultiHeadAttention(4, 2, causal=True)),
    (Dropout(HALF), Dropout(0.5)),
    (LeakyReLU(F(0.5)), LeakyReLU(0.5)),
    (LayerNorm(N(4), epsilon=HALF, affine=YES), LayerNorm(4, epsilon=0.5)),
    (RMSNorm(N(4)), RMSNorm(4)),
    (GroupNorm(N(2), N(4)), GroupNorm(2, 4)),
    (BatchNorm(N(4)), BatchNorm(4)),
    (Exact(N(99)), Exact(99)),
    (MonteCarlo(N(2)), MonteCarlo(2)),
    (EKFAC(basis_interval=N(3)), EKFAC(basis_interval=3)),
    (KFACBlock(exact_damping=YES), KFACBlock(exact_damping=True)),
    (
        BlockTridiagonal(split=YES, chains=[["0", "2"]]),
        BlockTridiagonal(split=True, chains=(("0", "2"),)),
    ),
    (FullKronecker(max_parameters=N(9)), FullKronecker(max_parameters=9)),
    (FullMatrix(N(9)), FullMatrix(9)),
    (Constant(HALF), Constant(0.5)),
    (Exponential(HALF, HALF, N(3), F(0.25)), Exponential(0.5, 0.5, 3, 0.25)),
    (Inverse(HALF, N(3)), Inverse(0.5, 3)),
    (Cosine(HALF, N(9), N(2)), Cosine(0.5, 9, 2)),
    (Piecewise([HALF, 0.25], [N(3)]), Piecewise((0.5, 0.25), (3,))),
    (Refresh(N(4), N(2), YES), Refresh(4, 2, True)),
    (IterateAverage(HALF, N(2)), IterateAverage(0.5, 2)),
    (MovingAverage(HALF), MovingAverage(0.5)),
    (Balance(N(5), N(2), HALF, N(4)), Balance(5, 2, 0.5, 4)),
    (ConstantDamping(HALF), ConstantDamping(0.5)),
    (LevenbergMarquardt(HALF, HALF, N(2)), LevenbergMarquardt(0.5, 0.5, 2)),
    (GammaSearch(N(9), HALF), GammaSearch(9, 0.5)),
    (QuadraticModel(HALF, YES, least_examples=N(9)), QuadraticModel(0.5, least_examples=9)),
    (FixedRate(HALF, HALF, HALF), FixedRate(0.5, 0.5, 0.5)),
    (KFAC(OBJECTIVE, l2=HALF, seed=N(3)), KFAC(OBJECTIVE, l2=0.5, seed=3)),
    (SGD(OBJECTIVE, HALF, HALF, YES, seed=N(3)), SGD(OBJECTIVE, 0.5, 0.5, True, seed=3)),
    (Adam(OBJECTIVE, HALF, HALF, HALF, HALF), Adam(OBJECTIVE, 0.5, 0.5, 0.5, 0.5)),
    (MiniBatches(N(9), N(2)), MiniBatches(9, 2)),
    (BatchState(N(1), N(2)), BatchState(1, 2)),
    (ConstantBatch(N(9)), ConstantBatch(9)),
    (GrowingBatch(N(9), N(2), N(10)), GrowingBatch(9, 2, 10)),
    (get_backend("numpy", np.float64), get_backend("numpy", "float64")),
    (get_backend("numpy", np.dtype("float32")), get_backend("numpy")),
]


def types(value: Any) -> Any:
    """The type of a value; of a tuple the types of what is in it."""
    return tuple(map(types, value)) if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize(
    ("given", "plain"),
    SAME,
    ids=[f"{type(plain).__name__} {i}" for i, (_, plain) in enumerate(SAME)],
)
def test_numbers_and_lists_of_all_kinds(given: Any, plain: Any):
    """They are equal, printed alike, and of Python's own types, which go into a file or a step."""
    assert given == plain
    assert repr(given) == repr(plain)
    for f in fields(plain):
        if f.name != "xp":
            assert types(getattr(given, f.name)) == types(getattr(plain, f.name)), f.name


def test_a_rate_of_numpys_leaves_single_precision(backend: Any):
    place = get_backend(backend.name, "float32", backend.device)
    for make in (SGD, Adam):
        optimizer = make(OBJECTIVE, rate=np.float64(0.1))
        state = optimizer.init(OBJECTIVE.network.init(0, place))
        state, report = optimizer.step(state, place.ones((4, 3)), place.ones((4, 2)))
        assert state.params.dtype == place.dtype
        assert type(report.alpha) is float


class Falling(Schedule):
    """A schedule of one's own that gives what it was given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, k: int) -> float:
        return self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, None, "0.1", True])
def test_what_a_schedule_gives_is_checked(value: Any):
    assert type(value_at(Falling(np.float32(0.5)), 3)) is float
    with pytest.raises(ConfigError, match=r"Falling in step 3: expected a number >= 0, got"):
        value_at(Falling(value), 3)
    with pytest.raises(ConfigError, match=r"Exponential in step 9: expected a number .* got inf"):
        value_at(Exponential(1e-6, decay=1e200), 9)


BAD: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: MultiHeadAttention(4, 2, causal="no"),
        "causal: expected True or False",
    ),
    (lambda: MultiHeadAttention(4, 2, bias=1), "MultiHeadAttention bias: expected True or False"),
    (
        lambda: MultiHeadAttention(4, 2, initializer=1),
        "MultiHeadAttention initializer: expected",
    ),
    (lambda: Embedding(4, 2, initializer=1), "Embedding initializer: expected a function"),
    (lambda: BatchNorm(4, affine="no"), "BatchNorm affine: expected True or False, got 'no'"),
    (lambda: LayerNorm(4, affine=0), "LayerNorm affine: expected True or False, got 0"),
    (lambda: FixedNorm(np.ones(2), np.ones(2), None), "FixedNorm affine: expected True or False"),
    (lambda: SGD(OBJECTIVE, nesterov="no"), "SGD nesterov: expected True or False, got 'no'"),
    (lambda: IterateAverage(power=-1.0), "IterateAverage power: expected a number >= 0"),
    (lambda: Refresh(spread="no"), "Refresh spread: expected True or False, got 'no'"),
    (
        lambda: BlockTridiagonal(split="no"),
        "BlockTridiagonal split: expected True or False",
    ),
    (lambda: FullKronecker("3"), "FullKronecker block: expected a KFACBlock, got '3'"),
    (
        lambda: FullKronecker(max_parameters=0),
        "FullKronecker max_parameters: expected an integer > 0",
    ),
    (lambda: FullMatrix(float("nan")), "FullMatrix max_parameters: expected an integer > 0"),
    (lambda: FullMatrix(True), "FullMatrix max_parameters: expected an integer > 0"),
    (lambda: GammaSearch(minimum=float("inf")), "GammaSearch: expected 0 <= minimum"),
    (lambda: Piecewise(values=0.1, boundaries=()), "Piecewise values: expected a tuple, got 0.1"),
    (lambda: Piecewise((0.1, 0.2), ("3",)), "Piecewise boundaries: expected a number, got '3'"),
    (lambda: Conv(1, 2, 3), "Conv: expected kernel to be a tuple .* for each spatial axis, got 3"),
    (lambda: Sequential([]), "Sequential: expected at least one layer, got none"),
    (lambda: Sequential([3]), "Sequential: expected a Layer at 0, got int"),
    (lambda: Dense(10**30, 1).init(0, get_backend()), r"Dense\(1000+, 1\): expected fewer than 2"),
    (lambda: Dense(3, 1).init("x", get_backend()), "rng: expected an Rng or a seed, got 'x'"),
    (lambda: get_backend([]), r"backend: expected one of numpy, .*; got \[\]"),
    (lambda: get_backend("numpy", np.int32), "dtype: expected float32 or float64, got <class"),
    (lambda: get_backend("numpy", None), "dtype: expected float32 or float64, got None"),
    (
        lambda: SGD(OBJECTIVE).state_from_tree({}),
        r"state: expected a tree from SGD.state_to_tree, got one without average, params",
    ),
    (
        lambda: KFAC(OBJECTIVE).state_from_tree(None),
        r"state: expected a tree from KFAC.state_to_tree, got None",
    ),
    (lambda: restored(step="3"), "state: step: expected an integer >= 0, got '3'"),
    (
        lambda: restored(moments={"7": {"A": np.ones((4, 4)), "G": np.eye(2)}}),
        r"state: moments: expected those of \[''\], got \['7'\]",
    ),
    (
        lambda: restored(moments={"": {"diagonal": np.ones((2, 4))}}),
        r"expected moments of its own, got those of DiagonalBlock",
    ),
    (lambda: restored(moments=3), "state: moments: expected .*, got 3"),
    (
        lambda: KFAC(OBJECTIVE).step(
            KFAC(OBJECTIVE, averaging=None).init(np.ones((2, 4))), np.ones((2, 3)), np.ones((2, 2))
        ),
        r"state: expected an average, .*dataclasses\.replace\(state, average=state\.params\)",
    ),
    (lambda: SGD(OBJECTIVE).init(OBJECTIVE.network), "params: expected an array, got Dense"),
    (lambda: quality(BlockDiagonal(), evaluation()), "quality: e: expected an Evaluation, got"),
    (lambda: BlockDiagonal().estimate(MonteCarlo(1), evaluation(), 0), "estimate: e: expected an"),
    (lambda: BlockDiagonal().estimate(evaluation(), 1, 0), "estimate: fisher: expected a Fisher"),
    (lambda: evaluation().take("1"), r"n: expected 1\.\.2 examples, got '1'"),
    (lambda: evaluation().take(True), r"n: expected 1\.\.2 examples, got True"),
    (
        lambda: sparse(Rng(0), 3, 2, get_backend(), connections=0.5),
        "sparse connections: expected an integer > 0",
    ),
    (
        lambda: tf32(get_backend(), "no").__enter__(),
        "tf32 enabled: expected True or False, got",
    ),
    (lambda: OBJECTIVE.evaluate(*single()), "x: expected dtype float32 .*; backend.asarray gives"),
]


def restored(**wrong: Any) -> Any:
    """A state of K-FAC put together from a tree that is partly wrong."""
    kfac = KFAC(OBJECTIVE)
    state, _ = kfac.step(kfac.init(np.ones((2, 4))), np.ones((2, 3)), np.ones((2, 2)))
    return kfac.state_from_tree(kfac.state_to_tree(state) | wrong)


def evaluation() -> Any:
    x, params, t = np.ones((2, 3)), np.ones((2, 4)), np.ones((2, 2))
    return OBJECTIVE.evaluate(params, x, t)


def single() -> Any:
    return np.ones((2, 4), np.float32), np.ones((2, 3)), np.ones((2, 2))


@pytest.mark.parametrize(("call", "match"), BAD, ids=[match for _, match in BAD])
def test_other_values_are_refused(call: Callable[[], Any], match: str):
    with pytest.raises((InputError, ConfigError), match=match) as caught:
        call()
    assert isinstance(caught.value, KfacError)
    assert "\n" not in str(caught.value)

"""Which networks are chains, what is refused and why, and what may be left uncoupled."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from cases import networks
from curvature_cases import estimate
from numerics import assert_close, host
from toys import MeanOverPositions, Scaling
from tridiagonal_dense import factors_of

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import (
    BlockDiagonal,
    BlockTridiagonal,
    FullKronecker,
    KFACBlock,
    describe,
    expand,
    find_chains,
    reduce,
)
from kfac_np.curvature.networks.tridiagonal_moments import cross_input_moment
from kfac_np.errors import CurvatureError
from kfac_np.fisher import Exact
from kfac_np.layers import (
    Conv,
    Dense,
    Flatten,
    Layer,
    Recurrent,
    ReLU,
    Residual,
    Sequential,
    Tanh,
    Tied,
)
from kfac_np.losses import SigmoidCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective

CHAINS: dict[str, tuple[Layer, tuple[tuple[str, ...], ...]]] = {
    "one layer": (Dense(2, 2), (("",),)),
    "no parameters": (Sequential(Tanh(), Flatten()), ()),
    "plain": (Sequential(Dense(2, 2), Tanh(), Dense(2, 2)), (("0", "2"),)),
    "nested": (
        Sequential(
            Sequential(Tanh()), Sequential(Dense(2, 2), Sequential(Dense(2, 2))), Dense(2, 2)
        ),
        (("1.0", "1.1.0", "2"),),
    ),
    "residual without parameters": (
        Sequential(Dense(2, 2), Residual(Tanh()), Dense(2, 2)),
        (("0", "2"),),
    ),
    "residual around everything": (
        Residual(Sequential(Dense(2, 2), Tanh(), Dense(2, 2))),
        (("0", "2"),),
    ),
    "shortcut without parameters": (
        Residual(Sequential(Dense(2, 2), Tanh(), Dense(2, 2)), shortcut=Tanh()),
        (("0.0", "0.2"),),
    ),
    "parameters in the shortcut only": (Residual(Tanh(), shortcut=Dense(2, 2)), (("1",),)),
    "one tied layer": (Tied((Dense(2, 2), Tanh()), (0, 1, 0)), (("0",),)),
    "one recurrent layer": (Sequential(Recurrent(Dense(4, 2), 2), Tanh()), (("0",),)),
}
SPLIT: dict[str, tuple[Layer, tuple[tuple[str, ...], ...], str]] = {
    "residual": (
        Sequential(
            Dense(2, 2), Residual(Sequential(Dense(2, 2), Tanh(), Dense(2, 2))), Dense(2, 2)
        ),
        (("0",), ("1.0", "1.2"), ("2",)),
        r"layer 1: a Residual with parameters inside and others outside",
    ),
    "residual first": (
        Sequential(Residual(Dense(2, 2)), Dense(2, 2)),
        (("0",), ("1",)),
        r"layer 0: a Residual",
    ),
    "shortcut": (
        Sequential(
            Dense(2, 2),
            Residual(
                Sequential(Dense(2, 3), Tanh(), Dense(3, 3)),
                shortcut=Sequential(Dense(2, 2), Dense(2, 3)),
            ),
            Dense(3, 2),
        ),
        (("0",), ("1.0.0", "1.0.2"), ("1.1.0", "1.1.1"), ("2",)),
        r"layer 1: a Residual with parameters inside and others outside",
    ),
    "shortcut around everything": (
        Residual(Dense(2, 3), shortcut=Dense(2, 3)),
        (("0",), ("1",)),
        r"a Residual with parameters in inner and shortcut is not a chain",
    ),
    "shortcut beside nested layers": (
        Sequential(
            Residual(
                Sequential(Sequential(Dense(4, 4), Tanh()), Dense(4, 4)), shortcut=Dense(4, 4)
            ),
            Dense(4, 2),
        ),
        (("0.0.0.0", "0.0.1"), ("0.1",), ("1",)),
        r"layer 0: a Residual with parameters in inner and shortcut",
    ),
    "tied": (
        Sequential(Dense(2, 2), Tied((Dense(2, 2), Dense(2, 2)), (0, 1, 0)), Dense(2, 2)),
        (("0",), ("1.0",), ("1.1",), ("2",)),
        r"layer 1: a Tied is no link of a chain",
    ),
    "recurrent": (  # with as many locations as its neighbours
        Sequential(Dense(2, 2), Recurrent(Dense(4, 2), 2), Dense(2, 2)),
        (("0",), ("1",), ("2",)),
        r"layer 1: a Recurrent is no link of a chain",
    ),
    "recurrent with a deep cell": (
        Sequential(Recurrent(Sequential(Dense(4, 3), Tanh(), Dense(3, 2)), 2), Dense(2, 2)),
        (("0.0",), ("0.2",), ("1",)),
        r"layer 0: a Recurrent is no link of a chain",
    ),
    "several parameters": (
        Sequential(Dense(2, 2), Scaling(2), Dense(2, 2)),
        (("0",), ("1.scale",), ("1.gain",), ("2",)),
        r"layer 1: Scaling\(d=2\) has parameters 1.scale, 1.gain, not one matrix",
    ),
}


def parameters(network: Layer) -> Any:
    return network.init(Rng(0), get_backend("numpy", "float64"))


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str):
    network, expected = CHAINS[name]
    for split in (False, True):
        assert find_chains(network, parameters(network), split=split) == expected


@pytest.mark.parametrize("name", SPLIT)
def test_what_is_not_a_chain_is_refused_with_the_reason_or_split(name: str):
    network, expected, reason = SPLIT[name]
    with pytest.raises(CurvatureError, match=f"{reason}.*; split=True makes chains"):
        find_chains(network, parameters(network))
    assert find_chains(network, parameters(network), split=True) == expected


def images(
    backend: Backend, network: Layer, shape: tuple[int, ...], *, weighted: bool = False
) -> Evaluation:
    """An evaluation of a network on random images."""
    rng = np.random.default_rng(3)
    params = trees.tree_map(
        lambda p: backend.asarray(0.5 * rng.standard_normal(p.shape)),
        network.init(Rng(0), backend),
    )
    x = backend.asarray(rng.standard_normal((6, *shape)))
    t = backend.asarray(rng.random((6, *network.output_shape(shape))))
    weights = backend.asarray(np.linspace(0.5, 2.0, 6)) if weighted else None
    return Objective(network, SigmoidCrossEntropy()).evaluate(params, x, t, weights)


def coupled(moments: dict[str, Any]) -> list[str]:
    return [path for path, m in moments.items() if "A_next" in m]


def test_convolutions_in_a_chain(backend: Backend):
    """Equal locations: as dense layers that see patches as rows."""
    network = Sequential(
        Conv(2, 3, (3,), padding="same"), ReLU(), Conv(3, 2, (2,), padding=((0, 1),)), Dense(2, 2)
    )
    e = images(backend, network, (5, 2))
    curvature = BlockTridiagonal()
    moments = estimate(curvature, e)
    expected = factors_of(e, Exact())
    assert coupled(moments) == ["0", "2"]
    for i, path in enumerate(("0", "2")):
        assert_close(moments[path]["A_next"], expected.A[i][i + 1])
        assert_close(moments[path]["G_next"], expected.G[i][i + 1])
    factors, events = curvature.factorise(moments, 0.1)
    v = e.gradient()
    solution = host(trees.ravel(curvature.solve(factors, v)))
    assert_close(solution, expected.damped(0.1).inverse() @ host(trees.ravel(v)))
    assert not events


def test_patches_are_unfolded_in_chunks_of_each_layers_own(backend: Backend):
    """Cut at different examples in the two layers: the moments are the same sums."""

    def network(first: int, second: int) -> Layer:
        return Sequential(
            Conv(2, 3, (3,), padding="same", budget_bytes=first),
            ReLU(),
            Conv(3, 2, (3,), padding="same", budget_bytes=second),
            Dense(2, 2),
        )

    found = []
    for first, second in ((10**9, 10**9), (600, 10**9), (600, 1500), (1, 1)):
        e = images(backend, network(first, second), (5, 2))
        weights = backend.asarray(np.linspace(0.5, 2.0, 6))
        for w in (None, weights):
            at = e.objective.evaluate(
                e.params, e.backward(e.output_gradient())[0].a[:, :, 2:4], e.targets, w
            )
            found.append(trees.ravel(estimate(BlockTridiagonal(), at)))
    for plain, weighted in zip(found[2::2], found[3::2], strict=True):
        assert_close(plain, found[0], 1e-13)
        assert_close(weighted, found[1], 1e-13)


def test_never_more_than_a_chunk_of_each_layer_is_unfolded():
    backend = get_backend("numpy", "float64")
    budget, n = 2**16, 200
    network = Sequential(*(Conv(8, 8, (5,), padding="same", budget_bytes=budget) for _ in "ab"))
    x = backend.asarray(np.random.default_rng(0).standard_normal((n, 100, 8)))
    e = Objective(network, SquaredError()).evaluate(network.init(Rng(0), backend), x, x)
    first, second = e.backward(e.output_gradient())
    whole = n * 100 * 41 * 8
    tracemalloc.start()
    cross_input_moment(first, second, e.scale, expand)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a chunk of each, another while it is being padded, and slack of as much
    assert peak < 5 * budget < 0.1 * whole


def test_layers_of_different_locations_are_refused_or_left_uncoupled(backend: Backend):
    network = Sequential(
        Conv(1, 2, (3,), padding="same"),
        ReLU(),
        Conv(2, 2, (3,), padding="same"),
        Flatten(),
        Dense(10, 3),
        Tanh(),
        Dense(3, 2),
    )
    e = images(backend, network, (5, 1))
    match = "layers 2 and 4: expected weights used at equally many locations, got 5 and 1"
    with pytest.raises(CurvatureError, match=match):
        estimate(BlockTridiagonal(), e)
    with pytest.raises(CurvatureError, match="0: 5, 2: 5, 4: 1, 6: 1"):
        estimate(FullKronecker(), e)
    curvature = BlockTridiagonal(split=True)
    moments = estimate(curvature, e)
    assert coupled(moments) == ["0", "4"]
    assert coupled(estimate(BlockTridiagonal(KFACBlock(sharing=reduce)), e)) == ["0", "2", "4"]
    table = describe(network, e.params, curvature, (5, 1)).splitlines()
    assert ["with next" in line for line in table] == [False, True, False, True, False, False]


@pytest.mark.parametrize("name", ["shortcut", "shortcut beside nested layers"])
def test_branches_are_coupled_inside_only(backend: Backend, name: str):
    network, chains, reason = SPLIT[name]
    e = images(backend, network, (network.at(chains[0][0]).d_in,))
    with pytest.raises(CurvatureError, match=reason):
        estimate(BlockTridiagonal(), e)
    curvature = BlockTridiagonal(split=True)
    moments = estimate(curvature, e)
    assert coupled(moments) == [path for chain in chains for path in chain[:-1]]
    factors, events = curvature.factorise(moments, 0.1)
    assert not events
    plain = BlockDiagonal()
    alone, _ = plain.factorise(estimate(plain, e), 0.1)
    ours, theirs = (
        dict(trees.items(c.solve(f, e.gradient())))
        for c, f in ((curvature, factors), (plain, alone))
    )
    for path in (chain[0] for chain in chains if len(chain) == 1):
        assert_close(ours[path], theirs[path], 1e-14)


def test_weights_used_several_times_are_not_coupled(backend: Backend):
    """Nor with neighbours that have equally many locations."""
    e = images(backend, SPLIT["recurrent"][0], (3, 2))
    with pytest.raises(CurvatureError, match="layer 1: a Recurrent is no link"):
        estimate(BlockTridiagonal(), e)
    assert coupled(estimate(BlockTridiagonal(split=True), e)) == []


@pytest.mark.parametrize("wrong", [("02",), "02", (("0", 2),), [["0", 2]]])
def test_chains_are_tuples_of_paths(wrong: Any):
    match = r"BlockTridiagonal chains: expected a tuple of tuples of paths, got "
    with pytest.raises(CurvatureError, match=match):
        BlockTridiagonal(chains=wrong)


def test_what_is_uncoupled_is_block_diagonal(backend: Backend):
    """Chains do not know of each other: each is solved as it would be alone."""
    network = Sequential(
        Dense(3, 3), Tanh(), Residual(Sequential(Dense(3, 4), Tanh(), Dense(4, 3))), Dense(3, 2)
    )
    e = images(backend, network, (3,))
    curvature, plain = BlockTridiagonal(split=True), BlockDiagonal()
    moments = estimate(curvature, e)
    assert coupled(moments) == ["2.0"]
    factors, _ = curvature.factorise(moments, 0.1)
    alone, _ = plain.factorise(estimate(plain, e), 0.1)
    v = e.gradient()
    ours, theirs = (
        dict(trees.items(c.solve(f, v))) for c, f in ((curvature, factors), (plain, alone))
    )
    for path in ("0", "3"):
        assert_close(ours[path], theirs[path], 1e-14)
    for path in ("2.0", "2.2"):
        assert np.max(np.abs(host(ours[path]) - host(theirs[path]))) > 1e-3 * np.max(
            np.abs(host(theirs[path]))
        )
    nothing = BlockTridiagonal(chains=())
    assert coupled(estimate(nothing, e)) == []
    dense = nothing.matrix(estimate(nothing, e), e.params).to_dense()
    assert_close(dense, plain.matrix(estimate(plain, e), e.params).to_dense(), 1e-15)


def test_chains_that_the_caller_names(backend: Backend):
    e = networks(name="residual_nested")[0].build(backend).evaluate()
    with pytest.raises(CurvatureError, match="layer 1: a Residual with parameters inside"):
        estimate(BlockTridiagonal(), e)
    with pytest.raises(CurvatureError, match="layer 1: a Residual with parameters inside"):
        describe(e.objective.network, e.params, BlockTridiagonal(), (2,))
    given = BlockTridiagonal(chains=(("0", "1.1"), ("1.2", "2.1")))
    moments = estimate(given, e)
    assert coupled(moments) == ["0", "1.2"]
    factors, events = given.factorise(moments, 0.1)
    assert not events
    assert np.all(np.isfinite(host(trees.ravel(given.solve(factors, e.gradient())))))
    for wrong in (("0", "2.1"), ("1.1", "0"), ("0", "x")):
        with pytest.raises(CurvatureError, match=f"follow one another.* got {wrong[0]} and"):
            estimate(BlockTridiagonal(chains=(wrong,)), e)


def test_grouped_layers(backend: Backend):
    network = Sequential(
        Conv(2, 2, (3,), padding="same"), Conv(2, 2, (3,), padding="same", groups=2), Dense(2, 2)
    )
    e = images(backend, network, (5, 2))
    match = "layer 1: BlockTridiagonal expected an affine layer with one matrix, got Grouped"
    with pytest.raises(CurvatureError, match=match):
        estimate(BlockTridiagonal(), e)
    with pytest.raises(CurvatureError, match="layer 1: FullKronecker expected an affine layer"):
        estimate(FullKronecker(), e)
    curvature, plain = BlockTridiagonal(split=True), BlockDiagonal()
    factors, _ = curvature.factorise(estimate(curvature, e), 0.1)
    alone, _ = plain.factorise(estimate(plain, e), 0.1)
    assert_close(
        trees.ravel(curvature.solve(factors, e.gradient())),
        trees.ravel(plain.solve(alone, e.gradient())),
        1e-14,
    )


def test_parameters_that_nothing_supports(backend: Backend):
    network = Sequential(Dense(3, 2), Scaling(2))
    e = Objective(network, SquaredError()).evaluate(
        network.init(Rng(0), backend), backend.ones((4, 3)), backend.zeros((4, 2))
    )
    with pytest.raises(CurvatureError, match=r"layer 1: Scaling.*not one matrix"):
        estimate(BlockTridiagonal(), e)
    with pytest.raises(CurvatureError, match=r"layer 1\.\w+: .*does not support PerExample"):
        estimate(BlockTridiagonal(split=True), e)


def test_a_layer_that_pools_positions(backend: Backend):
    network = Sequential(Dense(2, 3), MeanOverPositions(), Dense(3, 2))
    e = images(backend, network, (4, 2))
    with pytest.raises(CurvatureError, match=r"layers 0 and 2: .* got 4 and 1"):
        estimate(BlockTridiagonal(), e)


def test_costs_in_the_table():
    """A layer with the next: 4 n m (n + m) + 11 n³ and two Cholesky factors more; 8 products."""
    network = Sequential(Dense(4, 5), Tanh(), Dense(5, 5), Tanh(), Dense(5, 5))
    table = describe(network, parameters(network), BlockTridiagonal(), (4,))
    assert table.splitlines()[1].split("  ")[-1].strip() == str(
        4 * 5 * 5 * 10 + 2 * 5 * 6 * (5 + 5) + 2 * 5 * 5 * (5 + 6)
    )
    assert "A 5×5, G 5×5, with next A 5×6, G 5×5" in table
    plain = describe(network, parameters(network), BlockDiagonal(), (4,))
    assert table.splitlines()[3].split()[4:] == plain.splitlines()[3].split()[4:]
    whole = describe(network, parameters(network), FullKronecker(), (4,))
    size = 25 + 30 + 30
    assert whole.splitlines()[-1].split()[-1] == f"{2 * size**2 / 1e3:.3g}k"

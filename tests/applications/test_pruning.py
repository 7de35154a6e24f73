"""Removing weights, units and directions: reference values, laws, and networks that got smaller."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numerics import assert_close, host
from reference_files import Reference, load

from kfac_np import trees
from kfac_np.applications import FittedCurvature, Pruned, fit_curvature, prune
from kfac_np.applications.compensating import compensation
from kfac_np.applications.factoring import eigendamage_costs, in_eigenbasis, weighted_svd
from kfac_np.applications.saliency import group_costs, one_by_one, weight_costs
from kfac_np.applications.shrinking import find_links, shrunk
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import EKFAC, BlockDiagonal, Curvature, DiagonalBlock, ExactBlock, FullMatrix
from kfac_np.errors import CurvatureError, FactorizationError, InputError
from kfac_np.fisher import Empirical, Exact
from kfac_np.layers import (
    AveragePool,
    Conv,
    Dense,
    FixedNorm,
    Flatten,
    Layer,
    LayerNorm,
    Logistic,
    MaxPool,
    ReLU,
    Reshape,
    Residual,
    Sequential,
    Tanh,
)
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.matrices import BlockDiagonalMatrix, KroneckerMatrix
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, SGD, Adam
from kfac_np.optimizers.family import GramDescent, Preconditioned
from kfac_np.penalties import Zeros

NAMES = ["prune_mlp_ce_tanh", "prune_mlp_mse_relu_emp", "prune_cnn_ce_tanh"]
NUMPY = Backend.of(np.zeros(1))


# ------------------------------------------------------------------------------- reference values


def reference_fit(r: Reference, backend: Backend, curvature: Curvature) -> FittedCurvature:
    e = r.evaluate(backend)
    fisher = Exact() if r.spec["fisher"] == "type2" else Empirical()
    return fit_curvature(e.objective, e.params, [(e.inputs, e.targets)], curvature, fisher)


def blocks(r: Reference, backend: Backend, kind: str):
    """The matrix of each layer, [W | b], and the damping, by the name in the file."""
    curvature = BlockDiagonal(ExactBlock()) if kind == "exact" else BlockDiagonal()
    fit = reference_fit(r, backend, curvature)
    for i, position in enumerate(r.positions):
        block, w = fit.matrix.blocks[str(position)], fit.operand[str(position)]
        damping = r.spec["damping"]
        if kind == "plain":
            plain = [m + r.spec["plain"] * backend.eye(m.shape[0]) for m in (block.A, block.G)]
            block, damping = KroneckerMatrix(*plain), 0.0
        yield i, block, w, damping


@pytest.mark.parametrize("kind", ["exact", "kfac", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_single_weights(name: str, kind: str, backend: Backend):
    r = load(f"../applications/{name}")
    for i, block, w, damping in blocks(r, backend, kind):
        columns = r.columns[i]
        for method in ("obd", "obs"):
            expected = r[f"{kind}_{method}{i}"][:, columns]
            assert_close(weight_costs(block, w, method, damping), expected, 1e-10)
        q = np.zeros(w.shape, dtype=bool).reshape(-1)
        q[int(r[f"{kind}_obs_argmin{i}"])] = True
        gone = backend.asarray(q.reshape(w.shape)[:, columns], dtype=backend.xp.bool)
        update = compensation(BlockDiagonalMatrix({"0": block}), {"0": w}, {"0": gone}, damping)[
            "0"
        ]
        assert_close(update, r[f"{kind}_obs_update{i}"][:, columns], 1e-9)
        left, order, costs = one_by_one(block, w, 4, damping)
        theirs = np.arange(q.size).reshape(w.shape)[:, columns].reshape(-1)
        assert [int(theirs[k]) for k in order] == list(r[f"{kind}_sequential_order{i}"])
        assert_close(np.asarray(costs), r[f"{kind}_sequential_cost{i}"], 1e-10)
        assert_close(left, r[f"{kind}_sequential_weights{i}"][:, columns], 1e-9)


@pytest.mark.parametrize("kind", ["exact", "kfac", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_units_and_channels(name: str, kind: str, backend: Backend):
    r = load(f"../applications/{name}")
    for i, block, w, damping in blocks(r, backend, kind):
        columns, layer = r.columns[i], r.layers[r.positions[i]]
        channels = layer.c_in if isinstance(layer, Conv) else layer.d_in
        free = w.shape[1] - 1
        order = np.arange(channels) if isinstance(layer, Conv) else columns[:free]
        lines = {
            "unit": (0, [[k] for k in range(w.shape[0])], np.arange(w.shape[0])),
            "channel": (1, [list(range(c, free, channels)) for c in range(channels)], order),
        }
        for what, (axis, groups, places) in lines.items():
            for method in ("obd", "obs"):
                expected = r[f"{kind}_{what}_{method}{i}"][places]
                assert_close(group_costs(block, w, groups, axis, method, damping), expected, 1e-10)
            cheapest = groups[int(np.argmin(r[f"{kind}_{what}_obs{i}"][places]))]
            gone = np.zeros(w.shape, dtype=bool)
            gone[(cheapest, slice(None)) if axis == 0 else (slice(None), cheapest)] = True
            update = compensation(
                BlockDiagonalMatrix({"0": block}),
                {"0": w},
                {"0": backend.asarray(gone, dtype=backend.xp.bool)},
                damping,
            )["0"]
            assert_close(update, r[f"{kind}_{what}_update{i}"][:, columns], 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_coupled(name: str, backend: Backend):
    r = load(f"../applications/{name}")
    fit, order = reference_fit(r, backend, FullMatrix()), r.order()
    for method in ("obd", "obs"):
        costs = weight_costs(fit.matrix, fit.operand, method, r.spec["damping"])
        assert_close(costs, r[f"full_{method}"][order], 1e-10)
    q = np.zeros(len(order), dtype=bool)
    q[int(r["full_obs_argmin"])] = True
    gone = trees.unravel(backend.asarray(q[order], dtype=backend.xp.bool), fit.operand)
    update = compensation(fit.matrix, fit.operand, gone, r.spec["damping"])
    assert_close(update, r["full_obs_update"][order], 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_eigendamage(name: str, backend: Backend):
    r = load(f"../applications/{name}")
    for kind, curvature in (("", BlockDiagonal()), ("_ekfac", EKFAC())):
        fit = reference_fit(r, backend, curvature)
        for i, position in enumerate(r.positions):
            block, w = fit.matrix.blocks[str(position)], fit.operand[str(position)]
            costs = eigendamage_costs(block, w)
            expected = r[f"eigendamage{kind}{i}"]
            assert_close(costs, expected, 1e-8)
            axis = 1 if w.shape[0] <= w.shape[1] else 0
            assert_close(in_eigenbasis(block, w).costs, expected.sum(axis), 1e-8)


# ------------------------------------------------------------------------------------------- laws


def problem(backend: Backend, *layers: Layer, shape=(4,), n=40, classes=3):
    """An objective, parameters, a batch: not at a minimum, which the laws do not need."""
    network, seed = Sequential(*layers), np.random.default_rng(len(layers))
    params = trees.tree_map(
        lambda p: backend.asarray(0.7 * seed.standard_normal(p.shape)),
        network.init(Rng(0), backend),
    )
    x = backend.asarray(seed.standard_normal((n, *shape)))
    t = backend.asarray(seed.integers(0, classes, n))
    return Objective(network, SoftmaxCrossEntropy()), params, (x, t)


MLP = (Dense(4, 6), Tanh(), Dense(6, 5), Tanh(), Dense(5, 3))
WIDE = (Dense(4, 20), Tanh(), Dense(20, 20), Tanh(), Dense(20, 3))
KINDS: dict[str, Curvature] = {
    "kfac": BlockDiagonal(),
    "ekfac": EKFAC(),
    "diagonal": BlockDiagonal(DiagonalBlock()),
    "exact": BlockDiagonal(ExactBlock()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_is_what_the_model_rises_by(kind: str, backend: Backend):
    """Of a weight, a row, a column: the least of the model over all others, computed densely."""
    objective, params, batch = problem(backend, *MLP)
    fit = fit_curvature(objective, params, [batch], KINDS[kind])
    w, damping = fit.operand["2"], 0.01
    block = fit.matrix.blocks["2"]
    H = host(block.to_dense()) + damping * np.eye(w.size)
    for groups, axis in (([[1], [4]], 0), ([[0], [2, 3]], 1)):
        costs = host(group_costs(block, w, groups, axis, "obs", damping))
        brain_damage = host(group_costs(block, w, groups, axis, "obd", damping))
        for group, cost, damage in zip(groups, costs, brain_damage, strict=True):
            gone = np.zeros(w.shape, dtype=bool)
            gone[(group, slice(None)) if axis == 0 else (slice(None), group)] = True
            S, K, v = gone.ravel(), ~gone.ravel(), host(w).ravel()
            delta = np.where(S, -v, 0.0)
            assert damage == pytest.approx(0.5 * delta @ H @ delta, rel=1e-10)
            delta[K] = np.linalg.solve(H[np.ix_(K, K)], H[np.ix_(K, S)] @ v[S])
            assert cost == pytest.approx(0.5 * delta @ H @ delta, rel=1e-10)
            found = compensation(
                BlockDiagonalMatrix({"2": block}),
                {"2": w},
                {"2": backend.asarray(gone, dtype=backend.xp.bool)},
                damping,
            )["2"]
            assert_close(found, delta.reshape(w.shape), 1e-8)
            assert (host(found)[gone] == -host(w)[gone]).all()


def test_costs_of_one_by_one_add_up(backend: Backend):
    objective, params, batch = problem(backend, *MLP)
    fit = fit_curvature(objective, params, [batch])
    w, block = fit.operand["2"], fit.matrix.blocks["2"]
    left, order, costs = one_by_one(block, w, 20, 0.01)
    assert len(set(order)) == 20
    delta = left - w
    rise = 0.5 * trees.inner(delta, block.matvec(delta) + 0.01 * delta)
    assert float(rise) == pytest.approx(sum(costs), rel=1e-10)
    assert (host(left).ravel()[order] == 0.0).all()


def test_weighted_svd_is_best_in_its_metric(backend: Backend):
    objective, params, batch = problem(backend, *MLP)
    fit = fit_curvature(objective, params, [batch])
    block, w = fit.matrix.blocks["2"], fit.operand["2"]
    A, G, W = host(block.A), host(block.G), host(w)

    def lost(p, q):
        E = W - host(p) @ host(q)
        return 0.5 * np.trace(G @ E @ A @ E.T)

    svd = weighted_svd(block, w)
    for rank in (1, 3):
        (p, q), cost = svd.keep(range(rank)), float(host(svd.costs)[rank:].sum())
        assert p.shape == (5, rank)
        assert cost == pytest.approx(lost(p, q), rel=1e-10)
        u, s, vt = np.linalg.svd(W)
        assert cost < lost(u[:, :rank] * s[:rank], vt[:rank])
        in_basis = in_eigenbasis(block, w)
        best = sorted(np.argsort(host(in_basis.costs))[-rank:].tolist())
        dropped = float(np.sort(host(in_basis.costs))[:-rank].sum())
        assert dropped == pytest.approx(lost(*in_basis.keep(best)), rel=1e-10)
        assert cost <= dropped
    assert_close(svd.outer @ svd.inner, w, 1e-10)


def zeroed(network: Layer, params, kept):
    """All of the network, where the columns that read the other units are zero."""
    links, arrays = find_links(network), dict(trees.items(params))
    for path, units in kept.items():
        link = links[path]
        w = host(arrays[link.to]).copy()
        w[:, [c for u in range(link.units) if u not in units for c in link.columns[u]]] = 0.0
        arrays[link.to] = Backend.of(arrays[link.to]).asarray(w)
    return trees.map_named(lambda path, _: arrays[path], params)


IMAGE = (6, 6, 2)
NETWORKS: dict[str, tuple[tuple[int, ...], tuple[Layer, ...], dict[str, list[int]]]] = {
    "dense": ((4,), MLP, {"0": [0, 3, 5], "2": [1]}),
    "convolutions": (
        IMAGE,
        (
            Conv(2, 4, (3, 3), padding="same"), ReLU(), MaxPool((2, 2)),
            Conv(4, 5, (2, 2)), Tanh(), AveragePool((2, 2)), Reshape((-1,)), Dense(5, 3),
        ),
        {"0": [1, 2], "3": [0, 2, 4]},
    ),
    "branches": (
        IMAGE,
        (
            Conv(2, 3, (1, 1)), Residual(Sequential(Conv(3, 4, (3, 3), padding=1), ReLU(),
            Sequential(Conv(4, 3, (3, 3), padding=1)))), Flatten(), Dense(108, 3),
        ),
        {"1.0": [0, 3]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_smaller_network_is_the_one_with_zeros(name: str, backend: Backend):
    shape, layers, kept = NETWORKS[name]
    objective, params, (x, _) = problem(backend, *layers, shape=shape, n=3)
    network, smaller = shrunk(objective.network, params, kept)
    expected = objective.network.forward(zeroed(objective.network, params, kept), x)[0]
    assert_close(network.forward(smaller, x)[0], expected)
    sizes = [sum(p.size for p in trees.leaves(tree)) for tree in (params, smaller)]
    assert sizes[1] < sizes[0]


def test_what_has_no_units_to_remove():
    """Outputs, sums with a shortcut, layers before a norm over units."""
    network = Sequential(Dense(4, 5), LayerNorm(5), Dense(5, 6), Tanh(), Residual(Dense(6, 6)),
                         Dense(6, 3))  # fmt: skip
    assert not find_links(network)


@pytest.mark.parametrize("between", [(Logistic(),), (FixedNorm(np.ones(6), np.ones(6)), Tanh())])
def test_what_a_unit_without_weights_leaves_behind(between: tuple[Layer, ...]):
    """φ(0) ≠ 0 goes into the bias of the next layer: rows are cut as if they were zero."""
    layers = (Dense(4, 6), *between, Dense(6, 3))
    objective, params, batch = problem(NUMPY, *layers)
    fit = fit_curvature(objective, params, [batch])
    found = prune(objective, fit, 0.4, remove="units", method="magnitude")
    rows = np.argsort((params[0] ** 2).sum(1))
    kept = np.sort(rows[6 - found.objective.network.layers[0].d_out :])
    same = params[0].copy()
    same[np.setdiff1d(np.arange(6), kept)] = 0.0
    expected = objective.network.forward((same, *params[1:]), batch[0])[0]
    assert_close(found.objective.network.forward(found.params, batch[0])[0], expected)
    without = Objective(Sequential(*layers[:-1], Dense(6, 3, bias=False)), SoftmaxCrossEntropy())
    start = (*params[:-1], params[-1][:, :-1])
    fit = fit_curvature(without, start, [batch])
    with pytest.raises(InputError, match=r'layer 0: a unit without weights.*remove="inputs"'):
        prune(without, fit, 0.4, remove="units")
    assert prune(without, fit, 0.4, remove="inputs").share > 0.4


# ------------------------------------------------------------------------------------------ prune


@pytest.mark.parametrize("remove", ["weights", "units", "inputs", "rank", "eigenvectors"])
def test_the_share_that_was_asked_for_goes(remove: str, backend: Backend):
    objective, params, batch = problem(backend, *WIDE)
    fit = fit_curvature(objective, params, [batch])
    found = prune(objective, fit, 0.5, remove=remove)
    sizes = [sum(p.size for p in trees.leaves(tree)) for tree in (params, found.params)]
    if remove == "weights":
        zeros = sum(int((host(p) == 0.0).sum()) for p in trees.leaves(found.params))
        assert zeros == sizes[0] // 2 + sizes[0] % 2
        assert sum(int((~host(m)).sum()) for m in found.masks.values()) == zeros
        sizes[1] -= zeros
    assert found.total == tuple(sizes)
    assert 0.5 <= found.share < 0.6
    x = batch[0]
    z = found.objective.network.forward(found.params, x)[0]
    assert z.shape == (x.shape[0], 3)
    assert found.predicted > 0.0
    assert f"{found.total[1]:,}" in str(found)


def test_curvature_keeps_more_than_magnitude():
    """Hidden units are copies of each other: what one did, another takes over, and nothing is lost.

    K-FAC sees it in A; no diagonal does, and nothing in the weights' sizes tells.
    """
    objective, params, batch = problem(NUMPY, *MLP)
    double = np.concatenate([params[0], params[0]])
    read = np.concatenate([0.6 * params[2][:, :-1], 0.4 * params[2][:, :-1], params[2][:, -1:]], 1)
    wide = Sequential(Dense(4, 12), Tanh(), Dense(12, 5), Tanh(), Dense(5, 3))
    both, start = replace(objective, network=wide), (double, (), read, *params[3:])
    loss = objective.value(params, *batch)
    assert both.value(start, *batch) == pytest.approx(loss, rel=1e-12)
    rises = {}
    for name, method in (("kfac", "obs"), ("diagonal", "obs"), ("kfac", "magnitude")):
        fit = fit_curvature(both, start, [batch], KINDS[name])
        options = {"remove": "inputs", "method": method, "damping": 1e-8, "paths": ["2"]}
        found = prune(both, fit, 0.4, rounds=12, batches=[batch], **options)
        assert found.objective.network.layers[0].d_out == 6
        rises[name, method] = abs(found.objective.value(found.params, *batch) - loss)
    assert rises["kfac", "obs"] < 1e-4
    assert min(rises["diagonal", "obs"], rises["kfac", "magnitude"]) > 5e-3


def test_more_rounds_fit_again():
    objective, params, batch = problem(NUMPY, *MLP)
    fit = fit_curvature(objective, params, [batch])
    for remove in ("weights", "units"):
        found = prune(objective, fit, 0.5, remove=remove, rounds=3, batches=iter([batch]))
        assert found.share >= 0.5
        assert isinstance(found, Pruned)
        assert found.predicted > 0.0


@pytest.mark.parametrize("make", [KFAC, SGD, Adam, Preconditioned, GramDescent])
def test_training_keeps_zeros(make, backend: Backend):
    objective, params, batch = problem(backend, *MLP)
    found = prune(objective, fit_curvature(objective, params, [batch]), 0.4, remove="weights")
    optimizer = make(objective, penalty=Zeros(found.masks), l2=1e-3)
    state = optimizer.init(found.params)
    losses = []
    for _ in range(5):
        state, report = optimizer.step(state, *batch)
        losses.append(report.loss)
    assert losses[-1] < losses[0]
    arrays = dict(trees.items(state.params))
    for path, mask in found.masks.items():
        assert (host(arrays[path])[~host(mask)] == 0.0).all()
        assert (host(arrays[path]) != host(dict(trees.items(found.params))[path])).any()
    tree = optimizer.state_to_tree(state)
    again = optimizer.step(optimizer.state_from_tree(tree), *batch)[0]
    assert_close(again.params, optimizer.step(state, *batch)[0].params, 0.0)


@pytest.mark.parametrize("page", ["pruning", "continual"])
def test_the_pages_are_true(page: str):
    """The programs in docs/pruning.md and docs/continual.md run."""
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    objective, params, batch = problem(
        NUMPY, Dense(4, 20), Tanh(), Dense(20, 20), Tanh(), Dense(20, 3)
    )

    def train(optimizer, params, x, t):
        return optimizer.step(optimizer.init(params), x, t)[0].params

    names = {"objective": objective, "params": params, "batches": [batch], "tasks": [batch, batch],
             "train": train, "KFAC": KFAC, "Adam": Adam, "print": lambda text: None}  # fmt: skip
    exec(program, names)
    assert ("emptier" in names) == (page == "pruning")


# ------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_by_name():
    objective, params, batch = problem(NUMPY, *MLP)
    fit = fit_curvature(objective, params, [batch])
    before = trees.tree_map(np.copy, params)
    for options, message in [
        ({"share": -0.1}, r"share: expected a number in \(0, 1\), got -0.1"),
        ({"share": 1.0}, r"share: expected a number in \(0, 1\)"),
        ({"share": 0.99}, "share: expected at most 0.*one unit, got 0.99"),
        ({"share": 0.99, "remove": "weights"}, "less than the 69 weights of layers 0, 2, 4"),
        ({"share": 0.99, "remove": "rank"}, "share: expected at most 0.*one direction"),
        ({"remove": "neurons"}, "remove: expected weights, units, inputs"),
        ({"method": "obx"}, "method: expected obs, obd or magnitude"),
        ({"damping": -1.0}, "damping: expected a number >= 0"),
        ({"paths": ["7"]}, "paths: expected some of '0' or '2', got '7'"),
        ({"paths": ["0"], "remove": "inputs"}, "paths: expected some of '2' or '4', got '0'"),
        ({"share": 0.99, "rounds": 2, "batches": [batch]}, "one unit, got 0.99"),
        ({"rounds": 2}, "batches: expected data"),
        ({"rounds": 2, "batches": [batch], "remove": "rank"}, "rounds: expected 1"),
        (
            {"rounds": 2, "batches": [batch], "fisher": Empirical()},
            r"fisher: expected.*Exact.*got Empirical",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            prune(objective, fit, **{"share": 0.3, **options})
    other = Objective(Sequential(Dense(4, 6), Tanh(), Dense(6, 3)), SquaredError())
    with pytest.raises(InputError, match=r"prune fit: expected one of Sequential.*'2': \(3, 7\)"):
        prune(other, fit, 0.3)
    with pytest.raises(InputError, match="expected layers with units that can go, got none"):
        prune(objective, fit.select(["4"]), 0.3)
    coupled = fit_curvature(objective, params, [batch], FullMatrix())
    with pytest.raises(CurvatureError, match='couples them; use remove="weights"'):
        prune(objective, coupled, 0.3)
    assert prune(objective, coupled, 0.3, remove="weights").share >= 0.3
    diagonal = fit_curvature(objective, params, [batch], BlockDiagonal(DiagonalBlock()))
    with pytest.raises(CurvatureError, match=r'prune remove="rank": .*expected a Kronecker'):
        prune(objective, diagonal, 0.3, remove="rank")
    with pytest.raises(CurvatureError, match="Kronecker eigenbasis"):
        prune(objective, diagonal, 0.3, remove="eigenvectors")
    with pytest.raises(FactorizationError, match="more damping"):
        prune(objective, fit, 0.3, damping=0.0)  # the softmax leaves a direction without curvature
    for mask, message in [
        (np.ones((1, 1)), r"parameter 0: expected shape \(1, 1\), got \(6, 5\)"),
        (np.zeros((6, 5)), "parameter 0: expected zeros where the mask is False"),
    ]:
        with pytest.raises(InputError, match=message):
            SGD(objective, penalty=Zeros({"0": mask.astype(bool)})).init(params)
    with pytest.raises(InputError, match="Zeros mask 0: expected dtype bool, got float64"):
        Zeros({"0": np.ones((6, 5))})
    with pytest.raises(InputError, match="Zeros masks: expected a Mapping, got None"):
        Zeros(None)  # type: ignore[arg-type]
    for one, two in zip(trees.leaves(before), trees.leaves(params), strict=True):
        assert (one == two).all()

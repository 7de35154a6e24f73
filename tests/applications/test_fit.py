"""Fitting a curvature to a data set: batches, files, merging, interruptions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase
from numerics import host

from kfac_np import trees
from kfac_np.applications import FittedCurvature, fit_curvature, merge
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    FullMatrix,
)
from kfac_np.errors import CheckpointError, CurvatureError, InputError
from kfac_np.fisher import Empirical, Exact, FisherType, MonteCarlo
from kfac_np.layers import BatchNorm, Dense, Sequential
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective

CASES = {c.name: c for c in NETWORKS}
RELU = CASES["relu_softmax"]
CONV = CASES["conv_softmax"]  # weighted
KINDS: dict[str, Curvature] = {
    "kfac": BlockDiagonal(),
    "diagonal": BlockDiagonal(DiagonalBlock()),
    "full": FullMatrix(),
    "ekfac": EKFAC(),
    "tridiagonal": BlockTridiagonal(split=True),
}


def batches_of(case: NetworkCase, backend: Backend, *cuts: int):
    p = case.build(backend)
    edges = [0, *cuts, case.shape[0]]
    arrays = [p.x, p.t] if p.weights is None else [p.x, p.t, p.weights]
    return [tuple(a[i:j, ...] for a in arrays) for i, j in itertools.pairwise(edges)]


def fitted(case: NetworkCase, backend: Backend, curvature: Curvature, *cuts: int, **options):
    p = case.build(backend)
    batches = options.pop("batches", None) or batches_of(case, backend, *cuts)
    return fit_curvature(p.objective, p.params, batches, curvature, **options)


def dense(fit: FittedCurvature):
    return host(fit.matrix.to_dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [RELU, CONV, CASES["positions_mixed_softmax"]], ids=str)
def test_unequal_batches_give_the_whole(case: NetworkCase, kind: str, backend: Backend):
    curvature = KINDS[kind]
    fit = fitted(case, backend, curvature, 1, case.shape[0] - 1)
    e = case.build(backend).evaluate()
    whole = curvature.matrix(curvature.estimate(e, Exact(), Rng(0)), e.params)
    np.testing.assert_allclose(dense(fit), host(whole.to_dense()), rtol=1e-9, atol=1e-12)
    assert (fit.terms, fit.examples) == (case.terms, case.shape[0])
    assert fit.loss == pytest.approx(e.value * case.terms, rel=1e-12)


@pytest.mark.parametrize("fisher", [MonteCarlo(2), Empirical()], ids=repr)
def test_each_batch_has_targets_of_its_own(fisher: FisherType, backend: Backend):
    """Both passes of EKFAC sample the same; a seed gives the same fit, another one another."""
    one, again, other = (fitted(RELU, backend, EKFAC(), 2, fisher=fisher, rng=r) for r in (0, 0, 1))
    assert (dense(one) == dense(again)).all()
    assert (dense(one) == dense(other)).all() == isinstance(fisher, Empirical)


def test_sums_of_single_precision_are_in_double():
    backend = Backend.of(np.zeros(1, dtype=np.float32))
    objective = Objective(Dense(1, 1), SquaredError())
    x = backend.asarray(np.full((1, 1), 0.1))
    fit = fit_curvature(objective, backend.asarray(np.zeros((1, 2))), [(x, x)] * 3000)
    assert fit.moments[""]["A"].dtype == np.float64
    assert fit.moments[""]["A"][0, 0] == pytest.approx(float(x[0, 0] * x[0, 0]), rel=1e-12)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "full"])
def test_some_parameters_only(kind: str, backend: Backend):
    fit = fitted(RELU, backend, KINDS[kind], 2, paths=["4"])
    assert fit.paths == ("4",)
    whole = fitted(RELU, backend, KINDS[kind], 2)
    size = int(np.prod(fit.operand["4"].shape))
    np.testing.assert_allclose(dense(fit), dense(whole)[-size:, -size:], rtol=1e-9, atol=1e-14)
    if fit.curvature.separable:
        np.testing.assert_array_equal(dense(whole.select("4")), dense(whole)[-size:, -size:])


@pytest.mark.parametrize("kind", ["kfac", "diagonal", "full", "tridiagonal"])
def test_merging_is_fitting_to_all(kind: str, backend: Backend):
    for case in (RELU, CONV):
        first, second = batches_of(case, backend, 2)
        one, two = (fitted(case, backend, KINDS[kind], batches=[b]) for b in (first, second))
        whole, merged = fitted(case, backend, KINDS[kind]), merge(one, two)
        np.testing.assert_allclose(dense(merged), dense(whole), rtol=1e-10, atol=1e-14)
        assert (merged.terms, merged.examples) == (whole.terms, whole.examples)
        assert merged.loss == pytest.approx(whole.loss, rel=1e-12)


def test_a_fit_is_saved_without_its_data(backend: Backend, tmp_path):
    for kind in KINDS:
        fit, path = fitted(RELU, backend, KINDS[kind], 4), tmp_path / f"{kind}.npz"
        fit.save(path)
        loaded = FittedCurvature.load(path, KINDS[kind], backend)
        assert (dense(loaded) == dense(fit)).all()
        assert (loaded.terms, loaded.examples, loaded.loss, loaded.fisher, loaded.paths) == (
            fit.terms, fit.examples, fit.loss, fit.fisher, fit.paths
        )  # fmt: skip


class InterruptedFitError(Exception):
    pass


def stopping(batches, at: int):
    """Batches of which the one numbered `at`, counted over all passes, never comes."""
    counter = itertools.count()

    class Stopping:
        def __iter__(self):
            for batch in batches:
                if next(counter) == at:
                    raise InterruptedFitError
                yield batch

    return Stopping()


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_an_interrupted_fit_goes_on_to_the_same_bytes(at: int, tmp_path):
    """Of two passes over four batches; after 3 in the first, after 4 between them."""
    backend, resume = Backend.of(np.zeros(1)), tmp_path / "sums.npz"
    batches = batches_of(CONV, backend, 1, 2, 3)
    options = {"fisher": MonteCarlo(1), "resume": resume, "save_seconds": 0.0}
    with pytest.raises(InterruptedFitError):
        fitted(CONV, backend, EKFAC(), batches=stopping(batches, at), **options)
    assert resume.exists()
    left_over = stopping(batches, 99)
    fitted(CONV, backend, EKFAC(), batches=left_over, **options).save(tmp_path / "resumed.npz")
    fitted(CONV, backend, EKFAC(), batches=batches, fisher=MonteCarlo(1)).save(tmp_path / "one.npz")
    assert (tmp_path / "resumed.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert not resume.exists()


def test_what_was_interrupted_must_be_the_same_fit(tmp_path):
    backend, resume = Backend.of(np.zeros(1)), tmp_path / "sums.npz"
    batches = batches_of(RELU, backend, 1, 2)
    with pytest.raises(InterruptedFitError):
        fitted(RELU, backend, EKFAC(), batches=stopping(batches, 2), resume=resume, save_seconds=0)
    before = resume.read_bytes()
    for options in ({"fisher": Empirical()}, {"rng": 5}):
        with pytest.raises(CheckpointError, match="delete the file to begin anew"):
            fitted(RELU, backend, EKFAC(), batches=batches, resume=resume, **options)
    with pytest.raises(CheckpointError, match=r"curvature BlockDiagonal.*got EKFAC"):
        fitted(RELU, backend, BlockDiagonal(), batches=batches, resume=resume)
    with pytest.raises(CheckpointError, match="at least 2 batches"):
        fitted(RELU, backend, EKFAC(), batches=batches[:1], resume=resume)
    with pytest.raises(CheckpointError, match=r"batch 1: .*sums\.npz: .* in the same order"):
        fitted(RELU, backend, EKFAC(), batches=batches[1:] + batches[:1], resume=resume)
    p, (x, t) = RELU.build(backend), batches[0]
    other, t = Objective(p.objective.network, SquaredError()), np.eye(3)[t]
    with pytest.raises(CheckpointError, match=r"objective .*SoftmaxCrossEntropy.*delete the file"):
        fit_curvature(other, p.params, [(x, t)], EKFAC(), resume=resume)
    assert resume.read_bytes() == before


def test_bad_input_is_refused_by_name(tmp_path):
    backend = Backend.of(np.zeros(1))
    p = RELU.build(backend)
    good = batches_of(RELU, backend, 2)
    x, t = good[1]
    bad_x = x.copy()
    bad_x[0, 0] = np.nan
    for batches, message in [
        ([], "at least one"),
        ([good[0], (bad_x, t)], r"batch 1: x: .*NaN"),
        ([good[0], x], r"batch 1: expected a tuple \(x, t\)"),
        ([(x, t[:1])], "batch 0"),
    ]:
        with pytest.raises(InputError, match=message):
            fit_curvature(p.objective, p.params, batches)
    with pytest.raises(InputError, match=r"fit_curvature batches: .* got None"):
        fit_curvature(p.objective, p.params, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="parameter 2: expected finite values"):
        fit_curvature(p.objective, (p.params[0], (), np.nan * p.params[2], *p.params[3:]), good)
    with pytest.raises(InputError, match="params: expected an array, got NoneType"):
        fit_curvature(p.objective, None, good)
    with pytest.raises(InputError, match="goes through them twice"):
        fit_curvature(p.objective, p.params, iter(good), EKFAC())
    with pytest.raises(InputError, match=r"paths: expected some of '0', '2' or '4', got '7'"):
        fit_curvature(p.objective, p.params, good, paths=["7"])
    coupled = Objective(Sequential(Dense(3, 3), BatchNorm(3)), SquaredError())
    with pytest.raises(InputError, match=r"objective\.evaluation"):
        fit_curvature(coupled, coupled.network.init(Rng(0), backend), good)


def test_fits_that_do_not_belong_together_are_refused(tmp_path):
    backend = Backend.of(np.zeros(1))
    fit, path = fitted(RELU, backend, BlockDiagonal()), tmp_path / "fit.npz"
    with pytest.raises(InputError, match="fit 2: expected curvature"):
        merge(fit, fitted(RELU, backend, EKFAC()))
    with pytest.raises(InputError, match="fit 2: expected Fisher type"):
        merge(fit, fitted(RELU, backend, BlockDiagonal(), fisher=Empirical()))
    with pytest.raises(InputError, match="fit 2: expected parameters"):
        merge(fit, fitted(CONV, backend, BlockDiagonal()))
    with pytest.raises(CurvatureError, match="basis of each fit's own"):
        merge(fitted(RELU, backend, EKFAC()), fitted(RELU, backend, EKFAC()))
    with pytest.raises(InputError, match="at least one fit"):
        merge()
    p = RELU.build(backend)
    elsewhere = fit_curvature(p.objective, trees.scale(2.0, p.params), batches_of(RELU, backend))
    with pytest.raises(InputError, match="different parameters"):
        merge(fit, elsewhere)
    assert merge(fit, elsewhere, params=p.params).params is p.params
    with pytest.raises(CurvatureError, match="couples parameters"):
        fitted(RELU, backend, FullMatrix()).select(["4"])
    with pytest.raises(InputError, match="expected some of '0', '2' or '4', got none"):
        fit.select([])
    fit.save(path)
    with pytest.raises(CheckpointError, match="expected moments of EKFAC"):
        FittedCurvature.load(path, EKFAC())

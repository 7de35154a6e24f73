"""Every curvature keeps the laws of one; curvatures with one mistake each are found out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, Problem
from numerics import host

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import (
    BlockDiagonal,
    Curvature,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    pi_frobenius,
    plain,
    reduce,
)
from kfac_np.curvature.base import Block
from kfac_np.errors import InputError
from kfac_np.fisher import Empirical, Exact, MonteCarlo
from kfac_np.matrices import DenseMatrix
from kfac_np.testing import CURVATURE_LAWS, check_block, check_curvature


def problem(name: str, backend: Backend, n: int = 60) -> Problem:
    """The case of that name with a larger batch, so that its matrices are regular."""
    case = next(c for c in NETWORKS if c.name == name)
    return replace(case, shape=(n, *case.shape[1:])).build(backend)


def arguments(p: Problem) -> tuple:
    return p.objective, p.params, p.x, p.t


# Each with whether `solve` is the inverse of the block plus damping · I itself.
BLOCKS: dict[str, tuple[Block, bool]] = {
    "kfac": (KFACBlock(), False),
    "kfac_frobenius": (KFACBlock(rule=pi_frobenius), False),
    "kfac_plain": (KFACBlock(rule=plain), False),
    "kfac_exactly_damped": (KFACBlock(exact_damping=True), True),
    "kfac_reduce": (KFACBlock(sharing=reduce), False),
    "diagonal": (DiagonalBlock(), True),
    "exact": (ExactBlock(), True),
}
# A regular matrix; a singular one (softmax); shared weights; a loss at every position.
CASES = ["tanh_squared", "relu_softmax", "mean_pooled", "positions_mixed_squared"]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in BLOCKS
        for case in CASES
        if not (name == "kfac_reduce" and case.startswith("positions"))  # not defined
    ],
)
def test_blocks(name: str, case: str, backend: Backend):
    block, exact = BLOCKS[name]
    check_block(block, *arguments(problem(case, backend)), exact_damping=exact)


@pytest.mark.parametrize("case", ["tanh_squared", "positions_mixed_squared"])
def test_the_full_matrix(case: str, backend: Backend):
    check_curvature(FullMatrix(), *arguments(problem(case, backend)), exact_damping=True)


@pytest.mark.parametrize("fisher", [MonteCarlo(2), Empirical()])
def test_other_fisher_types(fisher):
    p = problem("tanh_squared", get_backend("numpy", "float64"))
    for block, exact in BLOCKS.values():
        check_block(block, *arguments(p), fisher=fisher, exact_damping=exact)


def test_one_matrix_at_least_is_regular():
    # Or else the law about undamped inverses would have nothing to say.
    p = problem("tanh_squared", get_backend("numpy", "float64"))
    for curvature in [*(BlockDiagonal(block) for block, _ in BLOCKS.values()), FullMatrix()]:
        moments = curvature.estimate(p.evaluate(), Exact(), Rng(0))
        assert np.linalg.cond(host(curvature.matrix(moments, p.params).to_dense())) < 1e8


# -------------------------------------------------------------------------------------- mistakes

INNER = ExactBlock()


@dataclass(frozen=True)
class Wrapped(Block):
    """The exact block, handed on; a subclass makes one mistake."""

    def supports(self, statistics):
        return True

    def input_moments(self, s, scale):
        return {}

    def moments(self, s, scale):
        return INNER.moments(s, scale)

    def matrix(self, moments, shape):
        return INNER.matrix(moments, shape)

    def factorise(self, moments, damping, ladder, previous=None):
        return INNER.factorise(moments, damping, ladder, previous)

    def solve(self, factors, v):
        return INNER.solve(factors, v)

    def cost(self, shape):
        return INNER.cost(shape)


class MomentsInSingle(Wrapped):
    def moments(self, s, scale):
        return {"block": INNER.moments(s, scale)["block"].astype(np.float32)}


class SolvesFlat(Wrapped):
    def solve(self, factors, v):
        return INNER.solve(factors, v).ravel()


class KnowsNoCost(Wrapped):
    def cost(self, shape):
        return {"factors": "one"}


class WritesToTheMoments(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        block = moments["block"]
        block += damping * np.eye(len(block))
        return INNER.factorise(moments, 0.0, ladder, previous)


class DependsOnChance(Wrapped):
    def moments(self, s, scale):
        noise = np.random.default_rng().standard_normal()
        return {"block": INNER.moments(s, scale)["block"] * (1.0 + 1e-9 * noise)}


class RootOfEachChunk(Wrapped):
    """A square root does not add up over chunks."""

    def moments(self, s, scale):
        block = INNER.moments(s, scale)["block"]
        return {"block": block / (1.0 + np.trace(block)) ** 0.5}


class Sum(Wrapped):
    def moments(self, s, scale):
        return {"block": INNER.moments(s, scale)["block"] * scale.terms}


class IgnoresWeights(Wrapped):
    def moments(self, s, scale):
        block = INNER.moments(s, scale)["block"]
        return {"block": block if scale.weights is None else block / scale.weights[0]}


class AsymmetricMatrix(Wrapped):
    def matrix(self, moments, shape):
        return DenseMatrix(np.triu(moments["block"]), shape)


class NegativeMatrix(Wrapped):
    def matrix(self, moments, shape):
        return DenseMatrix(moments["block"] - np.eye(len(moments["block"])), shape)


class AsymmetricSolve(Wrapped):
    def solve(self, factors, v):
        return INNER.solve({"inverse": np.triu(factors["inverse"])}, v)


class NegativeSolve(Wrapped):
    def solve(self, factors, v):
        return -INNER.solve(factors, v)


class NormalisesItsSolution(Wrapped):
    def solve(self, factors, v):
        x = INNER.solve(factors, v)
        return x / np.linalg.norm(x)


class TwiceTheDamping(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        return INNER.factorise(moments, 2.0 * damping, ladder, previous)


class AlwaysDamped(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        return INNER.factorise(moments, max(damping, 1e-3), ladder, previous)


class SolvesTheSum(Wrapped):
    def solve_mean(self, factors, s, scale, gradient):
        return INNER.solve(factors, s.gradient())


class HalfTheInverse(Wrapped):
    def solve(self, factors, v):
        return 0.5 * INNER.solve(factors, v)


class NotesTooMuch(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        ladder.note("block", "more damping", damping)
        return INNER.factorise(moments, damping, ladder, previous)


class NaNFromZero(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        ladder.note("block", "more damping", damping)
        inverse = INNER.factorise(moments, damping, ladder, previous)["inverse"]
        return {"inverse": inverse if np.any(moments["block"]) else np.nan * inverse}


class SilentAboutZero(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        if not np.any(moments["block"]):
            return {"inverse": np.eye(len(moments["block"]))}
        return INNER.factorise(moments, damping, ladder, previous)


class UsesNaN(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        return INNER.factorise(
            {"block": np.nan_to_num(moments["block"])}, damping, ladder, previous
        )


class ForgetsThePrevious(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        if previous is not None and not np.all(np.isfinite(moments["block"])):
            ladder.note("block", "gave up", damping)
            return {"inverse": np.eye(len(moments["block"]))}
        return INNER.factorise(moments, damping, ladder, previous)


class SilentAboutNaN(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        if previous is not None and not np.all(np.isfinite(moments["block"])):
            return previous
        return INNER.factorise(moments, damping, ladder, previous)


class ZeroWithoutVectors(Wrapped):
    def moments(self, s, scale):
        if s.num_vectors == 0:
            size = s.a.shape[-1] * s.g.shape[-1]
            return {"block": np.zeros((size, size))}
        return INNER.moments(s, scale)


class NaNWithoutVectors(Wrapped):
    def moments(self, s, scale):
        if s.num_vectors == 0:
            size = s.a.shape[-1] * s.g.shape[-1]
            return {"block": np.full((size, size), np.nan)}
        return INNER.moments(s, scale)


class InvertsInDouble(Wrapped):
    def factorise(self, moments, damping, ladder, previous=None):
        wide = {"block": moments["block"].astype(np.float64)}
        return INNER.factorise(wide, damping, ladder, previous)


MISTAKES = [
    (MomentsInSingle(), "places", "is float32 on cpu, expected float64 on cpu"),
    (SolvesFlat(), "places", "solve has the shapes {'0': (16,)"),
    (KnowsNoCost(), "places", "cost of layer 0: expected factors, factorise and solve, got"),
    (WritesToTheMoments(), "purity", "factorise writes to one of its arguments"),
    (DependsOnChance(), "purity", "moments once and again differ at 0.block"),
    (RootOfEachChunk(), "chunks", "moments of single columns and of all columns differ by"),
    (Sum(), "means", "the mean of two halves' moments and the whole's differ by"),
    (IgnoresWeights(), "weights", "with weights of 2 and twice that without differ by"),
    (AsymmetricMatrix(), "matrix", "the matrix and its transpose differ by"),
    (NegativeMatrix(), "matrix", "its lowest eigenvalue is -"),
    (AsymmetricSolve(), "solve", "⟨w, C v⟩ = "),
    (NegativeSolve(), "solve", "⟨v, C v⟩ is not positive for a random v"),
    (NormalisesItsSolution(), "solve", "solve(w - 3 v) and solve(w) - 3 solve(v) differ by"),
    (SolvesTheSum(), "solve", "solve_mean and solve of the mean gradient differ by"),
    (TwiceTheDamping(), "solve", "(C + λ) solve(v) and v differ by"),
    (HalfTheInverse(), "undamped", "solve(C v) and v differ by"),
    (AlwaysDamped(), "undamped", "solve(C v) and v differ by"),
    (NotesTooMuch(), "undamped", "led to: layer 0: factor block is singular"),
    (NaNFromZero(), "degenerate", "solve is not finite when all moments are zero"),
    (SilentAboutZero(), "degenerate", "moments of zero have an inverse without damping"),
    (UsesNaN(), "degenerate", "moments of NaN are factorised without an error"),
    (SilentAboutNaN(), "degenerate", "no event tells that moments of NaN were not used"),
    (ForgetsThePrevious(), "degenerate", "factors after moments of NaN and the last good ones"),
    (ZeroWithoutVectors(), "without_vectors", "gives a matrix of zeros, and no error"),
    (NaNWithoutVectors(), "without_vectors", "the matrix of the input-only type is not finite"),
    (InvertsInDouble(), "single_precision", "factors: 0.inverse is float64, expected"),
]


def small(n: int = 60) -> tuple:
    return arguments(problem("tanh_squared", get_backend("numpy", "float64"), n))


def test_the_wrapped_block_is_right():
    check_block(Wrapped(), *small(), exact_damping=True)


@pytest.mark.parametrize(
    ("block", "law", "message"),
    MISTAKES,
    ids=lambda value: type(value).__name__ if isinstance(value, Block) else "",
)
def test_blocks_with_a_mistake(block: Block, law: str, message: str):
    with pytest.raises(AssertionError) as error:
        check_block(block, *small(), exact_damping=True, laws=[law])
    assert f"breaks the law {law!r} (" in str(error.value)
    assert message in str(error.value)


def test_every_law_of_a_curvature_has_been_broken():
    assert {law for _, law, _ in MISTAKES} == set(CURVATURE_LAWS)


def test_what_cannot_be_checked():
    objective, params, x, t = small()
    with pytest.raises(InputError, match="x: expected at least two examples, got 1"):
        check_block(KFACBlock(), objective, params, x[:1], t[:1])
    single = trees.tree_map(lambda p: p.astype(np.float32), params)
    with pytest.raises(InputError, match=r"params\.0: expected dtype float64, got float32"):
        check_curvature(FullMatrix(), objective, single, x, t)
    with pytest.raises(InputError, match=r"laws: expected some of places, .*; got gravity"):
        check_curvature(FullMatrix(), objective, params, x, t, laws=["gravity"])


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_seed(seed: int):
    curvature: Curvature = BlockDiagonal()
    check_curvature(curvature, *small(), seed=seed)


def test_singular_matrices_have_no_undamped_law():
    # Fewer examples than inputs: nothing to say, and nothing said.
    case: NetworkCase = next(c for c in NETWORKS if c.name == "relu_softmax")
    check_block(KFACBlock(), *arguments(case.build(get_backend("numpy", "float64"))))

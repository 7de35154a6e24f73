"""The block-tridiagonal inverse of a chain of layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, DeferredChecks, Rng
from kfac_np.curvature.base import Block, Curvature, Factors, Moments, Units
from kfac_np.curvature.blocks.by_kind import KFACBlock
from kfac_np.curvature.ladder import Ladder, LadderEvent, require_damping, require_regular
from kfac_np.curvature.networks.block_diagonal import BlockDiagonal
from kfac_np.curvature.networks.tridiagonal_chains import find_chains
from kfac_np.curvature.networks.tridiagonal_factors import (
    couple,
    pull,
    regression,
    solve_coupled,
)
from kfac_np.curvature.networks.tridiagonal_moments import (
    cross_derivative_moment,
    cross_input_moment,
    rows_each,
)
from kfac_np.curvature.owners import require_own
from kfac_np.errors import CurvatureError
from kfac_np.fisher import FisherType
from kfac_np.layers import Layer
from kfac_np.matrices import ChainMatrix, Link, Matrix
from kfac_np.objective import Evaluation
from kfac_np.statistics import AffineStatistics, Scale
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_flag

__all__ = ["BlockTridiagonal"]

_WITH_NEXT = ("A_next", "G_next")  # moments of a layer and the next


@final
@dataclass(frozen=True)
class BlockTridiagonal(Curvature):
    """F̂⁻¹ = Ξᵀ Λ Ξ, block-tridiagonal: K-FAC that knows how neighbouring layers depend.

    With F̃_ij = G_ij ⊗ A_ij, moments of layers i and j together, F̂ agrees with F̃ on the diagonal
    and neighbouring blocks, and its inverse is zero beyond them:

    - Ψ_i = Ψ^G ⊗ Ψ^A with Ψ^A = A_{i,i+1} A_{i+1}⁻¹, Ψ^G = G_{i,i+1} G_{i+1}⁻¹;
    - Ξ has ones, and -Ψ_i to the right of the diagonal;
    - Λ = diag(Σ_i⁻¹), Σ_i = F̃_ii - Ψ_i F̃_{i+1,i+1} Ψ_iᵀ, and F̃_ii for the last layer.

    Damping is added to every A_ii and G_ii by the block's rule, before Ψ and Σ are formed. No
    dense block is ever formed; Σ_i⁻¹ comes from two eigenproblems of the sizes of A_i and G_i
    (`kfac_np.matrices.difference_inverse`). With n for d_in + 1 and for d_out, and about equal
    layers, `factorise` takes some 22 n³ operations for each factor where K-FAC takes 2 n³, and
    `solve` 8 products with factors where K-FAC takes 2. Factors take about three times the memory.

    A chain is needed: layers each of which acts on what the last one made, so that it is the
    neighbours that depend on each other most. It is taken from the network of the evaluation, in
    `estimate`; a network that is not a chain is refused with the reason. A `Residual` with
    parameters is none, nor are `Tied` and `Recurrent`, whose weights act on what they made
    themselves (`find_chains`). Moments of neighbours need weights that are used at as many
    locations: with `expand` layers of equal T, with `reduce` all layers.

    Parameters
    ----------
    block : KFACBlock
        Says how locations are shared and how damping is split; exact damping is not defined here.
    split : bool
        Where the network is not a chain, or two neighbours have no moments together, leave the
        two uncoupled rather than refuse: their blocks are coupled diagonally only. Parameters
        that are not affine layers get what `block` has for them.
    chains : tuple of tuples of str, optional
        Paths that are coupled, each chain a run of parameters that follow one another; for
        networks made of layers that only the caller knows. Empty: nothing is coupled.

    References
    ----------
    Martens & Grosse 2015, arXiv:1503.05671, §4.3, §6.3 and appendix B.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.fisher import Exact
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> net = Sequential(Dense(2, 3), Tanh(), Dense(3, 1))
    >>> backend = get_backend("numpy", "float64")
    >>> x = Rng(1).normal((20, 2), backend)
    >>> e = Objective(net, SquaredError()).evaluate(net.init(Rng(0), backend), x, x[:, :1])
    >>> curvature = BlockTridiagonal()
    >>> moments = curvature.estimate(e, Exact(), Rng(0))
    >>> {path: list(m) for path, m in moments.items()}
    {'0': ['A', 'A_next', 'G', 'G_next'], '2': ['A', 'G']}
    >>> factors, events = curvature.factorise(moments, damping=0.1)
    >>> [w.shape for w in curvature.solve(factors, e.gradient()) if len(w)], events
    ([(3, 3), (1, 4)], [])
    """

    block: KFACBlock = KFACBlock()
    split: bool = False
    chains: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        require_flag("BlockTridiagonal split", self.split)
        if not isinstance(self.block, KFACBlock) or self.block.exact_damping:
            raise CurvatureError(
                "BlockTridiagonal block: expected a KFACBlock with factored damping, got "
                f"{self.block!r}"
            )
        if not (self.chains is None or _are_chains(self.chains)):
            raise CurvatureError(
                f"BlockTridiagonal chains: expected a tuple of tuples of paths, got {self.chains!r}"
            )

    def block_of(self, path: str) -> Block:
        return self.block

    def coupled(
        self, network: Layer, params: Tree, statistics: Mapping[str, Any]
    ) -> list[tuple[str, str]]:
        """Pairs of paths of this network that are coupled; `statistics` of any batch, by path."""
        return self._with_chains(network, params)._pairs(statistics, Scale(terms=1, examples=1))

    # ------------------------------------------------------------------------------- moments

    def parts(
        self, e: Evaluation, fisher: FisherType, rng: Rng
    ) -> tuple[dict[str, Moments], dict[str, Moments]]:
        """Moments on a batch, as of every curvature; here the chains are found, too."""
        resolved = self._with_chains(e.objective.network, e.params)
        return super(BlockTridiagonal, resolved).parts(e, fisher, rng)

    def _with_chains(self, network: Layer, params: Tree) -> BlockTridiagonal:
        if self.chains is not None:
            return self
        return replace(self, chains=find_chains(network, params, split=self.split))

    def input_moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        found = dict(trees.items(statistics))
        moments = BlockDiagonal(self.block).input_moments(statistics, scale)
        for path, following in self._pairs(found, scale):
            moments[path]["A_next"] = cross_input_moment(
                found[path], found[following], scale, self.block.sharing
            )
        return moments

    def moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        found = dict(trees.items(statistics))
        moments = BlockDiagonal(self.block).moments(statistics, scale)
        for path, following in self._pairs(found, scale):
            if found[path].num_vectors == 0:
                raise CurvatureError(
                    f"layer {path}: BlockTridiagonal expected a Fisher type with vectors, "
                    "got InputOnly"
                )
            moments[path]["G_next"] = cross_derivative_moment(
                found[path], found[following], scale, self.block.sharing
            )
        return moments

    def _pairs(self, found: Mapping[str, Any], scale: Scale) -> list[tuple[str, str]]:
        """Neighbours that are coupled; without `chains` all that follow one another."""
        order = list(itertools.pairwise(found))
        chains = (tuple(found),) if self.chains is None else self.chains
        wanted = [pair for chain in chains for pair in itertools.pairwise(chain)]
        if strangers := [pair for pair in wanted if pair not in order]:
            raise CurvatureError(
                f"chains: expected parameters that follow one another among {', '.join(found)}, "
                f"got {' and '.join(strangers[0])}"
            )
        return [pair for pair in wanted if self._may_couple(*pair, found, scale)]

    def _may_couple(self, path: str, following: str, found: Mapping[str, Any], s: Scale) -> bool:
        for name in (path, following):
            if not isinstance(found[name], AffineStatistics):
                if self.split:
                    return False
                raise CurvatureError(
                    f"layer {name}: BlockTridiagonal expected an affine layer with one matrix, got "
                    f"{type(found[name]).__name__}; split=True leaves it uncoupled"
                )
        each = [rows_each(found[name], s, self.block.sharing) for name in (path, following)]
        if each[0] != each[1] and not self.split:
            raise CurvatureError(
                f"layers {path} and {following}: expected weights used at equally many locations, "
                f"got {each[0]} and {each[1]}, which have no moments together; split=True leaves "
                "the two uncoupled"
            )
        return each[0] == each[1]

    # ---------------------------------------------------------------- matrix and factors

    def require_own(self, moments: Mapping[str, Moments]) -> None:
        paths, coupled = list(moments), {"A", "G", *_WITH_NEXT}
        chains = (tuple(paths),) if self.chains is None else self.chains
        pairs = {path for chain in chains for path, _ in itertools.pairwise(chain)}

        def owns(path: str, m: Mapping[str, Array]) -> bool:
            if set(m) == coupled:
                return path != paths[-1]
            return self.block.owns(dict(m)) and (self.split or path not in pairs)

        require_own(type(self).__name__, moments, owns)

    def matrix(self, moments: dict[str, Moments], params: Tree) -> ChainMatrix:
        links = {
            path: Link(
                following,
                regression(moments[path]["A_next"], moments[following]["A"]),
                regression(moments[path]["G_next"], moments[following]["G"]),
            )
            for path, following in _links(moments, "A_next")
        }
        return ChainMatrix(self._blocks(moments, params), links, params)

    def block_traces(
        self, moments: dict[str, Moments], params: Tree, units: Mapping[str, Units] | None = None
    ) -> dict[str, Array]:
        self.require_own(moments)
        return BlockDiagonal(self.block).block_traces(_uncoupled(moments), params, units)

    def diagonal(self, moments: dict[str, Moments], params: Tree) -> Tree:
        blocks = self._blocks(moments, params)
        return trees.map_named(lambda path, _: blocks[path].diagonal(), params)

    def _blocks(self, moments: dict[str, Moments], params: Tree) -> dict[str, Matrix]:
        self.require_own(moments)
        own = _uncoupled(moments)
        return {path: self.block.matrix(own[path], p.shape) for path, p in trees.items(params)}

    def units(self, moments: dict[str, Moments], params: Tree) -> dict[str, Units]:
        self.require_own(moments)
        return BlockDiagonal(self.block).units(_uncoupled(moments), params)

    def mixes_units(self, moments: dict[str, Moments]) -> bool:
        return BlockDiagonal(self.block).mixes_units(_uncoupled(moments))

    def in_units(
        self, moments: dict[str, Moments], units: Mapping[str, Units]
    ) -> dict[str, Moments]:
        self.require_own(moments)
        found = BlockDiagonal(self.block).in_units(_uncoupled(moments), units)
        for path, following in _links(moments, "A_next"):
            a, g = moments[path]["A_next"], moments[path]["G_next"]
            if path in units:
                s, x = units[path]
                a, g = a * x.T, g * s
            if following in units:
                s, x = units[following]
                a, g = a * x, g * s.T
            found[path] |= {"A_next": a, "G_next": g}
        return found

    def factorise(
        self,
        moments: dict[str, Moments],
        damping: float,
        previous: dict[str, Factors] | None = None,
    ) -> tuple[dict[str, Factors], list[LadderEvent]]:
        require_damping(damping)
        self.require_own(moments)
        checks = (
            DeferredChecks()
        )  # as in `factorise_each`, but one for all layers: they are coupled
        found = self._factorise(moments, damping, previous or {}, checks)
        if not all(DeferredChecks.all_hold([checks])):
            found = self._factorise(moments, damping, previous or {}, None)
        require_regular(damping, found[1])
        return found

    def _factorise(
        self,
        moments: dict[str, Moments],
        damping: float,
        before: dict[str, Factors],
        checks: DeferredChecks | None,
    ) -> tuple[dict[str, Factors], list[LadderEvent]]:
        factors: dict[str, Factors] = {}
        events: list[LadderEvent] = []
        for path, own in _uncoupled(moments).items():
            ladder = Ladder(path, events, checks)
            factors[path] = self.block.factorise(own, damping, ladder, before.get(path))
        kept = {event.layer for event in events if event.rung == "kept the last inverse"}
        for path, following in _links(moments, "A_next"):
            stale = not kept.isdisjoint((path, following))
            m, ladder = moments[path], Ladder(path, events, checks)
            factors[path] = factors[path] | couple(
                (m["A_next"], m["G_next"]),
                (factors[path], factors[following]),
                damping,
                ladder,
                before.get(path),
                stale=stale,
            )
        return factors, events

    def solve(self, factors: dict[str, Factors], v: Tree) -> Tree:
        given = dict(trees.items(v))
        own = {path: factors[path] for path in given}
        out: dict[str, Array] = {}
        following = dict(_links(own, "Psi_A"))
        for path, x in given.items():
            if path in following:  # Λ Ξ v
                x = x - own[path]["Psi_G"] @ given[following[path]] @ own[path]["Psi_A"].T
                out[path] = solve_coupled(own[path], x)
            else:
                out[path] = self.block.solve(own[path], x)
        scaled = dict(out)
        for path, after in following.items():  # Ξᵀ
            out[after] = out[after] - pull(own[path], scaled[path])
        return trees.map_named(lambda path, _: out[path], v)


def _are_chains(chains: object) -> bool:
    return isinstance(chains, tuple) and all(
        isinstance(chain, tuple) and all(isinstance(path, str) for path in chain)
        for chain in chains
    )


def _uncoupled(moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """The moments of each layer by itself."""
    return {
        path: {name: x for name, x in m.items() if name not in _WITH_NEXT}
        for path, m in moments.items()
    }


def _links(named: Mapping[str, Mapping[str, Array]], key: str) -> Iterable[tuple[str, str]]:
    """Paths whose arrays have `key`, each with the path after it."""
    return [(a, b) for a, b in itertools.pairwise(named) if key in named[a]]

"""K-FAC's eigenbasis with eigenvalues of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Rng, Scalar, are_finite, array_namespace, clip
from kfac_np.curvature.base import Block, Curvature, Factors, Moments, accumulate
from kfac_np.curvature.block_diagonal import BlockDiagonal
from kfac_np.curvature.damping import marquardt, pi_trace
from kfac_np.curvature.diagonal import require_vectors
from kfac_np.curvature.ekfac_basis import eigenvectors, first_basis, next_bases
from kfac_np.curvature.ekfac_moments import resolve, rotated_squares
from kfac_np.curvature.kfac import KFACBlock
from kfac_np.curvature.ladder import Ladder, LadderEvent, factorise_each, require_damping
from kfac_np.curvature.owners import require_own
from kfac_np.curvature.sharing import Sharing, expand
from kfac_np.curvature.units import UnitBlock, scales
from kfac_np.errors import CurvatureError
from kfac_np.fisher import FisherType
from kfac_np.layers import Layer
from kfac_np.matrices import (
    BlockDiagonalMatrix,
    KroneckerSpectral,
    Matrix,
    ScaledMatrix,
    StackedMatrix,
)
from kfac_np.objective import Evaluation
from kfac_np.statistics import ElementwiseStatistics, Scale
from kfac_np.trees import Tree
from kfac_np.validation import (
    plain_fields,
    require_callable,
    require_flag,
    require_instance,
    require_integer,
)

__all__ = ["EKFAC"]


@final
@dataclass(frozen=True)
class EKFAC(Curvature):
    """F ≈ (U_G ⊗ U_A) diag(S) (U_G ⊗ U_A)ᵀ: K-FAC's eigenvectors, and the curvature along them.

    A = U_A Λ_A U_Aᵀ and G = U_G Λ_G U_Gᵀ are the factors of `KFACBlock`. Their eigenvalues
    λ^G_i λ^A_j are replaced by second moments of the derivatives of examples in this basis,

        s_ij = (1/M) Σ_{n,k} [(U_Gᵀ U_nk U_A)_ij]²,   U_nk = Σ_t g_knt ā_ntᵀ,

    the diagonal of the exact block there: no other eigenvalues are closer to the exact block in
    Frobenius norm, those of K-FAC among them, and the trace is that of the exact block, whatever
    the sharing of weights. The damping is exact, S + damping.

    Even undamped, steps are not invariant to affine maps of a layer's inputs and outputs, as those
    of K-FAC are, but to rotations only: what is diagonal in the eigenbasis of A is not so in that
    of D A D. In other units EKFAC is another approximation.

    The basis is kept for `basis_interval` estimates, through which S is averaged; then it is
    renewed from the averages of A and G so far, and S begins anew. Moments of a parameter are A, G,
    U_A, U_G, S and the age of the basis: all that training needs to go on. Embeddings have no U_A,
    it is the identity; grouped layers have a basis for each group; scale and shift have no
    Kronecker product, but the block that `elementwise` makes.

    Where a factor has an eigenvalue several times, its eigenvectors are a matter of choice, and so
    is S if the curvature along them is not the same. By `reduce` that is so wherever the averaged
    inputs have fewer directions than the inputs, and it is no fault of the estimate: any choice has
    the properties above.

    The first estimate carries vectors back twice: for A and G, and for S in their eigenbasis. An
    estimate costs two products with U more than that of K-FAC, and with T > 1 a derivative for
    each example.

    Parameters
    ----------
    sharing : callable
        `expand` or `reduce`: of which A and G the basis is taken.
    elementwise : Block
        For scale and shift, as in `KFACBlock`.
    basis_interval : int
        Estimates for which a basis is used; 1 takes a new one each time.
    unit_free : bool
        Take the eigenvectors of A and G in units of their own diagonals, and damp there. The
        eigenvectors of A are others when features are rescaled, and so are eigenvalues S that are
        measured along them; those of D_A⁻¹ᐟ² A D_A⁻¹ᐟ², D_A = diag A, are the same. U_A is
        D_A⁻¹ᐟ² times these, U_G likewise, F ≈ (U_G ⊗ U_A)⁻ᵀ diag(S) (U_G ⊗ U_A)⁻¹, and the damping
        is damping · diag G ⊗ diag A, G and A as they were when the basis was made (of embeddings, A
        as it is).

    References
    ----------
    George et al. 2018, arXiv:1806.03884, §3 and algorithm 1.

    Examples
    --------
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.curvature import BlockDiagonal, ExactBlock
    >>> from kfac_np.fisher import Exact
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> net, backend = Sequential(Dense(2, 3), Tanh(), Dense(3, 2)), get_backend("numpy", "float64")
    >>> x = Rng(1).normal((20, 2), backend)
    >>> e = Objective(net, SquaredError()).evaluate(net.init(Rng(0), backend), x, x)
    >>> def error(curvature):
    ...     exact = BlockDiagonal(ExactBlock())
    ...     found, expected = (
    ...         c.matrix(c.estimate(e, Exact(), Rng(0)), e.params).to_dense()
    ...         for c in (curvature, exact))
    ...     return ((found - expected) ** 2).sum() ** 0.5
    >>> bool(error(EKFAC()) < 0.8 * error(BlockDiagonal()))
    True
    """

    sharing: Sharing = expand
    elementwise: Block = UnitBlock()
    basis_interval: int = 20
    unit_free: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        require_callable("EKFAC sharing", self.sharing)
        require_instance("EKFAC elementwise", self.elementwise, Block)
        require_integer("EKFAC basis_interval", self.basis_interval)
        require_flag("EKFAC unit_free", self.unit_free)

    @property
    def _blocks(self) -> BlockDiagonal:
        """A, G and blocks without a product; factors in an eigenbasis are applied by it, too."""
        rule = marquardt if self.unit_free else pi_trace
        return BlockDiagonal(KFACBlock(self.sharing, rule, True, self.elementwise))

    @property
    def separable(self) -> bool:
        return True

    def block_of(self, path: str) -> Block:
        return self._blocks.block

    def costs(self, network: Layer, params: Tree, statistics: Tree) -> dict[str, Mapping[str, Any]]:
        """What each parameter gets and what it costs; "factorise" counts a new basis."""
        kinds = {path: type(s) for path, s in trees.items(statistics)}
        out = super().costs(network, params, statistics)
        for path, p in trees.items(params):
            if issubclass(kinds[path], ElementwiseStatistics):
                out[path] = {**out[path], "block": type(self.elementwise).__name__}
            else:
                shape = "×".join(map(str, p.shape))
                factors = f"{out[path]['factors']}, S {shape}"
                out[path] = {**out[path], "block": "EKFAC", "factors": factors}
        return out

    # ------------------------------------------------------------------------------- moments

    def estimate(
        self,
        e: Evaluation,
        fisher: FisherType,
        rng: Rng,
        old: dict[str, Moments] | None = None,
    ) -> dict[str, Moments]:
        """Moments on a batch, S in the basis of `old`, which is renewed first if it is its time.

        Raises
        ------
        CurvatureError
            A parameter, Fisher type or sharing that is not defined here; `old` is of another
            curvature.
        FactorizationError
            The first A or G is finite, and has no eigendecomposition.
        """
        if old is not None:
            self.require_own(old)
            bases = next_bases(old, self.basis_interval, unit_free=self.unit_free)

            def all_moments(statistics: Tree, scale: Scale) -> dict[str, Moments]:
                return _joined(self.moments(statistics, scale), _squares(bases, statistics, scale))

            found = accumulate(e, fisher, rng, self.input_moments, all_moments)
        else:
            rng = rng.spawn()  # of which both passes take the same vectors
            plain = super().estimate(e, fisher, rng.child())
            bases = {
                path: first_basis(path, m, unit_free=self.unit_free)
                for path, m in plain.items()
                if "G" in m
            }
            again = partial(_squares, bases)
            found = _joined(plain, accumulate(e, fisher, rng.child(), lambda *_: {}, again))
        return {
            path: _with_basis(m, bases[path]) if path in bases else m for path, m in found.items()
        }

    def input_moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        for path, s in trees.items(statistics):
            if not self._blocks.block.supports(s):
                raise CurvatureError(
                    f"layer {path}: EKFAC does not support {type(s).__name__}; expected an affine "
                    "layer, an embedding, or scale and shift"
                )
            require_vectors(s, f"layer {path}: EKFAC")
        return self._blocks.input_moments(statistics, scale)

    def moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        return self._blocks.moments(statistics, scale)

    def mix(
        self, old: dict[str, Moments], new: dict[str, Moments], epsilon: float
    ) -> dict[str, Moments]:
        """Moving averages of A and G, of S as long as the basis is the same, of all other moments.

        S is a plain mean at first, as all moments are at the beginning of training: its weight
        ε is at most 1 - 1/k at the k-th estimate in a basis. `new` was estimated given `old`.
        """
        self.require_own(old)
        averaged = {
            path: {name: x for name, x in m.items() if name not in ("U_A", "U_G", "age")}
            for path, m in new.items()
        }
        before = {path: {name: old[path][name] for name in m} for path, m in averaged.items()}
        mixed = trees.combine(epsilon, before, 1.0 - epsilon, averaged)
        for path, m in new.items():
            if "age" in m:
                xp, s = array_namespace(m["S"]), m["S"]
                age = xp.reshape(m["age"], (1,) * s.ndim)
                weight = clip(age / (age + 1.0), high=epsilon)
                s = weight * old[path]["S"] + (1.0 - weight) * s
                mixed[path] = {**m, **mixed[path], "S": s}
        return mixed

    def weighted(
        self, old: dict[str, Moments], new: dict[str, Moments], weights: Mapping[str, Scalar]
    ) -> dict[str, Moments]:
        """`new` itself: what is measured in one basis does not mix with what is in another."""
        return new

    # ---------------------------------------------------------------- matrix and factors

    def require_own(self, moments: Mapping[str, Moments]) -> None:
        names = {"A", "G", "U_A", "U_G", "S", "age"}

        def owns(_: str, m: Mapping[str, Array]) -> bool:
            return {*m, "U_A"} == names or self.elementwise.owns(dict(m))

        require_own(type(self).__name__, moments, owns)

    def matrix(self, moments: dict[str, Moments], params: Tree) -> BlockDiagonalMatrix:
        self.require_own(moments)

        def leaf(path: str, parameter: Array) -> Matrix:
            m = moments[path]
            if "S" not in m:
                return self._blocks.block.matrix(m, parameter.shape)
            if m["S"].ndim == 2:
                return self._matrix(m["S"], m.get("U_A"), m["U_G"])
            three = m["S"], m["U_A"], m["U_G"]
            groups = range(m["S"].shape[0])
            return StackedMatrix(tuple(self._matrix(*(x[i, ...] for x in three)) for i in groups))

        return BlockDiagonalMatrix(trees.map_named(leaf, params))

    def _matrix(self, s: Array, u_a: Array | None, u_g: Array) -> Matrix:
        if not self.unit_free:
            return KroneckerSpectral(s, u_a, u_g)
        u_g, units = _orthogonal(u_g)
        units = units[:, None] * array_namespace(s).ones_like(s)
        if u_a is not None:
            u_a, units_a = _orthogonal(u_a)
            units = units * units_a[None, :]
        return ScaledMatrix(KroneckerSpectral(s, u_a, u_g), units)

    def factorise(
        self,
        moments: dict[str, Moments],
        damping: float,
        previous: dict[str, Factors] | None = None,
    ) -> tuple[dict[str, Factors], list[LadderEvent]]:
        """1 / (S + damping): nothing is decomposed here.

        A basis that could not be renewed when it was due is an event, "kept the last basis".
        """
        require_damping(damping)
        self.require_own(moments)

        def of_layer(path: str, ladder: Ladder) -> Factors:
            factorise = self._factorise if "S" in moments[path] else self._blocks.block.factorise
            before = None if previous is None else previous.get(path)
            return factorise(moments[path], damping, ladder, before)

        return factorise_each(moments, of_layer, damping)

    def _factorise(
        self, m: Moments, damping: float, ladder: Ladder, previous: Factors | None
    ) -> Factors:
        basis = eigenvectors(m)
        if not ladder.holds(are_finite(m["S"], *basis.values())):
            kept: Factors = ladder.keep("S", previous, damping)
            return kept
        if not ladder.holds(m["age"] < self.basis_interval):
            ladder.note("A, G", "kept the last basis", damping)
        if self.unit_free and m["A"].ndim == 1:
            s = m["S"] + damping * scales(m["A"])[None, :]
            return {**basis, "inverse_values": ladder.reciprocal("S", s, 0.0)}
        if m["S"].ndim == 2:
            return {**basis, "inverse_values": ladder.reciprocal("S", m["S"], damping)}
        inverses = []
        for i in range(m["S"].shape[0]):
            group = ladder.within(f"[group {i}]")
            inverses.append(group.reciprocal("S", m["S"][i, ...], damping))
        return {**basis, "inverse_values": array_namespace(*inverses).stack(inverses)}

    def solve(self, factors: dict[str, Factors], v: Tree) -> Tree:
        return self._blocks.solve(factors, v)


def _squares(bases: Mapping[str, Moments], statistics: Tree, scale: Scale) -> dict[str, Moments]:
    """S of every parameter that has a basis."""
    return {
        path: {"S": rotated_squares(s, scale, bases[path].get("U_A"), bases[path]["U_G"])}
        for path, s in trees.items(statistics)
        if path in bases
    }


def _orthogonal(basis: Array) -> tuple[Array, Array]:
    """U and the units d of a basis D⁻¹ U: the rows of U have length 1."""
    xp = array_namespace(basis)
    units = 1.0 / xp.sqrt(xp.sum(basis**2, axis=-1))
    return units[:, None] * basis, units


def _joined(first: Mapping[str, Moments], second: Mapping[str, Moments]) -> dict[str, Moments]:
    return {path: {**m, **second.get(path, {})} for path, m in first.items()}


def _with_basis(m: Moments, basis: Moments) -> Moments:
    s = resolve(m["S"], basis.get("absent"))
    return {**m, "S": s, **{name: x for name, x in basis.items() if name != "absent"}}

"""K-FAC's eigenbasis with eigenvalues of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import final

from kfac_np import trees
from kfac_np.backend import Array, Rng, Scalar, array_namespace, clip
from kfac_np.curvature.base import (
    Block,
    Curvature,
    Factors,
    Moments,
    SecondPass,
    Units,
    accumulate,
    joined,
)
from kfac_np.curvature.blocks.by_kind import ByKind, KFACBlock, block_of_each_kind
from kfac_np.curvature.blocks.diagonal import require_vectors
from kfac_np.curvature.blocks.kronecker import KroneckerBlock
from kfac_np.curvature.blocks.scale_shift import UnitBlock
from kfac_np.curvature.blocks.spectral import SpectralBlock, units_of
from kfac_np.curvature.ladder import Ladder, LadderEvent, factorise_each, require_damping
from kfac_np.curvature.networks.block_diagonal import BlockDiagonal
from kfac_np.curvature.networks.ekfac_basis import BASIS, first_basis, next_bases
from kfac_np.curvature.networks.ekfac_moments import resolve, rotated_squares
from kfac_np.curvature.owners import require_own
from kfac_np.curvature.sharing import Sharing, expand
from kfac_np.errors import CurvatureError
from kfac_np.fisher import FisherType
from kfac_np.matrices import BlockDiagonalMatrix
from kfac_np.objective import Evaluation
from kfac_np.statistics import Scale, Statistics
from kfac_np.trees import Tree
from kfac_np.validation import (
    plain_fields,
    require_callable,
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
    of D A D. In other units EKFAC is another approximation. An optimiser that damps in the layers'
    own `units` has the eigenbasis of A and G in these, too (`in_own_units` of `estimate`); then
    rescaled features, hidden units and outputs change nothing of a damped step. Units are kept as
    long as the basis. Moments estimated without them get a basis from `in_units`, and the
    eigenvalues of K-FAC until the next estimate.

    The basis is kept for `basis_interval` estimates, through which S is averaged; then it is
    renewed from the averages of A and G so far, and S begins anew. Moments of a parameter are A, G,
    U_A, U_G, S and the age of the basis: all that training needs to go on. Embeddings have no U_A,
    it is the identity; grouped layers have a basis for each group; scale and shift have no
    Kronecker product, but the block that `elementwise` makes.

    Where a factor has an eigenvalue several times, its eigenvectors are a matter of choice, and so
    is S if the curvature along them is not the same. By `reduce` that is so wherever the averaged
    inputs have fewer directions than the inputs, and it is no fault of the estimate: any choice has
    the properties above.

    The first estimate backpropagates twice: for A and G, and for S in their eigenbasis. An
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

    def __post_init__(self) -> None:
        plain_fields(self)
        require_callable("EKFAC sharing", self.sharing)
        require_instance("EKFAC elementwise", self.elementwise, Block)
        require_integer("EKFAC basis_interval", self.basis_interval)

    def __repr__(self) -> str:
        # Without the address of a function: a saved fit is recognised by it in another process.
        shown = {f.name: repr(getattr(self, f.name)) for f in fields(self)}
        shown["sharing"] = getattr(self.sharing, "__name__", shown["sharing"])
        return f"EKFAC({', '.join(f'{name}={value}' for name, value in shown.items())})"

    @cached_property
    def _block(self) -> ByKind:
        return _EKFACBlock(self.sharing, self.elementwise)

    @cached_property
    def _blocks(self) -> BlockDiagonal:
        return BlockDiagonal(self._block)

    @property
    def separable(self) -> bool:
        return True

    def block_of(self, path: str) -> ByKind:
        return self._block

    # ------------------------------------------------------------------------------- moments

    def estimate(
        self,
        e: Evaluation,
        fisher: FisherType,
        rng: Rng,
        old: dict[str, Moments] | None = None,
        *,
        in_own_units: bool = False,
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

        def units(moments: dict[str, Moments]) -> dict[str, Units]:
            return self._new_units(moments, e.params) if in_own_units else {}

        if old is not None:
            self.require_own(old)
            factors = _with_factors(old)
            bases = next_bases(factors, self.basis_interval, units(factors))

            def all_moments(statistics: Tree, scale: Scale) -> dict[str, Moments]:
                return joined(self.moments(statistics, scale), _squares(bases, statistics, scale))

            found = joined(*accumulate(e, fisher, rng, self.input_moments, all_moments))
        else:
            rng = rng.spawn()  # of which both passes take the same vectors
            plain = super().estimate(e, fisher, rng.child())
            factors = _with_factors(plain)
            own = units(factors)
            bases = {path: first_basis(path, m, own.get(path)) for path, m in factors.items()}
            again = partial(_squares, bases)
            found = joined(plain, accumulate(e, fisher, rng.child(), _nothing, again)[1])
        return _in_bases(found, bases)

    @property
    def additive(self) -> bool:
        return False

    def second_pass(self, moments: dict[str, Moments], like: Array) -> SecondPass:
        bases = {
            path: _in_precision(first_basis(path, m, None), like)
            for path, m in _with_factors(moments).items()
        }

        def estimate(e: Evaluation, fisher: FisherType, rng: Rng) -> dict[str, Moments]:
            return accumulate(e, fisher, rng, _nothing, partial(_squares, bases))[1]

        return SecondPass(estimate, lambda first, s: _in_bases(joined(first, s), bases))

    def input_moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        for path, s in trees.items(statistics):
            if not self._block.supports(s):
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
            path: {name: x for name, x in m.items() if name not in (*BASIS, "age")}
            for path, m in new.items()
        }
        before = {path: {name: old[path][name] for name in m} for path, m in averaged.items()}
        mixed = trees.combine(epsilon, before, 1.0 - epsilon, averaged)
        for path, m in _with_factors(new).items():
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

    # ---------------------------------------------------------------------------------- units

    def _new_units(self, moments: dict[str, Moments], params: Tree) -> dict[str, Units]:
        """Units of the parameters that have factors, from A as it is now."""
        plain = {path: {"A": m["A"], "G": m["G"]} for path, m in moments.items()}
        of = {path: p for path, p in trees.items(params) if path in plain}
        kfac = KFACBlock(self.sharing)
        found = {path: kfac.units(m, of[path]) for path, m in plain.items()}
        return {path: u for path, u in found.items() if u is not None}

    def units(self, moments: dict[str, Moments], params: Tree) -> dict[str, Units]:
        self.require_own(moments)
        return self._blocks.units(moments, params)

    def mixes_units(self, moments: dict[str, Moments]) -> bool:
        return self._blocks.mixes_units(moments)

    def in_units(
        self, moments: dict[str, Moments], units: Mapping[str, Units]
    ) -> dict[str, Moments]:
        self.require_own(moments)
        return self._blocks.in_units(moments, units)

    # ---------------------------------------------------------------- matrix and factors

    def require_own(self, moments: Mapping[str, Moments]) -> None:
        require_own(type(self).__name__, moments, lambda _, m: self._block.owns(dict(m)))

    def matrix(self, moments: dict[str, Moments], params: Tree) -> BlockDiagonalMatrix:
        self.require_own(moments)
        return self._blocks.matrix(moments, params)

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

        ages = {path: m["age"] for path, m in _with_factors(moments).items()}

        def of_layer(path: str, ladder: Ladder) -> Factors:
            if path in ages and not ladder.holds(ages[path] < self.basis_interval):
                ladder.note("A, G", "kept the last basis", damping)
            before = None if previous is None else previous.get(path)
            return self._block.factorise(moments[path], damping, ladder, before)

        return factorise_each(moments, of_layer, damping)

    def solve(self, factors: dict[str, Factors], v: Tree) -> Tree:
        return self._blocks.solve(factors, v)


@final
@dataclass(frozen=True)
class _EKFACBlock(ByKind):
    sharing: Sharing
    elementwise: Block

    @cached_property
    def kinds(self) -> Mapping[type, Block]:
        product = SpectralBlock(KroneckerBlock(self.sharing))
        return block_of_each_kind(product, self.elementwise)


def _squares(bases: Mapping[str, Moments], statistics: Tree, scale: Scale) -> dict[str, Moments]:
    """S of every parameter that has a basis."""
    return {
        path: {"S": _squares_of(s, scale, bases[path])}
        for path, s in trees.items(statistics)
        if path in bases
    }


def _squares_of(s: Statistics, scale: Scale, basis: Moments) -> Array:
    """S of one parameter, in units if the basis is in some: along the columns of diag(u) U."""
    u_a, u_g, units = basis.get("U_A"), basis["U_G"], units_of(basis)
    if units is None:
        return rotated_squares(s, scale, u_a, u_g)
    out, into = units
    if u_a is None:
        return rotated_squares(s, scale, None, out * u_g) * into**2
    return rotated_squares(s, scale, array_namespace(u_a).matrix_transpose(into) * u_a, out * u_g)


def _with_factors(moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """Those of the parameters that have factors A and G, and not a block of another kind."""
    return {path: m for path, m in moments.items() if "G" in m}


def _nothing(statistics: Tree, scale: Scale) -> dict[str, Moments]:
    return {}


def _in_precision(basis: Moments, like: Array) -> Moments:
    """Statistics are rotated in their own precision, however exactly the basis is known."""
    xp = array_namespace(like)
    return {name: xp.astype(x, like.dtype) if name[0] == "U" else x for name, x in basis.items()}


def _in_bases(found: dict[str, Moments], bases: Mapping[str, Moments]) -> dict[str, Moments]:
    return {path: _with_basis(m, bases[path]) if path in bases else m for path, m in found.items()}


def _with_basis(m: Moments, basis: Moments) -> Moments:
    s = resolve(m["S"], basis.get("absent"))
    return {**m, "S": s, **{name: x for name, x in basis.items() if name != "absent"}}

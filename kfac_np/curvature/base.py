"""What a curvature approximation is: of one parameter (a block), and of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import (
    Array,
    Rng,
    Scalar,
    factor_of,
    is_asynchronous,
    quiet,
    quiet_methods,
)
from kfac_np.curvature.ladder import Ladder, LadderEvent
from kfac_np.fisher import FisherType
from kfac_np.matrices import Matrix, TreeMatrix
from kfac_np.objective import Evaluation
from kfac_np.statistics import AffineStatistics, Scale, Statistics
from kfac_np.trees import Tree
from kfac_np.validation import require_instance

__all__ = ["Block", "Curvature", "Factors", "Moments", "SecondPass", "Units"]

Moments = dict[str, Array]
"""Named second moments of one parameter: means, which may be averaged over batches or devices."""
Units = tuple[Array, ...]
"""Arrays whose product, broadcast, has the shape of a parameter: what each entry is measured in."""
Factors = dict[str, Array]
"""Named arrays that `solve` needs, made from moments by `factorise`."""


class Block(ABC):
    """An approximation of one parameter's block of the Fisher, from its statistics.

    A block holds settings only; moments and factors are passed in and out. To add one, write
    `input_moments`, `moments`, `matrix`, `factorise` and `solve`, and give it to
    `BlockDiagonal`.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.curvature import KFACBlock
    >>> from kfac_np.curvature.ladder import Ladder
    >>> from kfac_np.statistics import AffineStatistics, Scale
    >>> s, scale = AffineStatistics(np.ones((4, 1, 1)), np.ones((4, 1, 1))), Scale(4, 4)
    >>> block = KFACBlock()
    >>> m = {**block.input_moments(s, scale), **block.moments(s, scale)}
    >>> factors = block.factorise(m, 0.0, Ladder("0"))
    >>> block.solve(factors, np.asarray([[3.0]]))
    array([[3.]])
    """

    @abstractmethod
    def supports(self, statistics: object) -> bool:
        """Tell whether the block is defined for such statistics."""

    @abstractmethod
    def input_moments(self, s: Any, scale: Scale) -> Moments:
        """Moments that depend on the inputs only: formed once, however many vectors follow."""

    @abstractmethod
    def moments(self, s: Any, scale: Scale) -> Moments:
        """Moments that sum over the K vectors: those of several chunks are added."""

    def owns(self, moments: Moments) -> bool:
        """Tell whether these are moments as the block makes them, from their names.

        Override it, so that moments of another curvature are refused by name.
        """
        return True

    @abstractmethod
    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> Matrix:
        """The undamped block, acting on arrays of the parameter's shape."""

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        """Units u of a parameter that make it a pure number, from its own scales.

        In such units, θ = u θ̃, a multiple of I damps relative changes: rescaled features, hidden
        units and outputs change nothing of the damped update. A Kronecker product knows how large
        the inputs and outputs of its layer are, and has them of mean square 1. Other blocks know
        their diagonal, which becomes 1: λI is Marquardt's λ diag F in the units that the parameter
        comes in. None where a block knows of no scales; its parameter is damped in the latter.
        """
        return None

    def mixes_units(self, moments: Moments) -> Scalar | bool:
        """Tell whether inputs of the layer have units of their own, as raw features do.

        Their scales differ by orders of magnitude, from each other or from 1. False where a block
        does not know them.
        """
        return False

    def in_units(self, moments: Moments, units: Units) -> Moments:
        """Moments of diag(u) F diag(u), the block of θ̃."""
        raise NotImplementedError

    def trace(self, moments: Moments, shape: tuple[int, ...], units: Units | None) -> Array:
        """That of `matrix`, or of diag(u) F diag(u). Override it where it is had for less."""
        m = moments if units is None else self.in_units(moments, units)
        return self.matrix(m, shape).trace()

    @abstractmethod
    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        """Prepare `solve` for the block plus damping · I (damping is λ, not √λ)."""

    def solves(self, factors: Factors) -> bool:
        """Tell whether these are factors as the block makes them, from their names."""
        return True

    @abstractmethod
    def solve(self, factors: Factors, v: Array) -> Array:
        """(block + damping · I)⁻¹ v, as closely as the damping rule defines it."""

    def solve_mean(self, factors: Factors, s: Any, scale: Scale, gradient: Array) -> Array:
        """`solve` of the gradient that is the mean of `s`.

        A block that needs less work with the statistics than with their mean overrides this.
        """
        return self.solve(factors, gradient)

    def cost(
        self, shape: tuple[int, ...], kind: type[Statistics] = AffineStatistics
    ) -> Mapping[str, Any]:
        """What `describe` shows of a parameter of `shape`; override it if you like to tell.

        `kind` says which statistics it has. Keys: "factors" (text), "factorise" and "solve"
        (floating-point operations). Without them `describe` shows the shapes of the moments.
        """
        return {}


@final
@dataclass(frozen=True)
class SecondPass:
    """What a curvature measures in a second pass over a data set.

    Attributes
    ----------
    estimate : callable
        (evaluation, Fisher type, Rng) → moments of vectors on a batch, as those of
        `Curvature.parts`.
    joined : callable
        (moments of the first pass, means of `estimate` over all batches) → moments.
    """

    estimate: Callable[[Evaluation, FisherType, Rng], dict[str, Moments]]
    joined: Callable[[dict[str, Moments], dict[str, Moments]], dict[str, Moments]]


class Curvature(ABC):
    """An approximation of a network's Fisher matrix, acting on trees of parameters.

    `moments` are means over the loss terms and may be averaged over mini-batches and devices;
    `factorise` is expensive and is done now and then; `solve` is cheap and done every step.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import Rng
    >>> from kfac_np.curvature import BlockDiagonal, KFACBlock
    >>> from kfac_np.fisher import Exact
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> curvature = BlockDiagonal(KFACBlock())
    >>> moments = curvature.estimate(e, Exact(), Rng(0))
    >>> factors, events = curvature.factorise(moments, damping=0.0)
    >>> curvature.solve(factors, e.gradient())
    array([[2.]])
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        quiet_methods(cls, "estimate", "parts", "mix", "matrix", "block_traces")
        quiet_methods(cls, "factorise", "solve", "solve_mean")

    @quiet
    def estimate(
        self,
        e: Evaluation,
        fisher: FisherType,
        rng: Rng,
        old: dict[str, Moments] | None = None,
        *,
        in_own_units: bool = False,
    ) -> dict[str, Moments]:
        """Moments on a batch: each chunk of vectors is backpropagated, and its moments added.

        Parameters
        ----------
        e : Evaluation
        fisher : FisherType
        rng : Rng
            For a Fisher type that samples. Each estimate draws on: give the same `Rng.child`
            again for the same targets.
        old : dict, optional
            The moments so far, for a curvature that measures along directions it has from them
            (`EKFAC`). They are not averaged here: see `mix`.
        in_own_units : bool
            Whether they are going to be factorised in `units`, for a curvature that measures along
            directions, which are others then.

        Returns
        -------
        dict
            Path of a parameter ("0", "2.1") to its named moments.
        """
        return joined(*self.parts(e, fisher, rng))

    @quiet
    def parts(
        self, e: Evaluation, fisher: FisherType, rng: Rng
    ) -> tuple[dict[str, Moments], dict[str, Moments]]:
        """Moments on a batch, apart: those of inputs, and those of vectors.

        A moment of inputs is a mean over rows by the weights of their examples, divided by the sum
        of these. A moment of vectors is divided by M. Over several batches either is averaged by
        what it was divided by.
        """
        return accumulate(e, fisher, rng, self.input_moments, self.moments)

    @quiet
    def mix(
        self, old: dict[str, Moments], new: dict[str, Moments], epsilon: float
    ) -> dict[str, Moments]:
        """ε old + (1 - ε) new: a step of the moving average over batches.

        Parameters
        ----------
        old, new : dict
            As `estimate` gives them; `new` was given `old`.
        epsilon : float
            Weight of the old moments, in [0, 1).

        Raises
        ------
        CurvatureError
            Moments of another curvature; so for all that takes moments.
        """
        self.require_own(old)
        return trees.combine(epsilon, old, 1.0 - epsilon, new)

    def weighted(
        self, old: dict[str, Moments], new: dict[str, Moments], weights: Mapping[str, Scalar]
    ) -> dict[str, Moments]:
        """w new + (1 - w) old for each parameter: moments of a batch that counts for less.

        Parameters
        ----------
        old, new : dict
            As for `mix`.
        weights : mapping of path to Scalar
            In (0, 1]; 1 where there is none.
        """
        self.require_own(old)

        def blend(path: str, m: Moments) -> Moments:
            w = weights.get(path)
            if w is None or (not is_asynchronous(w) and float(w) == 1.0):
                return m
            return {
                name: x + (1.0 - factor_of(w, x)) * (old[path][name] - x) for name, x in m.items()
            }

        return {path: blend(path, m) for path, m in new.items()}

    # -------------------------------------------------------------------- whole data sets

    @property
    def additive(self) -> bool:
        """Whether moments of two data sets, averaged, are those of both together."""
        return True

    def second_pass(self, moments: dict[str, Moments], like: Array) -> SecondPass | None:
        """What is measured once `parts` of all batches are known; None if nothing is.

        Parameters
        ----------
        moments : dict
            Means of `parts` over all batches, in double precision.
        like : Array
            A parameter, for the precision of statistics.
        """
        return None

    @property
    def separable(self) -> bool:
        """Whether layers know nothing of each other.

        Then `factorise` may be given some of them only, the others at another time, and an
        optimiser may multiply what `solve` gives for each (`kfac_np.optimizers.Balance`). A
        block-diagonal curvature of your own says True.
        """
        return False

    def paths(self, params: Tree) -> tuple[str, ...]:
        """What moments are named by: the path of each parameter."""
        return tuple(path for path, _ in trees.items(params))

    def require_own(self, moments: Mapping[str, Moments]) -> None:
        """Raise `CurvatureError` if the moments are another curvature's, as their names tell.

        Override it, and call it in `factorise` and `matrix`.
        """
        return

    @abstractmethod
    def input_moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        """Moments that depend on the inputs only: formed once, however many vectors follow."""

    @abstractmethod
    def moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        """Moments that sum over the vectors backpropagated: those of several chunks are added."""

    @abstractmethod
    def matrix(self, moments: dict[str, Moments], params: Tree) -> TreeMatrix:
        """The undamped approximation as a matrix that acts on trees like `params`."""

    @quiet
    def block_traces(
        self, moments: dict[str, Moments], params: Tree, units: Mapping[str, Units] | None = None
    ) -> dict[str, Array]:
        """Those of `matrix`, in units: the trace of each parameter's block; empty without blocks.

        Override it where they are had for less than the matrix.
        """
        return self.matrix(self.in_units(moments, units or {}), params).block_traces()

    def units(self, moments: dict[str, Moments], params: Tree) -> dict[str, Units]:
        """`Block.units` of the parameters that have some, by path.

        None by default: `factorise` damps by a multiple of I.
        """
        return {}

    def mixes_units(self, moments: dict[str, Moments]) -> bool:
        """Tell whether there is a layer whose inputs have units of their own."""
        return False

    def in_units(
        self, moments: dict[str, Moments], units: Mapping[str, Units]
    ) -> dict[str, Moments]:
        """Moments of diag(u) F diag(u); parameters without units stay as they are.

        Where `solve` is given factors of these and u ∘ v, u times the result is
        (F + damping · diag(u)⁻²)⁻¹ v.
        """
        return moments

    def diagonal(self, moments: dict[str, Moments], params: Tree) -> Tree:
        """The diagonal of `matrix`, as a tree like `params`.

        Override it where it is had for less than the matrix.
        """
        return self.matrix(moments, params).diagonal()

    @abstractmethod
    def factorise(
        self,
        moments: dict[str, Moments],
        damping: float,
        previous: dict[str, Factors] | None = None,
    ) -> tuple[dict[str, Factors], list[LadderEvent]]:
        """Prepare `solve` for the approximation plus damping · I.

        With a damping, however small, it always succeeds: where it does not suffice the ladder
        adds to it, and an event says so. Without, `solve` is the inverse of the approximation
        itself, and there has to be one, as for `kfac_np.matrices.Matrix.solve`.

        Parameters
        ----------
        moments : dict
            As `estimate` gives them, or a moving average of such.
        damping : float
            λ, the multiple of the identity (not its root).
        previous : dict, optional
            The last good factors, kept where everything else fails.

        Returns
        -------
        factors : dict
        events : list of LadderEvent
            The factorisations that did not succeed as asked.

        Raises
        ------
        InputError
            Damping is negative or not finite.
        FactorizationError
            A moment is not finite and there are no previous factors; damping is 0 and the
            approximation singular up to rounding.
        CurvatureError
            Moments of another curvature.
        """

    @abstractmethod
    def solve(self, factors: dict[str, Factors], v: Tree) -> Tree:
        """(F + damping · I)⁻¹ v, as closely as the approximation defines it."""

    def solve_mean(
        self, factors: dict[str, Factors], statistics: Tree, scale: Scale, gradient: Tree
    ) -> Tree:
        """`solve` of the gradient that is the mean of `statistics`.

        The same numbers up to rounding. With fewer examples than units, a curvature can need less
        work with the statistics than with their mean, and overrides this.
        """
        return self.solve(factors, gradient)

    @abstractmethod
    def block_of(self, path: str) -> Block:
        """The block that covers the parameter at `path`."""


def accumulate(
    e: Evaluation,
    fisher: FisherType,
    rng: Rng,
    once: Callable[[Tree, Scale], dict[str, Moments]],
    each: Callable[[Tree, Scale], dict[str, Moments]],
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """What `once` makes of the first chunk's statistics, and the sum of what `each` makes of all.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.fisher import Exact
    >>> from kfac_np.layers import Identity
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> z = np.zeros((5, 3))
    >>> e = Objective(Identity(), SquaredError()).evaluate((), z, z)
    >>> counting = lambda statistics, scale: {"": {"chunks": np.ones(1)}}
    >>> accumulate(e, Exact(budget_bytes=1), Rng(0), lambda *_: {}, counting)
    ({}, {'': {'chunks': array([3.])}})
    """
    require_instance("estimate: e", e, Evaluation)
    require_instance("estimate: fisher", fisher, FisherType)
    first: dict[str, Moments] = {}
    total: dict[str, Moments] = {}
    for statistics in fisher.statistics(e, rng):
        if not total:
            first = once(statistics, e.scale)
            total = each(statistics, e.scale)
        else:
            total = trees.axpy(1.0, each(statistics, e.scale), total)
    return first, total


def joined(first: Mapping[str, Moments], second: Mapping[str, Moments]) -> dict[str, Moments]:
    """All moments of each parameter of either.

    Examples
    --------
    >>> joined({"0": {"A": 1}, "1": {}}, {"0": {"G": 2}})
    {'0': {'A': 1, 'G': 2}, '1': {}}
    """
    paths = dict.fromkeys((*first, *second))
    return {path: {**first.get(path, {}), **second.get(path, {})} for path in paths}

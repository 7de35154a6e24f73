"""Fisher types: which vectors are backpropagated, and nothing else.

Every curvature is C = (1/M) Σ_n J_nᵀ B_n J_n with B_n = Σ_k v_nk v_nkᵀ; a Fisher type says what
the K vectors v are (Dangel et al. 2025, arXiv:2507.05127).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Rng, array_namespace
from kfac_np.objective import Evaluation
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_integer

__all__ = ["Empirical", "Exact", "FisherType", "InputOnly", "MonteCarlo"]


class FisherType(ABC):
    """Yields, in chunks, the vectors v that define B_n = Σ_k v_nk v_nkᵀ.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import Rng
    >>> from kfac_np.layers import Identity
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> z = np.zeros((5, 3))
    >>> e = Objective(Identity(), SquaredError()).evaluate((), z, z)
    >>> [v.shape for fisher in (Exact(), InputOnly()) for v in fisher.vectors(e, Rng(0))]
    [(3, 5, 3), (0, 5, 3)]
    """

    @abstractmethod
    def vectors(self, e: Evaluation, rng: Rng) -> Iterator[Array]:
        """Yield arrays (K, N, [S,] C), K summed over all chunks; √weights are included.

        Where v is sampled, each call draws on from `rng` (or the children of its `Rng.spawn`).
        """

    def statistics(self, e: Evaluation, rng: Rng) -> Iterator[Tree]:
        """Carry each chunk back: trees of statistics, whose second moments add up."""
        for v in self.vectors(e, rng):
            yield e.backward(v)


@final
@dataclass(frozen=True)
class Exact(FisherType):
    """The exact Fisher ("type-2"), which for these losses is the generalised Gauss-Newton.

    v_n· are the columns of S_n, S_n S_nᵀ = ∂²ℓ/∂z², so K = C; with a loss term at each of S
    positions every term is backpropagated on its own, K = S · C; with batch statistics, which
    couple the examples, every term of the batch, K = N · S · C.

    Parameters
    ----------
    budget_bytes : int
        The columns are backpropagated in chunks, of as many columns as keep the derivatives that
        one backward pass holds within this budget (at least one column a chunk).

    References
    ----------
    Dangel et al. 2025, arXiv:2507.05127 (type-2).

    Examples
    --------
    >>> Exact(budget_bytes=2**20)
    Exact(budget_bytes=1048576)
    """

    budget_bytes: int = 2**28

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("Exact budget_bytes", self.budget_bytes)

    def vectors(self, e: Evaluation, rng: Rng) -> Iterator[Array]:
        loss, z = e.objective.loss, e.outputs
        columns, positions = loss.num_columns(z), e.scale.positions
        shape = e.inputs.shape[1:]
        size = max(1, e.objective.network.backward_size(shape), math.prod(z.shape[1:]))
        item = array_namespace(z).finfo(z.dtype).bits // 8
        at_once = max(1, self.budget_bytes // (z.shape[0] * size * item))
        chunk = max(1, at_once // positions)
        for start in range(0, columns, chunk):
            v = loss.fisher_factor(z, start, min(start + chunk, columns))
            yield from _separate_terms(e.weighted(v, 0.5), at_once, e.scale.coupled)


@final
@dataclass(frozen=True)
class MonteCarlo(FisherType):
    """The Monte-Carlo Fisher ("type-1"): v_nk = ∂ℓ(z_n, t̃_nk)/∂z / √K, t̃ ~ p(· | z_n).

    Unbiased: its mean over samples is the exact Fisher.

    Parameters
    ----------
    samples : int
        K, targets drawn for each loss term.

    References
    ----------
    Martens & Grosse 2015, §5 (targets sampled from the model's own distribution).

    Examples
    --------
    >>> MonteCarlo(samples=2)
    MonteCarlo(samples=2)
    """

    samples: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("MonteCarlo samples", self.samples)

    def vectors(self, e: Evaluation, rng: Rng) -> Iterator[Array]:
        loss, z, streams = e.objective.loss, e.outputs, Rng.of(rng).spawn()
        for k in range(self.samples):
            v = loss.sample_gradient(streams.child(k), z)
            v = v * self.samples**-0.5 if self.samples > 1 else v
            yield e.weighted(v, 0.5)[None, ...]


@final
@dataclass(frozen=True)
class Empirical(FisherType):
    """The empirical Fisher: v_n = ∂ℓ(z_n, t_n)/∂z with the training targets; K = 1.

    Not an approximation of the Fisher in general; offered because it is used and compared.

    References
    ----------
    Kunstner, Balles & Hennig 2019, arXiv:1905.12558.

    Examples
    --------
    >>> Empirical()
    Empirical()
    """

    def vectors(self, e: Evaluation, rng: Rng) -> Iterator[Array]:
        v = e.objective.loss.gradient(e.outputs, e.targets)
        v = e.weighted(v, 0.5)[None, ...]
        yield from _separate_terms(v, e.scale.positions, e.scale.coupled)


@final
@dataclass(frozen=True)
class InputOnly(FisherType):
    """No vectors at all (K = 0): Kronecker factors with G = I.

    References
    ----------
    Benzing 2022, "Gradient Descent on Neurons and its Link to Approximate Second-Order
    Optimization", arXiv:2201.12250 (FOOF).

    Examples
    --------
    >>> InputOnly()
    InputOnly()
    """

    def vectors(self, e: Evaluation, rng: Rng) -> Iterator[Array]:
        xp, z = array_namespace(e.outputs), e.outputs
        yield xp.zeros((0, *z.shape), dtype=z.dtype, device=z.device)


def _separate_terms(v: Array, at_once: int, coupled: bool) -> Iterator[Array]:
    """Give each of S positions vectors of its own: (K, N, S, C) to chunks of (S·K, N, S, C).

    Terms of one example must not be backpropagated together: their derivatives would be added
    before they are squared. Where examples are coupled the same holds for all terms of the batch,
    and each gets vectors of its own, N·S·K in all.
    """
    if v.ndim == 3 and not coupled:  # (K, N, C): one term an example
        yield v
        return
    xp = array_namespace(v)
    shape, (k, n, c) = v.shape, (v.shape[0], v.shape[1], v.shape[-1])
    flat = xp.reshape(v, (k, 1, -1, c)) if coupled else xp.reshape(v, (k, n, -1, c))
    total = flat.shape[2]
    step = max(1, at_once // k)
    for start in range(0, total, step):
        stop = min(start + step, total)
        out = xp.zeros((stop - start, *flat.shape), dtype=v.dtype, device=v.device)
        for s in range(start, stop):
            out[s - start, :, :, s, :] = flat[:, :, s, :]
        yield xp.reshape(out, ((stop - start) * k, *shape[1:]))

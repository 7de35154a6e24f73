"""Multipliers of the layers' proposals, measured along each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Rng, Scalar, array_namespace, select
from kfac_np.errors import ConfigError
from kfac_np.fisher import FisherType, InputOnly, MonteCarlo
from kfac_np.optimizers.quadratic_model import LocalModel
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_in, require_integer

__all__ = ["Balance"]


@final
@dataclass(frozen=True)
class Balance:
    """Multipliers m_i of the layers' proposals: Δ_i = -m_i F̂_i(γ)⁻¹ ∇h_i.

    The blocks F̂_i are all off, but not by the same factor, and with one α for all, the layer whose
    block claims far too little curvature sets the pace of the others. What a block claims can be
    checked along its own proposal: if only layer i moved, the best step would be

        α_i = -∇h_iᵀ Δ_i / b_i,   b_i = Δ_iᵀ (F_ii + (λ + η) I) Δ_i,

    which is 1 / m_i where the block is right and γ² = λ + η. So in every step that `interval`
    divides, from step `first` on,

        m_i ← m_i (α_i / ᾱ)^(1 - memory),   ᾱ = Σ_i -∇h_iᵀ Δ_i / Σ_i b_i,

    and all m_i are divided by their mean: only their ratios matter, since α follows. The first
    measurement counts whole, with exponent 1. Where α_i is not a positive number, α_i / ᾱ is
    taken as 1, and i is left out of both sums. "Layer" stands for a parameter with a block of its
    own, of which attention has four.

    On the autoencoders of docs/results.md, with batches that grow, the first layers get a third
    to a half and the last ones two or three times the mean; a fifth fewer steps are needed, and
    more later. Balanced from the first step on, plateaus last longer: hence `first`. On a
    classifier with small batches nothing is gained, and without a floor for λ the layers that are
    let go fit the noise of each batch.

    It is not from a paper. Only curvatures that are `separable` are balanced: where layers are
    coupled (`BlockTridiagonal`, `FullMatrix`, ...) there are no proposals of single ones.

    Parameters
    ----------
    interval : int
    first : int
    memory : float
        In [0, 1): the multipliers are geometric moving averages of what is measured.
    limit : float
        α_i / ᾱ is kept between its inverse and it, since few examples tell little.
    fisher : FisherType
        The vectors v that F_ii is formed from, v_nᵀ J_n,i Δ_i squared and averaged over the
        quadratic model's examples: a backward pass, and a product a layer.

    Examples
    --------
    >>> Balance().due(15), Balance().due(20)
    (False, True)
    >>> Balance().apply({"0": 0.5, "1": 1.5}, (2.0, 2.0))
    (1.0, 3.0)
    """

    interval: int = 5
    first: int = 20
    memory: float = 0.5
    limit: float = 16.0
    fisher: FisherType = MonteCarlo(1)

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("Balance interval", self.interval)
        require_integer("Balance first", self.first)
        require_in("Balance memory", self.memory, "[0, 1)")
        require_in("Balance limit", self.limit, "(1, 1e6]")
        if not isinstance(self.fisher, FisherType) or isinstance(self.fisher, InputOnly):
            raise ConfigError(
                f"Balance fisher: expected MonteCarlo, Exact or Empirical, got {self.fisher!r}"
            )

    def due(self, k: int) -> bool:
        """Tell whether step k measures."""
        return k >= self.first and k % self.interval == 0

    def apply(self, multipliers: dict[str, Scalar] | None, proposal: Tree) -> Tree:
        """Multiply each layer's part of a proposal; without multipliers it is the proposal."""
        if multipliers is None:
            return proposal
        return trees.map_named(lambda path, v: trees.scale(multipliers[path], v), proposal)

    def update(
        self, multipliers: dict[str, Scalar] | None, model: LocalModel, proposal: Tree, rng: Rng
    ) -> dict[str, Scalar]:
        """The multipliers after a measurement along `proposal`, which the old ones were applied to.

        Parameters
        ----------
        multipliers : dict or None
            Path of a parameter to m_i; None stands for 1 everywhere.
        model : LocalModel
        proposal : tree
        rng : Rng
            For a Fisher type that samples.
        """
        bends, descents, good = {}, {}, {}
        for path, (bend, slope) in model.of_each_layer(proposal, self.fisher, rng).items():
            finite = array_namespace(bend).isfinite(bend - slope)
            good[path] = (bend > 0.0) & (slope < 0.0) & finite
            bends[path] = select(good[path], bend, 1.0)
            descents[path] = select(good[path], -slope, 0.0)
        together = sum(select(good[path], bends[path], 0.0) for path in good)
        descent = sum(descents.values())
        old: dict[str, Any] = multipliers or dict.fromkeys(good, 1.0)
        power = 1.0 if multipliers is None else 1.0 - self.memory
        new = {}
        for path in good:
            ratio = descents[path] / bends[path] * together / select(good[path], descent, 1.0)
            ratio = select(ratio < self.limit, ratio, self.limit)
            ratio = select(ratio > 1.0 / self.limit, ratio, 1.0 / self.limit)
            new[path] = old[path] * select(good[path], ratio, 1.0) ** power
        mean = sum(new.values()) / len(new)
        return {path: m / mean for path, m in new.items()}

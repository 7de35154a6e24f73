"""A network and a loss, evaluated on a batch: the one place where means are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import (
    Array,
    DeferredChecks,
    Rng,
    Scalar,
    array_namespace,
    quiet,
    require_array,
    require_finite,
    require_float,
    require_same_place,
    scalar,
)
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import Layer
from kfac_np.losses import Loss
from kfac_np.statistics import Scale
from kfac_np.trees import Tree
from kfac_np.validation import is_integer

__all__ = ["Evaluation", "Objective"]


@final
@dataclass(frozen=True)
class Objective:
    """L(θ) = (1/M) Σ_n w_n ℓ(z_n, t_n), z = network(θ, x).

    M is the number of loss terms: N, or N · S when each of S positions has its own target. The
    weights w (default 1) are not normalised: L divides by M, not by Σ w.

    Parameters
    ----------
    network : Layer
    loss : Loss

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> objective = Objective(Dense(1, 1, bias=False), SquaredError())
    >>> W = np.asarray([[2.0]])
    >>> e = objective.evaluate(W, np.ones((4, 1)), np.zeros((4, 1)))
    >>> e.value, e.gradient()
    (2.0, array([[2.]]))
    """

    network: Layer
    loss: Loss

    def __post_init__(self) -> None:
        for name, value, kind in (("network", self.network, Layer), ("loss", self.loss, Loss)):
            if not isinstance(value, kind):
                raise InputError(f"Objective: expected a {kind.__name__} as {name}, got {value!r}")

    @quiet
    def evaluate(
        self,
        params: Tree,
        x: Array,
        t: Array,
        weights: Array | None = None,
        rng: Rng | None = None,
        checks: DeferredChecks | None = None,
    ) -> Evaluation:
        """Check the batch, run the network forward, and hold everything that follows from it.

        Parameters
        ----------
        params : tree of Array
        x : Array, shape (N, ...)
        t : Array
            Targets, as the loss takes them.
        weights : Array, shape (N,), optional
            Non-negative weights of the examples.
        rng : Rng, optional
            Random numbers for layers that draw some in training (Dropout); without it they draw
            none. Each evaluation draws on: give the same `Rng.child` again for the same function.
        checks : DeferredChecks, optional
            Takes the conditions on values that an asynchronous device cannot tell yet, for the
            caller to wait for; without it they are completed here.

        Raises
        ------
        InputError
            Wrong shape, dtype or device, an empty batch, or non-finite values.
        """
        stream = None if rng is None else Rng.of(rng).spawn()  # kept, to draw the same again
        z, cache = self._forward(params, x, t, weights, stream, checks)
        scale = _scale(z, weights, self.network.couples_examples)
        return Evaluation(self, params, x, cache, z, t, scale, stream)

    def value(
        self,
        params: Tree,
        x: Array,
        t: Array,
        weights: Array | None = None,
        rng: Rng | None = None,
    ) -> float:
        """L(θ) as a number, with the checks of `evaluate` but without keeping anything.

        Examples
        --------
        >>> import numpy as np
        >>> from kfac_np.layers import Identity
        >>> from kfac_np.losses import SquaredError
        >>> Objective(Identity(), SquaredError()).value((), np.ones((2, 2)), np.zeros((2, 2)))
        1.0
        """
        return float(self.mean_value(params, x, t, weights, rng))

    @quiet
    def mean_value(
        self,
        params: Tree,
        x: Array,
        t: Array,
        weights: Array | None = None,
        rng: Rng | None = None,
        checks: DeferredChecks | None = None,
    ) -> Scalar:
        """`value`, which stays on an asynchronous device; `checks` as in `evaluate`."""
        stream = None if rng is None else Rng.of(rng).spawn()
        z, _ = self._forward(params, x, t, weights, stream, checks)
        scale = _scale(z, weights, self.network.couples_examples)
        return _mean(_values(self.loss, z, t, scale), scale)

    @quiet
    def evaluation(self, params: Tree, x: Array) -> Objective:
        """The objective as it is used after training.

        Batch statistics become those of x, the training inputs or a good part of them; for
        networks without such, the objective itself.

        Examples
        --------
        >>> import numpy as np
        >>> from kfac_np.layers import Identity
        >>> from kfac_np.losses import SquaredError
        >>> objective = Objective(Identity(), SquaredError())
        >>> objective.evaluation((), np.ones((2, 2))) is objective
        True
        """
        if not self.network.couples_examples:
            return self
        self.require_inputs(params, x)
        return Objective(self.network.evaluation(params, x)[0], self.loss)

    def require_inputs(self, params: Tree, x: Array) -> None:
        """Raise `InputError` unless the network takes these inputs with these parameters."""
        checks = DeferredChecks()
        self._check_inputs(params, x, None, checks)
        checks.wait()

    def _forward(
        self,
        params: Tree,
        x: Array,
        t: Array,
        weights: Array | None,
        rng: Rng | None,
        checks: DeferredChecks | None,
    ) -> tuple[Array, Tree]:
        """Outputs and cache, of arguments that are fit for it."""
        own = DeferredChecks() if checks is None else checks
        self._check_inputs(params, x, weights, own)
        z, cache = self.network.forward(params, x, None if rng is None else rng.child())
        if z.ndim < 2:
            raise ShapeError(f"network: expected outputs (N, ..., C), got shape {z.shape}")
        self.loss.check(z, t, own)
        if checks is None:
            own.wait()
        return z, cache

    def _check_inputs(
        self, params: Tree, x: Array, weights: Array | None, checks: DeferredChecks
    ) -> None:
        require_array("x", x)
        named = [(f"parameter {path}".strip(), p) for path, p in trees.items(params)]
        for name, p in named:
            require_float(name, p)
        if named:
            require_same_place("x", x, named[0][1])
        for name, p in named[1:]:
            require_same_place(name, p, named[0][1], "first parameters")
        if x.ndim < 2:
            raise ShapeError(f"x: expected shape (N, ...) with at least two axes, got {x.shape}")
        if x.shape[0] == 0:
            raise ShapeError(f"x: expected at least one example, got shape {x.shape}")
        if 0 in x.shape:
            raise ShapeError(f"x: expected no axis to be empty, got shape {tuple(x.shape)}")
        self.network.output_shape(x.shape[1:])
        self.network.check_inputs(x, checks)
        if weights is None:
            return
        require_float("weights", weights)
        like = (named[0][1], "parameters") if named else (x, "inputs")  # inputs may be integers
        require_same_place("weights", weights, *like)
        if weights.shape != x.shape[:1]:
            raise ShapeError(f"weights: expected shape {x.shape[:1]}, got {weights.shape}")
        require_finite("weights", weights, checks)
        xp = array_namespace(weights)
        good = (xp.min(weights) >= 0.0) & (xp.max(weights) > 0.0)
        checks.require(good, lambda: InputError("weights: expected values >= 0, not all 0"))


@final
@dataclass(frozen=True, eq=False)
class Evaluation:
    """An objective at a point, on a batch: outputs, and all that backward passes can tell.

    Made by `Objective.evaluate`. Linear operations at the point (`jvp`, `backward`) may be
    called any number of times.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1))
    ... )
    >>> e.take(1).value, e.jvp(np.asarray([[1.0]]))[:, 0].tolist()
    (2.0, [1.0, 3.0])
    """

    objective: Objective
    params: Tree
    inputs: Array
    cache: Tree
    outputs: Array
    targets: Array
    scale: Scale
    rng: Rng | None = None

    @property
    def value(self) -> float:
        """L(θ) on the batch: the mean over terms."""
        return float(self.mean_value)

    @cached_property
    @quiet
    def mean_value(self) -> Scalar:
        """`value`, which stays on an asynchronous device."""
        return _mean(self._values, self.scale)

    @cached_property
    def _values(self) -> Array:
        return _values(self.objective.loss, self.outputs, self.targets, self.scale)

    @cached_property
    def standard_error(self) -> Scalar:
        """Of L(θ) as an estimate from these examples: σ/√N; infinite for a single one."""
        n = self.scale.examples
        if n == 1:
            return scalar(math.inf, self.outputs)
        xp = array_namespace(self._values)
        means = self._values
        if self.scale.positions > 1:
            means = xp.mean(xp.reshape(means, (n, -1)), axis=1)
        unit = xp.max(xp.abs(means))  # whose square may overflow
        unit = xp.where(unit > 0.0, unit, xp.ones_like(unit))
        return unit * xp.sqrt(xp.var(means / unit, correction=1.0)) / math.sqrt(n)

    def above_bound(self, value: Scalar) -> Scalar:
        """How far a value is above the least that L(θ) on the batch can have; maybe infinite."""
        bound, weights = self.objective.loss.lower_bound, self.scale.weights
        if weights is None or not bound:
            return value - bound
        return value - bound * scalar(array_namespace(weights).mean(weights))

    def take(self, n: int) -> Evaluation:
        """The evaluation of the first `n` examples alone (means over these).

        What was forwarded is cut; a network whose examples influence each other is forwarded
        again, since their batch statistics are others.
        """
        if not is_integer(n) or not 1 <= n <= self.scale.examples:
            raise InputError(f"n: expected 1..{self.scale.examples} examples, got {n!r}")
        if n == self.scale.examples:
            return self
        rows = slice(0, n)
        weights = self.scale.weights
        x, t = self.inputs[rows, ...], self.targets[rows, ...]
        if self.scale.coupled:
            w = None if weights is None else weights[rows]
            rng = None if self.rng is None else self.rng.child()  # the same masks
            return self.objective.evaluate(self.params, x, t, w, rng)
        return Evaluation(
            self.objective,
            self.params,
            x,
            self.objective.network.take(self.cache, rows),
            self.outputs[rows, ...],
            t,
            Scale(n * self.scale.positions, n, None if weights is None else weights[rows]),
            self.rng,
        )

    @quiet
    def backward(self, vectors: Array) -> Tree:
        """Statistics for vectors of the outputs' shape, or (K, *outputs.shape); not divided."""
        z = self.outputs
        if vectors.shape not in (z.shape, (*vectors.shape[:1], *z.shape)):
            raise ShapeError(
                f"vectors: expected shape {tuple(z.shape)}, after a K axis or without one, "
                f"got {tuple(vectors.shape)}"
            )
        network = self.objective.network
        return network.backward(self.params, self.cache, vectors, wrt_input=False)[1]

    @quiet
    def jvp(self, dparams: Tree) -> Array:
        """J_n v for each term: how the outputs move along `dparams`, shape of the outputs."""
        self.require_tangent(dparams)
        dz = self.objective.network.jvp(self.params, self.cache, None, dparams)
        return array_namespace(self.outputs).zeros_like(self.outputs) if dz is None else dz

    def require_tangent(self, dparams: Tree) -> None:
        """Raise `ShapeError` unless `dparams` has the structure and shapes of the parameters."""
        trees.map_named(_require_same_shape, self.params, dparams)

    @quiet
    def output_gradient(self) -> Array:
        """w_n ∂ℓ/∂z for each term, shape of the outputs; not divided by M."""
        g = self.objective.loss.gradient(self.outputs, self.targets)
        return self.weighted(g)

    def weighted(self, v: Array, power: float = 1.0) -> Array:
        """v times the examples' weights to a power; v has shape ([K,] N, [S,] C)."""
        if self.scale.weights is None:
            return v
        w = self.scale.weights**power
        xp = array_namespace(w)
        return v * xp.reshape(w, (self.scale.examples, *(1,) * (self.outputs.ndim - 1)))

    @quiet
    def mean_gradient(self, statistics: Tree) -> Tree:
        """Gradient tree from statistics: summed over examples, divided by M."""
        factor = 1.0 / self.scale.terms
        return trees.tree_map(lambda s: factor * s.gradient(), statistics)

    def gradient(self) -> Tree:
        """∇L(θ): the mean over terms, in the structure of the parameters."""
        return self.mean_gradient(self.backward(self.output_gradient()))


def _require_same_shape(path: str, p: Array, v: Any) -> None:
    if getattr(v, "shape", None) != p.shape:
        came = tuple(v.shape) if hasattr(v, "shape") else type(v).__name__
        place = f" {path}" if path else ""
        raise ShapeError(f"tangent of parameter{place}: expected {tuple(p.shape)}, got {came}")


def _scale(z: Array, weights: Array | None, coupled: bool) -> Scale:
    return Scale(math.prod(z.shape[:-1]), z.shape[0], weights, coupled)


def _mean(values: Array, scale: Scale) -> Scalar:
    return scalar(array_namespace(values).sum(values)) / scale.terms


def _values(loss: Loss, z: Array, t: Array, scale: Scale) -> Array:
    """Weighted losses of all terms, in double precision: ρ is a difference of two means of such."""
    xp = array_namespace(z)
    values = xp.reshape(loss.value(z, t), (scale.terms,))
    weights = scale.row_weights(scale.terms)
    if weights is not None:
        values = values * weights
    return xp.astype(values, xp.float64)

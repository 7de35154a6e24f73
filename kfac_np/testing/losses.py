"""The laws of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, all_finite, array_namespace
from kfac_np.errors import InputError
from kfac_np.losses import Loss
from kfac_np.testing._tools import (
    EXACT,
    FINITE_DIFFERENCE,
    SINGLE,
    STEP,
    check_targets,
    require,
    require_close,
    require_double,
    require_same_arrays,
    run_laws,
    single,
    without_writing,
)

__all__ = ["LOSS_LAWS", "check_loss"]

DRAWS = 4000
DEVIATIONS = 6.0
"""A mean of draws may be off by so many standard errors: for one honest loss in 10⁸ it is."""


def check_loss(
    loss: Loss,
    z: Array,
    t: Array,
    *,
    laws: Iterable[str] | None = None,
    largest: float = 1e4,
    seed: int = 0,
) -> None:
    """Raise `AssertionError` unless the loss keeps every law of `LOSS_LAWS`.

    Parameters
    ----------
    loss : Loss
    z : Array, shape (N, [S,] C)
        Natural parameters.
    t : Array
        Targets, one for each term.
    laws : iterable of str, optional
        Names of some laws; all when omitted.
    largest : float
        All is finite for natural parameters of either sign up to this size.
    seed : int
        For the random directions and the sampled targets.

    Raises
    ------
    AssertionError
        A law is broken; the message names the loss, the law and the numbers.
    InputError
        Outputs are not in double precision, or not finite, or have no axis of terms.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.losses import PoissonLogRate
    >>> z = np.asarray([[0.5, -1.0], [0.0, 2.0]])
    >>> check_loss(PoissonLogRate(), z, np.ones((2, 2)), largest=500.0)
    """
    require_double(z=z, t=t)
    if z.ndim < 2 or math.prod(z.shape) == 0:
        raise InputError(f"z: expected shape (N, [S,] C) without an empty axis, got {z.shape}")
    run_laws(loss, LOSS_LAWS, laws, _Subject(loss, z, t, float(largest), Rng(seed)))


@final
@dataclass(frozen=True, eq=False)
class _Subject:
    """A loss at outputs and targets."""

    loss: Loss
    z: Array
    t: Array
    largest: float
    rng: Rng

    @cached_property
    def u(self) -> Array:
        return self.rng.child("u").normal(self.z.shape, Backend.of(self.z))

    @cached_property
    def columns(self) -> Array:
        """S as (N, [S,] C, C): the last axis counts its columns."""
        return columns_last(self.loss.fisher_factor(self.z))

    @cached_property
    def hessian(self) -> Array:
        """∂²ℓ/∂z², shape (N, [S,] C, C), by products with unit vectors."""
        return hessian_at(self.loss, self.z)


def columns_last(k_first: Array) -> Array:
    xp = array_namespace(k_first)
    return xp.permute_dims(k_first, (*range(1, k_first.ndim), 0))


def hessian_at(loss: Loss, z: Array) -> Array:
    xp, c = array_namespace(z), z.shape[-1]
    units = xp.reshape(Backend.of(z).eye(c), (c, *(1,) * (z.ndim - 1), c))
    return columns_last(loss.hessian_product(z, xp.broadcast_to(units, (c, *z.shape)) + 0.0))


def shape(s: _Subject) -> None:
    """All results have one entry a term, and the dtype and place of the outputs."""
    c = s.z.shape[-1]
    stacked = array_namespace(s.z).stack([s.u, s.z])
    k = s.loss.num_columns(s.z)
    for name, result, expected in (
        ("value", s.loss.value(s.z, s.t), s.z.shape[:-1]),
        ("gradient", s.loss.gradient(s.z, s.t), s.z.shape),
        ("hessian_product", s.loss.hessian_product(s.z, s.u), s.z.shape),
        ("hessian_product of 2 vectors", s.loss.hessian_product(s.z, stacked), (2, *s.z.shape)),
        ("fisher_factor", s.loss.fisher_factor(s.z), (k, *s.z.shape)),
    ):
        require(result.shape == expected, f"{name} has shape {result.shape}, expected {expected}")
        require(
            Backend.of(result) == Backend.of(s.z),
            f"{name} is {result.dtype} on {Backend.of(result).device}, expected {s.z.dtype} "
            f"on {Backend.of(s.z).device}",
        )
    require(1 <= k <= c, f"num_columns: expected 1..{c}, got {k}")


def purity(s: _Subject) -> None:
    """Nothing that is passed in is written to."""
    for name, call, arguments in (
        ("check", lambda z, t: check_targets(s.loss, z, t), (s.z, s.t)),
        ("value", s.loss.value, (s.z, s.t)),
        ("gradient", s.loss.gradient, (s.z, s.t)),
        ("hessian_product", s.loss.hessian_product, (s.z, s.u)),
        ("fisher_factor", s.loss.fisher_factor, (s.z,)),
        ("sample_targets", lambda z: s.loss.sample_targets(s.rng, z), (s.z,)),
    ):
        without_writing(call, name, *arguments)


def gradient(s: _Subject) -> None:
    """The gradient agrees with central differences of the value, term by term."""
    xp = array_namespace(s.z)
    after, before = (s.loss.value(s.z + h * s.u, s.t) for h in (STEP, -STEP))
    along = xp.sum(s.loss.gradient(s.z, s.t) * s.u, axis=-1)
    scale = float(xp.max(xp.abs(s.loss.value(s.z, s.t)))) + 1.0
    quotient = (after - before) / (2 * STEP)
    require_close(
        "gradient · u", along, "the difference quotient", quotient, FINITE_DIFFERENCE, scale
    )


def hessian(s: _Subject) -> None:
    """hessian_product agrees with central differences of the gradient, and is symmetric."""
    xp = array_namespace(s.z)
    after, before = (s.loss.gradient(s.z + h * s.u, s.t) for h in (STEP, -STEP))
    scale = float(xp.max(xp.abs(s.loss.gradient(s.z, s.t)))) + 1.0
    require_close(
        "hessian_product",
        s.loss.hessian_product(s.z, s.u),
        "the difference quotient of the gradient",
        (after - before) / (2 * STEP),
        FINITE_DIFFERENCE,
        scale,
    )
    require_close("the Hessian", s.hessian, "its transpose", xp.matrix_transpose(s.hessian), EXACT)


def fisher_factor(s: _Subject) -> None:
    """S Sᵀ = ∂²ℓ/∂z²."""
    xp = array_namespace(s.z)
    square = s.columns @ xp.matrix_transpose(s.columns)
    require_close("S Sᵀ", square, "the Hessian by hessian_product", s.hessian, EXACT)


def column_ranges(s: _Subject) -> None:
    """Ranges of columns put together are the whole Fisher factor."""
    xp, k = array_namespace(s.z), s.loss.num_columns(s.z)
    whole = s.loss.fisher_factor(s.z)
    for size in {1, 2, k}:
        starts = range(0, k, size)
        parts = [s.loss.fisher_factor(s.z, i, min(i + size, k)) for i in starts]
        require_same_arrays(f"columns in ranges of {size}", xp.concat(parts), "all", whole)


def terms(s: _Subject) -> None:
    """A term does not depend on the other terms, nor on how many there are: sums, no means."""
    for n in range(s.z.shape[0]):
        rows = slice(n, n + 1)
        z, t = s.z[rows, ...], s.t[rows, ...]
        for name, one, every in (
            ("value", s.loss.value(z, t), s.loss.value(s.z, s.t)),
            ("gradient", s.loss.gradient(z, t), s.loss.gradient(s.z, s.t)),
            ("Hessian", hessian_at(s.loss, z), s.hessian),
        ):
            require_close(
                f"the {name} of example {n} alone", one, "in the batch", every[rows, ...], EXACT
            )


def sampled_targets(s: _Subject) -> None:
    """Sampled targets are valid, reproducible, and give gradients of mean 0 and mean square ∇²ℓ.

    This pins the scale of the loss: only for a negative log-likelihood are both true.
    """
    xp, lead = array_namespace(s.z), s.z.shape[:-1]
    shape = (DRAWS, *s.z.shape)
    z = xp.reshape(xp.broadcast_to(s.z[None, ...], shape), (DRAWS * lead[0], *s.z.shape[1:]))
    drawn = s.loss.sample_targets(s.rng.child("targets"), z)
    require_same_arrays(
        "targets drawn once",
        drawn,
        "drawn again from the same stream",
        s.loss.sample_targets(s.rng.child("targets"), z),
    )
    try:
        check_targets(s.loss, z, drawn)
    except InputError as error:
        require(False, f"sampled targets are not valid: {error}")
    g = xp.reshape(s.loss.gradient(z, drawn), shape)
    squares = g[..., :, None] * g[..., None, :]
    for name, values, expected in (
        ("mean of the gradient", g, xp.zeros_like(s.z)),
        ("mean square of the gradient", squares, s.hessian),
    ):
        off = xp.abs(xp.mean(values, axis=0) - expected)
        # An event too rare to have been drawn leaves a sample deviation of 0: allow for some
        # events of probability 1/DRAWS.
        allowed = DEVIATIONS * (xp.std(values, axis=0) / DRAWS**0.5 + 1.0 / DRAWS)
        worst = float(xp.max(off / allowed)) * DEVIATIONS
        require(
            worst <= DEVIATIONS,
            f"the {name} over {DRAWS} draws is {worst:.1f} standard errors from "
            f"{'0' if values is g else 'the Hessian'}",
        )


def large_outputs(s: _Subject) -> None:
    """Values and derivatives stay finite for outputs of either sign up to `largest`."""
    xp = array_namespace(s.z)
    for z in (s.largest * xp.sign(s.u), 0.0 * s.z + s.largest, 0.0 * s.z - s.largest, 0.0 * s.z):
        for name, result in (
            ("value", s.loss.value(z, s.t)),
            ("gradient", s.loss.gradient(z, s.t)),
            ("hessian_product", s.loss.hessian_product(z, s.u)),
            ("fisher_factor", s.loss.fisher_factor(z)),
        ):
            require(
                all_finite(result),
                f"{name} is not finite for outputs of ±{float(xp.max(xp.abs(z))):g}",
            )


def bad_targets(s: _Subject) -> None:
    """Good targets are accepted; a wrong shape, NaN or Inf are refused by an `InputError`."""
    check_targets(s.loss, s.z, s.t)
    xp = array_namespace(s.t)
    wrong = {
        "one example too few": s.t[:-1, ...],
        "one axis too many": s.t[..., None, None],
    }
    if xp.isdtype(s.t.dtype, "real floating"):
        wrong |= {"NaN": s.t * math.nan, "Inf": s.t + math.inf}
    for name, t in wrong.items():
        try:
            check_targets(s.loss, s.z, t)
        except InputError:
            continue
        require(False, f"check accepts targets with {name}")


def single_precision(s: _Subject) -> None:
    """Single precision stays single precision, and is close to double precision."""
    z, t, u = single((s.z, s.t, s.u))
    results = {
        "value": (s.loss.value(z, t), s.loss.value(s.z, s.t)),
        "gradient": (s.loss.gradient(z, t), s.loss.gradient(s.z, s.t)),
        "hessian_product": (s.loss.hessian_product(z, u), s.loss.hessian_product(s.z, s.u)),
        "fisher_factor": (s.loss.fisher_factor(z), s.loss.fisher_factor(s.z)),
    }
    xp = array_namespace(z)
    for name, (low, high) in results.items():
        require(low.dtype == xp.float32, f"{name}: expected dtype float32, got {low.dtype}")
        double = trees.tree_map(lambda x: xp.astype(x, xp.float64), low)
        require_close(f"{name} in single precision", double, "in double", high, SINGLE)
    sampled = s.loss.sample_targets(s.rng.child("single"), z)
    check_targets(s.loss, z, sampled)


LOSS_LAWS: Mapping[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        shape,
        purity,
        gradient,
        hessian,
        fisher_factor,
        column_ranges,
        terms,
        sampled_targets,
        large_outputs,
        bad_targets,
        single_precision,
    )
}
"""The laws by name; the first line of a law's docstring states it."""

"""KFC's theory as code: what each assumption makes of a convolution's block of the Fisher.

For small networks, tests and teaching: nothing here is needed to train (`KFACBlock` is).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np.backend import (
    Array,
    Geometry,
    Patches,
    array_namespace,
    pad,
    second_moment,
    sum_by_index,
    unfold,
)
from kfac_np.curvature.blocks.diagonal import require_vectors
from kfac_np.errors import CurvatureError
from kfac_np.matrices import DenseMatrix, KroneckerMatrix
from kfac_np.statistics import AffineStatistics, GroupedStatistics, Scale, term_gradients
from kfac_np.validation import require_instance

__all__ = ["Assumption", "convolution_block", "kfc_factors"]


class Assumption(enum.Flag):
    """What KFC assumes of a convolution's activations a and derivatives g; combine with ``|``.

    The batch stands for the distribution: E is the mean over its examples and vectors. Pixels
    are those of the image; padding is 0 and stays so. Locations t are those of the output.

    Attributes
    ----------
    IAD
        Independent activations and derivatives: E[a aᵀ ⊗ g gᵀ] = E[a aᵀ] ⊗ E[g gᵀ].
    SH_ACTIVATIONS
        Spatial homogeneity: the mean of a pixel is that of every other one, the second moment of
        two pixels depends on their displacement alone. Means over all (pairs of) pixels.
    SH_DERIVATIVES
        The second moment of g_t and g_t' depends on t' - t alone.
    SH
        Both.
    SUD
        Spatially uncorrelated derivatives: E[g_t g_t'ᵀ] = 0 for t ≠ t'. Without IAD, where the
        block is no function of second moments: uncorrelated given the activations.
    SUA
        Spatially uncorrelated activations: the second moment of two distinct pixels is the
        product of their means.
    WD
        White derivatives: E[g_t g_t'ᵀ] is a number times the identity for t = t', and 0 else.
    KFC
        IAD, SH and SUD: the assumptions of theorem 1.

    References
    ----------
    Grosse & Martens 2016, arXiv:1602.01407, §3 (IAD, SH, SUD) and §4.2 (SUA, WD).

    Examples
    --------
    >>> Assumption.IAD | Assumption.SH | Assumption.SUD == Assumption.KFC
    True
    >>> [a.name for a in Assumption.KFC]
    ['IAD', 'SH_ACTIVATIONS', 'SH_DERIVATIVES', 'SUD']
    """

    NONE = 0
    IAD = enum.auto()
    SH_ACTIVATIONS = enum.auto()
    SH_DERIVATIVES = enum.auto()
    SUD = enum.auto()
    SUA = enum.auto()
    WD = enum.auto()
    SH = SH_ACTIVATIONS | SH_DERIVATIVES
    KFC = IAD | SH | SUD


def convolution_block(
    s: AffineStatistics,
    scale: Scale,
    assumptions: Assumption = Assumption.NONE,
    max_numbers: int = 2**25,
) -> DenseMatrix:
    """A layer's block of the Fisher as it would be if `assumptions` held, written out.

    Without any, (1/M) Σ_{n,k} vec(U_nk) vec(U_nk)ᵀ with U_nk = Σ_t g_t ā_tᵀ. With IAD it is

        Σ_{t,t'} Γ(t, t') ⊗ A(t, t'),   A(t, t') = E[ā_t ā_t'ᵀ],   Γ(t, t') = E[g_t g_t'ᵀ],

    and the other assumptions say what Γ and A are. All that geometry does to A (padding, strides,
    dilation) is exact: A is put together from moments of pixels. With IAD, SUD and SH_DERIVATIVES
    the block is that of `KFACBlock` with `expand`; with SH_ACTIVATIONS, too, it is theorem 1's.

    Parameters
    ----------
    s : AffineStatistics
        Of a convolution, or of a dense layer over a sequence (whose locations stand in a row,
        and whose "pixels" are its inputs). Of a transposed convolution the pixels are those of
        the input with zeros in between. A group of a grouped convolution comes as `s.groups[i]`.
    scale : Scale
    assumptions : Assumption
    max_numbers : int
        Larger intermediate arrays are refused rather than allowed to exhaust the memory.

    Returns
    -------
    DenseMatrix
        For operands (d_out, d_in + 1); divided by M, like every curvature.

    Raises
    ------
    CurvatureError
        Too large; an assumption on second moments without IAD; statistics of another kind, or of
        examples that influence each other.

    References
    ----------
    Grosse & Martens 2016, arXiv:1602.01407, §3 and §4.2.

    Examples
    --------
    >>> import numpy as np
    >>> g, x = np.asarray([[[1.0], [2.0]]]), np.asarray([[[1.0], [3.0], [5.0]]])
    >>> s = AffineStatistics(Patches(x, Geometry((2,), (1,), (1,), ((0, 0),)), False, 100), g)
    >>> convolution_block(s, Scale(1, 1)).to_dense()
    array([[ 49.,  91.],
           [ 91., 169.]])
    >>> convolution_block(s, Scale(1, 1), Assumption.IAD | Assumption.SUD).to_dense()
    array([[ 37.,  63.],
           [ 63., 109.]])
    """
    require_instance("convolution_block assumptions", assumptions, Assumption)
    _check(s, scale, assumptions)
    if Assumption.IAD not in assumptions:
        uncorrelated = Assumption.SUD in assumptions
        number = s.num_vectors * s.num_examples * (s.num_locations if uncorrelated else 1)
        _require_memory(max_numbers, (number, _size(s)), (_size(s), _size(s)))
        rows = _located(s) if uncorrelated else term_gradients(s, scale)
        return _dense(s, second_moment(rows) / scale.terms)
    (_, t, d), d_out = s.inputs.shape, s.g.shape[-1]
    pairs = t if _is_diagonal(assumptions) else t * t
    _require_memory(max_numbers, (pairs, d * d), (pairs, d_out * d_out), (_size(s), _size(s)))
    xp = array_namespace(s.g)
    derivatives = _derivative_moments(s, scale, assumptions)
    activations = _Pixels(_patches(s)).moments(scale, assumptions, max_numbers)
    block = xp.reshape(derivatives, (pairs, -1)).T @ xp.reshape(activations, (pairs, -1))
    block = xp.permute_dims(xp.reshape(block, (d_out, d_out, d, d)), (0, 2, 1, 3))
    return _dense(s, xp.reshape(block, (_size(s), _size(s))))


def kfc_factors(
    s: AffineStatistics,
    scale: Scale,
    assumptions: Assumption = Assumption.KFC,
    max_numbers: int = 2**25,
) -> KroneckerMatrix:
    """Γ ⊗ Ω: KFC's factorisation, with Ω = Σ_t A(t, t) and Γ = E[g_t g_tᵀ], the mean over t.

    Under SH an entry of Ω for two taps at displacement δ is Ω(j, j', δ) times the number of
    locations from which both taps see the image, β of theorem 1; the last column has the means
    M(j), the corner is T. With SUA Ω(j, j', δ) is M(j) M(j'), and more (Σ(j, j')) only for δ = 0;
    with WD Γ is a number times the identity, which together is theorem 4.

    Parameters
    ----------
    s, scale, max_numbers
        As for `convolution_block`.
    assumptions : Assumption
        IAD, SH_DERIVATIVES and SUD (or WD in place of both) at least: without them there is no
        such factorisation. Ω = T·A, with the factor A of `KFACBlock` and `expand`, without
        SH_ACTIVATIONS and SUA only; Γ = G/T without WD only.

    Returns
    -------
    KroneckerMatrix
        With A = Ω (a sum over locations, a mean over examples) and G = Γ (a mean over locations,
        the sum over vectors and examples divided by M).

    Raises
    ------
    CurvatureError
        As `convolution_block`, and for assumptions under which the block does not factorise.

    References
    ----------
    Grosse & Martens 2016, arXiv:1602.01407, theorems 1 and 4.

    Examples
    --------
    >>> import numpy as np
    >>> x, g = np.ones((2, 3, 1)), np.ones((2, 3, 1))
    >>> geometry = Geometry((3,), (1,), (1,), ((1, 1),))
    >>> s = AffineStatistics(Patches(x, geometry, True, 100), g)
    >>> kfc_factors(s, Scale(2, 2)).A
    array([[2., 2., 1., 2.],
           [2., 3., 2., 3.],
           [1., 2., 2., 2.],
           [2., 3., 2., 3.]])
    """
    require_instance("convolution_block assumptions", assumptions, Assumption)
    _check(s, scale, assumptions)
    homogeneous = Assumption.SUD | Assumption.SH_DERIVATIVES
    if Assumption.IAD not in assumptions or not (
        homogeneous in assumptions or Assumption.WD in assumptions
    ):
        raise CurvatureError(
            "kfc_factors: expected IAD with SUD and SH_DERIVATIVES, or with WD, without which the "
            f"block is no Kronecker product; got {assumptions!r}"
        )
    (_, t, d), d_out = s.inputs.shape, s.g.shape[-1]
    _require_memory(max_numbers, (t, d * d), (t, d_out * d_out))
    xp = array_namespace(s.g)
    activations = _Pixels(_patches(s)).moments(scale, assumptions, max_numbers)
    derivatives = _derivative_moments(s, scale, assumptions)
    return KroneckerMatrix(xp.sum(activations, axis=0), xp.mean(derivatives, axis=0))


# ------------------------------------------------------------------------------------ derivatives


def _derivative_moments(s: AffineStatistics, scale: Scale, assumptions: Assumption) -> Array:
    """Γ(t, t') for the pairs of locations that the block sums over, (pairs, d_out, d_out)."""
    g, t, d_out = s.stacked_g, s.num_locations, s.g.shape[-1]
    xp = array_namespace(g)
    if not _is_diagonal(assumptions):
        rows = xp.reshape(g, (-1, t * d_out))
        moments = _by_pairs(second_moment(rows) / scale.terms, t)
        if Assumption.SH_DERIVATIVES in assumptions:
            moments = _homogeneous(moments, _patches(s).out)
        return moments
    rows = xp.permute_dims(xp.reshape(g, (-1, t, d_out)), (1, 0, 2))  # (T, K · N, d_out)
    moments = xp.matrix_transpose(rows) @ rows / scale.terms
    if Assumption.WD in assumptions:
        white = xp.sum(rows * rows) / (scale.terms * t * d_out)
        moments = white * xp.eye(d_out, dtype=g.dtype, device=g.device)[None, ...]
    elif Assumption.SH_DERIVATIVES in assumptions:
        moments = xp.mean(moments, axis=0)[None, ...]
    return xp.broadcast_to(moments, (t, d_out, d_out))


# ------------------------------------------------------------------------------------ activations


@final
@dataclass(frozen=True, eq=False)
class _Pixels:
    """The image behind patches: its moments, and which of them a patch's moments are."""

    patches: Patches

    @cached_property
    def image(self) -> Array:
        """What patches see of the input without its padding, shape (N, *spatial, C)."""
        cut = tuple((min(low, 0), min(high, 0)) for low, high in self.patches.geometry.padding)
        return pad(self.patches.x, cut)

    @cached_property
    def entries(self) -> Array:
        """For each location and column of a patch, which coordinate it is; shape (T, d).

        Coordinates are the pixels' channels, then 1, then 0 (padding).
        """
        p, image = self.patches, self.image
        xp, numbers = array_namespace(image), math.prod(image.shape[1:])
        each = xp.arange(numbers, dtype=xp.int64, device=image.device)
        each = xp.reshape(each, (1, *image.shape[1:]))
        borders = tuple((max(low, 0), max(high, 0)) for low, high in p.geometry.padding)
        rows = unfold(pad(each, borders, numbers + 1), p.geometry)[0, ...]
        if not p.ones:
            return rows
        one = xp.full((rows.shape[0], 1), numbers, dtype=xp.int64, device=image.device)
        return xp.concat([rows, one], axis=1)

    def moments(self, scale: Scale, assumptions: Assumption, max_numbers: int) -> Array:
        """A(t, t') for the pairs of locations that the block sums over, (pairs, d, d)."""
        entries, size = self.entries, math.prod(self.image.shape[1:]) + 2
        _require_memory(max_numbers, (size, size))
        xp = array_namespace(self.image)
        t, d = entries.shape
        if _is_diagonal(assumptions):
            first, second = entries, entries
        else:
            first = xp.reshape(xp.broadcast_to(entries[:, None, :], (t, t, d)), (-1, d))
            second = xp.reshape(xp.broadcast_to(entries[None, :, :], (t, t, d)), (-1, d))
        where = first[:, :, None] * size + second[:, None, :]
        coordinates = xp.reshape(self._coordinates(scale, assumptions), (-1,))
        return xp.reshape(xp.take(coordinates, xp.reshape(where, (-1,)), axis=0), (-1, d, d))

    def _coordinates(self, scale: Scale, assumptions: Assumption) -> Array:
        """Second moments of all coordinates of `entries`."""
        image, xp = self.image, array_namespace(self.image)
        *grid, c = image.shape[1:]
        pixels = math.prod(grid)
        rows = xp.reshape(image, (image.shape[0], pixels * c))
        weights = scale.row_weights(scale.examples)
        if weights is None:
            weights = xp.ones((scale.examples,), dtype=image.dtype, device=image.device)
        mean = xp.reshape(weights @ rows / xp.sum(weights), (pixels, c))
        second = _by_pairs(second_moment(rows, weights) / xp.sum(weights), pixels)
        if Assumption.SH_ACTIVATIONS in assumptions:
            mean = xp.broadcast_to(xp.mean(mean, axis=0)[None, :], mean.shape)
            second = _homogeneous(second, tuple(grid))
        if Assumption.SUA in assumptions:
            apart = _by_pairs(xp.reshape(mean, (-1, 1)) @ xp.reshape(mean, (1, -1)), pixels)
            same = xp.reshape(xp.eye(pixels, dtype=xp.int64, device=image.device), (-1, 1, 1)) == 1
            second = xp.where(same, second, apart)
        second = xp.permute_dims(xp.reshape(second, (pixels, pixels, c, c)), (0, 2, 1, 3))
        n = pixels * c
        out = xp.zeros((n + 2, n + 2), dtype=image.dtype, device=image.device)
        out[:n, :n] = xp.reshape(second, (n, n))
        out[:n, n] = xp.reshape(mean, (-1,))
        out[n, :n] = xp.reshape(mean, (-1,))
        out[n, n] = 1.0
        return out


# ---------------------------------------------------------------------------------------- helpers


def _by_pairs(moments: Array, places: int) -> Array:
    """(L · c, L · c) as (L · L, c, c): one matrix for each pair of places."""
    xp, c = array_namespace(moments), moments.shape[0] // places
    moments = xp.permute_dims(xp.reshape(moments, (places, c, places, c)), (0, 2, 1, 3))
    return xp.reshape(moments, (places * places, c, c))


def _homogeneous(moments: Array, grid: tuple[int, ...]) -> Array:
    """Each pair's moment replaced by the mean over all pairs at the same displacement."""
    xp, places = array_namespace(moments), math.prod(grid)
    each = xp.arange(places, dtype=xp.int64, device=moments.device)
    displacement = xp.zeros((places, places), dtype=xp.int64, device=moments.device)
    number, inner = 1, places
    for n in grid:
        inner //= n
        along = each // inner % n
        displacement = displacement * (2 * n - 1) + along[None, :] - along[:, None] + (n - 1)
        number *= 2 * n - 1
    displacement = xp.reshape(displacement, (-1,))
    rows = xp.reshape(moments, (places * places, -1))
    ones = xp.ones((places * places, 1), dtype=moments.dtype, device=moments.device)
    means = sum_by_index(rows, displacement, number) / sum_by_index(ones, displacement, number)
    return xp.reshape(xp.take(means, displacement, axis=0), moments.shape)


def _located(s: AffineStatistics) -> Array:
    """Rows vec(g_t ā_tᵀ), one a vector, example and location."""
    outer = s.g[..., :, None] * s.a[..., None, :]
    return array_namespace(outer).reshape(outer, (-1, _size(s)))


def _patches(s: AffineStatistics) -> Patches:
    """The patches; inputs that are an array stand in a row, each a patch of one tap."""
    if isinstance(s.inputs, Patches):
        return s.inputs
    a, one_tap = s.inputs, Geometry((1,), (1,), (1,), ((0, 0),))
    # A last column of ones is the homogeneous coordinate: no channel, whose mean is estimated.
    xp = array_namespace(a)
    ones = not bool(xp.any(xp.abs(a[..., -1] - 1.0) > 0.0))
    return Patches(a[..., :-1] if ones else a, one_tap, ones, 1)


def _is_diagonal(assumptions: Assumption) -> bool:
    """Whether distinct locations are uncorrelated, so that only t = t' counts."""
    return bool(assumptions & (Assumption.SUD | Assumption.WD))


def _size(s: AffineStatistics) -> int:
    return math.prod(s.parameter_shape)


def _dense(s: AffineStatistics, block: Array) -> DenseMatrix:
    return DenseMatrix(block, s.parameter_shape)


def _check(s: object, scale: Scale, assumptions: Assumption) -> None:
    if isinstance(s, GroupedStatistics):
        raise CurvatureError(
            "convolution_block: expected AffineStatistics, got GroupedStatistics; each group is a "
            "convolution of its own, give s.groups[i]"
        )
    if not isinstance(s, AffineStatistics):
        raise CurvatureError(
            f"convolution_block: expected AffineStatistics, got {type(s).__name__}"
        )
    require_vectors(s, "convolution_block")
    moments = assumptions & ~(Assumption.IAD | Assumption.SUD)
    if moments and Assumption.IAD not in assumptions:
        raise CurvatureError(
            f"convolution_block: expected IAD with {moments!r}, which is about second moments: "
            "they do not determine the block without it"
        )
    if scale.coupled and assumptions:
        raise CurvatureError(
            "convolution_block: expected examples that do not influence each other, got batch "
            "statistics"
        )


def _require_memory(max_numbers: int, *shapes: tuple[int, int]) -> None:
    for rows, columns in shapes:
        if rows * columns > max_numbers:
            raise CurvatureError(
                f"convolution_block: expected arrays of at most {max_numbers} numbers, got "
                f"{rows}×{columns}: this is for small networks"
            )

"""What a query's loss would be without one of the training examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kfac_np.applications.influence import Influence
from kfac_np.backend import Array, Rng, array_namespace
from kfac_np.errors import CurvatureError
from kfac_np.fisher import Exact
from kfac_np.objective import Evaluation
from kfac_np.validation import require_instance

__all__ = ["leave_one_out"]


def leave_one_out(
    influence: Influence, queries: Sequence[Array], examples: Sequence[Array]
) -> Array:
    """ℓ_q(θ_t) - ℓ_q(θ), θ_t after one Newton step on the mean loss without example t.

    Besides the gradient g_t, the curvature U_t U_tᵀ / M of the example is taken away:

        θ_t = θ + (B - U_t U_tᵀ / M)⁻¹ g_t / M,   U_t U_tᵀ = J_tᵀ (∂²ℓ_t/∂z²) J_t,

    and outputs move along J_q (θ_t - θ). `Influence.scores` / M is this to first order in 1/M. It
    is exact, for an example of whatever leverage, where z is linear in θ, the loss is the squared
    error, θ its minimum, C the whole exact curvature (`FullMatrix`, or one layer's `ExactBlock`)
    and the damping the weight decay of training. What is left keeps its weight 1/M, and the weight
    decay stays what it was.

    Parameters
    ----------
    influence : Influence
        With the curvature of all examples, those that are left out among them.
    queries, examples : tuple (x, t) or (x, t, weights)
        As for `Influence.scores`.

    Returns
    -------
    Array, shape (Q, N)
        A positive number is the loss that training on the example saves.

    Raises
    ------
    CurvatureError
        Without an example's curvature B is not positive definite: B is no curvature of a set of
        examples with it, or has too little damping.

    References
    ----------
    Cook & Weisberg 1982, "Residuals and Influence in Regression", §2.2 (for linear regression).

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.applications import fit_curvature
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> x, t = np.ones((4, 1)), np.asarray([[0.0], [0.0], [0.0], [4.0]])
    >>> objective = Objective(Dense(1, 1, bias=False), SquaredError())
    >>> influence = Influence(objective, fit_curvature(objective, t[3:] / 4, [(x, t)]), damping=0.0)
    >>> leave_one_out(influence, (x[:1], t[:1]), (x[3:], t[3:]))  # the mean is 0 without the 4
    array([[-0.5]])
    """
    require_instance("leave_one_out influence", influence, Influence)
    fit = influence.fit
    parts: dict[int, list[Array]] = {}
    done = 0
    for start, cross, gram in influence.pairs.cross(
        queries, _outputs, examples, _leaving, gram=True
    ):
        assert gram is not None, "asked for"
        done = done if start in parts else 0
        solved = _without(gram, fit.terms, done)
        done += gram.shape[0]
        xp = array_namespace(cross)
        # (K_q, Q, 1 + K, N) times (1 + K, N), the gradient's own factor being 1
        moved = xp.sum(cross * xp.matrix_transpose(solved)[None, None, ...], axis=2) / fit.terms
        rows = slice(start, start + moved.shape[1])
        parts.setdefault(start, []).append(_changes(influence, queries, rows, moved))
    xp = array_namespace(next(iter(parts.values()))[0])
    return xp.concat([xp.concat(p, axis=1) for p in parts.values()], axis=0)


def _outputs(e: Evaluation) -> Array:
    """The outputs themselves, one after the other: (S · C, N, [S,] C)."""
    xp, z = array_namespace(e.outputs), e.outputs
    number = math.prod(z.shape[1:])
    each = xp.eye(number, dtype=z.dtype, device=z.device)
    every = each[:, None, :] * xp.ones((1, z.shape[0], 1), dtype=z.dtype, device=z.device)
    return xp.reshape(every, (number, *z.shape))


def _leaving(e: Evaluation) -> Array:
    """The gradient of an example's loss, and the columns of U."""
    xp = array_namespace(e.outputs)
    return xp.concat([e.output_gradient()[None, ...], *Exact().vectors(e, Rng(0))], axis=0)


def _without(gram: Array, terms: int, first: int) -> Array:
    """1 and (I - H)⁻¹ Uᵀ B⁻¹ g / M of each example, H = Uᵀ B⁻¹ U / M, shape (N, 1 + K)."""
    xp = array_namespace(gram)
    h, k = gram[:, 1:, 1:] / terms, gram.shape[1] - 1
    leverage = xp.max(xp.linalg.eigvalsh(0.5 * (h + xp.matrix_transpose(h))), axis=1)
    if bool(xp.any(leverage >= 1.0)):
        i = int(xp.argmax(leverage))
        raise CurvatureError(
            f"leave_one_out: example {first + i}: expected leverage < 1, got "
            f"{float(leverage[i]):.3g}; the curvature must be that of all examples, this one among "
            "them, or needs more damping"
        )
    eye = xp.eye(k, dtype=gram.dtype, device=gram.device)
    solved = xp.linalg.solve(eye[None, ...] - h, gram[:, 1:, :1] / terms)[..., 0]
    return xp.concat([xp.ones_like(solved[:, :1]), solved], axis=1)


def _changes(influence: Influence, queries: Sequence[Array], rows: slice, moved: Array) -> Array:
    """ℓ(z + moved) - ℓ(z), moved (S · C, Q, N), shape (Q, N)."""
    x, t, *weights = (array[rows, ...] for array in queries)
    e = influence.objective.evaluate(influence.fit.params, x, t)
    xp, z, loss = array_namespace(x), e.outputs, influence.objective.loss
    q, n = moved.shape[1:]

    def repeated(array: Array) -> Array:
        shape = (q, n, *array.shape[1:])
        return xp.reshape(xp.broadcast_to(array[:, None, ...], shape), (q * n, *array.shape[1:]))

    def total(outputs: Array, targets: Array) -> Array:
        return xp.sum(xp.reshape(loss.value(outputs, targets), (outputs.shape[0], -1)), axis=1)

    step = xp.reshape(xp.permute_dims(moved, (1, 2, 0)), (q * n, *z.shape[1:]))
    after = xp.reshape(total(repeated(z) + step, repeated(t)), (q, n))
    change = after - total(z, t)[:, None]
    return change * weights[0][:, None] if weights else change

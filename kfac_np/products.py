"""Exact products with the GGN, Fisher and Hessian, without forming a matrix.

All are means over the M loss terms, at the point and on the batch of an `Evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_np import trees
from kfac_np.backend import Array, Rng, Scalar, array_namespace, quiet, scalar
from kfac_np.errors import CurvatureError, InputError
from kfac_np.fisher import Exact, FisherType, InputOnly
from kfac_np.objective import Evaluation
from kfac_np.trees import Tree

__all__ = [
    "block_forms",
    "fisher_product",
    "ggn_product",
    "hessian_product",
    "quadratic_forms",
    "tangent_forms",
]


@quiet
def ggn_product(e: Evaluation, v: Tree) -> Tree:
    """(1/M) Σ_n w_n J_nᵀ (∂²ℓ/∂z²) J_n v: one jvp, a small product, one backward pass.

    For the losses of this library the generalised Gauss-Newton is the exact Fisher.

    Parameters
    ----------
    e : Evaluation
    v : tree of Array
        In the structure of the parameters.

    Returns
    -------
    tree of Array
        In the structure of the parameters; a mean over the loss terms.

    References
    ----------
    Schraudolph 2002; Martens & Grosse 2015, §6.2.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> ggn_product(e, np.asarray([[1.0]]))
    array([[5.]])
    """
    u = e.objective.loss.hessian_product(e.outputs, e.jvp(v))
    return e.mean_gradient(e.backward(e.weighted(u)))


@quiet
def fisher_product(e: Evaluation, v: Tree, fisher: FisherType, rng: Rng | None = None) -> Tree:
    """F v = (1/M) Σ_n J_nᵀ B_n J_n v for any Fisher type.

    Parameters
    ----------
    e : Evaluation
    v : tree of Array
    fisher : FisherType
        Exact, MonteCarlo or Empirical.
    rng : Rng, optional
        For MonteCarlo. Each call draws on: for products with one and the same matrix give the same
        `Rng.child` each time, or none.

    Returns
    -------
    tree of Array

    Raises
    ------
    CurvatureError
        `InputOnly`, which defines Kronecker factors and no matrix of this form.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.fisher import Empirical
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0]]), np.zeros((1, 1)))
    >>> fisher_product(e, np.asarray([[1.0]]), Empirical())
    array([[4.]])
    """
    if isinstance(fisher, InputOnly):
        raise CurvatureError(
            "fisher_product: expected Exact, MonteCarlo or Empirical, got InputOnly()"
        )
    if isinstance(fisher, Exact):
        return ggn_product(e, v)
    xp = array_namespace(e.outputs)
    dz = e.jvp(v)
    total = xp.zeros_like(dz)
    for vectors in fisher.vectors(e, rng or Rng(0)):
        # Σ_k v_k (v_kᵀ J v). Samples at S positions are independent, so that each position keeps
        # its own; the vectors of an empirical Fisher hold one position each.
        along = xp.sum(vectors * dz[None, ...], axis=-1, keepdims=True)
        total = total + xp.sum(vectors * along, axis=0)
    return e.mean_gradient(e.backward(total))


@quiet
def quadratic_forms(e: Evaluation, vectors: Sequence[Tree]) -> Array:
    """Gram matrix u_iᵀ F u_j with the exact Fisher, without a backward pass.

    uᵀ F w = (1/M) Σ_n w_n (J_n u)ᵀ (∂²ℓ/∂z²) (J_n w).

    Parameters
    ----------
    e : Evaluation
    vectors : sequence of m trees
        Each in the structure of the parameters.

    Returns
    -------
    Array, shape (m, m)
        Symmetric; a mean over the loss terms.

    Raises
    ------
    InputError
        No vectors.

    References
    ----------
    Martens & Grosse 2015, appendix C.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> quadratic_forms(e, [np.asarray([[1.0]]), np.asarray([[2.0]])])
    array([[ 5., 10.],
           [10., 20.]])
    """
    if not vectors:
        raise InputError("quadratic_forms: expected at least one vector, got none")
    return tangent_forms(e, [e.jvp(v) for v in vectors])


@quiet
def tangent_forms(e: Evaluation, tangents: Sequence[Array]) -> Array:
    """`quadratic_forms` of vectors whose tangents J u (`Evaluation.jvp`) are known.

    Parameters
    ----------
    e : Evaluation
    tangents : sequence of m arrays
        Of the shape of the outputs.

    Returns
    -------
    Array, shape (m, m)
        Symmetric; a mean over the loss terms.

    Raises
    ------
    InputError
        None, or some of another shape.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> tangent_forms(e, [np.asarray([[1.0], [3.0]])])
    array([[5.]])
    """
    shape, came = e.outputs.shape, [tuple(u.shape) for u in tangents]
    if not came or any(s != shape for s in came):
        raise InputError(f"tangents: expected arrays of shape {tuple(shape)}, got {came}")
    xp, m = array_namespace(e.outputs), len(tangents)
    stacked = xp.stack(list(tangents))  # (m, N, [S,] C)
    bent = e.weighted(e.objective.loss.hessian_product(e.outputs, stacked))
    gram = xp.reshape(stacked, (m, -1)) @ xp.reshape(bent, (m, -1)).T
    return (0.5 / e.scale.terms) * (gram + gram.T)


@quiet
def block_forms(
    e: Evaluation, v: Tree, fisher: FisherType, rng: Rng | None = None
) -> dict[str, Scalar]:
    """v_iᵀ F_ii v_i for each parameter, without the blocks that couple it to others.

    v_iᵀ F_ii v_i = (1/M) Σ_k Σ_n (u_knᵀ J_n,i v_i)², with the vectors u of a Fisher type: one
    backward pass for all parameters, and a product for each. Unbiased with `MonteCarlo`.

    Parameters
    ----------
    e : Evaluation
    v : tree of Array
        In the structure of the parameters.
    fisher : FisherType
    rng : Rng, optional
        For MonteCarlo. Each call draws on: for products with one and the same matrix give the same
        `Rng.child` each time, or none.

    Returns
    -------
    dict
        Path of a parameter to the number; a mean over the loss terms.

    Raises
    ------
    CurvatureError
        `InputOnly`, which has no vectors, or what is no Fisher type.
    ShapeError
        `v` has not the structure and shapes of the parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> float(block_forms(e, np.asarray([[1.0]]), Exact())[""])
    5.0
    """
    if not isinstance(fisher, FisherType) or isinstance(fisher, InputOnly):
        raise CurvatureError(
            f"block_forms: expected Exact, MonteCarlo or Empirical, got {fisher!r}"
        )
    e.require_tangent(v)
    parts = dict(trees.items(v))
    total: dict[str, Any] = dict.fromkeys(parts, 0.0)
    for statistics in fisher.statistics(e, rng or Rng(0)):
        for path, s in trees.items(statistics):
            along = s.along(parts[path])
            xp = array_namespace(along)
            if e.scale.coupled:  # the batch is one example
                along = xp.sum(along, axis=-1)
            total[path] = total[path] + scalar(xp.sum(along * along)) / e.scale.terms
    return total


@quiet
def hessian_product(e: Evaluation, v: Tree) -> Tree:
    """∇²L(θ) v: the GGN product plus (1/M) Σ_n w_n (∂ℓ/∂z)·(∂²z v).

    Forward-over-backward differentiation; needs `backward_jvp` of every layer.

    Parameters
    ----------
    e : Evaluation
    v : tree of Array

    Returns
    -------
    tree of Array
        A mean over the loss terms.

    References
    ----------
    Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> hessian_product(e, np.asarray([[1.0]]))
    array([[5.]])
    """
    dg = e.weighted(e.objective.loss.hessian_product(e.outputs, e.jvp(v)))
    network = e.objective.network
    _, dgradient = network.backward_jvp(e.params, e.cache, e.output_gradient(), None, v, dg)
    return trees.scale(1.0 / e.scale.terms, dgradient)

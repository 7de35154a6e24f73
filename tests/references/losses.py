"""Every loss of one term, from its definition, for autograd."""

from __future__ import annotations

import functools
from typing import Any

import autograd.numpy as anp

from kfac_np import losses


@functools.singledispatch
def term(loss: Any, z: Any, t: Any) -> Any:
    """ℓ(z, t) of one term: z has shape (C,)."""
    raise NotImplementedError(f"write the reference of {loss!r}")


@term.register
def _(loss: losses.SquaredError, z: Any, t: Any) -> Any:
    return anp.sum((z - t) ** 2) / 2


@term.register
def _(loss: losses.SigmoidCrossEntropy, z: Any, t: Any) -> Any:
    p = 1 / (1 + anp.exp(-z))
    return -anp.sum(t * anp.log(p) + (1 - t) * anp.log(1 - p))


@term.register
def _(loss: losses.SoftmaxCrossEntropy, z: Any, t: Any) -> Any:
    log_p = z - anp.log(anp.sum(anp.exp(z)))
    if anp.ndim(t) == 0:  # the number of a class
        return -log_p[int(t)]
    return -anp.sum(t * log_p)


@term.register
def _(loss: losses.PoissonLogRate, z: Any, t: Any) -> Any:
    return anp.sum(anp.exp(z) - t * z)

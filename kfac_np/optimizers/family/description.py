"""The layer table of the family: what each parameter is preconditioned by, and what that keeps."""

from __future__ import annotations

import math
from typing import Any

from kfac_np import trees
from kfac_np.curvature.analysis.describe import aligned, statistics_of_zeros
from kfac_np.optimizers.family.preconditioned import Preconditioned
from kfac_np.trees import Tree

__all__ = ["describe_preconditioners"]


def describe_preconditioners(
    optimizer: Preconditioned, params: Tree, input_shape: tuple[int, ...]
) -> str:
    """Tabulate layer, parameters, preconditioner, and numbers kept, a line for each parameter.

    Parameters
    ----------
    optimizer : Preconditioned
    params : tree of Array
    input_shape : tuple of int
        Of one example.

    Returns
    -------
    str
        Numbers kept are those of the preconditioner and of what is grafted; momentum and averages
        of `Preconditioned` are as many as the parameters, each.

    Raises
    ------
    ShapeError
        The network does not accept such inputs.

    Examples
    --------
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense, LayerNorm, Sequential
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> from kfac_np.optimizers.family.presets import muon
    >>> net = Sequential(Dense(4, 3), LayerNorm(3))
    >>> optimizer = muon(Objective(net, SquaredError()))
    >>> print(describe_preconditioners(optimizer, net.init(Rng(0), get_backend()), (4,)))
    path  layer         parameters  preconditioner  keeps
    0     Dense(4, 3)   3×5 = 15    Muon            15
    1     LayerNorm(3)  2×3 = 6     AdamScaling     12
    total               21                          27
    """
    network = optimizer.objective.network
    network.output_shape(input_shape)
    kinds = dict(trees.items(statistics_of_zeros(network, params, input_shape)))
    rows = [("path", "layer", "parameters", "preconditioner", "keeps")]
    total = kept = 0
    for path, p in trees.items(params):
        rule = optimizer.rule_of(path, p, kinds[path])
        grafted = [optimizer.graft] if optimizer.graft and rule == optimizer.preconditioner else []
        groups = p.shape[0] if p.ndim == 3 else 1
        one = p[0, ...] if p.ndim == 3 else p
        numbers = groups * sum(_size(each.init(one)) for each in (rule, *grafted))
        size = math.prod(p.shape)
        shape, name = "×".join(map(str, p.shape)), repr(network.at(path))
        rows.append((path, name, f"{shape} = {size}", type(rule).__name__, str(numbers)))
        total, kept = total + size, kept + numbers
    rows.append(("total", "", str(total), "", str(kept)))
    return aligned(rows)


def _size(slots: Any) -> int:
    return sum(math.prod(x.shape) for x in trees.leaves(slots) if hasattr(x, "shape"))

"""Which parameters of a network follow one another: the chains of affine layers."""

from __future__ import annotations

from kfac_np import trees
from kfac_np.errors import CurvatureError
from kfac_np.layers import Layer, Residual, Sequential
from kfac_np.trees import Tree

__all__ = ["find_chains"]

Chains = tuple[tuple[str, ...], ...]


def find_chains(network: Layer, params: Tree, *, split: bool = False) -> Chains:
    """Find the chains of a network: parameters each of which acts on what the last one made.

    Layers without parameters (activations, pooling, reshapes) do not interrupt a chain, and
    `Sequential` may be nested. What does: a `Residual` with parameters inside and others outside,
    whose outputs reach further than the next layer; and a layer that has several parameters or is
    a container unknown here.

    Parameters
    ----------
    network : Layer
    params : tree of Array
        Of the network.
    split : bool
        Return several chains rather than refuse a network that is not one.

    Returns
    -------
    tuple of tuples of str
        Paths, in the order of `params`.

    Raises
    ------
    CurvatureError
        The network is not one chain; the message says where and why.

    Examples
    --------
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense, Tanh
    >>> net = Sequential(Dense(2, 3), Tanh(), Residual(Dense(3, 3)), Dense(3, 1))
    >>> params = net.init(Rng(0), get_backend())
    >>> find_chains(net, params, split=True)
    (('0',), ('2',), ('3',))
    >>> find_chains(net, params)
    Traceback (most recent call last):
    kfac_np.errors.CurvatureError: layer 2: a Residual with parameters inside and others outside ...
    """
    chains: list[tuple[str, ...]] = []
    current: list[str] = []
    reason = ""
    for path, why in _walk(network, params, ""):
        if path is not None:
            if chains and not current and not split:
                raise CurvatureError(f"{reason}; split=True makes chains of what lies between")
            current.append(path)
        elif current:
            chains.append(tuple(current))
            current, reason = [], why
    return (*chains, tuple(current)) if current else tuple(chains)


def _walk(network: Layer, params: Tree, place: str) -> list[tuple[str | None, str]]:
    """Paths of parameters in order; None where a chain ends, with the reason."""
    if isinstance(network, Sequential):
        found = []
        for i, layer in enumerate(network.layers):
            found += _walk(layer, params[i], f"{place}.{i}" if place else str(i))
        return found
    paths = [path for path, _ in trees.items(params, place)]
    at = f"layer {place}: " if place else ""
    if isinstance(network, Residual) and paths:
        why = "a Residual with parameters inside and others outside is not a chain: its input "
        end = (None, f"{at}{why}reaches past them")
        return [end, *_walk(network.inner, params, place), end]
    if paths and isinstance(params, tuple | list | dict):
        end = (None, f"{at}{network!r} has parameters {', '.join(paths)}, not one matrix")
        return [end, *(step for path in paths for step in ((path, ""), end))]
    return [(path, "") for path in paths]

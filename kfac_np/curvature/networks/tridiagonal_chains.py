"""Which parameters of a network follow one another: the chains of affine layers."""

from __future__ import annotations

from kfac_np import trees
from kfac_np.errors import CurvatureError
from kfac_np.layers import Layer, Recurrent, Residual, Sequential, Tied
from kfac_np.trees import Tree

__all__ = ["find_chains"]

Chains = tuple[tuple[str, ...], ...]
Steps = list[tuple[str | None, str]]


def find_chains(network: Layer, params: Tree, *, split: bool = False) -> Chains:
    """Find the chains of a network: parameters each of which acts on what the last one made.

    Layers without parameters (activations, pooling, reshapes) do not interrupt a chain, and
    `Sequential` may be nested. What does:

    - a `Residual` with parameters inside and others outside, or in both of its branches: what goes
      into it reaches further than the next layer, and the branches lie side by side. Each branch
      is walked for chains of its own; nothing is coupled across the sum.
    - `Tied` and `Recurrent`. Their statistics are those of all uses together, side by side as
      locations, so that moments with a neighbour would pair a use with whatever stands at its
      place there; and what a use acts on was made in part by an earlier use of the same weights.
      None of their parameters is coupled, neither to neighbours nor within.
    - a layer that has several parameters or is a container unknown here. None of these is
      coupled. A layer unknown here that has one matrix is taken for a link.

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
    for path, why in _walk(network, [path for path, _ in trees.items(params)], ""):
        if path is not None:
            if chains and not current and not split:
                raise CurvatureError(f"{reason}; split=True makes chains of what lies between")
            current.append(path)
        elif current:
            chains.append(tuple(current))
            current, reason = [], why
    return (*chains, tuple(current)) if current else tuple(chains)


def _walk(network: Layer, paths: list[str], place: str) -> Steps:
    """Those of the paths that are below `place`, in order; None where a chain ends, and why."""
    own = [path for path in paths if f"{path}.".startswith(f"{place}.") or not place]
    children = dict(trees.items(network.children, place))
    at = f"layer {place}: " if place else ""
    if isinstance(network, Sequential):
        return [step for key, child in children.items() for step in _walk(child, own, key)]
    if isinstance(network, Residual) and own:
        return _walk_branches([_walk(child, own, key) for key, child in children.items()], at)
    if own and isinstance(network, Tied | Recurrent):
        name = type(network).__name__
        why = f"a {name} is no link of a chain: it acts on what its own weights made"
        return _each_alone(own, f"{at}{why}")
    if own and own != [place]:
        why = f"{network!r} has parameters {', '.join(own)}, not one matrix"
        return _each_alone(own, f"{at}{why}")
    return [(path, "") for path in own]


def _walk_branches(branches: list[Steps], at: str) -> Steps:
    """A sum of branches, none of which is coupled to another or to what lies outside."""
    why = f"{at}a Residual with parameters inside and others outside is not a chain: its input "
    end = (None, f"{why}reaches past them")
    why = f"{at}a Residual with parameters in inner and shortcut is not a chain: the two lie "
    between = (None, f"{why}side by side")
    first, *others = branches
    return [end, *first, *(step for branch in others for step in (between, *branch)), end]


def _each_alone(paths: list[str], why: str) -> Steps:
    end = (None, why)
    return [end, *(step for path in paths for step in ((path, ""), end))]

"""One round of pruning: from a fit and a share to a smaller network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

from kfac_np import trees
from kfac_np.applications.compensating import compensation, quadratic
from kfac_np.applications.factoring import FACTORINGS, Factoring
from kfac_np.applications.fitted import FittedCurvature
from kfac_np.applications.saliency import Method, group_costs, weight_costs
from kfac_np.applications.shrinking import (
    Link,
    absorbed,
    columns_of,
    factored,
    find_links,
    matrices,
    shrunk,
    size_of,
)
from kfac_np.backend import Array, array_namespace
from kfac_np.errors import CurvatureError, InputError
from kfac_np.matrices import BlockDiagonalMatrix, Matrix
from kfac_np.objective import Objective
from kfac_np.trees import Tree

__all__ = ["Pruned", "Remove", "Round"]

Remove = Literal["weights", "units", "inputs", "rank", "eigenvectors"]


@final
@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller network, and what became of each layer.

    Attributes
    ----------
    objective : Objective
        Of the smaller network; for `weights` the one that was given.
    params : tree of Array
    masks : dict of path to Array of bool
        Which weights are kept, where single ones were removed; empty otherwise.
    predicted : float
        ½ δᵀ C δ, summed over the rounds: by how much the quadratic model says that the loss (the
        mean over the terms) has risen.
    before, after : dict of path to int
        Parameters of each layer that was cut; after it those that are not zero by a mask.
    total : tuple of int
        Parameters of the whole network, before and after.

    Examples
    --------
    >>> Pruned(None, (), {}, 0.01, {"0": 40}, {"0": 30}, (50, 40)).share
    0.2
    """

    objective: Objective
    params: Tree
    masks: dict[str, Array]
    predicted: float
    before: dict[str, int]
    after: dict[str, int]
    total: tuple[int, int]

    @property
    def share(self) -> float:
        """The share of all parameters that is gone."""
        return 1.0 - self.total[1] / self.total[0]

    def __str__(self) -> str:
        lines = ["path    parameters     kept"]
        for path, n in self.before.items():
            kept = self.after[path]
            lines.append(f"{path or '(all)':6s} {n:11,d} {kept:8,d}  {100 * kept / n:5.1f} %")
        lines.append(f"{'total':6s} {self.total[0]:11,d} {self.total[1]:8,d}")
        return "\n".join(lines)


@final
@dataclass
class Round:
    """One round: from a fit and a share of what there was at first."""

    objective: Objective
    fit: FittedCurvature
    total: int
    share: float
    asked: float  # the share that is to be gone after the last round
    remove: Remove
    method: Method
    damping: float | None
    paths: tuple[str, ...]
    w: dict[str, Array] = field(init=False)
    level: float = field(init=False)

    def __post_init__(self) -> None:
        xp = array_namespace(*self.fit.operand.values())
        self.w = {path: xp.astype(x, xp.float64) for path, x in self.fit.operand.items()}
        size = sum(math.prod(x.shape) for x in self.w.values())
        mean = float(self.fit.matrix.trace()) / size
        self.level = 0.01 * mean if self.damping is None else self.damping

    def run(self) -> Pruned:
        """Choose, compensate, cut; `Pruned.before` is left to the caller."""
        if self.remove == "weights":
            return self._weights()
        if self.remove in FACTORINGS:
            return self._factors(FACTORINGS[self.remove])
        return self._units()

    @property
    def _surplus(self) -> int:
        """How many parameters are still to go."""
        return math.ceil(self.share * self.total) - (self.total - size_of(self.fit.params))

    def _block(self, path: str) -> Matrix:
        matrix = self.fit.matrix
        if not isinstance(matrix, BlockDiagonalMatrix):
            raise CurvatureError(
                f'prune remove="{self.remove}": expected a block for each layer, got '
                f'{self.fit.curvature!r}, which couples them; use remove="weights"'
            )
        found: Matrix = matrix.blocks[path]
        return found

    def _changed(self, gone: Mapping[str, Array]) -> tuple[dict[str, Array], float]:
        """The parameters after the removal of weights, and what the model says of it."""
        xp = array_namespace(*self.w.values())
        if self.method == "obs":
            delta = compensation(self.fit.matrix, self.w, gone, self.level, tolerance=1e-6)
        else:
            delta = {p: xp.where(gone[p], -x, xp.zeros_like(x)) for p, x in self.w.items()}
        moved = {p: xp.where(gone[p], xp.zeros_like(x), x + delta[p]) for p, x in self.w.items()}
        return moved, quadratic(self.fit.matrix, delta)

    def _inserted(self, operand: Mapping[str, Array]) -> Tree:
        xp = array_namespace(*self.w.values())
        like = self.fit.operand
        return self.fit.insert({p: xp.astype(x, like[p].dtype) for p, x in operand.items()})

    # -------------------------------------------------------------------------------- weights

    def _weights(self) -> Pruned:
        xp = array_namespace(*self.w.values())
        layers = matrices(self.objective.network)
        costs = weight_costs(self.fit.matrix, self.w, self.method, self.level)
        free = {path: columns_of(layers[path]) for path in self.paths}
        flat = xp.concat([xp.reshape(costs[p][:, : free[p]], (-1,)) for p in self.paths])
        count = math.ceil(self.share * self.total)
        if count >= flat.shape[0]:
            raise InputError(
                f"prune share: expected less than the {flat.shape[0]:,} weights of layers "
                f"{', '.join(self.paths)}, of {self.total:,} parameters; "
                f"got {math.ceil(self.asked * self.total):,}"
            )
        rank = xp.argsort(xp.argsort(flat))
        gone, start = (
            {p: xp.zeros(x.shape, dtype=xp.bool, device=x.device) for p, x in self.w.items()},
            0,
        )
        for path in self.paths:
            rows, columns = self.w[path].shape[0], free[path]
            part = xp.reshape(rank[start : start + rows * columns] < count, (rows, columns))
            rest = gone[path][:, columns:]
            gone[path] = xp.concat([part, rest], axis=1)
            start += rows * columns
        moved, cost = self._changed(gone)
        masks = {path: ~gone[path] for path in self.paths}
        after = {path: int(xp.count_nonzero(mask)) for path, mask in masks.items()}
        left = self.total - count
        return Pruned(
            self.objective, self._inserted(moved), masks, cost, {}, after, (self.total, left)
        )

    # ----------------------------------------------------------------------- units and inputs

    def _units(self) -> Pruned:
        links = [
            link
            for link in find_links(self.objective.network).values()
            if (link.path if self.remove == "units" else link.to) in self.paths
        ]
        gone = self._chosen_units(links)
        masks = self._unit_masks(links, gone)
        moved, cost = self._changed(masks)
        if self.remove == "units":
            for link in links:
                if gone[link.path]:
                    moved = self._take_over(link, moved, gone[link.path])
        kept = {
            link.path: [u for u in range(link.units) if u not in gone[link.path]] for link in links
        }
        network, params = shrunk(self.objective.network, self._inserted(moved), kept)
        objective = replace(self.objective, network=network)
        changed = dict.fromkeys(p for link in links for p in (link.path, link.to))
        sizes = {path: math.prod(p.shape) for path, p in trees.items(params) if path in changed}
        return Pruned(objective, params, {}, cost, {}, sizes, (self.total, size_of(params)))

    def _take_over(self, link: Link, moved: dict[str, Array], units: set[int]) -> dict[str, Array]:
        if link.to in moved:
            read = moved[link.to]
            new = absorbed(link, self.fit.params, moved[link.path], sorted(units), read)
            return {**moved, link.to: new}
        read = dict(trees.items(self.fit.params))[link.to]
        new = absorbed(link, self.fit.params, moved[link.path], sorted(units), read)
        if new is not read:
            raise InputError(
                f"prune fit: expected curvature of layer {link.to}, too, whose bias takes over "
                f"what units of layer {link.path} leave behind"
            )
        return moved

    def _chosen_units(self, links: Sequence[Link]) -> dict[str, set[int]]:
        """The cheapest units for the parameters that they free, until enough are gone."""
        shapes = {path: list(p.shape) for path, p in trees.items(self.fit.params)}
        ranked = []
        for link in links:
            path, axis = (link.path, 0) if self.remove == "units" else (link.to, 1)
            groups = [[unit] for unit in range(link.units)] if axis == 0 else link.columns
            costs = group_costs(
                self._block(path), self.w[path], groups, axis, self.method, self.level
            )
            freed = self._freed(link, shapes)
            ranked += [(float(costs[u]) / freed, u, link) for u in range(link.units)]
        gone: dict[str, set[int]] = {link.path: set() for link in links}
        left = self._surplus
        for _, unit, link in sorted(ranked, key=lambda item: item[0]):
            if left <= 0:
                return gone
            if len(gone[link.path]) + 1 < link.units:
                left -= self._freed(link, shapes)
                gone[link.path].add(unit)
                shapes[link.path][0] -= 1
                shapes[link.to][1] -= len(link.columns[unit])
        if left > 0:
            most = 1.0 - (size_of(self.fit.params) - self._surplus + left) / self.total
            raise InputError(
                f"prune share: expected at most {most:.3f}, where each layer keeps one unit, got "
                f"{self.asked:g}"
            )
        return gone

    def _freed(self, link: Link, shapes: Mapping[str, Sequence[int]]) -> int:
        norms = sum(shapes[place][0] for place, _ in link.between if place in shapes)
        return shapes[link.path][1] + len(link.columns[0]) * shapes[link.to][0] + norms

    def _unit_masks(self, links: Sequence[Link], gone: Mapping[str, set[int]]) -> dict[str, Array]:
        xp = array_namespace(*self.w.values())
        masks = {p: xp.zeros(x.shape, dtype=xp.bool, device=x.device) for p, x in self.w.items()}
        for link in links:
            path, axis = (link.path, 0) if self.remove == "units" else (link.to, 1)
            lines = set(gone[link.path])
            if axis == 1:
                lines = {c for unit in lines for c in link.columns[unit]}
            flags = [i in lines for i in range(self.w[path].shape[axis])]
            line = xp.asarray(flags, device=self.w[path].device)
            masks[path] = masks[path] | (line[:, None] if axis == 0 else line[None, :])
        return masks

    # ------------------------------------------------------------------------------- products

    def _factors(self, factoring: Callable[[Matrix, Array], Factoring]) -> Pruned:
        """Drop the cheapest directions of all layers until W̄ ≈ P Q has few enough parameters."""
        try:
            found = {path: factoring(self._block(path), self.w[path]) for path in self.paths}
        except CurvatureError as error:
            raise error.within(f'prune remove="{self.remove}"') from None
        ranked = []
        for path, f in found.items():
            saved = sum(self.w[path].shape)
            ranked += [(float(f.costs[k]) / saved, path, k) for k in range(f.costs.shape[0])]
        kept = {path: list(range(f.costs.shape[0])) for path, f in found.items()}
        left = self._size_with(kept)
        for _, path, k in sorted(ranked):
            if self.total - left >= self.share * self.total:
                break
            if len(kept[path]) > 1:
                kept[path].remove(k)
                left = self._size_with(kept)
        if self.total - left < self.share * self.total:
            raise InputError(
                f"prune share: expected at most {1 - left / self.total:.3f}, where each layer "
                f"keeps one direction, got {self.asked:g}"
            )
        smaller = [path for path in self.paths if self._is_smaller(path, kept)]
        products = {path: found[path].keep(kept[path]) for path in smaller}
        xp = array_namespace(*self.w.values())
        delta = {path: xp.zeros_like(x) for path, x in self.w.items()}
        delta |= {path: p @ q - self.w[path] for path, (p, q) in products.items()}
        dtype = self.fit.operand[self.paths[0]].dtype
        cast = {k: (xp.astype(p, dtype), xp.astype(q, dtype)) for k, (p, q) in products.items()}
        network, params = factored(self.objective.network, self.fit.params, cast)
        after = {path: size_of(pair) for path, pair in products.items()}
        return Pruned(
            replace(self.objective, network=network),
            params,
            {},
            quadratic(self.fit.matrix, delta),
            {},
            after,
            (self.total, size_of(params)),
        )

    def _is_smaller(self, path: str, kept: Mapping[str, Sequence[int]]) -> bool:
        rows, columns = self.w[path].shape
        return len(kept[path]) * (rows + columns) < rows * columns

    def _size_with(self, kept: Mapping[str, Sequence[int]]) -> int:
        """Parameters of the network, where a layer is a product if that is smaller."""
        total = self.total
        for path in self.paths:
            rows, columns = self.w[path].shape
            if self._is_smaller(path, kept):
                total -= rows * columns - len(kept[path]) * (rows + columns)
        return total

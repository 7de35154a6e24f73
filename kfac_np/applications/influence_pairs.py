"""Queries meet examples, a few at a time, whatever is backpropagated for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import final

from kfac_np import trees
from kfac_np.applications.fitted import FittedCurvature
from kfac_np.applications.influence_products import Products
from kfac_np.backend import (
    Array,
    all_finite,
    array_namespace,
    require_array,
    require_float,
    require_same_place,
)
from kfac_np.backend.chunks import cut, examples_at_once
from kfac_np.errors import InputError, KfacError
from kfac_np.objective import Evaluation, Objective
from kfac_np.statistics import Scale, Statistics

__all__ = ["Pairs", "Vectors"]

Vectors = Callable[[Evaluation], Array]
"""Which vectors are backpropagated: an evaluation to (K, N, [S,] C)."""
Batch = Sequence[Array]
"""(x, t) or (x, t, weights)."""


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """uᵀ B⁻¹ v for derivatives of the outputs of examples along vectors.

    Attributes
    ----------
    objective : Objective
    fit : FittedCurvature
        Gives the parameters, and which of them are meant.
    products : list of Products
        The blocks of B⁻¹.
    budget_bytes : int
    """

    objective: Objective
    fit: FittedCurvature
    products: list[Products]
    budget_bytes: int

    def cross(
        self,
        queries: Batch,
        of_queries: Vectors,
        examples: Batch,
        of_examples: Vectors,
        *,
        gram: bool = False,
    ) -> Iterator[tuple[int, Array, Array | None]]:
        """Products of queries and examples, all examples for the first queries first.

        Parameters
        ----------
        queries, examples : tuple (x, t) or (x, t, weights)
        of_queries, of_examples : callable
            An `Evaluation` to the vectors, (K, N, [S,] C), that are backpropagated.
        gram : bool
            Also the products of each example's vectors with one another.

        Yields
        ------
        start : int
            Number of the first query of this part.
        cross : Array, shape (K_q, Q', K, N')
        gram : Array or None, shape (N', K, K)
        """
        asked, given = self._checked("queries", queries), self._checked("examples", examples)
        at_once = self._at_once("queries", asked, of_queries, lambda p, one: p.numbers(one, 1)[0])
        for part in cut(asked[0].shape[0], at_once):
            q = part.stop - part.start
            found = self._derivatives("queries", [array[part, ...] for array in asked], of_queries)
            rows = q * _vectors(found)
            held = [p.hold(found) for p in self.products]
            del found  # before the examples come

            def numbers(p: Products, one: Mapping[str, Statistics], rows: int = rows) -> int:
                _, of_cross, of_gram = p.numbers(one, rows)
                return max(of_cross, of_gram) if gram else of_cross

            for found in self._parts("examples", given, of_examples, numbers):
                both = zip(self.products, held, strict=True)
                cross = reduce(add, (p.cross(h, found) for p, h in both))
                shape = (rows // q, q, *cross.shape[1:])
                among = self._gram(found) if gram else None
                yield part.start, array_namespace(cross).reshape(cross, shape), among

    def gram(self, examples: Batch, of_examples: Vectors) -> Iterator[Array]:
        """Products of each example's vectors with one another, parts of shape (N', K, K)."""
        given = self._checked("examples", examples)
        for found in self._parts(
            "examples", given, of_examples, lambda p, one: p.numbers(one, 1)[2]
        ):
            yield self._gram(found)

    def _gram(self, found: Mapping[str, Statistics]) -> Array:
        return reduce(add, (p.gram(found) for p in self.products))

    def _parts(
        self,
        name: str,
        batch: Batch,
        vectors: Vectors,
        numbers: Callable[[Products, Mapping[str, Statistics]], int],
    ) -> Iterator[dict[str, Statistics]]:
        for rows in cut(batch[0].shape[0], self._at_once(name, batch, vectors, numbers)):
            yield self._derivatives(name, [array[rows, ...] for array in batch], vectors)

    def _at_once(
        self,
        name: str,
        batch: Batch,
        vectors: Vectors,
        numbers: Callable[[Products, Mapping[str, Statistics]], int],
    ) -> int:
        """How many examples the budget allows, as the statistics of the first one tell."""
        one = self._derivatives(name, [array[:1, ...] for array in batch], vectors)
        network, shape = self.objective.network, batch[0].shape[1:]
        passes = (2 + 2 * _vectors(one)) * max(network.backward_size(shape), math.prod(shape))
        each = passes + max(numbers(p, one) for p in self.products)
        return examples_at_once(self._like, each, self.budget_bytes)

    def _derivatives(self, name: str, batch: Batch, vectors: Vectors) -> dict[str, Statistics]:
        x, t, *weights = batch
        try:
            e = self.objective.evaluate(self.fit.params, x, t)
        except KfacError as error:
            raise error.within(name) from None
        for w in weights:  # of which all may be 0 in a part
            e = replace(e, scale=Scale(e.scale.terms, e.scale.examples, w))
        found: dict[str, Statistics] = dict(trees.items(e.backward(vectors(e))))
        return {path: found[path] for path in self.fit.paths}

    def _checked(self, name: str, batch: Batch) -> Batch:
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3) or batch[1] is None:
            came = type(batch).__name__
            if isinstance(batch, tuple | list):
                came = f"({', '.join(type(part).__name__ for part in batch)})"
            raise InputError(
                f"{name}: expected (x, t) or (x, t, weights), as influence is on losses, got {came}"
            )
        x, t, *weights = batch
        try:
            require_array("x", x)
            require_array("t", t)
            self.objective.evaluate(self.fit.params, x[:1, ...], t[:1, ...])
            for label, array in zip(("t", "weights"), (t, *weights), strict=False):
                require_array(label, array)
                if array.shape[0] != x.shape[0]:
                    raise InputError(
                        f"{label}: expected {x.shape[0]} examples, as in x, got {array.shape[0]}"
                    )
            for w in weights:
                require_float("weights", w)
                require_same_place("weights", w, self._like, "parameters")
                if w.ndim != 1 or not all_finite(w) or bool(array_namespace(w).any(w < 0)):
                    raise InputError("weights: expected a vector of finite numbers >= 0")
        except KfacError as error:
            raise error.within(name) from None
        return batch

    @property
    def _like(self) -> Array:
        return self.fit.operand[self.fit.paths[0]]


def _vectors(found: Mapping[str, Statistics]) -> int:
    return next(iter(found.values())).num_vectors

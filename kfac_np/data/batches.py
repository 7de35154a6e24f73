"""Shuffled minibatches that can be resumed, and rules for their size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np

from kfac_np.backend import Rng
from kfac_np.data.dataset import Labels
from kfac_np.errors import InputError
from kfac_np.validation import plain_fields, require_integer

__all__ = ["BatchSchedule", "BatchState", "ConstantBatch", "GrowingBatch", "MiniBatches"]

BatchSchedule: TypeAlias = Callable[[int, int], int]
"""(k, n) -> size of the k-th batch, k = 1, 2, …, of n examples."""


@final
@dataclass(frozen=True)
class BatchState:
    """How far the examples are used: all that a checkpoint needs to know.

    Parameters
    ----------
    epoch : int
        Number of passes that are finished.
    position : int
        Number of examples of the present pass that are used.

    Examples
    --------
    >>> import dataclasses
    >>> dataclasses.asdict(BatchState(2, 30))
    {'epoch': 2, 'position': 30}
    """

    epoch: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        for name, value in (("epoch", self.epoch), ("position", self.position)):
            require_integer(f"BatchState {name}", value, zero=True)


@final
@dataclass(frozen=True)
class MiniBatches:
    """Cut a stream of shuffled examples, one permutation of all n after the other, into batches.

    The permutation of an epoch depends on (seed, epoch) alone, so a state of two integers
    resumes anywhere, bit for bit, and the size may change from batch to batch.

    A batch smaller than n that reaches the end of an epoch is completed from the next one:
    every batch has exactly the size asked for, each epoch's examples occur once, and only such
    a batch can have an example twice. A size of n or more gives the full batch, every example
    exactly once: the present epoch if nothing of it is used yet, otherwise the whole next one
    (what was left of the present one is in it too).

    Parameters
    ----------
    n : int
        Number of examples.
    seed : int
        Non-negative.

    Examples
    --------
    >>> batches = MiniBatches(5)
    >>> state, indices = batches.next(BatchState(), 3)
    >>> state, len(indices)
    (BatchState(epoch=0, position=3), 3)
    >>> state, more = batches.next(state, 4)
    >>> state
    BatchState(epoch=1, position=2)
    >>> sorted([*indices.tolist(), *more[:2].tolist()])
    [0, 1, 2, 3, 4]
    """

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("MiniBatches n", self.n)
        require_integer("MiniBatches seed", self.seed, zero=True)

    def next(self, state: BatchState, size: int) -> tuple[BatchState, Labels]:
        """Return the state after the next batch, and the batch: indices of its examples.

        Parameters
        ----------
        state : BatchState
            ``BatchState()`` to begin with.
        size : int
            At least 1; what exceeds n is cut off.

        Returns
        -------
        BatchState
        array of int64, shape (min(size, n),)

        Raises
        ------
        InputError
            The size is below 1, or the state belongs to a larger data set.

        Examples
        --------
        >>> MiniBatches(3, seed=1).next(BatchState(epoch=0, position=2), 9)[0]
        BatchState(epoch=2, position=0)
        """
        require_integer("MiniBatches batch size", size)
        if state.position >= self.n:
            raise InputError(
                f"MiniBatches: expected a position below n = {self.n}, got {state}: "
                "it belongs to another data set"
            )
        if size >= self.n:
            epoch = state.epoch + (state.position > 0)
            return BatchState(epoch + 1), self._permutation(epoch)
        end = state.position + size
        indices = self._permutation(state.epoch)[state.position : end]
        if end < self.n:
            return BatchState(state.epoch, end), indices
        rest = end - self.n
        if rest:
            indices = np.concatenate([indices, self._permutation(state.epoch + 1)[:rest]])
        return BatchState(state.epoch + 1, rest), indices

    def _permutation(self, epoch: int) -> Labels:
        return Rng(self.seed, "epoch", epoch).permutation(self.n).astype(np.int64, copy=False)


@final
@dataclass(frozen=True)
class ConstantBatch:
    """m_k = min(size, n).

    Parameters
    ----------
    size : int
        At least 1.

    Examples
    --------
    >>> ConstantBatch(256)(1, 1000), ConstantBatch(256)(1, 100)
    (256, 100)
    """

    size: int

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("ConstantBatch size", self.size)

    def __call__(self, k: int, n: int) -> int:
        """Return the size of batch k = 1, 2, … of n examples."""
        _check_step("ConstantBatch", k, n)
        return min(self.size, n)


@final
@dataclass(frozen=True)
class GrowingBatch:
    """m_k = min(m₁ exp((k-1)/b), n, most), rounded, with b such that m_k = n at k = full_at.

    Parameters
    ----------
    first : int
        m₁, at least 1.
    full_at : int
        The step from which the batch would have all n examples, at least 1.
    most : int, optional
        It grows no further than this.

    References
    ----------
    Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature, 2015, section 13, where m₁ = 1000 and m₅₀₀ = n.

    Examples
    --------
    >>> size = GrowingBatch(first=1000, full_at=500)
    >>> [size(k, 60_000) for k in (1, 2, 250, 499, 500, 501)]
    [1000, 1008, 7714, 59510, 60000, 60000]
    """

    first: int = 1000
    full_at: int = 500
    most: int | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        most = self.first if self.most is None else self.most
        for name, value in (("first", self.first), ("full_at", self.full_at), ("most", most)):
            require_integer(f"GrowingBatch {name}", value)
        if most < self.first:
            raise InputError(
                f"GrowingBatch: expected most >= first, got {self.most!r} and {self.first!r}"
            )

    def __call__(self, k: int, n: int) -> int:
        """Return the size of batch k = 1, 2, … of n examples."""
        _check_step("GrowingBatch", k, n)
        most = n if self.most is None else min(self.most, n)
        if k >= self.full_at or self.first >= n:
            return most
        b = (self.full_at - 1) / math.log(n / self.first)
        return min(round(self.first * math.exp((k - 1) / b)), most)


def _check_step(name: str, k: int, n: int) -> None:
    if k < 1 or n < 1:
        raise InputError(f"{name}: expected a step k >= 1 and n >= 1 examples, got k={k}, n={n}")

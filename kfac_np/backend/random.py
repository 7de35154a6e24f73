"""Reproducible random numbers, the same on every backend."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, final

import numpy as np

from kfac_np.backend.array import Array, Backend
from kfac_np.backend.fused import bernoulli
from kfac_np.errors import InputError
from kfac_np.validation import is_integer

__all__ = ["Rng"]


@final
class Rng:
    """A stream of random numbers determined by a seed and a path of integer or string keys.

    A stream goes on, as NumPy's generators do: whatever is given one (`Layer.init`,
    `Objective.evaluate`, `Curvature.estimate`, `Matrix.sample`, ...) takes its next numbers, and
    called again takes others. To draw the same again give the same `child` again, which starts
    from its beginning each time.

    Draws are made by NumPy (PCG64) on the host and then moved to the device, so that runs on
    different backends see the same numbers. Training uses one stream a step,
    ``rng.child("targets", step)``, so that there is no generator state to checkpoint: a resumed
    run draws what an uninterrupted one would have drawn.

    Parameters
    ----------
    seed : int
        Non-negative.
    *keys : int or str
        The path from the seed to this stream; integers are non-negative.

    Raises
    ------
    InputError
        A negative seed or key.

    Examples
    --------
    >>> a, b = Rng(0).child("targets", 7), Rng(0, "targets", 7)
    >>> bool((a.permutation(5) == b.permutation(5)).all())
    True
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.layers import Dense
    >>> rng = Rng(0)
    >>> first, second = (Dense(2, 1).init(rng, get_backend()) for _ in range(2))
    >>> bool((first == second).all())
    False
    """

    def __init__(self, seed: int, *keys: int | str) -> None:
        _require_natural(seed)
        for key in keys:
            if not isinstance(key, str):
                _require_natural(key)
        self.seed = int(seed)
        self.keys = keys
        self._spawned = 0

    @classmethod
    def of(cls, rng: Rng | int) -> Rng:
        """The stream itself, or that of a seed: what `init` takes for an `Rng`.

        Examples
        --------
        >>> Rng.of(3).seed
        3
        >>> Rng.of("3")
        Traceback (most recent call last):
        kfac_np.errors.InputError: rng: expected an Rng or a seed, got '3'
        """
        if isinstance(rng, Rng):
            return rng
        if not is_integer(rng):
            raise InputError(f"rng: expected an Rng or a seed, got {rng!r}")
        return cls(rng)

    @cached_property
    def _generator(self) -> np.random.Generator:
        """Made at the first draw: containers hand a child to every layer, and few of them draw."""
        words = [word for key in self.keys for word in _words(key)]
        # What `SeedSequence(seed, spawn_key=words)` makes of them, without an array for each word.
        seed = _bits(self.seed)
        entropy = [*seed, *[0] * (4 - len(seed)), *words]
        return np.random.default_rng(np.asarray(entropy, dtype=np.uint32))

    def child(self, *keys: int | str) -> Rng:
        """Return the independent stream further down the path.

        Examples
        --------
        >>> Rng(3).child(1).child("a").keys
        (1, 'a')
        """
        return Rng(self.seed, *self.keys, *keys)

    def spawn(self) -> Rng:
        """Return a stream whose children nobody had before: another at each call.

        For what draws from children of the stream it is given, and is to draw others when it is
        given the stream again. The first has the children of the stream itself, so that a stream
        that is used once, as those of the optimisers are, is its own.

        Examples
        --------
        >>> rng = Rng(3)
        >>> [rng.spawn().child("a").keys for _ in range(2)]
        [('a',), ('spawn', 1, 'a')]
        """
        turn, self._spawned = self._spawned, self._spawned + 1
        return self.child("spawn", turn) if turn else self.child()

    def normal(self, shape: tuple[int, ...], backend: Backend) -> Array:
        """Draw standard normal numbers.

        Examples
        --------
        >>> from kfac_np.backend import get_backend
        >>> Rng(0).normal((2, 3), get_backend()).shape
        (2, 3)
        """
        return backend.asarray(self._generator.standard_normal(shape))

    def uniform(self, shape: tuple[int, ...], backend: Backend) -> Array:
        """Draw numbers uniform in [0, 1).

        Examples
        --------
        >>> from kfac_np.backend import get_backend
        >>> bool((Rng(0).uniform((9,), get_backend()) < 1).all())
        True
        """
        # Drawn in single precision where that is what is kept: 1 - 2**-30 would round to 1.
        kind = np.float32 if backend.dtype == backend.xp.float32 else np.float64
        return backend.asarray(self._generator.random(shape, dtype=kind))

    def bernoulli(self, p: Array) -> Array:
        """Draw 1 with probability p and 0 otherwise, for an array of probabilities.

        1 where u < p, with u = (i + f) / 2¹⁶: 16 bits i of its own for each number, which is all
        that is drawn and moved for it, and a fraction f, 8 bits (in double precision 37), that
        the numbers along the last axis share. Each u is uniform over the multiples of 2⁻²⁴ (2⁻⁵³)
        in [0, 1), as from `uniform`, so that P(1) = p up to 2⁻²⁴ (2⁻⁵³). Two numbers of one
        row depend on each other through f alone, with a covariance of 2⁻³⁴ at most.

        Parameters
        ----------
        p : Array
            Probabilities, on any device; below 0 counts as 0, above 1 as 1.

        Returns
        -------
        Array, shape, dtype and device of p

        Examples
        --------
        >>> import numpy as np
        >>> Rng(0).bernoulli(np.asarray([0.0, 1.0, 1.0]))
        array([0., 1., 1.])
        """
        backend, shape = Backend.of(p), p.shape
        n, bits = math.prod(shape), (8 if backend.dtype == backend.xp.float32 else 37)
        words = self._generator.bit_generator.random_raw((n + 3) // 4)
        coarse = words.astype("<u8", copy=False).view("<i2")[:n].astype(np.int16, copy=False)
        steps = self._generator.integers(0, 2**bits, (*shape[:-1], 1) if shape else ())
        fine = backend.asarray(2.0**15 + steps * 2.0**-bits)
        return bernoulli(p, backend.asarray(coarse.reshape(shape)), fine)

    def poisson(self, rate: Any, backend: Backend) -> Array:
        """Draw Poisson numbers for a host array of rates, as floats.

        Examples
        --------
        >>> import numpy as np
        >>> from kfac_np.backend import get_backend
        >>> Rng(0).poisson(np.zeros(2), get_backend())
        array([0., 0.], dtype=float32)
        """
        return backend.asarray(np.asarray(self._generator.poisson(rate), dtype=np.float64))

    def permutation(self, n: int) -> np.ndarray[Any, Any]:
        """Draw a permutation of 0..n-1 (on the host).

        Examples
        --------
        >>> sorted(Rng(0).permutation(3).tolist())
        [0, 1, 2]
        """
        return self._generator.permutation(n)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Draw integers in [low, high) (on the host).

        Examples
        --------
        >>> Rng(0).integers(5, 6, (2,))
        array([5, 5])
        """
        return self._generator.integers(low, high, shape)


def _require_natural(number: object) -> None:
    if not is_integer(number):
        raise InputError(f"Rng: expected integers or names, got {number!r}")
    if number < 0:
        raise InputError(f"Rng: expected a non-negative seed and keys, got {number}")


def _words(key: int | str) -> list[int]:
    """A key as 32-bit words: its kind, its length, itself.

    Different paths then never spell the same words, as (2**32,) and (0, 1), or ("a",) and
    (1, 97), otherwise would.
    """
    if isinstance(key, str):
        letters = key.encode()
        return [1, len(letters), *letters]
    parts = _bits(int(key))
    return [0, len(parts), *parts]


def _bits(number: int) -> list[int]:
    """A number as 32-bit words, the lowest first; at least one."""
    return [(number >> shift) % 2**32 for shift in range(0, max(number.bit_length(), 1), 32)]

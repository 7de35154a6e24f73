"""One pass over a data set (for EKFAC two): the curvature of all of it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kfac_np import trees
from kfac_np.applications.batches import require_batch, require_batches
from kfac_np.applications.fitted import FittedCurvature, chosen_paths, require_sound
from kfac_np.backend import Array, Backend, Rng, all_finite, array_namespace, to_numpy
from kfac_np.curvature import BlockDiagonal, Curvature
from kfac_np.curvature.base import Moments, joined
from kfac_np.errors import CheckpointError, InputError, KfacError
from kfac_np.fisher import Exact, FisherType
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers.base import check_params
from kfac_np.training import checkpoint
from kfac_np.trees import Tree
from kfac_np.validation import require_instance, require_positive

__all__ = ["fit_curvature"]

Parts = tuple[dict[str, Moments], dict[str, Moments]]


def fit_curvature(
    objective: Objective,
    params: Tree,
    batches: Iterable[Sequence[Array]],
    curvature: Curvature | None = None,
    fisher: FisherType | None = None,
    *,
    paths: Iterable[str] | None = None,
    rng: Rng | int = 0,
    resume: str | os.PathLike[str] | None = None,
    save_seconds: float = 30.0,
) -> FittedCurvature:
    """Estimate (1/M) Σ_n J_nᵀ B_n J_n on a whole data set, a batch at a time.

    Batches may differ in size: each counts by its loss terms, so that the result is that of one
    batch with all the data, up to rounding. Sums over batches are in double precision.

    Parameters
    ----------
    objective : Objective
        Of independent examples: for a network with batch statistics, `Objective.evaluation`.
    params : tree of Array
        θ, where the curvature is taken.
    batches : iterable of (x, t) or (x, t, weights)
        On the parameters' device. EKFAC goes through it twice (A and G first, then its
        eigenvalues), and so it must be a list or something else that starts again.
    curvature : Curvature, optional
        `BlockDiagonal()` when omitted: K-FAC of every layer.
    fisher : FisherType, optional
        `Exact()` when omitted: the generalised Gauss-Newton matrix.
    paths : iterable of str, optional
        Parameters to take; all when omitted. The others are held fixed by all that uses the fit.
    rng : Rng or int
        For `MonteCarlo`: batch i has targets of its own stream, whatever was done before.
    resume : path, optional
        Keeps the sums so far in this file. If it is there when the call begins, and of the same
        fit, the call goes on from there, to the same bits; it is deleted at the end. Batches must
        be the same ones in the same order, of which the last that was added up is compared.
    save_seconds : float
        How often.

    Returns
    -------
    FittedCurvature

    Raises
    ------
    InputError
        No batches, a batch that does not fit, or whose moments are not finite; parameters that
        are not finite floats.
    CurvatureError
        A parameter that the curvature does not support.
    CheckpointError
        `resume` is the file of another fit or of other batches, or damaged.

    References
    ----------
    Martens & Grosse 2015, §3; George et al. 2018, arXiv:1806.03884, §3 (the second pass).

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> backend = get_backend("numpy", "float64")
    >>> objective, x = Objective(Dense(2, 1), SquaredError()), Rng(1).normal((9, 2), backend)
    >>> params = objective.network.init(Rng(0), backend)
    >>> whole = fit_curvature(objective, params, [(x, x[:, :1])])
    >>> parts = fit_curvature(objective, params, [(x[:2], x[:2, :1]), (x[2:], x[2:, :1])])
    >>> bool(abs(whole.moments[""]["A"] - parts.moments[""]["A"]).max() < 1e-15)
    True
    """
    curvature = BlockDiagonal() if curvature is None else curvature
    fisher = Exact() if fisher is None else fisher
    for name, value, kind in (
        ("objective", objective, Objective),
        ("curvature", curvature, Curvature),
        ("fisher", fisher, FisherType),
    ):
        require_instance(f"fit_curvature {name}", value, kind)
    require_positive("fit_curvature save_seconds", save_seconds, zero=True)
    require_batches("fit_curvature", batches)
    check_params(params)
    if objective.network.couples_examples:
        raise InputError(
            "fit_curvature objective: expected independent examples, got a network with batch "
            "statistics; fit `objective.evaluation(params, x)`, whose statistics are those of x"
        )
    known = tuple(path for path, _ in trees.items(params))
    covered = known if paths is None else chosen_paths(paths, known)
    chosen = fisher if paths is None else _OfSome(fisher, covered)
    stream = Rng.of(rng).spawn()
    first = _Pass(objective, params, batches, chosen, stream, curvature.parts)
    file = _Progress(resume, save_seconds, _identity(objective, curvature, chosen, params, stream))
    done = file.load(Backend.of(trees.leaves(params)[0]))

    before = done.first if done else None
    if before is None:
        before = first.run(file, None, done.sums if done else None)
    moments = before.means()
    second = curvature.second_pass(moments, trees.leaves(params)[0])
    if second is not None:
        if iter(batches) is batches:
            raise InputError(
                f"fit_curvature batches: {curvature!r} goes through them twice; expected a list, "
                "got an iterator, which is used up by the first pass"
            )
        again = _Pass(objective, params, batches, chosen, stream, _of_vectors(second.estimate))
        started = done.sums if done and done.first else None
        moments = second.joined(moments, again.run(file, before, started).means())
    fit = FittedCurvature(
        curvature=curvature,
        fisher=repr(fisher),
        params=params,
        paths=covered,
        moments=moments,
        input_names=before.input_names(),
        terms=before.terms,
        weight=before.weight,
        examples=before.examples,
        loss=before.loss,
        outputs=before.outputs,
    )
    file.remove()
    return require_sound(fit, "fit_curvature")


@final
@dataclass
class _Sums:
    """Sums over batches: what moments were divided by is multiplied in again."""

    batches: int = 0
    terms: int = 0
    examples: int = 0
    weight: float = 0.0  # Σ w over the terms
    loss: float = 0.0
    outputs: int = 0  # of a term
    of_inputs: dict[str, Moments] | None = None
    of_vectors: dict[str, Moments] | None = None

    def means(self) -> dict[str, Moments]:
        return joined(
            trees.scale(1.0 / self.weight, self.of_inputs),
            trees.scale(1.0 / self.terms, self.of_vectors),
        )

    def input_names(self) -> tuple[str, ...]:
        return tuple(sorted({name for m in (self.of_inputs or {}).values() for name in m}))

    def add(self, e: Evaluation, parts: Parts) -> None:
        terms, w = e.scale.terms, e.scale.weights
        weight = float(terms)
        if w is not None:
            weight = e.scale.positions * float(array_namespace(w).sum(_double(w)))
        self.of_inputs = _plus(self.of_inputs, weight, parts[0])
        self.of_vectors = _plus(self.of_vectors, float(terms), parts[1])
        self.batches += 1
        self.terms += terms
        self.examples += e.scale.examples
        self.weight += weight
        self.loss += terms * e.value
        self.outputs = e.outputs.shape[-1]


@final
@dataclass(frozen=True)
class _Pass:
    """What is estimated on each batch, and added up."""

    objective: Objective
    params: Tree
    batches: Iterable[Sequence[Array]]
    fisher: FisherType
    rng: Rng
    parts: Callable[[Evaluation, FisherType, Rng], Parts]

    def run(self, file: _Progress, before: _Sums | None, started: _Sums | None) -> _Sums:
        sums = started or _Sums()
        done, number = sums.batches, -1
        for number, batch in enumerate(self.batches):
            if number < done - 1:
                continue
            try:
                require_batch(batch)
                if number == done - 1:
                    file.require_last(batch)
                    continue
                self._add(number, batch, sums)
            except KfacError as error:
                raise error.within(f"batch {number}") from None
            file.save(before, sums, batch)
        if number < 0:
            raise InputError("fit_curvature batches: expected at least one, got none")
        if number + 1 < sums.batches:
            raise CheckpointError(
                f"fit_curvature resume: expected at least {sums.batches} batches, as the file has, "
                f"got {number + 1}"
            )
        return sums

    def _add(self, number: int, batch: Sequence[Array], sums: _Sums) -> None:
        x, t, *weights = batch
        e = self.objective.evaluate(self.params, x, t, weights[0] if weights else None)
        parts = self.parts(e, self.fisher, self.rng.child("targets", number))
        for moments in parts:
            for path, m in moments.items():
                if m and not all_finite(*m.values()):
                    raise InputError(f"layer {path}: moments are not finite")
        sums.add(e, parts)


@final
@dataclass(frozen=True)
class _OfSome(FisherType):
    """The statistics of some parameters only, by path."""

    fisher: FisherType
    paths: tuple[str, ...]

    def vectors(self, e: Evaluation, rng: Rng) -> Any:
        return self.fisher.vectors(e, rng)

    def statistics(self, e: Evaluation, rng: Rng) -> Any:
        for tree in self.fisher.statistics(e, rng):
            yield {path: s for path, s in trees.items(tree) if path in self.paths}


@final
@dataclass(frozen=True)
class _Done:
    first: _Sums | None  # the sums of the first pass, where it is complete
    sums: _Sums | None  # those of the pass that was interrupted


@final
class _Progress:
    """The file that an interrupted fit goes on from."""

    def __init__(
        self, path: str | os.PathLike[str] | None, seconds: float, identity: dict[str, str]
    ) -> None:
        self._path = None if path is None else Path(path)
        self._seconds = seconds
        self._identity = identity
        self._batch: str | None = None  # of the file, the last one that was added up
        self._last = time.monotonic()

    def load(self, backend: Backend) -> _Done | None:
        if self._path is None or not self._path.exists():
            return None
        tree, metadata = checkpoint.load(self._path, backend)
        for name, expected in self._identity.items():
            if metadata.get(name) != expected:
                raise CheckpointError(
                    f"{self._path}: expected sums of a fit with {name} {expected}, got "
                    f"{metadata.get(name)}; delete the file to begin anew"
                )
        self._batch = metadata.get("batch")
        first, sums = (None if x is None else _Sums(**x) for x in (tree["first"], tree["sums"]))
        return _Done(first, sums)

    def require_last(self, batch: Sequence[Array]) -> None:
        """Raise `CheckpointError` unless the file's last batch was this one."""
        if _digest(enumerate(batch)) != self._batch:
            raise CheckpointError(
                f"{self._path}: expected the batch that was added up before, got another; give the "
                "same batches in the same order, or delete the file to begin anew"
            )

    def save(self, first: _Sums | None, sums: _Sums, batch: Sequence[Array]) -> None:
        now = time.monotonic()
        if self._path is None or now - self._last < self._seconds:
            return
        tree = {"first": None if first is None else dict(vars(first)), "sums": dict(vars(sums))}
        metadata = {**self._identity, "batch": _digest(enumerate(batch))}
        checkpoint.save(self._path, tree, metadata)
        self._last = time.monotonic()

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _identity(
    objective: Objective, curvature: Curvature, fisher: FisherType, params: Tree, stream: Rng
) -> dict[str, str]:
    return {
        "objective": repr(objective),
        "curvature": repr(curvature),
        "fisher": repr(fisher),
        "rng": f"{stream.seed} {stream.keys}",
        "parameters": _digest(trees.items(params)),
    }


def _digest(named: Iterable[tuple[object, Array | None]]) -> str:
    digest = hashlib.sha256()
    for name, x in named:
        if x is not None:
            host = to_numpy(x)
            digest.update(f"{name} {host.dtype} {host.shape}".encode())
            digest.update(host.tobytes())
    return digest.hexdigest()


def _of_vectors(
    estimate: Callable[[Evaluation, FisherType, Rng], dict[str, Moments]],
) -> Callable[[Evaluation, FisherType, Rng], Parts]:
    return lambda e, fisher, rng: ({}, estimate(e, fisher, rng))


def _plus(
    total: dict[str, Moments] | None, factor: float, moments: dict[str, Moments]
) -> dict[str, Moments]:
    mine = trees.tree_map(lambda x: factor * _double(x), moments)
    return mine if total is None else trees.axpy(1.0, mine, total)


def _double(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.astype(x, xp.float64)

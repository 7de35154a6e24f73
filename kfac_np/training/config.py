"""What a run is made of: frozen dataclasses, the names of their parts, and TOML files of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from kfac_np import data, optimizers
from kfac_np.errors import ConfigError
from kfac_np.training.annotations import name_in
from kfac_np.training.defaults import STAND_IN, complete, presets_by_name
from kfac_np.training.files import write_text
from kfac_np.training.parts import Model, choices
from kfac_np.training.settings import build, dump
from kfac_np.training.tables import parse_toml
from kfac_np.validation import require_in, require_integer, require_one_of

__all__ = [
    "BackendSettings",
    "Config",
    "DataSettings",
    "RunSettings",
    "fingerprint",
    "from_table",
    "read_table",
    "to_table",
    "toml",
    "write",
]


_MOST_THREADS = 2**16


@final
@dataclass(frozen=True)
class DataSettings:
    """Which data set, where it is (a relative path is made absolute), and how much of it.

    Parameters
    ----------
    name : str
        curves, digits, fashion-mnist, cifar10, cifar100, cifar:DIR or idx:DIR.
    directory : str, optional
        Where the files of Fashion-MNIST or CIFAR are.
    download : bool
        Whether they may be downloaded.
    n_train, n_test : int, optional
        Keep only the first so many.

    Examples
    --------
    >>> DataSettings(n_train=100).name
    'curves'
    """

    name: str = "curves"
    directory: str | None = None
    download: bool = False
    n_train: int | None = None
    n_test: int | None = None

    def __post_init__(self) -> None:
        kind, _, place = self.name.partition(":")
        if "\0" in f"{place}{self.directory}":
            raise ConfigError("expected a path without null characters")
        if place:
            object.__setattr__(self, "name", f"{kind}:{os.path.abspath(place)}")
        if self.directory is not None:
            object.__setattr__(self, "directory", os.path.abspath(self.directory))

    def load(self) -> data.Dataset:
        """Load the data set."""
        return data.load(
            self.name,
            self.directory,
            download=self.download,
            n_train=self.n_train,
            n_test=self.n_test,
        )


@final
@dataclass(frozen=True)
class BackendSettings:
    """Array library and precision.

    Examples
    --------
    >>> BackendSettings().name
    'numpy'
    """

    name: Literal["numpy", "cupy", "torch", "array_api_strict"] = "numpy"
    dtype: Literal["float32", "float64"] = "float32"


@final
@dataclass(frozen=True)
class RunSettings:
    """How long to train, and what to write down on the way.

    Parameters
    ----------
    steps, seconds : int and float, optional
        The budget: training ends when the first of the two is used up. Seconds count
        optimisation steps only.
    evaluations : int
        How often the model is evaluated, spread evenly over the budget (besides once before the
        first step and once after the last).
    evaluation_examples : int
        Training examples that are evaluated, the first ones; always the same.
    statistics_examples : int
        Training examples, the first ones, that batch statistics are taken from when a network with
        such is evaluated: all at once, and for every evaluation anew, since they depend on the
        parameters.
    checkpoint_every : int
        Steps between checkpoints; with 0 only the last step gets one.
    keep_checkpoints : int
    threads : int, optional
        That BLAS and this library work on; as many as the environment says by default. The last
        digits of a run depend on it.

    Examples
    --------
    >>> RunSettings(steps=100).evaluation_due(before=(3, 0.1), after=(4, 0.2))
    True
    """

    steps: int | None = None
    seconds: float | None = None
    evaluations: int = 25
    evaluation_examples: int = 2000
    statistics_examples: int = 500
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            require_integer("steps", self.steps, zero=True)
        if self.seconds is not None:
            require_in("seconds", self.seconds, "[0, inf]")
        if self.steps is None and self.seconds is None:
            raise ConfigError("expected a budget, steps or seconds, got neither")
        for name in ("evaluations", "checkpoint_every"):
            require_integer(name, getattr(self, name), zero=True)
        for name in ("evaluation_examples", "statistics_examples", "keep_checkpoints"):
            require_integer(name, getattr(self, name))
        if self.threads is not None:
            require_integer("threads", self.threads)
            if self.threads > _MOST_THREADS:
                raise ConfigError(f"threads: expected at most {_MOST_THREADS}, got {self.threads}")

    def finished(self, step: int, seconds: float) -> bool:
        """Tell whether the budget is used up."""
        by_steps = self.steps is not None and step >= self.steps
        return by_steps or (self.seconds is not None and seconds >= self.seconds)

    def evaluation_due(self, before: tuple[int, float], after: tuple[int, float]) -> bool:
        """Tell whether a step from (step, seconds) `before` to `after` passes an evaluation."""
        return self._slot(*after) > self._slot(*before)

    def checkpoint_due(self, step: int) -> bool:
        """Tell whether a step is followed by a checkpoint."""
        return self.checkpoint_every > 0 and step % self.checkpoint_every == 0

    def _slot(self, step: int, seconds: float) -> int:
        used = [step / self.steps] if self.steps else []
        used += [seconds / self.seconds] if self.seconds else []
        return int(self.evaluations * min(1.0, max(used, default=0.0)))


@final
@dataclass(frozen=True)
class Config:
    """Everything that determines a run.

    Parameters
    ----------
    model : Model
    optimizer : Optimizer
    batch : BatchSchedule
    run : RunSettings
    seed : int
    data : DataSettings
    backend : BackendSettings
    variant : str, optional
        The name that the optimiser was asked for by, where it is one of
        `kfac_np.training.defaults.presets_by_name`.

    Examples
    --------
    >>> config = from_table({"model": {"sizes": [30, 6]}, "run": {"steps": 10}})
    >>> config.model.sizes, type(config.optimizer).__name__, config.variant
    ((30, 6), 'KFAC', 'kfac-autoencoder')
    """

    model: Model
    optimizer: optimizers.Optimizer
    batch: data.BatchSchedule
    run: RunSettings
    seed: int = 0
    data: DataSettings = field(default_factory=DataSettings)
    backend: BackendSettings = field(default_factory=BackendSettings)
    variant: str | None = None

    def __post_init__(self) -> None:
        require_integer("seed", self.seed, zero=True)
        if self.run.threads is not None and self.backend.name in ("cupy", "torch"):
            raise ConfigError(
                f"run.threads: expected with the backend numpy, got {self.backend.name}, whose "
                "threads are its own"
            )


def from_table(table: Mapping[str, Any]) -> Config:
    """Build a configuration from TOML tables; what is not said takes its default (`complete`).

    Raises
    ------
    ConfigError
        An unknown option or name, a wrong type or a refused value, with what was expected.

    Examples
    --------
    >>> from_table({"model": {"sizes": [30, 6]}, "run": {"steps": 10}, "data": {"nme": "curves"}})
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: data: unknown option 'nme', expected name, directory, download, ...
    """
    _refuse_moved(table)
    table = {"run": {}, **complete(table)}
    names, name = choices(), table["optimizer"]["name"]
    presets = presets_by_name()
    require_one_of("optimizer.name", name, [*names[optimizers.Optimizer], *presets])
    variant = name if name in presets else None
    if variant is not None:
        kind = name_in(names[optimizers.Optimizer], presets[variant](STAND_IN))
        table["optimizer"] = {**table["optimizer"], "name": kind}
    given = {"objective": STAND_IN, "variant": variant}
    config: Config = build(Config, table, names, given=given)
    optimizer = config.optimizer
    if "seed" not in table["optimizer"] and any(
        f.name == "seed" for f in dataclasses.fields(optimizer)
    ):
        optimizer = dataclasses.replace(optimizer, seed=config.seed)  # type: ignore[call-arg]
        config = dataclasses.replace(config, optimizer=optimizer)
    return config


_MOVED = {
    "optimizer.statistics": "optimizer.moving_average.interval",
    "optimizer.least_statistics": "a quarter of optimizer.step_rule.least_examples",
    "optimizer.step_rule.balance": "optimizer.balance",
    "optimizer.gamma.within": "optimizer.gamma.maximum of 'search'; of 'relative' it is 10",
    "optimizer.gamma.bound": "optimizer.gamma.maximum of 'search'; of 'relative' it is 10",
    "optimizer.gamma.ratio": "0.3, and no option",
    "optimizer.damping.minimum": "optimizer.damping.floor",
    "optimizer.damping.maximum": "1e8 typical eigenvalues, none if optimizer.damping.floor is 0",
    "optimizer.damping.ceiling": "1e8 typical eigenvalues, none if optimizer.damping.floor is 0",
    "optimizer.averaging.warm_up": "optimizer.averaging.power",
    "optimizer.guard.errors": "4, and no option",
    "optimizer.guard.settling": "50, and no option",
    "optimizer.curvature.unit_free": "optimizer.relative",
    "optimizer.curvature.block.unit_free": "optimizer.relative",
}
"""What options of earlier versions are now."""


def _refuse_moved(table: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an option that has another name or place by now, or none."""
    for path, place in _MOVED.items():
        found: Any = table
        for key in path.split("."):
            found = found.get(key, _MOVED) if isinstance(found, Mapping) else _MOVED
        if found is not _MOVED:
            raise ConfigError(f"{path}: no option any more; it is {place}")


def to_table(config: Config) -> dict[str, Any]:
    """Return the complete configuration, from which `from_table` builds the same again.

    Examples
    --------
    >>> config = from_table({"data": "digits", "run": {"steps": 10}})
    >>> table = to_table(config)
    >>> table["optimizer"]["damping"]["interval"], from_table(table) == config
    (5, True)
    """
    table: dict[str, Any] = dump(Config, config, choices())
    del table["variant"]
    if config.variant is not None:
        table["optimizer"]["name"] = config.variant
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    return {**plain, **{k: v for k, v in table.items() if isinstance(v, dict)}}


def fingerprint(config: Config) -> str:
    """Return a hash of all that a run may not change: everything but its budget and threads.

    Examples
    --------
    >>> short, long = (from_table({"run": {"steps": n}}) for n in (10, 20))
    >>> fingerprint(short) == fingerprint(long)
    True
    """
    run = dataclasses.replace(config.run, steps=0, seconds=None)
    table = to_table(dataclasses.replace(config, run=run))
    del table["run"]["threads"]
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def read_table(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    ConfigError
        It is absent, or not TOML.

    Examples
    --------
    >>> read_table("no/such/file.toml")
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: no/such/file.toml: expected a TOML file, found no such file
    """
    try:
        # Names of files that are not UTF-8 keep their bytes (`write_text`).
        return parse_toml(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: expected a TOML file, found no such file") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: expected a TOML file ({error})") from error


def toml(table: Mapping[str, Any]) -> str:
    r"""Return tables as TOML text. Needs tomli-w.

    Raises
    ------
    ConfigError
        tomli-w is missing.

    Examples
    --------
    >>> toml({"seed": 3})
    'seed = 3\n'
    """
    try:
        import tomli_w
    except ImportError as error:
        raise ConfigError("config files need tomli-w: pip install tomli-w") from error
    return tomli_w.dumps(table)


def write(path: str | os.PathLike[str], table: Mapping[str, Any]) -> None:
    """Write tables to a TOML file as a whole. Needs tomli-w.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write(f"{directory}/config.toml", {"seed": 3})
    ...     read_table(f"{directory}/config.toml")
    {'seed': 3}
    """
    write_text(path, toml(table))

"""The command compare: several optimisers, the same start, the same time."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kfac_np.backend import to_numpy
from kfac_np.cli.arguments import table_from
from kfac_np.cli.commands import (
    extended,
    make_room,
    only_resuming,
    show,
    title_of,
    try_to_draw,
)
from kfac_np.cli.progress import announce_restart, interruptible, observing, require_extras
from kfac_np.cli.thread_choice import with_threads
from kfac_np.data import Dataset
from kfac_np.errors import ConfigError, DivergenceError, FactorizationError, KfacError
from kfac_np.training import plots
from kfac_np.training.config import Config, from_table, read_table, to_table, toml, write
from kfac_np.training.defaults import default_optimizer
from kfac_np.training.experiment import Experiment
from kfac_np.training.files import write_text
from kfac_np.training.lock import locked
from kfac_np.training.loop import Position
from kfac_np.training.metrics import reconstruct
from kfac_np.training.records import to_json
from kfac_np.training.run import CONFIG, SUMMARY, read_config, run
from kfac_np.training.tables import merge
from kfac_np.validation import did_you_mean

__all__ = ["compare", "configs_of"]

FAILED, INTERRUPTED = 1, 130
_DEFAULT_SECONDS = 30.0
_PICTURES = 10


def compare(flags: argparse.Namespace) -> int:
    """Train with each optimiser in turn; print a table, write summary and pictures.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> words = ["compare", "--data", "digits", "--optimizers", "sgd,adam", "--print-config"]
    >>> compare(make_parser().parse_args(words))
    seed = 0
    ...
    0
    """
    only_resuming(flags)
    if flags.resume:
        if not Path(flags.resume).is_dir():
            raise ConfigError(
                f"{flags.resume}: expected the directory of a comparison, found no such directory"
            )
        table = read_table(Path(flags.resume) / CONFIG)
        if "compare" not in table:
            raise ConfigError(
                f"{flags.resume}: expected a comparison, found a single run; use train --resume"
            )
    else:
        table = table_from(flags)
    configs = {
        label: extended(config, flags)
        for label, config in configs_of(table, flags.optimizers).items()
    }
    if flags.print_config:
        print(toml(_shared_table(configs)), end="")
        return 0
    require_extras()
    datasets = _load(configs)
    directory = Path(flags.resume or flags.out or "runs/compare")
    if not flags.resume:
        for label, config in configs.items():
            try:
                Experiment.of(config, datasets[label]).check()
            except KfacError as error:
                raise error.within(label) from error
    configs = with_threads(configs, flags)
    if not flags.resume:
        make_room(directory)
    with locked(directory) as require:
        return _compare(configs, datasets, directory, flags, require)


def configs_of(table: Mapping[str, Any], names: str | None = None) -> dict[str, Config]:
    """Return one configuration for each optimiser of a comparison.

    Parameters
    ----------
    table : mapping
        What all have in common, and under "compare" what each has of its own.
    names : str, optional
        Which, separated by commas; those under "compare", or else the default
        optimiser of the model and its data (`default_optimizer`), SGD and Adam.

    Raises
    ------
    ConfigError
        As `from_table`; or there is no optimiser, or the same one twice, or a name that cannot
        be that of a directory.

    Examples
    --------
    >>> table = {"data": "digits", "run": {"steps": 3}, "compare": {"slow": {
    ...     "optimizer": {"name": "sgd", "rate": 1e-4}}}}
    >>> configs = configs_of(table, "slow,sgd")
    >>> configs["slow"].optimizer.rate, configs["sgd"].batch == configs["slow"].batch
    (0.0001, True)
    """
    own = table.get("compare", {})
    if not isinstance(own, Mapping) or not all(isinstance(v, Mapping) for v in own.values()):
        raise ConfigError("compare: expected a table for each optimiser, got something else")
    if "optimizer" in table:
        raise ConfigError("optimizer: expected with train; compare has compare.NAME.optimizer")
    labels = list(own) if names is None else [name.strip() for name in names.split(",")]
    labels = labels or [default_optimizer(table), "sgd", "adam"]
    if len(set(labels)) < len(labels) or not all(map(str.strip, labels)):
        raise ConfigError(f"--optimizers: expected different names, got {','.join(labels)!r}")
    if escaping := [n for n in labels if n in (".", "..") or set(n) & set("/\\\0")]:
        raise ConfigError(
            f"compare: expected names that can be directories, without separators, got "
            f"{escaping[0]!r}"
        )
    if unused := sorted(own.keys() - labels):
        raise ConfigError(
            f"compare: expected settings of {', '.join(labels)}; got {unused[0]!r}"
            f"{did_you_mean(unused[0], labels)}"
        )
    common = {k: v for k, v in table.items() if k != "compare"}
    if not {"steps", "seconds"} & set(common.get("run", {})):
        common = merge(common, {"run": {"seconds": _DEFAULT_SECONDS}})
    configs = {}
    for label in labels:
        with_name = merge({"optimizer": {"name": label}}, own.get(label, {}))
        configs[label] = from_table(merge(common, with_name))
    return configs


def _compare(
    configs: Mapping[str, Config],
    datasets: Mapping[str, Dataset],
    directory: Path,
    flags: argparse.Namespace,
    require: Callable[[], None],
) -> int:
    write(directory / CONFIG, _shared_table(configs))
    code = 0
    summaries: dict[str, dict[str, Any]] = {}
    pictures: dict[str, Any] = {}
    for label, config in configs.items():
        experiment = Experiment.of(config, datasets[label])
        position, summary = _run(label, experiment, directory / label, flags)
        summaries[label] = {"optimizer": label, **summary}
        code = code if summary["status"] != "failed" else FAILED
        if position is not None and experiment.task == "reconstruction":
            pictures.setdefault("data", to_numpy(experiment.test[0][:_PICTURES, ...]))
            params = position.parameters[summary["parameters"]]
            images = reconstruct(
                experiment.frozen(params), params, experiment.test[0][:_PICTURES, ...]
            )
            pictures[label] = to_numpy(images)
        if summary["status"] == "interrupted":
            code = INTERRUPTED
            break
    require()
    write_text(directory / SUMMARY, to_json(summaries, indent=2) + "\n")
    title = "; ".join(dict.fromkeys(map(title_of, configs.values())))

    def draw_curves() -> None:
        curves = [c for label in summaries for c in plots.read_curves(directory / label, label)]
        plots.plot_curves(directory / "curves.png", curves, title=title)

    def draw_images() -> None:
        shape = next(iter(datasets.values())).image_shape
        plots.plot_images(directory / "reconstructions.png", pictures, shape, title)

    try_to_draw("curves.png", draw_curves)
    if pictures:
        try_to_draw("reconstructions.png", draw_images)
    show(summaries)
    print(f"Everything is in {directory}")
    return code


def _load(configs: Mapping[str, Config]) -> dict[str, Dataset]:
    """Load each data set once."""
    loaded: dict[Any, Dataset] = {}
    for config in configs.values():
        if config.data not in loaded:
            loaded[config.data] = config.data.load()
    return {label: loaded[config.data] for label, config in configs.items()}


def _run(
    label: str, experiment: Experiment, directory: Path, flags: argparse.Namespace
) -> tuple[Position | None, dict[str, Any]]:
    """Train with one optimiser; one that diverges does not end the comparison."""
    resume = bool(flags.resume) and (directory / CONFIG).exists()
    if resume:
        read_config(directory)  # a damaged one is not to be written over
        announce_restart(directory)
    settings = experiment.config.run
    try:
        with interruptible() as interrupted, observing(label, settings, interrupted) as observer:
            return run(
                experiment, directory, resume=resume, fall_back=flags.fall_back, observer=observer
            )
    except (DivergenceError, FactorizationError) as error:
        print(f"kfac-np: {label}: {error}", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError):
            summary: dict[str, Any] = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
            return None, summary
        raise  # there was no summary to be had


def _shared_table(configs: Mapping[str, Config]) -> dict[str, Any]:
    """The complete configuration: what all have in common, and the rest of each."""
    tables = {label: to_table(config) for label, config in configs.items()}
    first = next(iter(tables.values()))
    common = {k: v for k, v in first.items() if all(t[k] == v for t in tables.values())}
    common.pop("optimizer", None)
    own = {
        label: {k: v for k, v in table.items() if k not in common}
        for label, table in tables.items()
    }
    return {**common, "compare": own}

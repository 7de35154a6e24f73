"""The commands train, describe and factors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kfac_np import curvature
from kfac_np.cli.arguments import table_from
from kfac_np.cli.outline import outline
from kfac_np.cli.progress import announce_restart, interruptible, observing, require_extras
from kfac_np.cli.thread_choice import with_threads
from kfac_np.errors import CheckpointError, ConfigError, DivergenceError, FactorizationError
from kfac_np.optimizers import KFAC
from kfac_np.optimizers.family import Preconditioned
from kfac_np.optimizers.family.description import describe_preconditioners
from kfac_np.training import checkpoint, plots
from kfac_np.training.annotations import name_in
from kfac_np.training.config import Config, from_table, to_table, toml
from kfac_np.training.experiment import Experiment
from kfac_np.training.lock import locked
from kfac_np.training.parts import ConvNet, Model, ResNet, choices
from kfac_np.training.run import CHECKPOINTS, new_directory, read_config, run
from kfac_np.training.tables import merge

__all__ = [
    "describe",
    "extended",
    "factors",
    "has_budget",
    "make_room",
    "only_resuming",
    "show",
    "title_of",
    "train",
    "try_to_draw",
]

INTERRUPTED = 130
_NO_STEPS = {"run": {"steps": 0}}


def train(flags: argparse.Namespace) -> int:
    """Train one network, or go on with a run.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> words = ["train", "--data", "digits", "--steps", "1", "--print-config"]
    >>> train(make_parser().parse_args(words))
    seed = 0
    ...
    0
    """
    only_resuming(flags)
    if flags.resume:
        config = extended(read_config(flags.resume), flags)
    else:
        table = table_from(flags)
        if flags.print_config and not has_budget(table):
            return _print_without_budget(table)
        config = from_table(table)
    if flags.print_config:
        print(toml(to_table(config)), end="")
        return 0
    require_extras()
    experiment = Experiment.of(config)
    directory = Path(flags.resume or flags.out or "runs/train")
    if not flags.resume:
        experiment.check()
    experiment = replace(experiment, config=with_threads({"": config}, flags)[""])
    if flags.resume:
        announce_restart(directory)
    else:
        make_room(directory)
    preconditioned = isinstance(config.optimizer, Preconditioned)
    label = (preconditioned and config.variant) or type(config.optimizer).__name__
    try:
        with interruptible() as interrupted, observing(label, config.run, interrupted) as observer:
            _, summary = run(
                experiment,
                directory,
                resume=bool(flags.resume),
                fall_back=flags.fall_back,
                observer=observer,
            )
    except (DivergenceError, FactorizationError):
        try_to_draw("curves.png", partial(_draw_curves, directory, label, config))
        raise
    try_to_draw("curves.png", partial(_draw_curves, directory, label, config))
    show({label: summary})
    print(f"Everything is in {directory}")
    return INTERRUPTED if summary["status"] == "interrupted" else 0


def describe(flags: argparse.Namespace) -> int:
    """Print the layer table of a model and of its curvature; of an image model, all its layers.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> describe(make_parser().parse_args(["describe", "--data", "digits", "--sizes", "6"]))
    path  layer         parameters    block      factors ...
    ...
    0
    """
    table = table_from(flags)
    without_budget = not has_budget(table)
    if flags.print_config and without_budget:
        return _print_without_budget(table)
    config = from_table(merge(table, _NO_STEPS) if without_budget else table)
    if flags.print_config:
        print(toml(to_table(config)), end="")
        return 0
    if config.data.name == "curves":  # made on the spot: the shape is all that matters
        config = replace(config, data=replace(config.data, n_train=1, n_test=1))
    experiment = Experiment.of(config)
    optimizer = experiment.optimizer
    approximation = (
        optimizer.curvature if isinstance(optimizer, KFAC) else curvature.BlockDiagonal()
    )
    params = experiment.start().state.params
    network, shape = optimizer.objective.network, experiment.supply.x.shape[1:]
    if isinstance(optimizer, Preconditioned):  # before all output
        described = describe_preconditioners(optimizer, params, shape)
    else:
        described = curvature.describe(network, params, approximation, shape)
    if isinstance(config.model, ConvNet | ResNet):  # what became of the image is of interest
        print(f"{outline(network, shape)}\n")
    print(described)
    return 0


def factors(flags: argparse.Namespace) -> int:
    """Draw the Kronecker factors of a run's newest checkpoint, and their spectra.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> factors(make_parser().parse_args(["factors", "no/such/run"]))
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: no/such/run: expected a run directory, found no such directory
    """
    directory = Path(flags.directory)
    config = read_config(directory)
    path, tree, metadata = checkpoint.load_latest(directory / CHECKPOINTS)
    state = tree.get("optimizer") if isinstance(tree, dict) else None
    moments = state.get("moments") if isinstance(state, dict) else None
    if not isinstance(config.optimizer, KFAC) or not moments:
        raise CheckpointError(f"{path}: expected a state of KFAC with curvature moments")
    out = Path(flags.out or directory / "factors.png")
    plots.plot_factors(out, moments, f"{title_of(config)}, step {metadata['step']}")
    print(f"Factors of step {metadata['step']} are in {out}")
    return 0


def make_room(directory: Path) -> None:
    """Make a new run directory, and say so where an older one had to move.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     make_room(Path(place) / "run")
    """
    moved = new_directory(directory)
    if moved is not None:
        print(f"The older run in {directory} is now in {moved}")


def only_resuming(flags: argparse.Namespace) -> None:
    """Raise `ConfigError` if a resumed run is to become another one, or a new one to fall back.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> only_resuming(make_parser().parse_args(["train", "--resume", "a", "--steps", "9"]))
    """
    if not flags.resume:
        if flags.fall_back:
            raise ConfigError("--fall-back: expected with --resume DIR")
        return
    fixed = {k for k, v in vars(flags).items() if v not in (None, False, [])}
    allowed = {"command", "resume", "fall_back", "steps", "seconds", "threads", "debug"}
    allowed |= {"print_config"}
    if changed := sorted(fixed - allowed):
        names = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise ConfigError(f"--resume: the run goes on as it began, without {names}")


def extended(config: Config, flags: argparse.Namespace) -> Config:
    """Give a run another budget, where the flags say one.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> config = from_table({"run": {"steps": 5}})
    >>> flags = make_parser().parse_args(["train", "--resume", "a", "--steps", "9"])
    >>> extended(config, flags).run.steps
    9
    """
    budget = {n: getattr(flags, n) for n in ("steps", "seconds") if getattr(flags, n) is not None}
    return replace(config, run=replace(config.run, **budget)) if budget else config


def try_to_draw(picture: str, draw: Callable[[], None]) -> None:
    """Draw a picture of a run that is over, or say why that fails: the run is what it is.

    Examples
    --------
    >>> try_to_draw("curves.png", lambda: None)
    """
    try:
        draw()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"kfac-np: {picture} could not be drawn ({reason:.200})", file=sys.stderr)


def show(summaries: dict[str, dict[str, Any]]) -> None:
    """Print a table, one line for each run, and say which made things worse.

    Examples
    --------
    >>> show({"sgd": {"steps": 9, "seconds": 0.5, "training_loss": 2.5, "status": "finished",
    ...     "parameters": "current", "training_accuracy": 0.5, "test": {"accuracy": 0.25}}})
    run  steps  seconds  training loss  training accuracy  test accuracy  parameters
    sgd      9      0.5            2.5                0.5           0.25     current
    """
    titles = {"training_loss": "training loss", "training_accuracy": "training accuracy"}
    titles["reconstruction_error"] = "squared error"
    first = next(iter(summaries.values()))
    figures = [name for name in titles if name in first]
    header = ["run", "steps", "seconds", *(titles[n] for n in figures)]
    header += [f"test {_test_title(n)}" for n in first["test"] if n != "loss"] + ["parameters"]
    rows = [header]
    for label, s in summaries.items():
        numbers = [s[name] for name in figures]
        numbers += [value for name, value in s["test"].items() if name != "loss"]
        status = s["parameters"] if s["status"] == "finished" else s["status"]
        cells = [label, str(s["steps"]), f"{s['seconds']:.1f}"]
        rows.append([*cells, *map(_number, numbers), status])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [cell.rjust(w) for cell, w in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    for label, s in summaries.items():
        began, loss = s.get("training_loss_at_start"), s["training_loss"]
        if s["status"] == "finished" and began is not None and began < loss:
            print(
                f"kfac-np: {label}: the training loss rose from {began:.4g} to {loss:.4g}; use a "
                "smaller learning rate or more damping",
                file=sys.stderr,
            )


def title_of(config: Config) -> str:
    """Name the data and the model, for a picture.

    Examples
    --------
    >>> title_of(from_table({"data": "digits", "run": {"steps": 1}}))
    'digits, autoencoder 32-16-6'
    >>> title_of(from_table({"data": "idx:/data/mine", "model": "convnet", "run": {"steps": 1}}))
    'mine, convnet'
    """
    kind, _, place = config.data.name.partition(":")
    model = name_in(choices()[Model], config.model)
    sizes = "-".join(map(str, getattr(config.model, "sizes", ())))
    return f"{Path(place).name or kind}, {model} {sizes}".rstrip()


def has_budget(table: Mapping[str, Any]) -> bool:
    """Tell whether a configuration says how long to train.

    Examples
    --------
    >>> has_budget({"run": {"steps": 3}}), has_budget({"run": {"evaluations": 3}})
    (True, False)
    """
    settings = table.get("run", {})
    if not isinstance(settings, Mapping):
        return True  # what it is instead is for `from_table` to say
    return any(settings.get(name, "none") != "none" for name in ("steps", "seconds"))


def _print_without_budget(table: dict[str, Any]) -> int:
    """Print all settings but the budget, which is still to be chosen."""
    shown = to_table(from_table(merge(table, _NO_STEPS)))
    print(toml(merge(shown, {"run": {"steps": "none"}})), end="")
    return 0


def _draw_curves(directory: Path, label: str, config: Config) -> None:
    with locked(directory):
        curves = plots.read_curves(directory, label)
        plots.plot_curves(directory / "curves.png", curves, title=title_of(config))


def _test_title(name: str) -> str:
    return "squared error" if name == "reconstruction_error" else name


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

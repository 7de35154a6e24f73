"""Flags, and the configuration tables that they stand for."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, final

from kfac_np.errors import ConfigError
from kfac_np.figures import figures
from kfac_np.optimizers.family import METHODS
from kfac_np.training.config import read_table
from kfac_np.training.defaults import complete, set_optimizer, variants
from kfac_np.training.tables import assign, merge, parse_assignment
from kfac_np.validation import did_you_mean, listed

__all__ = ["add_run", "make_parser", "table_from"]

_SETTINGS = """\
Every setting is reachable: in TOML (--config), or as --set PATH=VALUE, for example
  --set optimizer.damping.initial=10 --set optimizer.refresh.interval=5
  --set optimizer.fisher=exact --set optimizer.averaging=none
  --optimizer sgd --set optimizer.rate='{name="cosine", initial=0.1, steps=1000}'
--print-config shows all of them with their values; an unknown one lists its neighbours."""

_SETTINGS_OF_EACH = """\
Every setting is reachable: in TOML (--config), or as --set PATH=VALUE; those of one optimiser
begin with compare and its name, for example
  --set model.activation=tanh --set compare.kfac.optimizer.damping.initial=10
  --set compare.sgd.optimizer.rate='{name="cosine", initial=0.1, steps=1000}'
--print-config shows all of them with their values; an unknown one lists its neighbours."""

_CODES_OF_RUNS = """\
Exit codes: 0 success; 1 the run failed (it diverged, say); 2 bad usage, configuration, data or
checkpoint; 130 interrupted, 143 terminated, 129 hung up: the step is finished and a checkpoint
saved."""

_CODES = """\
Exit codes: 0 success; 1 it failed; 2 bad usage, configuration, data or checkpoint."""

_DIAGNOSIS = """\
Products of matrices are timed in fresh processes: as it is, with other numbers of threads, and
without environment variables that pin kernels. docs/doctor.md explains what is printed.

Exit codes: 0 whatever is advised; 1 something is broken; 2 bad usage."""

# Flags that stand for one option each.
_PATHS = {
    "data": "data.name",
    "data_dir": "data.directory",
    "download": "data.download",
    "n_train": "data.n_train",
    "n_test": "data.n_test",
    "model": "model.name",
    "sizes": "model.sizes",
    "activation": "model.activation",
    "init": "model.initializer",
    "optimizer": "optimizer.name",
    "curvature": "optimizer.curvature.name",
    "batch_size": "batch",
    "backend": "backend.name",
    "dtype": "backend.dtype",
    "steps": "run.steps",
    "seconds": "run.seconds",
    "evaluations": "run.evaluations",
    "evaluation_examples": "run.evaluation_examples",
    "checkpoint_every": "run.checkpoint_every",
    "threads": "run.threads",
    "seed": "seed",
}


@final
class _Parser(argparse.ArgumentParser):
    """Reports bad usage like every other error: in one line, and by the command it is about."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help tells more)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse here what a command does not know: it would be reported without the command."""
        for word in args or ():  # argparse would take the value away
            if re.fullmatch("--[a-z0-9-]+=--", word):
                self.error(f"argument {word[:-3]}: expected a value, got '--'")
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = next((word for word in unknown if word.startswith("-")), unknown[0])
            meant = did_you_mean(option.partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        known = action.choices
        if known is not None and value not in known:
            names = listed(known)
            meant = did_you_mean(value, known)
            raise argparse.ArgumentError(action, f"expected {names}, got {value!r}{meant}")


@final
class _Version(argparse.Action):
    """Looks the version up only when asked: what that imports takes longer than --help."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("kfac_np")
        except metadata.PackageNotFoundError:  # run from its source, not installed
            version = "(not installed)"
        print(f"kfac_np {version}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands.

    Examples
    --------
    >>> make_parser().parse_args(["train", "--steps", "3"]).steps
    3
    """
    parser = _Parser(prog="kfac-np", description="Train networks with K-FAC, SGD or Adam.")
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, summary: str, *epilog: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="\n\n".join(epilog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        return command

    train = add("train", "train one network", _SETTINGS, _CODES_OF_RUNS)
    _add_problem(train)
    _add_optimizer(train)
    _add_running(train)
    train.set_defaults(command="train")

    summary = "train with several optimisers, for the same time each"
    compare = add("compare", summary, _SETTINGS_OF_EACH, _CODES_OF_RUNS)
    _add_problem(compare)
    names = ["kfac", *variants(), "sgd", "adam", *METHODS, "gram"]
    compare.add_argument(
        "--optimizers",
        metavar="A,B,...",
        help=f"among {', '.join(names)} (default: train's, sgd and adam; or, if the configuration "
        "has compare.NAME, just the names it has); a name of your own needs "
        "--set compare.NAME.optimizer.name=..., and compare.NAME.PATH sets options of one",
    )
    _add_running(compare)
    compare.set_defaults(command="compare")

    summary = "print the layer table: parameters, blocks, factor sizes, cost"
    describe = add("describe", summary, _SETTINGS, _CODES)
    _add_problem(describe)
    _add_optimizer(describe)
    describe.set_defaults(command="describe")

    factors = add("factors", "draw a K-FAC run's Kronecker factors and their spectra", _CODES)
    factors.add_argument("directory", type=_path, metavar="RUN_DIR")
    factors.add_argument("--out", type=_path, metavar="FILE", help="default RUN_DIR/factors.png")
    factors.set_defaults(command="factors")

    fit = add("fit", "fit a curvature to a run's training data, into RUN_DIR/curvature.npz", _CODES)
    add_run(fit)
    fit.set_defaults(command="fit")

    summary = (
        "tell how far a run's predictions hold: a posterior of its parameters, tuned and drawn"
    )
    posterior = add("uncertainty", summary, _CODES)
    add_run(posterior)
    precision = posterior.add_mutually_exclusive_group()
    precision.add_argument(
        "--prior", type=_positive, metavar="X", help="prior precision (default: tuned)"
    )
    precision.add_argument(
        "--tune",
        choices=("validation", "evidence"),
        help="the prior precision on half of the test set, which is then not reported on (default "
        "for up to 100 outputs), or by marginal likelihood",
    )
    posterior.add_argument("--last-layer", action="store_true", help="a posterior of this one only")
    posterior.add_argument(
        "--examples",
        type=_count,
        metavar="N",
        help="test examples (default: all, of networks with more than 100 outputs 200)",
    )
    posterior.set_defaults(command="uncertainty")
    _add_pruning(add("prune", "make a run's network smaller, into RUN_DIR/pruned.npz", _CODES))

    tracing = "which training examples a run's worst predictions come from"
    _add_influence(add("influence", tracing, _CODES))

    summary = "draw the K-FAC papers' figures (docs/figures.md) and their numbers"
    drawing = add("figures", summary, _CODES)
    drawing.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(figures())}, or all")
    drawing.add_argument("--quick", action="store_true", help="of tiny networks, within seconds")
    drawing.add_argument("--out", type=_path, metavar="DIR", help="default runs/figures")
    drawing.set_defaults(command="figures")

    doctor = add("doctor", "tell how fast this machine computes, and what to change", _DIAGNOSIS)
    doctor.add_argument(
        "--backend", choices=("numpy", "cupy"), default="numpy", help="cupy: the GPU, too"
    )
    doctor.add_argument("--seconds", type=_seconds, default=2.0, metavar="S", help="default 2")
    doctor.add_argument("--json", action="store_true", help="for a bug report")
    doctor.set_defaults(command="doctor")
    return parser


def _add_influence(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add = parser.add_argument
    add(
        "--queries",
        type=_count,
        default=6,
        metavar="N",
        help="the N test examples with the largest losses (default 6)",
    )
    add("--test", type=_natural, nargs="+", metavar="I", help="these test examples instead")
    add("--top", type=_count, default=4, metavar="K", help="the K most extreme (default 4)")
    add(
        "--damping",
        type=float,
        metavar="X",
        help="what is added to the curvature (default: a tenth of each layer's mean eigenvalue)",
    )
    parser.set_defaults(command="influence")


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add = parser.add_argument
    add(
        "--remove",
        choices=("weights", "units", "inputs", "rank", "eigenvectors"),
        help="what goes (default inputs: units, by what the layers that read them lose; rank where "
        "no units can go)",
    )
    add(
        "--share",
        type=float,
        metavar="X",
        help="of all parameters (default: the most that costs a point of test accuracy at most, or "
        "2 %% of the test loss)",
    )
    add("--rounds", type=_count, default=3, metavar="N", help="with fits in between (default 3)")
    parser.set_defaults(command="prune")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that begins with a run and a curvature fitted to its data.

    Examples
    --------
    >>> make_parser().parse_args(["fit", "runs/train", "--curvature", "ekfac"]).curvature
    'ekfac'
    """
    add = parser.add_argument
    add("directory", type=_path, metavar="RUN_DIR")
    add(
        "--curvature",
        choices=("kfac", "ekfac", "diagonal", "block-tridiagonal", "full"),
        help="default: what RUN_DIR/curvature.npz is, or else kfac",
    )
    add(
        "--fisher",
        choices=("exact", "monte-carlo", "empirical"),
        help="default: likewise, or else exact, for more than 100 outputs monte-carlo",
    )
    add("--batch-size", type=_count, metavar="N", help="examples at a time (default: by memory)")


def table_from(flags: argparse.Namespace) -> dict[str, Any]:
    """Lay configuration file, flags and --set over each other, the later over the earlier.

    Examples
    --------
    >>> flags = make_parser().parse_args(["train", "--data", "digits", "--rate", "0.1",
    ...     "--optimizer", "sgd", "--steps", "5", "--set", "run.evaluations=2"])
    >>> table = table_from(flags)
    >>> table["run"], table["optimizer"]
    ({'steps': 5, 'evaluations': 2}, {'name': 'sgd', 'rate': 0.1})
    """
    table: dict[str, Any] = read_table(flags.config) if flags.config else {}
    for name, path in _PATHS.items():
        value = getattr(flags, name, None)
        if value is not None and value is not False:
            table = assign(table, path, value)
    for assignment in flags.set:
        table = merge(table, parse_assignment(assignment))
    short = {n: getattr(flags, n, None) for n in ("rate", "momentum", "damping", "l2")}
    if any(value is not None for value in short.values()):
        table = set_optimizer(complete(table), **short)
    return table


def _add_problem(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and model")
    add = group.add_argument
    add(
        "--data",
        metavar="NAME",
        help="curves (default), digits, fashion-mnist, cifar10, cifar100, cifar:DIR or idx:DIR",
    )
    add(
        "--data-dir",
        type=_path,
        metavar="DIR",
        help="where the files of Fashion-MNIST or CIFAR are",
    )
    add("--download", action="store_true", help="allow downloading Fashion-MNIST or CIFAR")
    add("--n-train", type=int, metavar="N", help="keep only the first N training examples")
    add("--n-test", type=int, metavar="N")
    add("--model", metavar="NAME", help="autoencoder (default), mlp, convnet or resnet")
    add(
        "--sizes",
        type=_sizes,
        metavar="N,N,...",
        help="hidden layers of an mlp, or of an autoencoder down to the code, which are mirrored",
    )
    add("--activation", metavar="NAME", help="of hidden units: logistic, tanh, relu, gelu, ...")
    add("--init", metavar="NAME", help="initial weights: sparse, glorot, he, fan-in")
    add(
        "--batch-size",
        type=_batch,
        metavar="N|N:K[:M]",
        help="N:K grows from N to all by step K, :M to M at most",
    )
    add("--backend", metavar="NAME", help="numpy (default), cupy, torch, array_api_strict")
    add("--dtype", metavar="TYPE", help="float32 (default) or float64")
    add("--seed", type=int, metavar="N", help="of parameters, batches and sampled targets")
    add("--config", type=_path, metavar="FILE", help="TOML file; flags go over it")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="set any option")
    add("--print-config", action="store_true", help="print the effective configuration and stop")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimiser")
    add = group.add_argument
    names = ", ".join(["kfac", *variants(), "sgd", "adam", *METHODS, "gram"])
    add(
        "--optimizer",
        metavar="NAME",
        help=f"{names}; default kfac, for autoencoders of images in batches of 500 and more "
        "kfac-autoencoder, for convolutional networks kfac-convolutional",
    )
    add(
        "--curvature",
        metavar="NAME",
        help="K-FAC's: block-diagonal (default), ekfac, block-tridiagonal (of a network that is no "
        "chain, with --set optimizer.curvature.split=true), or for small networks full-kronecker, "
        "full",
    )
    add("--rate", type=float, metavar="X", help="learning rate; K-FAC's is adapted without")
    add("--momentum", type=float, metavar="X")
    add("--damping", type=float, metavar="X", help="K-FAC's λ (the initial one if adapted)")
    add("--l2", type=float, metavar="X", help="coefficient of the ℓ2 term")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--steps", type=int, metavar="N", help="stop after N steps")
    add("--seconds", type=float, metavar="X", help="stop after X seconds of optimisation")
    add("--evaluations", type=int, metavar="N", help="evaluate N times on the way (25)")
    add("--evaluation-examples", type=int, metavar="N", help="on the first N examples (2000)")
    add("--out", type=_path, metavar="DIR", help="run directory; an older run there is moved aside")
    add("--checkpoint-every", type=int, metavar="N", help="steps (default: only at the end)")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="of BLAS (default: what OPENBLAS_NUM_THREADS, OMP_NUM_THREADS, ... say; or else the "
        "number whose products are fastest at the start)",
    )
    add(
        "--resume",
        type=_path,
        metavar="DIR",
        help="go on with the run in DIR, bit for bit; other options "
        "than --steps, --seconds and --threads cannot be changed",
    )
    add(
        "--fall-back",
        action="store_true",
        help="if DIR's newest checkpoint cannot be used, resume from the one before",
    )


def _path(text: str) -> str:
    if not text or "\0" in text:  # a shell variable that is not set, say
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return text


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds <= 60.0:
        raise argparse.ArgumentTypeError(f"expected seconds, up to 60, got {text!r}")
    return seconds


def _sizes(text: str) -> list[int]:
    parts = re.split(r"[,\s-]+", text.strip())
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected sizes as in 400,200,100, got {text!r}")
    return [int(part) for part in parts]


def _batch(text: str) -> Mapping[str, Any]:
    found = re.fullmatch(r"(\d+)(?::(\d+)(?::(\d+))?)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected N, or N:K[:M] for a growing one, got {text!r}")
    if found[2] is None:
        return {"name": "constant", "size": int(found[1])}
    most = "none" if found[3] is None else int(found[3])
    return {"name": "growing", "first": int(found[1]), "full_at": int(found[2]), "most": most}

"""The command uncertainty: a posterior of a run's parameters, and how far its predictions hold."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from typing import Any

from kfac_np.applications import FittedCurvature, Laplace, Prediction
from kfac_np.applications.laplace_predictive import predicted
from kfac_np.backend import Array, array_namespace, to_numpy
from kfac_np.cli.commands import title_of
from kfac_np.cli.progress import Shown, require_extras
from kfac_np.cli.runs import TrainedRun, described, fitted
from kfac_np.errors import ConfigError
from kfac_np.figures.calibration import (
    Reliability,
    Seen,
    coverage,
    draw_coverage,
    draw_reliability,
)
from kfac_np.figures.drawing import Drawing, HostArray, save
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.training.files import write_text
from kfac_np.training.lock import locked
from kfac_np.training.records import to_json
from kfac_np.validation import is_number

__all__ = ["uncertainty"]

_MANY_OUTPUTS, _FEW_EXAMPLES = 100, 200  # each output is carried back
_PICTURES = 12
_AT_ONCE, _MOST_VALIDATION = 100, 1000


def uncertainty(flags: argparse.Namespace) -> int:
    """Tune a Laplace approximation of a run, predict its test set, print and draw the results.

    Examples
    --------
    >>> from kfac_np.cli.arguments import make_parser
    >>> uncertainty(make_parser().parse_args(["uncertainty", "no/such/run"]))
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: no/such/run: expected a run directory, found no such directory
    """
    require_extras()
    run = TrainedRun.read(flags.directory)
    fit = fitted(run, flags.curvature, flags.fisher, flags.batch_size)
    if flags.last_layer:
        fit = fit.select(fit.paths[-1:])
    x, t = _tested(run, flags.examples)
    laplace, how, first = _tuned(Laplace(run.objective, fit), flags, x, t)
    x, t = x[first:, ...], t[first:, ...]
    known, found = _predictions(laplace, x, diagonal=_has_many(fit))
    numbers = {name: _numbers(p, t) for name, p in {"network": known, "posterior": found}.items()}
    summary = {
        "step": run.step,
        "parameters": run.parameters,
        "curvature": described(run, fit),
        "layers": list(fit.paths),
        "tuned": how,
        "log_marginal_likelihood": laplace.log_marginal_likelihood,
        "prior_precision": laplace.prior_precision,
        "noise": laplace.noise,
        "test_examples": int(x.shape[0]),
        **numbers,
    }
    drawing = _drawing(run, known, found, x, t)
    with locked(run.directory):
        write_text(run.directory / "uncertainty.json", to_json(summary, indent=2) + "\n")
        save(drawing, run.directory, "uncertainty")
    _print(summary, laplace)
    print(f"uncertainty.json, uncertainty.png and its numbers are in {run.directory}")
    return 0


def _tested(run: TrainedRun, examples: int | None) -> tuple[Array, Array]:
    x, t = run.test
    many = run.objective.network.output_shape(x.shape[1:])[-1] > _MANY_OUTPUTS
    if examples is not None and examples > x.shape[0]:
        raise ConfigError(
            f"--examples: expected at most {x.shape[0]} test examples, got {examples}"
        )
    n = min(x.shape[0], examples or (_FEW_EXAMPLES if many else x.shape[0]))
    if n < x.shape[0]:
        print(f"The first {n} of {x.shape[0]} test examples (--examples N takes more)")
    return x[:n, ...], t[:n, ...]


def _tuned(
    laplace: Laplace, flags: argparse.Namespace, x: Array, t: Array
) -> tuple[Laplace, str, int]:
    """With its prior precision; how that was found, and how many examples were used for it."""
    if flags.prior is not None:
        return replace(laplace, prior_precision=flags.prior), "given", 0
    half = min(x.shape[0] // 2, _MOST_VALIDATION)
    chosen = flags.tune or ("evidence" if _has_many(laplace.fit) or not half else "validation")
    if chosen == "evidence":
        return laplace.tuned(), "by marginal likelihood", 0
    starts = range(0, half, _AT_ONCE)
    ends = [min(i + _AT_ONCE, half) for i in starts]
    batches = [(x[i:j, ...], t[i:j, ...]) for i, j in zip(starts, ends, strict=True)]
    how = f"on the first {half} test examples, which are not used below"
    print("tuning the prior precision", file=sys.stderr, flush=True)
    best = laplace.tuned_on(batches)
    assert is_number(best.prior_precision)
    if not 1.1e-4 < best.prior_precision * best.noise**2 < 0.9e4:
        print("The best prior precision that was tried is at the end of those that were tried")
    return best, how, half


def _has_many(fit: FittedCurvature) -> bool:
    return fit.outputs > _MANY_OUTPUTS


def _predictions(laplace: Laplace, x: Array, diagonal: bool) -> tuple[Prediction, Prediction]:
    """What the network alone says, with the noise of its training errors, and the posterior."""
    n, loss, fit = x.shape[0], laplace.objective.loss, laplace.fit
    rows = [slice(i, min(i + _AT_ONCE, n)) for i in range(0, n, _AT_ONCE)]
    each = [laplace.outputs(x[r, ...], diagonal) for r in Shown("predicting", rows)]
    xp = array_namespace(x)
    f, spread = (xp.concat(list(parts)) for parts in zip(*each, strict=True))
    sigma = 1.0
    if isinstance(loss, SquaredError):
        sigma = math.sqrt(2.0 * fit.loss / (fit.weight * fit.outputs))
    known = predicted(loss, sigma, f, 0.0 * spread, "map", 1, 0)
    return known, predicted(loss, laplace.noise, f, spread, "probit", 1, 0)


def _numbers(prediction: Prediction, t: Array) -> dict[str, float]:
    """Test NLL, accuracy where there are classes, and how far off the probabilities are."""
    found = {}
    regression = isinstance(prediction.loss, SquaredError)
    if not regression or prediction.output_covariance is not None:
        found["nll"] = prediction.nll(t)
    if regression:
        levels, shares = _coverage(prediction, t)
        return {**found, "coverage_error": float(abs(levels - shares).mean())}
    probability, came_true = _events(prediction, t)
    if isinstance(prediction.loss, SoftmaxCrossEntropy):
        found["accuracy"] = float(came_true.mean())
    return {**found, "calibration_error": Reliability.of(probability, came_true).error}


def _events(prediction: Prediction, t: Array) -> tuple[HostArray, HostArray]:
    """Of classes the confidence and whether it was right; else each probability and target."""
    mean, targets = to_numpy(prediction.mean), to_numpy(t)
    if not isinstance(prediction.loss, SoftmaxCrossEntropy):
        return mean, targets
    return mean.max(axis=-1), mean.argmax(axis=-1) == targets


def _coverage(prediction: Prediction, t: Array) -> tuple[HostArray, HostArray]:
    error = to_numpy(t - prediction.mean)
    return coverage(error, to_numpy(prediction.variance) ** 0.5)


def _drawing(run: TrainedRun, known: Prediction, found: Prediction, x: Array, t: Array) -> Drawing:
    title = f"{title_of(run.experiment.config)}, step {run.step}: test set"
    both = {"network": known, "posterior": found}
    if isinstance(found.loss, SquaredError):
        return draw_coverage({n: _coverage(p, t) for n, p in both.items()}, title, "targets")
    curves = {name: Reliability.of(*_events(p, t)) for name, p in both.items()}
    images = to_numpy(x).reshape(-1, *run.experiment.dataset.image_shape)
    if isinstance(found.loss, SoftmaxCrossEntropy):
        seen = _least_sure(images, known, found, t)
        return draw_reliability(curves, title, "confidence", "share that is right", seen)
    seen = _unknown(images, found)
    return draw_reliability(curves, title, "predicted intensity", "mean intensity", seen)


def _least_sure(
    images: HostArray, known: Prediction, found: Prediction, t: Array
) -> tuple[str, list[Seen]]:
    before, after, targets = to_numpy(known.mean), to_numpy(found.mean), to_numpy(t)
    seen = []
    for i in after.max(axis=-1).argsort()[:_PICTURES]:
        said = after[i].argmax()
        text = (
            f"is {targets[i]}, said {said}\nnetwork {before[i].max():.2f}, now {after[i][said]:.2f}"
        )
        seen.append(Seen(images[i], text))
    return "test images of which the posterior is least sure", seen


def _unknown(images: HostArray, found: Prediction) -> tuple[str, list[Seen]]:
    """Images beside a map of the deviation of their outputs."""
    deviation = to_numpy(found.output_variance) ** 0.5
    seen = []
    for i in (-deviation.mean(axis=-1)).argsort()[: _PICTURES // 2]:
        seen.append(Seen(images[i], "image"))
        map_ = deviation[i] / deviation[i].max()
        seen.append(
            Seen(
                map_.reshape(images[i].shape),
                f"deviation of logits\nup to {deviation[i].max():.2g}",
            )
        )
    return "test images of which the posterior knows least", seen


def _print(summary: dict[str, Any], laplace: Laplace) -> None:
    prior = laplace.prior_precision
    line = f"prior precision {f'{prior:.4g}' if is_number(prior) else _each(prior)}"
    if isinstance(laplace.objective.loss, SquaredError):
        line += f", noise {laplace.noise:.4g}"
    print(summary["curvature"])
    how = summary["tuned"]
    how = "prior precision as given" if how == "given" else f"tuned {how}"
    print(f"posterior of layers {', '.join(summary['layers'])}, {how}")
    print(f"{line}, log marginal likelihood {laplace.log_marginal_likelihood:.6g}")
    titles = {"nll": "test NLL", "calibration_error": "calibration error"}
    names = list(summary["network"])
    print(" " * 10 + "".join(f"{titles.get(n, n.replace('_', ' ')):>20}" for n in names))
    for which in ("network", "posterior"):
        print(f"{which:10}" + "".join(f"{summary[which][name]:20.4g}" for name in names))


def _each(prior: Any) -> str:
    return ", ".join(f"{path}: {value:.4g}" for path, value in prior.items())

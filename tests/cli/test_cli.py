"""The command line: what it prints, writes, and returns."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from kfac_np.cli import main
from kfac_np.cli.commands import show
from kfac_np.cli.progress import interruptible
from kfac_np.errors import ConfigError
from kfac_np.figures import figures
from kfac_np.training import checkpoint
from kfac_np.training.config import from_table, read_table
from kfac_np.training.experiment import Experiment
from kfac_np.training.lock import locked
from kfac_np.training.records import read_records
from kfac_np.training.run import read_config

DIGITS = ["--data", "digits", "--n-train", "120", "--n-test", "40"]
SMALL = [*DIGITS, "--sizes", "8,3"]
CONVNET = ["--model", "convnet", "--set", "model.channels=[2, 3]", "--set", "model.dropout=0.1"]
RESNET = ["--model", "resnet", "--set", "model.widths=[2, 4]"]


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than training does: they are drawn in the tests that look at them."""
    if request.node.get_closest_marker("pictures") is None:
        for name in ("curves", "factors", "images"):
            monkeypatch.setattr(f"kfac_np.training.plots.plot_{name}", not_drawn)


def not_drawn(path: str | os.PathLike[str], *_: object, **__: object) -> None:
    Path(path).touch()


def command(words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start the command as a program of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "kfac_np", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        **options,
    )


def test_train_writes_a_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["train", *SMALL, "--steps", "5", "--checkpoint-every", "2", "--out", str(out)]
    assert main(words) == 0
    assert {p.name for p in out.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "evaluations.jsonl",
        "summary.json",
        "curves.png",
        "checkpoints",
    }
    printed = capsys.readouterr()
    header, row, where = printed.out.splitlines()
    assert header.split()[:3] == ["run", "steps", "seconds"]
    assert row.split()[:2] == ["KFAC", "5"]
    assert where == f"Everything is in {out}"
    assert "step      0" in printed.err
    assert main(words) == 0
    assert f"The older run in {out} is now in {out}.1" in capsys.readouterr().out


def test_train_resumes_and_extends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, directory in ((9, "long"), (4, "short")):
        out = str(tmp_path / directory)
        assert main(["train", *SMALL, "--steps", str(steps), "--out", out]) == 0
    assert main(["train", "--resume", str(tmp_path / "short"), "--steps", "9"]) == 0
    short, long = (
        [
            {k: v for k, v in r.items() if k != "seconds"}
            for r in read_records(tmp_path / d / "metrics.jsonl")
        ]
        for d in ("short", "long")
    )
    assert short == long
    assert len(short) == 9
    assert main(["train", "--resume", str(tmp_path / "short"), "--seed", "3", "--rate", "1"]) == 2
    assert (
        "kfac-np: error: --resume: the run goes on as it began, without --rate, --seed"
        in capsys.readouterr().err
    )


def test_a_run_without_a_checkpoint_says_that_it_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert "starts again" not in capsys.readouterr().out
    for path in checkpoint.checkpoints(tmp_path / "checkpoints"):
        path.unlink()
    assert main(["train", "--resume", str(tmp_path)]) == 0
    expected = f"No checkpoint in {tmp_path}: the run starts again from step 0"
    assert expected in capsys.readouterr().out.splitlines()


def test_an_edited_configuration_is_not_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "--steps", "2", "--out", str(tmp_path)]) == 0
    file = tmp_path / "config.toml"
    file.write_text(file.read_text().replace("n_train = 120", "n_train = 110"))
    assert main(["train", "--resume", str(tmp_path), "--steps", "3"]) == 2
    assert f"has {file} been edited, or was it written by another" in capsys.readouterr().err


def test_flags_file_and_set_lie_over_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        "seed = 1\n[run]\nsteps = 7\nevaluations = 3\n[optimizer.refresh]\ninterval = 9\n"
    )
    words = ["train", "--config", str(file), "--steps", "8", "--print-config", "--damping", "3"]
    words += ["--set", "run.evaluations=4", "--set", "optimizer.fisher=exact", "--l2", "0"]
    words += ["--batch-size", "30:9:60", "--data", "digits", "--dtype", "float64"]
    assert main(words) == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(capsys.readouterr().out)
    config = from_table(read_table(shown))
    assert (config.seed, config.run.steps, config.run.evaluations) == (1, 8, 4)
    optimizer: Any = config.optimizer
    assert (optimizer.refresh.interval, optimizer.damping.initial, optimizer.l2) == (9, 3.0, 0.0)
    assert type(optimizer.fisher).__name__ == "Exact"
    assert config.batch(9, 1000) == 60
    assert config.backend.dtype == "float64"


@pytest.mark.parametrize(("words", "most"), [("600:9", None), ("600:9:700", 700), ("9", 9)])
def test_batch_sizes_that_grow(words: str, most: int | None, capsys: Any, tmp_path: Path) -> None:
    """Of N:K nothing bounds the growth, whatever the default for the data is."""
    flags = ["train", "--data", "fashion-mnist", "--steps", "1", "--batch-size", words]
    assert main([*flags, "--print-config"]) == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(capsys.readouterr().out)
    batch = from_table(read_table(shown)).batch
    assert batch(9, 50_000) == (most or 50_000)


@pytest.mark.pictures
def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "demo"
    words = ["compare", *SMALL, "--optimizers", "kfac,slow,adam", "--steps", "6", "--out", str(out)]
    words += ["--set", "compare.slow.optimizer={name='sgd', rate=1e-9}"]
    assert main(words) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["run", "kfac", "slow", "adam", "Everything"]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["kfac", "slow", "adam"]
    for label, each in summary.items():
        assert each["optimizer"] == label
        assert each["steps"] == 6
        assert each["seconds"] > 0
        assert each["training_loss"] > 0
        assert each["reconstruction_error"] > 0
        assert len(read_records(out / label / "metrics.jsonl")) == 6
    assert summary["kfac"]["training_loss"] < summary["slow"]["training_loss"]
    begun = {
        read_records(out / label / "evaluations.jsonl")[0]["current"]["loss"] for label in summary
    }
    assert len(begun) == 1  # all begin with the same parameters
    for picture in ("curves.png", "reconstructions.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    # Its configuration does the same again, and so does each optimiser's on its own.
    assert main(["compare", "--config", str(out / "config.toml"), "--out", f"{out}2"]) == 0
    assert main(["train", "--config", str(out / "slow" / "config.toml"), "--out", f"{out}3"]) == 0

    def losses(directory: str) -> list[float]:
        return [r["loss"] for r in read_records(Path(directory) / "metrics.jsonl")]

    assert losses(f"{out}/slow") == losses(f"{out}2/slow") == losses(f"{out}3")


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["--data", "curves"], "kfac-autoencoder"),
        (["--data", "curves", "--batch-size", "100"], "kfac"),
        (["--data", "digits", "--model", "convnet"], "kfac-convolutional"),
        (["--data", "digits"], "kfac"),
    ],
)
def test_a_comparison_begins_with_the_default_optimiser_under_its_name(
    capsys: pytest.CaptureFixture[str], words: list[str], first: str
) -> None:
    assert main(["compare", *words, "--print-config"]) == 0
    compared = tomllib.loads(capsys.readouterr().out)["compare"]
    names = {label: table["optimizer"]["name"] for label, table in compared.items()}
    assert names == {first: first, "sgd": "sgd", "adam": "adam"}
    assert main(["train", *words, "--steps", "1", "--print-config"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["optimizer"] == compared[first]["optimizer"]


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "/x", ".", "..", "", " "])
def test_names_of_a_comparison_stay_in_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"[compare.{json.dumps(name)}.optimizer]\nname = 'sgd'\n[run]\nsteps = 1\n")
    words = ["compare", *SMALL, "--config", str(file), "--out", str(tmp_path / "o" / "run")]
    assert main(words) == 2
    assert "names" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"c.toml"}


def test_a_comparison_is_not_taken_for_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path)
    words = [*SMALL, "--steps", "1", "--optimizers", "sgd", "--out", out]
    assert main(["compare", *words]) == 0
    for wrong in (["factors", out], ["train", "--resume", out]):
        assert main(wrong) == 2
        expected = f"expected the directory of one run, found a comparison; use {out}/NAME"
        assert expected in capsys.readouterr().err
    assert main(["compare", "--resume", f"{out}/sgd"]) == 2
    assert "found a single run; use train --resume" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "describe"])
def test_print_config_needs_no_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main([name, "--print-config", "--data", "digits"]) == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(capsys.readouterr().out)
    assert read_table(shown)["run"]["steps"] == "none"
    assert main(["train", "--config", str(shown), "--steps", "4", "--print-config"]) == 0
    assert "steps = 4" in capsys.readouterr().out
    assert main(["train", "--config", str(shown)]) == 2


def test_the_examples_of_the_help_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    examples = capsys.readouterr().out.partition("for example\n")[2].partition("--print-config")[0]
    assert "--optimizer sgd" in examples
    for line in examples.splitlines():
        assert main(["train", "--print-config", *shlex.split(line)]) == 0


def test_compare_goes_on_when_one_diverges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *SMALL, "--optimizers", "sgd,adam", "--steps", "4", "--out", str(tmp_path)]
    assert main([*words, "--set", "compare.sgd.optimizer.rate=1e38"]) == 1
    printed = capsys.readouterr()
    assert "kfac-np: sgd: step" in printed.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [s["status"] for s in summary.values()] == ["failed", "finished"]
    assert "failed" in printed.out


def test_commands_wait_for_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    words = [*SMALL, "--steps", "1", "--out", out]
    assert main(["compare", *words]) == 0
    with locked(out):
        for again in (["compare", *words], ["compare", "--resume", out], ["train", *words]):
            assert main(again) == 2
            assert f"error: another run is writing to {out}" in capsys.readouterr().err
    lone = str(tmp_path / "run" / "sgd")
    for path in checkpoint.checkpoints(f"{lone}/checkpoints"):
        path.unlink()
    with locked(lone):
        assert main(["train", "--resume", lone]) == 2
        assert "starts again" not in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_compare_resumes(tmp_path: Path) -> None:
    words = ["compare", *SMALL, "--optimizers", "sgd,adam", "--steps", "4"]
    for name in ("whole", "cut"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    for path in (tmp_path / "cut" / "adam").rglob("*"):
        if path.is_file():
            path.unlink()
    assert main(["compare", "--resume", str(tmp_path / "cut")]) == 0
    for label in ("sgd", "adam"):
        cut, whole = (
            [r["loss"] for r in read_records(tmp_path / d / label / "metrics.jsonl")]
            for d in ("cut", "whole")
        )
        assert cut == whole


def test_compare_classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", *SMALL, "--model", "mlp", "--optimizers", "kfac,kfac-fixed,sgd"]
    words += ["--steps", "3", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "training accuracy" in capsys.readouterr().out
    assert not (tmp_path / "reconstructions.png").exists()


def test_a_network_that_is_no_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused in one line that says how to leave layers uncoupled; then it works."""
    words = [*DIGITS, *RESNET, "--curvature", "block-tridiagonal"]
    split = ["--set", "optimizer.curvature.split=true"]
    train = ["train", "--steps", "1", "--batch-size", "40", "--out", str(tmp_path / "run")]
    for start in (["describe"], train):
        assert main([*start, *words]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("kfac-np: error: layer ")
        assert "a Residual with parameters inside and others outside is not a chain" in line
        assert " ".join(split) in line
        assert main([*start, *words, *split]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*CONVNET, "--curvature", "full-kronecker"], "FullKronecker: expected weights used at"),
        ([*CONVNET, "--curvature", "block-tridiagonal"], "layers 1 and 4: expected weights used"),
        (
            [*RESNET, "--set", 'optimizer.curvature.overrides.99={name="diagonal"}'],
            "overrides: expected paths among 1, 2, ",
        ),
        (
            [
                *[*RESNET, "--set", "model.normalization=batch"],
                *["--set", "optimizer.curvature.block.sharing=reduce"],
            ],
            "reduce: expected examples that do not influence each other, got batch statistics",
        ),
    ],
)
def test_parts_that_do_not_fit_the_network_leave_the_older_run_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """What only the network reveals is found before anything is moved or written."""
    out = tmp_path / "run"
    assert main(["train", *SMALL, "--steps", "1", "--out", str(out)]) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    settings = [word.replace("optimizer.", "compare.kfac.optimizer.") for word in words]
    if "--curvature" in words:
        at = words.index("--curvature")
        name = f"compare.kfac.optimizer.curvature.name={words[at + 1]}"
        settings[at : at + 2] = ["--set", name]
    for start in (["train", *words], ["compare", "--optimizers", "sgd,kfac", *settings]):
        capsys.readouterr()
        assert main([*start, *DIGITS, "--steps", "1", "--out", str(out)]) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert message in line
        assert line.startswith("kfac-np: error: kfac: ") == (start[0] == "compare")
        assert printed.out == ""
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
def test_networks_for_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: list[str]
) -> None:
    words = [*DIGITS, *model, "--steps", "3", "--batch-size", "40"]
    names = "kfac,kfac-convolutional,kfac-fixed,kfc-pre,sgd,adam"
    assert main(["compare", *words, "--optimizers", names, "--out", str(tmp_path)]) == 0
    assert "test accuracy" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {s["status"] for s in summary.values()} == {"finished"}
    assert main(["factors", str(tmp_path / "kfac")]) == 0
    assert (tmp_path / "kfac" / "factors.png").exists()


def test_describe_shows_what_became_of_the_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", *DIGITS, *CONVNET]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    layers, curvature = lines[: lines.index([])], lines[lines.index([]) + 1 :]
    shapes = [words[-1] for words in layers if words[-1].count("×") == 2]
    assert shapes == ["8×8×1", "8×8×2", "4×4×2", "4×4×2", "4×4×3", "2×2×3", "2×2×3"]
    assert [words[0] for words in curvature] == ["path", "1", "4", "9", "total"]
    assert "19×19," in curvature[2]  # A of 9 · 2 + 1 inputs
    assert main(["describe", *DIGITS, *RESNET]) == 0
    printed = capsys.readouterr().out
    assert "6.1      Conv(2, 4, (1, 1), stride=2, bias=False)" in printed
    assert "4 blocks 2×2" in printed


def test_train_on_a_directory_in_cifar_s_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = random.Random(0).randbytes(3072 * 6)
    records = b"".join(bytes([i % 3]) + pixels[3072 * i : 3072 * (i + 1)] for i in range(6))
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(records)
    words = ["train", "--data", f"cifar:{tmp_path}", *CONVNET, "--steps", "1"]
    assert main([*words, "--batch-size", "4", "--out", str(tmp_path / "run")]) == 0
    assert "Conv(3, 2, (5, 5)" in repr(Experiment.of(read_config(tmp_path / "run")).optimizer)
    words = ["describe", "--data", "cifar", "--data-dir", str(tmp_path), "--model", "mlp"]
    assert main(words) == 0
    assert "Dense(3072, 256)" in capsys.readouterr().out


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe"]) == 0
    printed = capsys.readouterr().out
    assert "Dense(784, 400)" in printed
    assert "A 785×785, G 400×400" in printed
    assert main(["describe", *SMALL, "--optimizer", "sgd"]) == 0
    words = ["describe", *SMALL, "--set", "optimizer.curvature.block=diagonal"]
    assert main(words) == 0
    assert "DiagonalBlock" in capsys.readouterr().out
    assert main([*words, "--print-config"]) == 0
    assert 'name = "diagonal"' in capsys.readouterr().out


@pytest.mark.pictures
def test_factors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("kfac", "sgd"):
        words = ["train", *SMALL, "--steps", "2", "--optimizer", name]
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    assert main(["factors", str(tmp_path / "kfac")]) == 0
    assert (tmp_path / "kfac" / "factors.png").exists()
    assert "Factors of step 2 are in" in capsys.readouterr().out
    assert main(["factors", str(tmp_path / "sgd")]) == 2
    assert "expected a state of KFAC" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "COMMAND: expected train, compare, describe, factors, fit, "),
        (["factor"], "got 'factor'; did you mean 'factors'? (kfac-np --help tells more)"),
        (
            ["train", "--sedonds", "3"],
            "unrecognized arguments: --sedonds 3; did you mean '--seconds'? (kfac-np train --help",
        ),
        (["figures", "--set", "seed=3"], "arguments: --set (kfac-np figures --help tells more)"),
        (["figures", "ficher"], "or all, got 'ficher'; did you mean 'fisher'?"),
        (["doctor", "--backend", "cuppy"], "numpy or cupy, got 'cuppy'; did you mean 'cupy'?"),
        (["train", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["train", "--sizes", "4,x"], "--sizes: expected sizes as in 400,200,100, got '4,x'"),
        (["train", "--batch-size", "x"], "--batch-size: expected N, or N:K[:M] for a growing one"),
        (["train"], "run: expected a budget, steps or seconds, got neither"),
        (["train", "--steps", "1", "--data", "mnist"], "data: expected curves, digits, fashion"),
        (["train", "--steps", "1", "--data", "cifar-10"], "did you mean 'cifar10'?"),
        (["train", "--steps", "1", "--data", "idx:/nowhere"], "/nowhere"),
        (["train", "--steps", "1", "--model", "cnn"], "model.name: expected autoencoder, mlp"),
        (["train", "--steps", "1", "--model", "resnet18"], "got 'resnet18'; did you mean 'resnet'"),
        (
            ["train", "--steps", "1", "--optimizer", "x"],
            "muon, shampoo, kl-shampoo, soap, eva, foof or singd, got 'x'",
        ),
        (["train", "--steps", "1", "--optimizer", "Adma"], "got 'Adma'; did you mean 'adam'?"),
        (["train", "--steps", "1", "--activation", "rleu"], "got 'rleu'; did you mean 'relu'?"),
        (["train", "--steps", "1", "--dtype", "flaot64"], "got 'flaot64'; did you mean 'float64'?"),
        (["train", "--steps", "1", "--set", "run.step=1"], "did you mean 'steps'?"),
        (["train", "--steps", "1", "--set", "x"], "--set: expected path.to.option=value, got 'x'"),
        (["train", "--steps", "1", "--set", "x=1"], "configuration: unknown option 'x'"),
        (["train", "--steps", "1", "--config", "/no"], "/no: expected a TOML file, found no such"),
        (["train", "--steps", "1", "--backend", "jax"], "backend.name: expected numpy, cupy"),
        (["train", "--steps", "1", "--rate", "-1"], "rate: expected a number > 0, got -1.0"),
        (["train", "--resume", "/no"], "/no: expected a run directory, found no such directory"),
        (["train", "--resume", "/"], "/: expected a run directory, found no config.toml in it"),
        (["train", "--steps", "1", "--out", ""], "argument --out: expected a path, got ''"),
        (["compare", "--out", ""], "argument --out: expected a path, got ''"),
        (["train", "--resume", ""], "argument --resume: expected a path, got ''"),
        (["train", "--steps", "1", "--fall-back"], "--fall-back: expected with --resume DIR"),
        (["compare", "--fall-back"], "--fall-back: expected with --resume DIR"),
        (["train", "--print-config", "--set", "run=3"], "run: expected a table"),
        (["compare", "--resume", "/no"], "directory of a comparison, found no such directory"),
        (["compare", "--optimizers", "sgd,sgd"], "--optimizers: expected different names"),
        (["compare", "--optimizers", "sgd,"], "--optimizers: expected different names"),
        (
            ["compare", "--optimizers", "x"],
            (
                "optimizer.name: expected kfac, sgd, adam, gram, preconditioned, kfac-autoencoder, "
                "kfac-convolutional, kfac-fixed, kfc-pre, adamw, nadam, lion, muon, shampoo, "
                "kl-shampoo, soap, eva, foof or singd, got 'x'"
            ),
        ),
        (["compare", "--set", "optimizer.l2=0"], "optimizer: expected with train; compare has"),
        (
            ["compare", "--set", "compare.x.seed=0", "--optimizers", "sgd"],
            "compare: expected settings",
        ),
        (["compare", "--set", "compare.sdg.seed=0", "--optimizers", "sgd"], "did you mean 'sgd'?"),
        (["compare", "--set", "compare=3"], "compare: expected a table for each optimiser"),
        (["train", "--steps", "1", "--out=--"], "argument --out: expected a value, got '--'"),
        (["train", "--steps", "1", "--set=--"], "argument --set: expected a value, got '--'"),
        (["train", "--config", "\0"], r"argument --config: expected a path, got '\x00'"),
        (["train", "--data-dir", ""], "argument --data-dir: expected a path, got ''"),
        (
            ["train", "--steps", "1", "--set", "optimizer.statistics_fraction.name=[1]"],
            "statistics_fraction.name: expected constant, exponential,",
        ),
        (["describe", *DIGITS, "--sizes", f"{10**30}"], "expected fewer than 2^60 parameters"),
        (["factors", "/no"], "/no: expected a run directory"),
        (["describe", "--sizes", "0"], "model sizes"),
        (["describe", "--model", "convnet"], "expected data with labels for a convnet, got"),
        (["describe", "--data", "cifar:/no"], "/no: expected a directory with data_batch_*.bin"),
        (
            ["describe", "--data", "cifar10", "--data-dir", "/no"],
            "looked in /no (no such directory), /no/cifar-10-batches-bin (no such directory). Two",
        ),
        (["describe", "--data", "cifar10", "--data-dir", "/no"], "with --data-dir DIR or in the"),
        (["describe", "--data", "fashion-mnist", "--data-dir", "/no"], "(30 MB) with --download"),
        (["describe", "--data", "digits", "--data-dir", "/no"], "data: expected a directory with"),
        (
            ["describe", *DIGITS, "--model", "resnet", "--set", "model.widths=[1,1,1,1]"],
            "resnet: expected images of at least 9 × 9 pixels for 4 stages, got 8 × 8",
        ),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = message.replace("model sizes", "expected at least two positive layer sizes")
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("kfac-np: error: ")
    assert message in line


def test_a_model_that_does_not_fit_is_bad_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise MemoryError("Unable to allocate 23.3 TiB")

    monkeypatch.setattr("kfac_np.training.experiment.start", start)
    assert main(["describe", *SMALL]) == 2
    expected = "model: expected parameters that fit into memory (Unable to allocate 23.3 TiB)"
    assert capsys.readouterr().err == f"kfac-np: error: {expected}\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError):
        main(["train", "--debug"])


def test_divergence_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", *SMALL, "--optimizer", "sgd", "--rate", "1e38", "--steps", "9"]
    assert main([*words, "--out", str(tmp_path)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("kfac-np: error: step ")
    assert checkpoint.latest(tmp_path / "checkpoints") is not None
    assert (tmp_path / "curves.png").exists()


def test_unexpected_errors_are_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a\nbug")

    monkeypatch.setattr("kfac_np.cli.commands.table_from", broken)
    assert main(["describe"]) == 1
    expected = "kfac-np: error: RuntimeError: a bug (--debug shows the traceback)\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setattr("kfac_np.cli.commands.table_from", lambda _: 1 / 0)
    assert main(["describe"]) == 1


def test_interrupting_before_training_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kfac_np.cli.commands.table_from", interrupted)
    assert main(["describe"]) == 130
    assert capsys.readouterr().err == "kfac-np: interrupted\n"


@pytest.mark.parametrize("module", ["matplotlib", "tqdm", "tomli_w"])
def test_missing_extras_are_named_before_training(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == module else find(n, *a)
    )
    assert main(["train", *SMALL, "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    name = module.replace("_", "-")
    assert f"{name} missing: pip install {name}\n" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "there", "absent"),
    [
        (["--help"], "doctor", "--set"),
        (["--version"], "kfac_np", "--set"),
        (["train", "--help"], "--set optimizer.damping.initial=10", "--set compare"),
        (["describe", "--help"], "--set optimizer.damping.initial=10", "--set compare"),
        (["compare", "--help"], "--set compare.kfac.optimizer", "--set optimizer"),
        (["factors", "--help"], "Exit codes: 0 success", "--set"),
        (["figures", "--help"], " ".join(f"{name}," for name in figures()), "--set"),
        (["doctor", "--help"], "--json", "--set"),
    ],
    ids=" ".join,
)
def test_help_promises_what_there_is(
    words: list[str], there: str, absent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        main(words)
    assert info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert there in text
    assert absent not in text


def test_settings_in_help_are_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for command, budget in (("train", ["--steps", "1"]), ("compare", [])):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        examples = [shlex.split(line) for line in lines if line.startswith("  --") and "=" in line]
        examples = [words for words in examples if "--set" in words and "PATH=VALUE" not in words]
        assert len(examples) == {"train": 3, "compare": 2}[command]
        for words in examples:
            assert main([command, *budget, *words, "--print-config"]) == 0
            capsys.readouterr()


def test_a_picture_that_fails_leaves_the_run_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nlatex")

    for name in ("plot_curves", "plot_images"):
        monkeypatch.setattr(f"kfac_np.training.plots.{name}", fail)
    for command, pictures in (("train", 1), ("compare", 2)):
        words = [command, *SMALL, "--steps", "1", "--out", str(tmp_path / command)]
        assert main(words) == 0
        printed = capsys.readouterr()
        assert printed.err.count("png could not be drawn (RuntimeError: no latex)") == pictures
        assert "Everything is in" in printed.out
    words = ["train", *SMALL, "--optimizer", "sgd", "--rate", "1e38", "--steps", "9"]
    assert main([*words, "--out", str(tmp_path / "failed")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("kfac-np: error: step ")


def test_a_run_that_makes_things_worse_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *SMALL, "--model", "mlp", "--optimizer", "sgd", "--rate", "1e9"]
    assert main([*words, "--steps", "3", "--out", str(tmp_path)]) == 0
    assert "kfac-np: SGD: the training loss rose from 2." in capsys.readouterr().err


def test_a_progress_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for budget in (["--steps", "3"], ["--seconds", "0.01"]):
        assert main(["train", *SMALL, *budget, "--out", str(tmp_path)]) == 0
        assert "100%" in capsys.readouterr().err


def test_a_second_interrupt_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where tests run in the background
    with interruptible() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "interrupt again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows")
def test_a_hangup_is_a_polite_end_unless_it_is_ignored() -> None:
    def hang_up() -> None:
        with interruptible() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)  # the shell's, after the terminal's
            assert interrupted()

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="129"):
            hang_up()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with interruptible() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_the_main_thread_hears_interrupts() -> None:
    heard: list[bool] = []

    def listen() -> None:
        with interruptible() as interrupted:
            heard.append(interrupted())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [False]


def test_an_interrupted_comparison_stops_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def at_once() -> Iterator[Callable[[], bool]]:
        yield lambda: True

    monkeypatch.setattr("kfac_np.cli.comparison.interruptible", at_once)
    words = ["compare", *SMALL, "--optimizers", "sgd,adam", "--steps", "4", "--out", str(tmp_path)]
    assert main(words) == 130
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {label: s["status"] for label, s in summary.items()} == {"sgd": "interrupted"}
    monkeypatch.undo()
    assert main(["compare", "--resume", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [s["steps"] for s in summary.values()] == [4, 4]


def test_the_version_of_a_source_tree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "kfac_np (not installed)\n"


def test_a_figure_that_does_not_exist_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        {
            "sgd": {
                "steps": 1,
                "seconds": 0.1,
                "training_loss": None,
                "status": "failed",
                "parameters": "current",
                "test": {},
            }
        }
    )
    assert capsys.readouterr().out.splitlines()[1].split() == ["sgd", "1", "0.1", "-", "failed"]


def wait_for_lines(path: Path, number: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.0005)
    raise AssertionError(f"no {number} lines: {process.communicate()}")


def test_killed_at_any_moment_and_resumed_it_is_the_same_run(tmp_path: Path) -> None:
    # SIGKILL to a process of its own, again and again, wherever it happens to be.
    words = [*SMALL, "--steps", "100", "--checkpoint-every", "3", "--evaluations", "41"]
    words += ["--set", "optimizer.refresh.interval=7", "--batch-size", "30:150"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", *words, "--out", str(whole)]) == 0
    start = ["train", *words, "--out", str(cut)]
    for lines in (1, 20, 61):
        with command(start) as process:
            wait_for_lines(cut / "metrics.jsonl", lines, process)
            process.send_signal(signal.SIGKILL)
        start = ["train", "--resume", str(cut)]
    with command(start) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        first, second = (
            [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(d / name)]
            for d in (whole, cut)
        )
        assert first == second
        assert len(first) > 40


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_an_interrupt_finishes_the_step_and_saves(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    words = ["train", *SMALL, "--steps", "1000000", "--out", str(tmp_path)]
    with command(words) as process:
        wait_for_lines(tmp_path / "metrics.jsonl", 5, process)
        process.send_signal(number)
        printed, errors = process.communicate()
    assert process.returncode == code, errors
    assert "finishing this step" in errors
    assert "Traceback" not in errors
    assert ("interrupted" in printed) == (number == signal.SIGINT)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"
    steps = len(read_records(tmp_path / "metrics.jsonl"))
    assert checkpoint.load_latest(tmp_path / "checkpoints")[2]["step"] == steps


def test_a_console_without_greek_letters() -> None:
    for words in (["train", "--help"], ["describe", *SMALL]):
        done = subprocess.run(
            [sys.executable, "-m", "kfac_np", *words],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"?" in done.stdout

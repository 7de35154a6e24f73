"""The measuring instrument: that it counts, rejects, takes turns and writes rightly. No speeds."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    convnet,
    laplace,
    measure,
    problems,
    processes,
    race,
    registry,
    report,
    step_code,
    table_data,
    table_report,
    table_runs,
    tables,
    torch_trainee,
    workloads,
)
from benchmarks.contenders import child
from benchmarks.contenders import kfac_np as ours
from kfac_np.data import digits
from kfac_np.optimizers import MovingAverage

ROOT = processes.ROOT
DIGITS = digits()
posix = pytest.mark.skipif(os.name != "posix", reason="contenders are stopped by POSIX signals")


def step(wall, cpu=None, wait=0.0, kind=""):
    return {"wall": wall, "cpu": wall if cpu is None else cpu, "wait": wait, "kind": kind}


# Operations


def test_operations_of_two_dense_layers_by_hand():
    w = workloads.Workload("", workloads.classifier((3, 4, 2)), batch=10, model="exact", refresh=2)
    assert w.operations() == {
        "forward": 2 * 10 * (4 * 4 + 5 * 2),
        "backward": 2 * 10 * (2 * 4),  # nothing goes back to the inputs of the network
        "gradient": 2 * 10 * (4 * 4 + 5 * 2),
        "sampled backward": 2 * 10 * (2 * 4),
        "moments": 10 * (4**2 + 4**2 + 5**2 + 2**2),
        "refresh": (4**3 + 4**3 + 5**3 + 2**3) / 2,
        "solve": 2 * (4 * 4 * 4 + 4 * 4 * 4 + 2 * 2 * 5 + 2 * 5 * 5),
        "model": 2 * 2 * 10 * (4 * 4 + 5 * 2 + 4 * 2),
    }


def test_operations_of_other_methods():
    w = workloads.WORKLOADS["W1-1000-fixed"]
    sgd = w.operations("sgd")
    assert set(sgd) == {"forward", "backward", "gradient"}
    assert sgd["forward"] == w.operations()["forward"]
    assert w.operations("kfac", empirical=True)["sampled backward"] == 0
    eighth = replace(w, statistics_fraction=1 / 8)
    assert eighth.operations()["moments"] == w.operations()["moments"] / 8
    assert "model" not in w.operations()
    exact = workloads.WORKLOADS["W1-1000-exact"]
    quarter = replace(exact, model_fraction=1 / 4)
    assert quarter.operations()["model"] == exact.operations()["model"] / 4


def test_input_moments_of_the_convolutions():
    # 512 images: 76, 801 and 801 columns at 32², 16² and 8² places, half of a product each.
    layers = workloads.WORKLOADS["W2-512"].network.affine()
    assert [(a.d_in + 1, a.d_out, a.positions) for a in layers] == [
        (76, 32, 1024),
        (801, 32, 256),
        (801, 64, 64),
        (1025, 10, 1),
    ]
    inputs = sum(512 * a.positions * (a.d_in + 1) ** 2 for a in layers[:3])
    assert inputs == pytest.approx(108e9, rel=0.01)


@pytest.mark.parametrize("name", ["W1-256-fixed", "W2-128", "W3"])
def test_shapes_are_those_of_the_networks(name):
    w = workloads.WORKLOADS[name]
    setup = child.Setup(w, "kfac", "cpu", "float32", 1, False, {})
    objective = ours.objective(w.network)
    assert objective.network.output_shape((w.network.inputs,)) == (w.network.sizes[-1],)
    from kfac_np import Rng, get_backend, trees

    params = objective.network.init(Rng(0), get_backend())
    shapes = [p.shape for p in trees.leaves(params)]
    assert shapes == [(a.d_out, a.d_in + 1) for a in w.network.affine()]
    assert ours.optimizer(setup, objective).l2 == w.l2


@pytest.mark.parametrize("name", ["W1-256-fixed", "W2-128", "W3"])
def test_the_reference_loss_is_ours(name):
    w = workloads.tiny(workloads.WORKLOADS[name])
    setup = child.Setup(w, "kfac", "cpu", "float64", 1, False, {})
    objective, params, x, t = ours.start(setup)
    expected = objective.evaluate(params, x, t).value
    assert problems.loss(w.network, *problems.problem(w, "float64")) == pytest.approx(expected)


def test_workloads_by_name():
    assert [w.name for w in workloads.select(["W1-256"])] == ["W1-256-fixed", "W1-256-exact"]
    with pytest.raises(SystemExit, match="no workload 'W9'"):
        workloads.select(["W9"])


def test_a_workload_survives_the_line():
    w = workloads.WORKLOADS["W2-128"]
    message = measure.Settings().setup(registry.CONTENDERS["kfac_np-paper"], w)
    told = child.Setup.of(json.loads(json.dumps(message)))
    assert told.workload == replace(w, statistics_fraction=1 / 8, model_fraction=1 / 4)


# Statistics


def test_disturbed_steps_are_rejected_and_counted():
    steps = [step(1.0) for _ in range(9)] + [step(2.0, cpu=1.0), step(1.2, wait=0.2)]
    assert measure.disturbed(steps) == [False] * 9 + [True, True]
    result = measure.summarise(steps, period=1)
    assert (result["rejected"], result["steps"]) == (2, 11)
    assert result["median"] == result["per_step"] == 1.0


def test_what_a_contender_always_does_is_no_disturbance():
    # More threads than cores: its own threads wait for each other in every step.
    assert not any(measure.disturbed([step(1.0 + 0.01 * i, 1.5, wait=0.3) for i in range(10)]))
    # Slow steps that use the processor all the time belong to the contender.
    assert not any(measure.disturbed([step(1.0) for _ in range(9)] + [step(3.0)]))


def test_rare_kinds_of_steps_count_as_often_as_they_come():
    steps = [step(5.0, kind="refresh") if k % 4 == 0 else step(1.0) for k in range(10)]
    result = measure.summarise(steps, period=4)
    assert result["per_step"] == pytest.approx((3 * 1.0 + 5.0) / 4)  # two periods, the last eight
    assert result["median"] == 1.0
    assert result["kinds"]["refresh"] == {"count": 2, "median": 5.0}


def test_quartiles():
    assert measure.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measure.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_the_roofline_is_the_largest_rate():
    best = measure.best_rates({"gemm 1": [1.0, 5.0], "gemm 2": [3.0, 4.0], "copy": [2.0]})
    assert (best["gemm"], best["gemm least"], best["copy"]) == (5.0, 3.0, 2.0)


# Turns


class Scripted:
    """A process that writes down its turns."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def ask(self, do, count=1, **_):
        self.log.append(self.name)
        return {"steps": [step(0.01)] * count}

    def close(self):
        return {}


def scripted(names, settings):
    log = []
    contenders = [replace(registry.CONTENDERS["kfac_np"], name=name) for name in names]
    rounds = measure.Round(workloads.WORKLOADS["W3"], contenders, settings)
    rounds.processes = {name: Scripted(name, log) for name in (*names, "roofline")}
    rounds.steps = {name: [] for name in names}
    rounds.turns = dict.fromkeys(names, 2)
    return rounds, log


def test_contenders_take_turns_and_begin_in_turn():
    rounds, log = scripted(["a", "b", "c"], measure.Settings(rounds=3, gemm_every=2))
    assert rounds._rounds(measure.time.monotonic()) == 3
    assert log == ["roofline", *"abc", *"bca", "roofline", *"cab", "roofline"]
    assert {name: len(steps) for name, steps in rounds.steps.items()} == {"a": 6, "b": 6, "c": 6}


def test_who_fails_does_not_stop_the_others():
    rounds, log = scripted(["a", "b"], measure.Settings(rounds=2))

    def fail(**_):
        raise processes.ContenderError("error: broken")

    rounds.processes["a"].ask = fail
    rounds._rounds(measure.time.monotonic())
    assert rounds.failed == {"a": "error: broken"}
    assert log.count("b") == 2


def test_time_is_limited_at_a_whole_period():
    rounds, _ = scripted(["a"], measure.Settings(rounds=10**4, seconds=1e-9))
    assert rounds._rounds(measure.time.monotonic() - 1.5e-9) <= 20


# Processes


def test_children_get_threads_and_nothing_that_distorts(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("XLA_FLAGS", "--x")
    monkeypatch.setenv("MY_VARIABLE", "kept")
    env = processes.environment(3)
    assert "OPENBLAS_CORETYPE" not in env
    assert "XLA_FLAGS" not in env
    assert {"OPENBLAS_CORETYPE", "XLA_FLAGS"} <= set(processes.removed())
    assert env["OMP_NUM_THREADS"] == env["OPENBLAS_NUM_THREADS"] == env["NPROC"] == "3"
    assert (env["MY_VARIABLE"], env["JAX_PLATFORMS"]) == ("kept", "cpu")
    assert processes.environment(1, "cuda", tf32=True)["CUPY_TF32"] == "1"


def test_interpreters(monkeypatch):
    contender = registry.CONTENDERS["kfac-jax"]
    monkeypatch.delenv("KFAC_BENCH_PYTHON_JAX", raising=False)
    assert registry.interpreter(contender, {}) == sys.executable
    monkeypatch.setenv("KFAC_BENCH_PYTHON_JAX", "/env")
    assert registry.interpreter(contender, {}) == "/env"
    assert registry.interpreter(contender, {"jax": "/family"}) == "/family"
    assert registry.interpreter(contender, {"jax": "/family", "kfac-jax": "/own"}) == "/own"


def test_contenders_by_name_and_mathematics():
    exact = workloads.WORKLOADS["W1-256-exact"]
    assert [c.name for c in registry.choose([], exact)] == ["kfac_np", "kfac-jax"]
    with pytest.raises(SystemExit, match="no contender nobody"):
        registry.choose(["nobody"], exact)


def test_who_is_left_out_is_told_why():
    w2 = workloads.WORKLOADS["W2-128"]
    everyone = registry.choose([], w2)

    def names(asked, workload, device):
        kept, why = registry.left_out(asked, workload, device, everyone)
        assert {c.name for c in kept} | set(why) == {c.name for c in everyone}
        return set(why)

    assert names([], w2, "cpu") == {"kfac-jax"}
    assert names(["kfac-jax"], w2, "cpu") == set()
    assert names([], w2, "cuda") == set()
    assert names([], workloads.tiny(w2), "cpu") == set()


@posix
def test_a_missing_library_and_a_missing_interpreter_are_told(tmp_path):
    script = "from benchmarks.contenders.child import serve; "
    script += "serve({'no_such_library': 'pip install it'}, None)"
    message = measure.Settings().setup(registry.CONTENDERS["kfac_np"], workloads.WORKLOADS["W3"])
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(message) + "\n",
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["missing"] == "No module named 'no_such_library'; pip install it"
    with pytest.raises(processes.ContenderError, match="cannot start"):
        processes.Process(str(tmp_path / "python"), "kfac_np", {}, None)


# Reports


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.json"
    report.write_json(path, {"a": 1})

    def break_off(source, target):
        raise OSError("no space")

    monkeypatch.setattr(report.os, "replace", break_off)
    with pytest.raises(OSError, match="no space"):
        report.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


# Tables


def test_the_grid_of_tables():
    cells = list(tables.grid())
    runs = tables.choose(False, [], [])
    assert len(cells) == len(set(cells)) == 890
    assert len(runs) == 5 * 890 + 310  # L-BFGS on whole tables only
    assert not any(c.units == "targets" and c.data in table_data.CLASSES for c in cells)
    assert {c.batch for c in cells if c.data == "linnerud"} == {16, 0}  # it has 20 examples


def test_a_tenth_of_the_grid_has_everything_in_it():
    cells = list(tables.tenth())
    assert (len(cells), len(tables.choose(True, [], []))) == (89, 476)
    for axis in ("data", "units", "dtype", "batch", "seed"):
        values = [getattr(c, axis) for c in cells]
        assert set(values) == {getattr(c, axis) for c in tables.grid()}


def test_tables_by_name():
    chosen = tables.choose(False, ["wine//float64/all/0", "iris/raw/float32"], ["kfac"])
    assert [c.name for c, _ in chosen if c.data == "wine"] == [
        f"wine/{units}/float64/all/0" for units in ("standardised", "raw", "features")
    ]
    assert len(chosen) == 3 + 3 * 5
    with pytest.raises(SystemExit, match="--only wines: no such cell; one is breast_cancer/"):
        tables.choose(False, ["wines"], [])
    with pytest.raises(SystemExit, match="no optimizer sgd; there are kfac,"):
        tables.choose(False, [], ["sgd"])


@pytest.mark.parametrize("name", table_data.GENERATED)
def test_units_of_tables(name):
    raw, plain = table_data.raw(name), table_data.load(name, "standardised")
    assert (len(raw.x), bool(raw.classes)) == (table_data.SIZES[name], name in table_data.CLASSES)
    np.testing.assert_allclose(plain.x.mean(axis=0), 0.0, atol=1e-9)
    np.testing.assert_allclose(plain.x.std(axis=0), 1.0)
    scaled = table_data.load(name, "features", seed=3)
    powers = np.log10(scaled.x.std(axis=0))
    assert np.all(np.abs(powers) < 6)
    assert np.ptp(powers) > 3
    np.testing.assert_array_equal(scaled.t, plain.t)
    if raw.classes:
        np.testing.assert_array_equal(plain.t, raw.t)
    else:
        np.testing.assert_allclose(table_data.load(name, "targets").t, 100 * plain.t + 500)


def test_a_run_on_a_table():
    cell = table_runs.Cell("collinear", "standardised", "float64", 0, 0)
    line = table_runs.run(cell, "kfac", 1.0, steps=12)
    assert line["first"] == table_runs.Problem.of(cell).loss(table_runs.Problem.of(cell).params)
    assert line["steps"] == 12
    assert line["failed"] is None
    assert line["final"] < line["first"] <= line["worst"]
    assert line["averaged"] < line["first"]
    again = table_runs.run(replace(cell), "kfac", 1.0, steps=12)
    assert {**again, "seconds": 0} == {**line, "seconds": 0}


@pytest.mark.parametrize("what", ["raises", "NaN", "up and down"])
def test_what_happens_to_a_run_is_written_down(what, monkeypatch):
    def train(problem):
        if what == "raises":
            raise ValueError("out of luck")
        far = tuple(p * 100 if len(p) else p for p in problem.params)
        yield 1, far, None
        yield 2, tuple(p * np.nan if len(p) else p for p in far), None
        yield 3, problem.params, None

    monkeypatch.setitem(table_runs.OPTIMIZERS, "made up", train)
    cell = table_runs.Cell("one_in_a_hundred", "raw", "float32", 16, 0)
    line = json.loads(
        json.dumps(table_runs.run(cell, "made up", 1.0, steps=2 if what == "NaN" else 3))
    )
    if what == "raises":
        assert line["failed"] == "ValueError: out of luck"
        assert (line["steps"], line["final"]) == (0, line["first"])
    elif what == "NaN":
        assert line["failed"] == "the loss is inf"
        assert line["final"] is None
    else:
        assert line["failed"] is None
        assert line["worst"] is None  # not finite on the way
        assert line["final"] == line["first"]


@pytest.mark.parametrize("batch", [0, 16, 300])
def test_every_example_once_in_a_pass(batch):
    problem = table_runs.Problem.of(table_runs.Cell("collinear", "raw", "float64", batch, 1))
    n, size = 500, batch or 500
    batches = problem.batches()
    drawn = [next(batches) for _ in range(3 * n // size)]
    assert {len(x) for x, _ in drawn} == {size}
    first = np.concatenate([t for _, t in drawn])[:n]
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(problem.t, axis=0))


def test_the_summary_of_tables():
    def line(optimizer, final, seed=0, data="wine", failed=None):
        cell = {"data": data, "units": "raw", "dtype": "float64", "batch": 0, "seed": seed}
        losses = {"first": 2.0, "final": final, "worst": 9.0, "averaged": final}
        return {**cell, "optimizer": optimizer, **losses, "steps": 7, "failed": failed}

    lines = [line("adam-0.001", 0.5, data=d) for d in ("wine", "iris", "digits")]
    lines += [line("adam-0.01", 0.1, data=d) for d in ("wine", "iris", "digits")]
    lines += [line("kfac", 0.1005), line("kfac", 3.0, 1), line("kfac", 0.01, 2)]
    lines += [line("kfac", 0.8, data="iris"), line("kfac", 1e-9, data="digits", failed="broken")]
    text = table_report.summary(lines)
    assert "| kfac | 5 | 1 | 1 | 7 |" in text
    assert "| kfac | 33% (0%) of 3 | 33% (33%) of 3 | 33% (0%) of 3 | – | – |" in text
    assert "| wine | 100% (0%) of 1 |" in text
    worst = [row for row in text.splitlines() if row.startswith("| iris/raw/float64/all |")]
    assert worst == ["| iris/raw/float64/all | 2 | 0.8 | 0.1 | 8 |"]
    assert "| digits/raw/float64/all | 2 | inf | 0.1 | inf |" in text


def test_a_loss_below_a_millionth_is_as_good_as_any():
    assert table_report.no_worse(1e-7, 1e-30, first=1.0)
    assert not table_report.no_worse(1e-5, 1e-30, first=1.0)
    assert not table_report.no_worse(float("inf"), float("inf"), first=1.0)


@pytest.mark.parametrize("data", ["collinear", "one_in_a_hundred"])
def test_scikit_learn_starts_where_we_do(data):
    pytest.importorskip("sklearn")
    problem = table_runs.Problem.of(table_runs.Cell(data, "standardised", "float32", 0, 2))
    model = table_runs.sklearn_model(problem, learning_rate_init=1e-30)
    labels = table_runs._labels(problem)
    known = {"classes": np.unique(labels)} if data in table_data.CLASSES else {}
    model.partial_fit(problem.x, labels, **known)
    assert problem.loss(table_runs.params_of(model, problem)) == problem.loss(problem.params)
    assert model.loss_ == pytest.approx(problem.loss(problem.params), rel=1e-5)


# Races


def words_of(*flags):
    """What the race of convolutional networks asks of race.py."""
    return convnet.command(convnet.arguments(flags))[2:]


@pytest.mark.parametrize("flags", [[], ["--sweep"], ["--model", "resnet", "--threads", "2"]])
def test_the_race_of_convolutional_networks_is_one_that_can_be_run(flags):
    args = race.arguments(words_of(*flags))
    assert len(args.tables) == (45 if flags == ["--sweep"] else 4)
    assert args.clock == ("wall" if "--threads" in flags else "processor")
    assert sum(race.peer(t)[0] == "" for t in args.tables.values()) == (2 if len(flags) != 1 else 0)
    with pytest.raises(SystemExit, match="no contender x; there are"):
        words_of(*flags, "--contenders", "x")


@pytest.mark.parametrize("model", ["convnet", "resnet"])
def test_pytorch_starts_where_we_do_and_averages(model):
    torch = pytest.importorskip("torch")
    table = {"data": "digits", "model": model, "run": {"steps": 1}}
    settings = {"name": "torch-sgd", "rate": 0.1, "batch": 8, "average": 0.5}
    ours = race.trainee_of({**table, "optimizer": {"name": "sgd", "averaging": "none"}}, 0, DIGITS)
    theirs = race.trainee_of({**table, "optimizer": settings}, 0, DIGITS)
    x, t = DIGITS.x_test, DIGITS.t_test
    params, objective = ours.experiment.start().state.params, ours.experiment.optimizer.objective
    with torch.no_grad():
        z = theirs.network(torch.from_numpy(x)).numpy()
    assert z == pytest.approx(objective.evaluate(params, x, t).outputs, rel=1e-4, abs=1e-4)
    weights = [w.detach().clone() for w in theirs.network.parameters()]
    assert theirs.step() == 1
    after = [w.detach().clone() for w in theirs.network.parameters()]
    assert not torch.equal(weights[0], after[0])
    theirs.step()
    expected = 0.5 * after[0] + 0.5 * next(theirs.network.parameters()).detach()
    assert theirs.average[0].numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-7)
    assert theirs.evaluate().keys() == {"loss", "accuracy", "test_loss", "test_accuracy"}


def test_a_schedule_rises_and_falls():
    factor = torch_trainee.factor_of({"steps": 100, "warmup": 9})
    assert [factor(k) for k in (0, 100, 200)] == pytest.approx([0.1, 0.0, 0.0])
    assert factor(50) == pytest.approx(0.5)
    assert torch_trainee.factor_of({"steps": None, "warmup": 0})(1000) == 1.0


@posix
def test_a_quick_run_from_beginning_to_end(tmp_path):
    out = tmp_path / "x.json"
    command = [sys.executable, "benchmarks/bench.py", "--quick", "--threads", "1", "--rounds", "3"]
    command += ["W3", "--contenders", "kfac_np,kfac_np-sgd", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| kfac_np |" in done.stdout
    record = json.loads(out.read_text())
    assert record["threads"] == 1
    result = record["workloads"]["W3"]
    assert result["failed"] == {}
    assert result["roofline"]["gemm"] > 0
    for r in result["contenders"].values():
        assert r["to_ours"] == 1.0
        assert r["steps"] == len(r["walls"]) >= 3
        assert r["first_step_seconds"] > 0
        assert r["peak_bytes"] > 2**20
        assert {"numpy", "kfac_np", "python"} <= set(r["versions"])
        assert np.isfinite(r["rate"])


# Code


def test_the_lines_of_a_function():
    average = MovingAverage()
    found = step_code.lines(step_code.entered(lambda: average.epsilon(4)))
    (name,) = found
    functions, spanned, total = found[name]
    assert (functions, spanned) == (1, len(inspect.getsourcelines(MovingAverage.epsilon)[0]))
    assert total == len((ROOT / name).read_text(encoding="utf-8").splitlines())


def test_the_code_that_a_step_enters(capsys):
    assert step_code.main(["--steps", "2", "--files"]) == 0
    printed = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    (_, *total), files = printed[1], printed[4:]
    assert {"kfac_np/optimizers/kfac.py", "kfac_np/layers/dense.py"} <= {name for name, *_ in files}
    columns = zip(*(map(int, counts) for _, *counts in files), strict=True)
    assert list(map(int, total)) == [len(files), *map(sum, columns)]


def test_posteriors_of_a_table():
    """The protocol of `laplace.py`, few steps of it; a better structure has more evidence."""
    pytest.importorskip("sklearn")
    data = laplace.split("wine", seed=0)
    assert [len(part) for part in data] == [142, 142, 36, 36]
    np.testing.assert_allclose(
        (data[0].mean(axis=0), data[0].std(axis=0)), [[0.0] * 13, [1.0] * 13], atol=1e-12
    )
    lines = laplace.measure("wine", 0, ("kron", "full"), steps=60)
    assert lines[0]["map"] == lines[1]["map"] < np.log(3)
    assert lines[0]["evidence"] < lines[1]["evidence"] < 0
    objective, params = laplace.trained("diabetes", 0, data := laplace.split("diabetes", 0), 3)
    x, t = data[:2]
    training = laplace.map_nll(objective, params, (x, t, x, t))
    residual = objective.network.forward(params, x)[0] - t
    assert training == pytest.approx(0.5 * np.log(2 * np.pi * np.e * np.mean(residual**2)))

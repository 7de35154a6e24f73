"""The family against other libraries' values, step by step, and what all methods of it keep.

The files in tests/data/optimizers hold given gradients (or pairs (ā, g)), and what came of them in
double precision: facebookresearch/optimizers (Shampoo, KL-Shampoo), nikhilvyas/SOAP, torch 2.13
(Muon, AdamW, NAdam), pytorch_optimizer (Lion), lzhangbv/eva, f-dangel/singd and netket. FOOF and
the natural gradients are their formulas, evaluated in torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, Problem, class_targets
from optimizer_cases import flat
from reference_files import Reference

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.errors import DivergenceError, InputError
from kfac_np.fisher import Empirical, Exact
from kfac_np.layers import Conv, Dense, Flatten, Identity, LayerNorm, Reshape, Sequential, Tanh
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import IterateAverage, Optimizer, State
from kfac_np.optimizers.family import (
    FOOF,
    METHODS,
    SINGD,
    SOAP,
    AdamScaling,
    Eva,
    FirstMoment,
    GramDescent,
    Muon,
    NAdamScaling,
    Preconditioned,
    Shampoo,
    SignMomentum,
    natural_direction,
    spring_direction,
)
from kfac_np.optimizers.family.gram import gram_matrix
from kfac_np.optimizers.family.muon import newton_schulz, polar_factor
from kfac_np.optimizers.family.presets import adamw, muon, shampoo
from kfac_np.optimizers.family.shampoo import inverse_root
from kfac_np.statistics import AffineStatistics, Scale

NUMPY = get_backend("numpy", "float64")
FOLDER = Path(__file__).parents[1] / "data" / "optimizers"
NOWHERE = Objective(Identity(), SquaredError())  # gradients are given
Arrays = Mapping[str, Any]


def load(name: str) -> tuple[Arrays, Any]:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays["spec"]))


# ------------------------------------------------------- the same steps as in other libraries


def adam_like(h: Any) -> Preconditioned:
    b1, b2 = h["betas"]
    rules = {
        "AdamW": lambda: AdamScaling(b1, b2, h["eps"]),
        "NAdam": lambda: NAdamScaling(b1, b2, h["eps"], h["momentum_decay"]),
        "Lion": lambda: SignMomentum(b1, b2),
    }
    rule = rules[h["rule"]]()
    decay = h.get("weight_decay", 0.0)
    return Preconditioned(NOWHERE, rule, h["lr"], weight_decay=decay, fallback=rule)


def muon_of(h: Any) -> Preconditioned:
    scale = {"original": "original", "match_rms_adamw": "match-rms"}[h["scale"]]
    rule = Muon(h["momentum"], nesterov=h["nesterov"], scale=scale, epsilon=h["eps"])
    return Preconditioned(NOWHERE, rule, h["lr"], weight_decay=h["weight_decay"])


def shampoo_of(h: Any) -> Preconditioned:
    rule = Shampoo(
        **{name: h[name] for name in ("beta1", "beta2", "exponent", "interval", "start", "kl")},
        epsilon=h["eps"],
    )
    graft = None
    if h["grafting"]:
        beta2 = 1.0 if h["grafting"] == "adagrad" else h["grafting_beta2"]
        graft = AdamScaling(h["beta1"], beta2, h["grafting_eps"])
    return Preconditioned(
        NOWHERE,
        rule,
        h["lr"],
        momentum=h["momentum"],
        weight_decay=h["weight_decay"],
        graft=graft,
        fallback=rule,
    )


def soap_of(h: Any) -> Preconditioned:
    rule = SOAP(
        h["beta1"],
        h["beta2"],
        h["shampoo_beta"],
        h["eps"],
        interval=h["interval"],
        correct_bias=h["correct_bias"],
    )
    return Preconditioned(NOWHERE, rule, h["lr"], fallback=rule)


SEQUENCES: dict[str, tuple[Callable[[Any], Preconditioned], float]] = {
    "lr_adamw": (adam_like, 1e-10),
    "lr_nadam": (adam_like, 1e-10),
    "lr_lion": (adam_like, 1e-10),
    "opt_muon_torch": (muon_of, 1e-10),
    "opt_muon_torch_rms_plain": (muon_of, 1e-10),
    "opt_shampoo_ema_adam_beta1": (shampoo_of, 1e-7),
    "opt_shampoo_ema_interval3_momentum": (shampoo_of, 1e-7),
    "opt_shampoo_half_exponent": (shampoo_of, 1e-7),
    "opt_shampoo_sum_interval3_adagrad": (shampoo_of, 1e-7),
    "opt_klshampoo_ema": (shampoo_of, 1e-7),
    "opt_klshampoo_ema_beta1_adam": (shampoo_of, 1e-7),
    "opt_soap_1d_nocorrect": (soap_of, 1e-10),
    "opt_soap_interval4_wd": (soap_of, 1e-10),
}


def matrix(a: Any) -> Any:
    """A kernel as a matrix with a row for each channel it makes; anything else as it is."""
    return a.reshape(a.shape[0], -1) if a.ndim == 4 else a


@pytest.mark.alike("name")  # the laws below take every method to every backend
@pytest.mark.parametrize("name", SEQUENCES)
def test_given_gradients_lead_where_they_lead_elsewhere(name: str, backend: Backend) -> None:
    make, tolerance = SEQUENCES[name]
    arrays, spec = load(name)
    h, optimizer = spec["hyper"], make(spec["hyper"])
    # Vectors that the other library has an Adam of its own for.
    left_out = {"bias"} if h.get("precondition_1d") is False else set()
    names = [n for n in spec["parameters"] if n not in left_out]
    state = optimizer.init({n: backend.asarray(matrix(arrays[f"p0_{n}"])) for n in names})
    # SOAP shrinks the weights after its update, and not in the first step, which only looks.
    shrinks = 1.0 - h["lr"] * h["weight_decay"] if name.startswith("opt_soap") else 1.0
    for k in range(1, 10):
        gradient = {n: backend.asarray(matrix(arrays[f"g_{n}"][k - 1])) for n in names}
        update, slots, velocity = optimizer.advance(state, gradient)
        params = trees.axpy(1.0, update, state.params)
        params = trees.scale(shrinks if k > 1 else 1.0, params)
        state = dataclasses.replace(state, params=params, step=k, slots=slots, velocity=velocity)
        for n in names:
            expected = matrix(arrays[f"p_{n}"][k - 1])
            assert to_numpy(state.params[n]) == pytest.approx(
                expected, rel=tolerance, abs=tolerance * abs(expected).max()
            ), (n, k)


def pair(backend: Backend, a: Any, g: Any) -> AffineStatistics:
    """Statistics of a layer without shared weights, of rows a and g."""
    return AffineStatistics(backend.asarray(a[:, None, :]), backend.asarray(g[:, None, :]))


def assert_near(found: Any, expected: Any) -> None:
    assert to_numpy(found) == pytest.approx(expected, rel=1e-9, abs=1e-10 * abs(expected).max())


@pytest.mark.parametrize("name", ["opt_eva_noclip", "opt_eva_klclip"])
def test_eva_does_what_it_does_elsewhere(name: str, backend: Backend) -> None:
    arrays, spec = load(name)
    h = spec["hyper"]
    rule = Eva(h["damping"], 1.0 - h["xi"])
    optimizer = Preconditioned(NOWHERE, rule, h["lr"], kl_clip=h["kl_clip"])
    layers = [key[4:] for key in arrays if key.startswith("grad")]
    zeros = {i: backend.asarray(np.zeros_like(arrays[f"grad{i}"][0])) for i in layers}
    state = optimizer.init(zeros)
    for k in range(1, 7):
        gradient = {i: backend.asarray(arrays[f"grad{i}"][k - 1]) for i in layers}
        statistics = {
            i: pair(backend, *(arrays[f"{v}bar{i}"][None, k - 1] for v in "ag")) for i in layers
        }
        update, slots, _ = optimizer.advance(state, gradient, statistics, Scale(1, 1))
        state = dataclasses.replace(state, step=k, slots=slots)
        for i in layers:
            assert_near(update[i] * (-1.0 / h["lr"]), arrays[f"pre{i}"][k - 1])
            assert_near(slots[i]["own"]["g"], arrays[f"mg{i}"][k - 1])


def test_foof_does_what_its_formula_says(backend: Backend) -> None:
    arrays, spec = load("opt_foof_interval3")
    h = spec["hyper"]
    rule = FOOF(h["damping"], h["decay"], h["interval"])
    optimizer = Preconditioned(NOWHERE, rule, h["lr"])
    state = optimizer.init({i: backend.asarray(arrays[f"p0_{i}"]) for i in "01"})
    for k in range(1, 9):
        gradient = {i: backend.asarray(arrays[f"grad{i}"][k - 1]) for i in "01"}
        a = {i: arrays[f"a{i}"][k - 1] for i in "01"}
        statistics = {i: pair(backend, rows, rows) for i, rows in a.items()}
        update, slots, _ = optimizer.advance(state, gradient, statistics, Scale(8, 8))
        params = trees.axpy(1.0, update, state.params)
        state = dataclasses.replace(state, params=params, step=k, slots=slots)
        for i in "01":
            assert_near(params[i], arrays[f"p_{i}"][k - 1])


STRUCTURES = {
    "block3diagonal": "block-diagonal",
    "hierarchical2_1": "hierarchical",
    "dense": "dense",
    "diagonal": "diagonal",
}


@pytest.mark.alike("name")
@pytest.mark.parametrize(
    "name",
    ["singd_dense", "singd_dense_kfaclike", "singd_diagonal", "singd_block3", "singd_hierarchical"],
)
def test_singd_does_what_it_does_elsewhere(name: str, backend: Backend) -> None:
    arrays, spec = load(name)
    h = spec["hyper"]
    rule = SINGD(
        h["damping"],
        h["lr_cov"],
        h["alpha1"],
        tuple(STRUCTURES[s] for s in h["structures"]),
        interval=h["interval"],
        normalized=h["normalize_lr_cov"],
        kfac_like=h["kfac_like"],
    )
    optimizer = Preconditioned(
        NOWHERE, rule, h["lr"], h["momentum"], weight_decay=h["weight_decay"]
    )
    n = arrays["a"].shape[1]
    state = optimizer.init((backend.asarray(arrays["p0"]),))
    for k in range(1, 7):
        gradient = (backend.asarray(arrays["grad"][k - 1]),)
        statistics = (pair(backend, arrays["a"][k - 1], arrays["g"][k - 1]),)
        update, slots, velocity = optimizer.advance(state, gradient, statistics, Scale(n, n))
        params = trees.axpy(1.0, update, state.params)
        state = dataclasses.replace(state, params=params, step=k, slots=slots, velocity=velocity)
        assert_near(params[0], arrays["p"][k - 1])
        assert_near(slots["0"]["own"]["K"], arrays["K"][k - 1])


# ------------------------------------------------------------------ natural gradient by examples


def joint(file: Reference, vector: Any) -> Any:
    """The file's order, a layer's W and then its b, as that of [W | b]."""
    parts = []
    for i in range(file.count):
        rows, columns = file[f"W{i}"].shape
        w, b, vector = np.split(vector, [rows * columns, rows * columns + rows])
        parts.append(np.column_stack([w.reshape(rows, columns), b]).ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("name", ["gram_mlp_mse_tanh", "gram_mlp_ce_relu"])
def test_gram_solves_with_the_whole_fisher(name: str, backend: Backend) -> None:
    """Against (F + λI)⁻¹ ∇ with F written out, exact and empirical."""
    file = Reference(f"../optimizers/{name}")
    e = file.evaluate(backend)
    for i, damping in enumerate(file.spec["lambdas"]):
        for fisher, kind in ((Exact(), "ggn"), (Empirical(), "ef")):
            (vectors,) = fisher.vectors(e, Rng(0))
            found = natural_direction(e, vectors, e.gradient(), damping)
            expected = joint(file, file[f"nat_{kind}_{i}"])
            assert flat(found) == pytest.approx(expected, rel=1e-9, abs=1e-9 * abs(expected).max())


@pytest.mark.parametrize("name", ["gram_minsr", "gram_spring_proj"])
def test_spring_does_what_it_does_elsewhere(name: str, backend: Backend) -> None:
    arrays, spec = load(name)
    h, phi = spec["hyper"], None
    for o, e, expected in zip(arrays["O"], arrays["e"], arrays["update"], strict=True):
        phi = spring_direction(
            backend.asarray(o),
            backend.asarray(e),
            h["diag_shift"],
            phi if h["momentum"] else None,
            h["momentum"] or 0.0,
            h["proj_reg"] or 0.0,
        )
        assert_near(phi, expected)


@pytest.mark.parametrize("c", [c for c in NETWORKS if not c.coupled][::6], ids=str)
def test_gram_matrix_is_that_of_the_derivatives_of_examples(
    c: NetworkCase, backend: Backend
) -> None:
    """For every kind of parameter, whether or not those derivatives are formed."""
    e = c.build(backend).evaluate()
    (v,) = Empirical().vectors(e, Rng(0))
    v = backend.xp.concat([v, 2.0 * v])
    statistics = e.backward(v)
    n = v.shape[0] * c.shape[0]
    rows = [to_numpy(s.per_example()).reshape(n, -1) for s in trees.leaves(statistics)]
    u = np.concatenate(rows, axis=1)
    expected = u @ u.T
    found = to_numpy(gram_matrix(statistics, e))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12 * abs(expected).max())


# -------------------------------------------------------------------------- roots and polar factors


def ill_conditioned(n: int, condition: float) -> tuple[Any, Any, Any]:
    """A symmetric matrix that is not diagonal, with its eigenvalues and eigenvectors."""
    q = np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0]
    values = np.logspace(0.0, -np.log10(condition), n)
    return (q * values) @ q.T, values, q


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_roots_of_ill_conditioned_matrices(exponent: float, backend: Backend) -> None:
    """Right to condition · eps in each eigendirection, where a wrong power is off by orders."""
    m, values, q = ill_conditioned(9, 1e8)
    root = to_numpy(inverse_root(backend.asarray(m), exponent, 1e-300))
    assert np.diag(q.T @ root @ q) == pytest.approx(values**-exponent, rel=1e-6)
    assert root @ np.linalg.matrix_power(root, round(1 / exponent) - 1) @ m == pytest.approx(
        np.eye(9), abs=1e-5
    )


def test_directions_never_seen_have_no_larger_root_than_rounding_allows(backend: Backend) -> None:
    g = np.outer(np.arange(1.0, 5.0), [1.0, 2.0, 3.0])
    root = to_numpy(inverse_root(backend.asarray(g @ g.T), 0.25, 1e-300))
    largest = (4 * np.finfo(float).eps * (g @ g.T).trace()) ** -0.25
    assert np.linalg.norm(root, 2) == pytest.approx(largest, rel=1e-6)


def test_polar_factors_are_those_of_singular_value_decompositions(backend: Backend) -> None:
    """Wide, tall, of low rank, ill-conditioned; Newton and Schulz as elsewhere."""
    arrays, spec = load("opt_muon_polar")
    for name in spec["parameters"]:
        m = backend.asarray(arrays[f"X_{name}"])
        assert to_numpy(polar_factor(m)) == pytest.approx(arrays[f"polar_{name}"], abs=1e-9)
        assert_near(newton_schulz(m), arrays[f"ns5_{name}"])
        cubic = newton_schulz(m, (1.5, -0.5, 0.0), 12)
        assert to_numpy(cubic) == pytest.approx(arrays[f"cubic12_{name}"], abs=1e-9)


# ------------------------------------------------------------------------ laws of all the methods

NETWORK = Sequential(
    Reshape((4, 1)), Conv(1, 4, (2,), groups=1), LayerNorm(4), Tanh(),
    Conv(4, 2, (1,), groups=2), Flatten(), Dense(6, 3),
)  # fmt: skip
SMALL = NetworkCase("family", NETWORK, (12, 4), SoftmaxCrossEntropy(), class_targets, weighted=True)
LAWS: dict[str, Callable[[Objective], Optimizer]] = {
    **{name: make for name, make in METHODS.items() if name not in ("shampoo", "muon", "adamw")},
    "adamw": lambda o: adamw(o, undecayed=("1",), clip=0.1, averaging=IterateAverage(0.5)),
    "shampoo": lambda o: shampoo(o, preconditioner=Shampoo(interval=3, start=2), l2=1e-3),
    "muon": lambda o: muon(o, overrides={"6": AdamScaling()}, momentum=0.5, nesterov=True),
    "muon_exact": lambda o: muon(o, preconditioner=Muon(polar="exact")),
    "one_sided": lambda o: shampoo(o, preconditioner=Shampoo(largest=3)),
    "gram": GramDescent,
    "spring": lambda o: GramDescent(o, Exact(), rate=0.1, l2=1e-3),
}
STEPS = 4


@functools.cache
def expected_path(name: str) -> list[Any]:
    problem = SMALL.build(NUMPY)
    return [flat(s.params) for s in walk(LAWS[name](problem.objective), problem)]


def walk(optimizer: Optimizer, problem: Problem, steps: int = STEPS) -> list[State]:
    """States before and after each step on the same batch."""
    states = [optimizer.init(problem.params)]
    for _ in range(steps):
        batch = (problem.x, problem.t, problem.weights)
        states.append(optimizer.step(states[-1], *batch)[0])
    return states


def bits(optimizer: Optimizer, state: State) -> list[tuple[str, Any]]:
    items = trees.items(optimizer.state_to_tree(state))
    return [(path, to_numpy(x).tobytes() if hasattr(x, "shape") else x) for path, x in items]


@pytest.mark.parametrize("name", LAWS)
def test_every_method_resumes_bit_for_bit_and_is_the_same_on_every_backend(
    name: str, backend: Backend
) -> None:
    problem = SMALL.build(backend)
    optimizer = LAWS[name](problem.objective)
    states = walk(optimizer, problem)
    for k, state in enumerate(states[:-1]):
        tree = trees.tree_map(
            lambda x: backend.asarray(np.copy(to_numpy(x))) if hasattr(x, "shape") else x,
            optimizer.state_to_tree(state),
        )
        resumed = optimizer.state_from_tree(tree)
        batch = (problem.x, problem.t, problem.weights)
        again, report = optimizer.step(resumed, *batch)
        assert bits(optimizer, again) == bits(optimizer, states[k + 1])
        assert report.step == k + 1
        assert flat(again.params) == pytest.approx(expected_path(name)[k + 1], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_every_method_descends_in_single_precision_too(name: str) -> None:
    single = get_backend("numpy", "float32")
    problem = SMALL.build(single)
    optimizer = LAWS[name](problem.objective)
    state = walk(optimizer, problem, 8)[-1]
    for leaf in trees.leaves(optimizer.state_to_tree(state)):
        assert not hasattr(leaf, "shape") or leaf.dtype == np.float32
    before, after = (
        problem.objective.value(params, problem.x, problem.t, problem.weights)
        for params in (problem.params, state.params)
    )
    assert after < before - 1e-4


@pytest.mark.parametrize("name", ["soap", "singd", "gram"])
def test_what_is_not_finite_is_an_error_before_anything_changes(
    name: str, backend: Backend
) -> None:
    problem = SMALL.build(backend)
    optimizer = LAWS[name](problem.objective)
    state = walk(optimizer, problem, 1)[-1]
    before = bits(optimizer, state)
    with pytest.raises(InputError, match="x: expected finite values"):
        optimizer.step(state, problem.x * float("nan"), problem.t)[0].wait()
    huge = dataclasses.replace(state, params=trees.scale(1e200, state.params))
    with pytest.raises(DivergenceError, match="step 2: the loss is"):
        optimizer.step(huge, problem.x * 1e200, problem.t)[0].wait()
    assert bits(optimizer, state) == before


# ------------------------------------------------------ with nothing preconditioned, what is left


def path_of(optimizer: Preconditioned, backend: Backend) -> list[Any]:
    return [flat(s.params) for s in walk(optimizer, SMALL.build(backend))]


def test_shampoo_that_has_not_begun_is_the_method_that_it_grafts(backend: Backend) -> None:
    o, adam = SMALL.build(backend).objective, AdamScaling(0.8, 0.95)
    waiting = Preconditioned(o, Shampoo(start=STEPS + 1), 0.01, graft=adam, fallback=adam)
    plain = Preconditioned(o, adam, 0.01, fallback=adam)
    for found, expected in zip(path_of(waiting, backend), path_of(plain, backend), strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("rule", [Shampoo(0.5, exponent=0.0), Shampoo(0.5, largest=1, kl=True)])
def test_shampoo_without_roots_is_momentum(rule: Shampoo, backend: Backend) -> None:
    """The exponent 0, or no side small enough; grafting what it is already changes nothing."""
    o, mean = SMALL.build(backend).objective, FirstMoment(0.5)
    shampoo_ = Preconditioned(o, rule, 0.1, graft=mean, fallback=mean)
    plain = Preconditioned(o, mean, 0.1)
    for found, expected in zip(path_of(shampoo_, backend), path_of(plain, backend), strict=True):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_soap_without_a_basis_is_adam_a_step_later(backend: Backend) -> None:
    """Its bias correction is beside ε: here 1e-30."""
    o, tiny = SMALL.build(backend).objective, AdamScaling(0.9, 0.95, 1e-30)
    rule = SOAP(0.9, 0.95, epsilon=1e-30, largest=1)
    soap_ = Preconditioned(o, rule, 0.01, overrides={"2": FirstMoment(), "6": rule})
    plain = Preconditioned(o, tiny, 0.01, fallback=tiny)
    weights = SMALL.build(backend).params
    batches = [trees.tree_map(lambda p, s=s: 0.3 * p + s, weights) for s in (0.1, -0.2, 0.4)]
    later, state = soap_.init(weights), plain.init(weights)
    _, slots, _ = soap_.advance(later, batches[0])
    later = dataclasses.replace(later, step=1, slots=slots)
    for g in batches:
        update, slots, _ = soap_.advance(later, g)
        expected, others, _ = plain.advance(state, g)
        for i in (1, 4, 6):
            assert_near(update[i], to_numpy(expected[i]))
        later = dataclasses.replace(later, step=later.step + 1, slots=slots)
        state = dataclasses.replace(state, step=state.step + 1, slots=others)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Muon(polar="svd"), "Muon polar: expected newton-schulz or exact, got 'svd'"),
        (lambda: Muon(coefficients=(1.0,)), "Muon coefficients: expected three"),
        (lambda: Shampoo(exponent=-1.0), "Shampoo exponent: expected a number >= 0"),
        (lambda: SOAP(beta2=1.0), r"SOAP beta2: expected a number in \[0, 1\)"),
        (lambda: SINGD(structures=("dense", "band")), "SINGD structures: expected dense"),
        (lambda: muon(NOWHERE, graft=0.1), "Preconditioned graft: expected a Preconditioner"),
        (lambda: adamw(NOWHERE, kl_clip=0.0), "Preconditioned kl_clip: expected a number > 0"),
        (
            lambda: adamw(NOWHERE, overrides={"7": Muon()}).init((np.ones(2),)),
            "Preconditioned overrides: expected paths among 0; got 7",
        ),
        (
            lambda: Preconditioned(NOWHERE, Eva()).advance(
                Preconditioned(NOWHERE, Eva()).init((np.ones((2, 2)),)), (np.ones((2, 2)),)
            ),
            r"Eva: expected the statistics \(ā, g\) of an affine layer, got None",
        ),
    ],
)
def test_bad_settings(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


def test_gram_refuses_coupled_examples(backend: Backend) -> None:
    problem = next(c for c in NETWORKS if c.coupled).build(backend)
    optimizer = GramDescent(problem.objective)
    with pytest.raises(InputError, match="gram: expected examples that do not influence"):
        optimizer.step(optimizer.init(problem.params), problem.x, problem.t)

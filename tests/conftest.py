"""Fixtures that every test may use, and which of the grid of cases and backends runs by default."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from statistics import mean
from typing import Any

import array_api_strict
import hypothesis
import pytest

from kfac_np.backend import Backend, Rng, get_backend

# The real CuPy on the CPU: programs of another environment, which its `run` starts.
collect_ignore = ["cuda_on_cpu"]

# The same examples in every run: a failure on one machine is a failure on all.
hypothesis.settings.register_profile(
    "kfac_np", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("kfac_np")


def _numpy() -> Backend:
    return get_backend("numpy", "float64")


def _array_api_strict() -> Backend:
    # Its second, pretended device refuses arrays of the first and conversions to NumPy: it finds
    # on any machine what otherwise only a GPU would.
    return get_backend("array_api_strict", "float64", array_api_strict.Device("device1"))


def _torch() -> Backend:
    import torch

    torch.set_num_threads(1)  # its threads would fight over the tiny matrices of the tests
    return get_backend("torch", "float64", "cpu")


def _cupy() -> Backend:
    return get_backend("cupy", "float64")


def _missing_torch() -> str:
    return "" if importlib.util.find_spec("torch") else "not installed"


def _missing_cupy() -> str:
    if not importlib.util.find_spec("cupy"):
        return "not installed"
    import cupy

    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "no GPU"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU ({error})"


MAKERS: dict[str, Callable[[], Backend]] = {
    "numpy": _numpy,
    "array_api_strict": _array_api_strict,
    "torch": _torch,
    "cupy": _cupy,
}
MISSING = {"torch": _missing_torch(), "cupy": _missing_cupy()}
AVAILABLE = [name for name in MAKERS if not MISSING.get(name)]


def pytest_report_header() -> list[str]:
    """Say on which backends the tests run, and why not on the others."""
    missing = [f"{name} ({why})" for name, why in MISSING.items() if why]
    return [
        f"backends: {', '.join(AVAILABLE)}"
        + (f"; not collected: {', '.join(missing)}" if missing else "")
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--all`."""
    parser.addoption("--all", action="store_true", help="run all cases on all backends")


@pytest.hookimpl(tryfirst=True)  # before pytest sorts what is not run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run all cases on the first backend, and a covering part of each file on each of the others.

    What is asked for by name runs: a test by its "file::name", or anything by `-k`.
    """
    if config.option.all or config.option.keyword or any("::" in a for a in config.args):
        return
    grids: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        backend = params_of(item).get("backend", AVAILABLE[0])
        if backend != AVAILABLE[0]:
            grids.setdefault((item.nodeid.partition("::")[0], backend), []).append(item)
    left_out: set[pytest.Item] = set()
    for grid in grids.values():
        kept = covering([features_of(item) for item in grid])
        left_out |= {item for i, item in enumerate(grid) if i not in kept}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def params_of(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a test by name."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def features_of(item: pytest.Item) -> tuple[Hashable, ...]:
    """What a test is made of: its function, and the value of each parameter.

    The same value is the same object; not all of them can be compared.
    """
    alike = {"backend", *(name for mark in item.iter_markers("alike") for name in mark.args)}
    values = ((name, id(v)) for name, v in params_of(item).items() if name not in alike)
    return (("", item.nodeid.partition("[")[0]), *values)


def covering(points: Sequence[tuple[Hashable, ...]]) -> set[int]:
    """Which points to take so that every feature of any of them comes at least once.

    For each feature in turn it is the point of which the other features have come least often: of a
    product about a diagonal.

    Examples
    --------
    >>> points = [(law, case) for law in "ab" for case in "123"]
    >>> [points[i] for i in sorted(covering(points))]
    [('a', '1'), ('a', '3'), ('b', '2')]
    """
    places: dict[Hashable, list[int]] = {}
    for i, point in enumerate(points):
        for feature in point:
            places.setdefault(feature, []).append(i)
    times: Counter[Hashable] = Counter()
    taken: set[int] = set()
    for feature in sorted(places, key=lambda feature: len(places[feature])):  # the rarest first
        if not times[feature]:
            best = min(places[feature], key=lambda i: mean(times[f] for f in points[i]))
            taken.add(best)
            times.update(points[best])
    return taken


@pytest.fixture(scope="session", params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each available backend in turn, in float64."""
    return MAKERS[request.param]()


@pytest.fixture
def rng() -> Rng:
    """Random numbers, the same in every run and on every backend."""
    return Rng(0)

"""Factors renewed a few layers at a time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, host
from optimizer_cases import case

from kfac_np import trees
from kfac_np.backend import Backend
from kfac_np.curvature import EKFAC, BlockDiagonal, BlockTridiagonal
from kfac_np.errors import ConfigError
from kfac_np.optimizers import KFAC, Refresh, practical

CASE = case("tanh_squared")


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 40))
def test_every_layer_once_an_interval(interval: int, first: int, layers: int) -> None:
    refresh = Refresh(interval, first, spread=True)
    paths = [str(i) for i in range(layers)]
    for k in range(1, first + 1):
        assert list(refresh.share(k, paths)) == paths
    for start in range(first + 1, first + 4):
        shares = [refresh.share(k, paths) for k in range(start, start + interval)]
        assert sorted(p for share in shares for p in share) == sorted(paths)
        assert max(map(len, shares)) <= -(-layers // interval)


def test_all_at_once_unless_told_otherwise() -> None:
    refresh = Refresh(4, first=2)
    assert [k for k in range(1, 13) if refresh.share(k, ("0", "2")) == ("0", "2")] == [
        1,
        2,
        4,
        8,
        12,
    ]
    assert not any(refresh.share(k, ("0", "2")) for k in (3, 5, 6, 7))


@pytest.mark.parametrize("curvature", [BlockDiagonal(), EKFAC()], ids=["kfac", "ekfac"])
def test_each_layer_has_the_factors_of_its_last_step(curvature: Any, backend: Backend) -> None:
    kfac = practical(
        CASE.objective,
        0.05,
        curvature=curvature,
        refresh=Refresh(4, first=1, spread=True),
        guard=None,
    )
    state = kfac.init(CASE.params(backend))
    seen: dict[str, Any] = {}
    lasts = []
    for k in range(1, 10):
        state, report = kfac.step(state, *CASE.batch_on(backend, k))
        damping = report.gamma**2
        now, _ = curvature.factorise(state.moments, damping)
        seen |= {path: now[path] for path in report.refreshed}
        lasts.append(len(report.refreshed))
        for path, factors in state.factors.items():
            for name, factor in factors.items():
                assert_close(factor, host(seen[path][name]), 1e-9)
    assert lasts[0] == len(trees.leaves(state.params)) > max(lasts[1:]) == 1


def test_what_cannot_be_spread() -> None:
    spread = Refresh(spread=True)
    with pytest.raises(ConfigError, match="KFAC refresh: spread=True expected a curvature whose"):
        KFAC(CASE.objective, curvature=BlockTridiagonal(), refresh=spread)
    with pytest.raises(ConfigError, match="Refresh spread: expected"):
        Refresh(spread=1)  # type: ignore[arg-type]

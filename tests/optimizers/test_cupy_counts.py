"""How often a step waits for a GPU, and how many kernels it launches: no more than in a table.

Counted with the real CuPy on the CPU (tests/cuda_on_cpu), and skipped without it. When a step does
more for a good reason, the table is written anew, and the difference seen in the change:

    tests/cuda_on_cpu/run tests/cuda_on_cpu/steps.py --write
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("cuda_on_cpu.counting", reason="make test-cupy")


@pytest.mark.parametrize("name", ["mlp", "conv", "ekfac", "tridiagonal"])
def test_waits_and_launches(name: str) -> None:
    from steps import BOUNDS, counted

    bounds = json.loads(BOUNDS.read_text())[name]
    found = {kind: [c.waits, c.launches] for kind, (_, c) in counted(name).items()}
    assert found.keys() == bounds.keys()
    too_many = {
        kind: f"{pair[0]} waits, {pair[1]} launches; at most {bounds[kind]}"
        for kind, pair in found.items()
        if pair[0] > bounds[kind][0] or pair[1] > bounds[kind][1]
    }
    assert not too_many

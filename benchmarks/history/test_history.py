"""Times of this library alone, kept to be compared with later ones: `make bench-history`.

pytest-benchmark keeps each run under runs/bench-history and compares it with the one before.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.contenders.child import Setup
from benchmarks.contenders.kfac_np import build
from benchmarks.workloads import WORKLOADS

CASES = [("W3", "kfac"), ("W3", "sgd"), ("W1-256-fixed", "kfac"), ("W1-256-exact", "kfac")]
CASES += [("W2-128", "kfac"), ("W2-128", "sgd")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_step(benchmark, name, method):
    setup = Setup(WORKLOADS[name], method, "cpu", "float32", 1, False, {})
    running = build(setup)
    # Step 1 inverts the factors, step 20 does again: these are the steps between.
    running.step()
    benchmark.pedantic(running.step, warmup_rounds=3, rounds=12)

"""Who takes part: programs, what they do, and in which interpreter."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.workloads import Workload, tiny


@dataclass(frozen=True)
class Contender:
    """A program under `benchmarks/contenders`, started as a process of its own.

    `family` is what shares an interpreter: "own", "jax" or "torch". `changes` are made to the
    workload, so that a contender with other settings carries them in its name. `empirical`:
    factors come from the gradients themselves, without a second backward pass. `counts`: it does
    what the operations of K-FAC are counted for. `not_on`: why it is left out of workloads that
    begin so, on a CPU, unless it is asked for by name.
    """

    name: str
    program: str
    family: str
    method: str = "kfac"
    models: tuple[str, ...] = ("fixed",)
    changes: dict[str, Any] = field(default_factory=dict)
    asked_for: bool = False
    empirical: bool = False
    counts: bool = True
    not_on: dict[str, str] = field(default_factory=dict)

    def takes_part(self, workload: Workload) -> bool:
        """Whether the workload's mathematics is among what it does."""
        return workload.model in self.models

    def workload(self, workload: Workload) -> Workload:
        """What it is given to do."""
        return replace(workload, **self.changes)


_BOTH = ("fixed", "exact")
SLOW = "a step takes minutes on a CPU (--contenders kfac-jax insists)"
PAPER = {"statistics_fraction": 1 / 8, "model_fraction": 1 / 4}
CONTENDERS = {
    c.name: c
    for c in (
        Contender("kfac_np", "kfac_np", "own", models=_BOTH),
        Contender("kfac_np-paper", "kfac_np", "own", "kfac", _BOTH, PAPER, asked_for=True),
        Contender("kfac_np-sgd", "kfac_np", "own", "sgd"),
        Contender("kfac-jax", "kfac_jax", "jax", models=_BOTH, not_on={"W2": SLOW}),
        Contender("jax-sgd", "jax_sgd", "jax", "sgd"),
        Contender("torch-sgd", "torch_sgd", "torch", "sgd"),
        Contender("kfac-pytorch", "kfac_pytorch", "torch", empirical=True),
        Contender("asdl", "asdl", "torch"),
        Contender("singd", "singd", "torch", empirical=True, counts=False),
        Contender("curvlinops", "curvlinops", "torch"),
        Contender("nngeometry", "nngeometry", "torch"),
    )
}
OURS = {"kfac": "kfac_np", "sgd": "kfac_np-sgd"}
ROOFLINE = Contender("roofline", "roofline", "own", models=_BOTH)


def choose(names: list[str], workload: Workload) -> list[Contender]:
    """Contenders by name (all but special ones without any) that do this workload."""
    unknown = set(names) - set(CONTENDERS)
    if unknown:
        known = ", ".join(CONTENDERS)
        raise SystemExit(f"no contender {', '.join(sorted(unknown))}; there are {known}")
    wanted = [CONTENDERS[n] for n in names] or [c for c in CONTENDERS.values() if not c.asked_for]
    return [c for c in wanted if c.takes_part(workload)]


def left_out(
    names: list[str], workload: Workload, device: str, contenders: list[Contender]
) -> tuple[list[Contender], dict[str, str]]:
    """Those that are tried, and why the others are not."""
    why = {}
    for contender in contenders:
        for beginning, reason in contender.not_on.items():
            small = workload.network == tiny(workload).network
            if device == "cpu" and workload.name.startswith(beginning) and not (names or small):
                why[contender.name] = reason
    return [c for c in contenders if c.name not in why], why


def interpreter(contender: Contender, pythons: dict[str, str]) -> str:
    """Named for the contender or its family, by argument or by KFAC_BENCH_PYTHON_JAX and so on."""
    variable = os.environ.get(f"KFAC_BENCH_PYTHON_{contender.family.upper()}")
    named = pythons.get(contender.name) or pythons.get(contender.family)
    return named or variable or sys.executable


def pair(text: str) -> tuple[str, str]:
    """A contender, or a family of them, and its interpreter, from a command line."""
    name, sign, path = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, path

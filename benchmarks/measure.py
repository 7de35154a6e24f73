"""Interleaved rounds, rejected steps, medians: from contenders to numbers."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import ContenderError, Process, environment
from benchmarks.registry import OURS, ROOFLINE, Contender, interpreter
from benchmarks.workloads import Workload

Step = dict[str, Any]
"""wall, cpu, wait (seconds) and kind of one step."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    tf32: bool = False
    rounds: int = 60
    seconds: float = 90.0
    warm: int = 3
    turn_seconds: float = 0.05
    gemm_every: int = 10
    pythons: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def setup(self, contender: Contender, workload: Workload) -> dict[str, Any]:
        """The command that a contender begins with."""
        return {
            "do": "setup",
            "workload": contender.workload(workload).as_dict(),
            "method": contender.method,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "tf32": self.tf32,
            "options": self.options,
        }


def disturbed(steps: list[Step]) -> list[bool]:
    """Which steps something else interfered with.

    Each contender's steps are compared with their best tenth: a step is disturbed when its threads
    waited for a core for longer (by 5 % of its time), or when they used less processor time per
    second (by 10 %) and it took longer. Steps of a kind of which there are fewer than three are
    kept.
    """
    marks = [False] * len(steps)
    for kind in {s["kind"] for s in steps}:
        chosen = [i for i, s in enumerate(steps) if s["kind"] == kind]
        if len(chosen) < 3:
            continue
        walls = [steps[i]["wall"] for i in chosen]
        use = [steps[i]["cpu"] / steps[i]["wall"] for i in chosen]
        wait = [(steps[i]["wait"] or 0.0) / steps[i]["wall"] for i in chosen]
        tenth = len(chosen) // 10
        quick, used, waited = sorted(walls)[tenth], sorted(use)[-1 - tenth], sorted(wait)[tenth]
        for wall, share, pause, i in zip(walls, use, wait, chosen, strict=True):
            slower = wall > 1.05 * quick and share < 0.9 * used
            marks[i] = slower or pause > waited + 0.05
    return marks


def summarise(steps: list[Step], period: int) -> dict[str, Any]:
    """Seconds per step: rare kinds of steps weighted by how often they come in whole periods.

    `median` and quartiles are those of the usual kind of step; `per_step` has the others in it.
    """
    marks = disturbed(steps)
    kinds: dict[str, list[Step]] = {}
    for kind in {s["kind"] for s in steps}:
        of_kind = [(s, mark) for s, mark in zip(steps, marks, strict=True) if s["kind"] == kind]
        kept = [s for s, mark in of_kind if not mark]
        kinds[kind] = kept or [s for s, _ in of_kind]
    whole = steps[-(len(steps) // period * period) :] if len(steps) >= period else steps
    counts = {kind: sum(s["kind"] == kind for s in whole) for kind in kinds}
    medians = {
        clock: {k: statistics.median(s[clock] for s in chosen) for k, chosen in kinds.items()}
        for clock in ("wall", "cpu")
    }
    per_step, processor = (
        sum(counts[k] * medians[clock][k] for k in kinds) / len(whole) for clock in ("wall", "cpu")
    )
    usual = [s["wall"] for s in kinds[max(counts, key=lambda k: counts[k])]]
    low, median, high = quartiles(usual)
    return {
        "per_step": per_step,
        "processor_per_step": processor,
        "median": median,
        "quartiles": [low, high],
        "least": min(usual),
        "steps": len(steps),
        "rejected": sum(marks),
        "kinds": {k: {"count": counts[k], "median": medians["wall"][k]} for k in kinds},
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


class Round:
    """All contenders of one workload, alive at once."""

    def __init__(self, workload: Workload, contenders: list[Contender], settings: Settings) -> None:
        self.workload, self.settings = workload, settings
        self.contenders = {c.name: c for c in contenders}
        self.processes: dict[str, Process] = {}
        self.started: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, list[Step]] = {}
        self.turns: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def run(self, say: Any = print) -> dict[str, Any]:
        """Start all, go round, end all; what was measured."""
        with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
            stack.callback(self._kill)
            for contender in (*self.contenders.values(), ROOFLINE):
                self._start(contender, Path(logs) / f"{contender.name}.log", say)
            load, before = os.getloadavg()[0], _busy(self.processes)
            began = time.monotonic()
            rounds = self._rounds(began)
            elapsed, after = time.monotonic() - began, _busy(self.processes)
            ends = {name: process.close() for name, process in self.processes.items()}
        gemm = best_rates(ends.get(ROOFLINE.name, {}).get("result", {}).get("rates", {}))
        return {
            "workload": self.workload.as_dict(),
            "rounds": rounds,
            "seconds": elapsed,
            "load": [load, os.getloadavg()[0]],
            "foreign_cores": (after - before) / elapsed if before is not None and after else None,
            "roofline": gemm,
            "contenders": self._results(ends, gemm),
            "failed": self.failed,
        }

    def _start(self, contender: Contender, log: Path, say: Any) -> None:
        s = self.settings
        python = interpreter(contender, s.pythons)
        env = environment(s.threads, s.device, s.tf32)
        try:
            process = Process(python, contender.program, env, log)
            self.processes[contender.name] = process
            self.started[contender.name] = process.ask(**s.setup(contender, self.workload))
            if contender is ROOFLINE:
                return
            steps = process.ask(do="step", count=s.warm)["steps"]
        except ContenderError as error:
            self._give_up(contender.name, str(error), say)
            return
        quickest = min(step["wall"] for step in steps)
        self.turns[contender.name] = max(1, min(20, math.ceil(s.turn_seconds / quickest)))
        self.steps[contender.name] = []

    def _give_up(self, name: str, why: str, say: Any = print) -> None:
        if process := self.processes.pop(name, None):
            process.close()
        self.steps.pop(name, None)
        self.failed[name] = why
        say(f"  {name}: {why}", flush=True)

    def _rounds(self, began: float) -> int:
        """Everyone's turn, beginning with another one each time."""
        s, done = self.settings, 0
        while done < s.rounds and self.steps:
            if done % s.gemm_every == 0:
                self._roofline()
            for name in rotated(list(self.steps), done):
                try:
                    answer = self.processes[name].ask(do="step", count=self.turns[name])
                except ContenderError as error:
                    self._give_up(name, str(error))
                    continue
                self.steps[name] += answer["steps"]
            done += 1
            late = (time.monotonic() - began) / s.seconds
            if late > 2.0 or (late > 1.0 and done % self.workload.refresh == 0):
                break
            if sys.stderr.isatty():
                print(
                    f"\r{self.workload.name}: {done} rounds ", end="", file=sys.stderr, flush=True
                )
        self._roofline()
        return done

    def _roofline(self) -> None:
        if process := self.processes.get(ROOFLINE.name):
            process.ask(do="step", count=1)

    def _results(self, ends: dict[str, Any], gemm: dict[str, float]) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for name, steps in self.steps.items():
            contender = self.contenders[name]
            result = summarise(steps, self.workload.refresh)
            parts: dict[str, float] = {}
            if contender.counts:
                parts = contender.workload(self.workload).operations(
                    contender.method, contender.empirical
                )
            rate = sum(parts.values()) / result["per_step"] if parts else None
            results[name] = {
                "method": contender.method,
                **result,
                "operations": parts,
                "rate": rate,
                "of_roofline": rate / gemm["gemm"] if rate and gemm.get("gemm") else None,
                "peak_bytes": ends[name].get("peak_bytes"),
                "device_bytes": ends[name].get("device_bytes"),
                **self.started[name],
                "walls": [round(step["wall"], 7) for step in steps],
            }
        for result in results.values():
            ours = results.get(OURS[result["method"]])
            result["to_ours"] = result["per_step"] / ours["per_step"] if ours else None
            result["median_to_ours"] = result["median"] / ours["median"] if ours else None
            result["processor_to_ours"] = (
                result["processor_per_step"] / ours["processor_per_step"] if ours else None
            )
        return results

    def _kill(self) -> None:
        for process in self.processes.values():
            process.close()


def rotated(names: list[str], k: int) -> list[str]:
    """The list, beginning at its k-th entry."""
    k %= len(names)
    return names[k:] + names[:k]


def best_rates(rates: dict[str, list[float]]) -> dict[str, float]:
    """Largest rates; "gemm" that of all sizes, "gemm least" the least of the moments' best."""
    best = {name: max(values) for name, values in rates.items() if values}
    products = [values for name, values in rates.items() if name.startswith("gemm") and values]
    if products:
        moments = [max(moment) for moment in zip(*products, strict=True)]
        best |= {"gemm": max(moments), "gemm least": min(moments)}
    return best


def _busy(processes: dict[str, Process]) -> float | None:
    """Processor seconds used on this machine by anything but the contenders (Linux)."""
    try:
        fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = fields
    total = (user + nice + system + irq + softirq + steal) / float(os.sysconf("SC_CLK_TCK"))
    return total - sum(p.processor_seconds() for p in processes.values())

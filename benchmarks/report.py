"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, removed

BUSY = 0.15
"""Cores that others may use while times are taken, before a warning is printed."""


def table(name: str, result: dict[str, Any]) -> str:
    """One workload as a Markdown table, with the conditions it was measured in."""
    columns = (
        "ms/step", "median (quartiles)", "time / ours", "processor ms (/ ours)", "GFLOP/step",
        "GFLOP/s", "of roofline", "peak MB", "import s", "first step s", "steps (rejected)",
    )  # fmt: skip
    rows = [f"| contender | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for contender, r in result["contenders"].items():
        low, high = r["quartiles"]
        rows.append(
            f"| {contender} | {1e3 * r['per_step']:.2f} "
            f"| {1e3 * r['median']:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f}) "
            f"| {_or_dash(r['to_ours'], '.2f')} "
            f"| {1e3 * r['processor_per_step']:.2f} ({_or_dash(r['processor_to_ours'], '.2f')}) "
            f"| {_or_dash(sum(r['operations'].values()) or None, '.2f', 1e-9)} "
            f"| {_or_dash(r['rate'], '.1f', 1e-9)} "
            f"| {_or_dash(r['of_roofline'], '.0%')} "
            f"| {_or_dash(r['device_bytes'] or r['peak_bytes'], '.0f', 1e-6)} "
            f"| {r['import_seconds']:.2f} | {r['first_step_seconds']:.2f} "
            f"| {r['steps']} ({r['rejected']}) |"
        )
    gemm = result["roofline"]
    notes = [f"{result['rounds']} rounds in {result['seconds']:.0f} s"]
    if "gemm" in gemm:
        notes.append(
            f"matrix products {1e-9 * gemm['gemm']:.0f} GFLOP/s (at the worst moment "
            f"{1e-9 * gemm['gemm least']:.0f}), copies {1e-9 * gemm['copy']:.1f} GB/s"
        )
    notes.append("load {:.2f} before, {:.2f} after".format(*result["load"]))
    if result["foreign_cores"] is not None:
        notes.append(f"others used {result['foreign_cores']:.2f} cores meanwhile")
    lines = [f"### {name}", "", *rows, "", "; ".join(notes) + "."]
    if (result["foreign_cores"] or 0.0) > BUSY:
        lines.append(
            "**Other programs were running: take these times again on an idle machine.** Processor "
            "time with --threads 1 is disturbed least."
        )
    lines += [f"Not measured: {who}: {why}" for who, why in result["failed"].items()]
    return "\n".join(lines)


def conditions(threads: int, device: str, dtype: str) -> dict[str, Any]:
    """Machine, date and checkout."""
    return {
        "command": "python " + " ".join(_command()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": (_git("status", "--porcelain", "--", "kfac_np") or "").splitlines(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "platform": platform.platform(),
        "variables_removed": removed(),
    }


def heading(record: dict[str, Any]) -> str:
    """Conditions in a line or two."""
    gone = record["variables_removed"]
    return (
        f"{record['date']}, {record['processor']}, {record['threads']} of {record['cores']} cores, "
        f"{record['device']}, {record['dtype']}, commit {(record['commit'] or 'unknown')[:9]}"
        + (" with changes" if record["changed_files"] else "")
        + (f"\nRemoved from the contenders' environment: {', '.join(gone)}" if gone else "")
    )


def libraries(result: dict[str, Any]) -> str:
    """Versions and BLAS of each contender."""
    lines = []
    for name, r in result["contenders"].items():
        seen = " ".join(f"{k} {v}" for k, v in r["versions"].items() if v != "unknown")
        pools = "; ".join(r["blas"]) if r["blas"] else "pools unknown (pip install threadpoolctl)"
        lines.append(f"{name}: {seen}; {pools}")
    return "\n".join(lines)


def write_json(path: Path, record: Any) -> None:
    """As JSON, indented."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """All of it or nothing: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def processor() -> str:
    """Model of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _or_dash(value: float | None, form: str, factor: float = 1.0) -> str:
    return "–" if value is None else format(factor * value, form)


def _command() -> list[str]:
    import sys

    return ["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

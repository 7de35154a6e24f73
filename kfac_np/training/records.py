"""Files of JSON lines: one record a line, flushed, and cut back to a step on resuming."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfac_np.errors import CheckpointError
from kfac_np.training.files import naming, write_atomically

__all__ = ["append_record", "cut_after", "read_records", "sync", "to_json"]


def append_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    r"""Append one record; when this returns, the line survives the death of the process.

    Parameters
    ----------
    path : path
        Created when missing.
    record : mapping
        NaN and infinities, which JSON lacks, become null.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     append_record(f"{directory}/metrics.jsonl", {"step": 1, "loss": float("nan")})
    ...     Path(f"{directory}/metrics.jsonl").read_text()
    '{"step": 1, "loss": null}\n'
    """
    with naming(path), Path(path).open("a", encoding="utf-8") as file:
        file.write(to_json(record) + "\n")


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until the disk has a file's records: a checkpoint must not be ahead of them.

    Examples
    --------
    >>> sync("no/such/file.jsonl")
    """
    if Path(path).exists():
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())


def to_json(value: Any, indent: int | None = None) -> str:
    """Encode as standard JSON, with null for NaN and infinities.

    Examples
    --------
    >>> to_json({"rho": float("inf"), "steps": (1, 2)})
    '{"rho": null, "steps": [1, 2]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def read_records(path: str | os.PathLike[str], until: int | None = None) -> list[dict[str, Any]]:
    """Read the records of a file of JSON lines; a last line that was cut off is left out.

    Parameters
    ----------
    path : path
    until : int, optional
        Last step that is wanted: lines after it are left out unread.

    Raises
    ------
    CheckpointError
        A line before the last wanted one is not a record.

    Examples
    --------
    >>> read_records("no/such/file.jsonl")
    []
    """
    return [json.loads(line) for line in _whole_lines(Path(path), until)]


def cut_after(path: str | os.PathLike[str], step: int) -> None:
    r"""Drop what comes after a step, damaged or not; the file is replaced as a whole.

    Raises
    ------
    CheckpointError
        A line before the last wanted one is not a record.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory) / "metrics.jsonl"
    ...     _ = path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    ...     cut_after(path, 1)
    ...     path.read_text()
    '{"step": 1}\n'
    """
    path = Path(path)
    if not path.exists():
        return
    kept = b"".join(_whole_lines(path, step))
    write_atomically(path, lambda file: file.write(kept))


def _whole_lines(path: Path, until: int | None = None) -> list[bytes]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    steps = [_step_of(line) for line in lines]
    if until is not None:
        wanted = [n for n, step in enumerate(steps) if step is not None and step <= until]
        steps = steps[: wanted[-1] + 1] if wanted else []
    if None in steps:
        number = steps.index(None) + 1
        raise CheckpointError(f"{path}, line {number}: expected a JSON object with a step")
    return [
        line
        for line, step in zip(lines, steps, strict=False)
        if until is None or (step is not None and step <= until)
    ]


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

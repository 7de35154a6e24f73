"""Files of JSON lines: one record a line, flushed, and cut back to a step on resuming."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from kfac_np.errors import CheckpointError
from kfac_np.training.files import naming, write_atomically

__all__ = [
    "RecordFile",
    "append_record",
    "cut_after",
    "read_evaluations",
    "read_records",
    "to_json",
]


@final
class RecordFile:
    r"""A file of records that a run appends to, of growing steps.

    What cannot be written, because the disk is full, say, is kept and tried again.

    Parameters
    ----------
    path : path
        Created with the first record.
    last : int
        Step of the last record in it: there is no second one of that step.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     file = RecordFile(f"{directory}/metrics.jsonl")
    ...     file.append({"step": 1, "loss": float("nan")})
    ...     file.path.read_text()
    '{"step": 1, "loss": null}\n'
    """

    def __init__(self, path: str | os.PathLike[str], last: int = -1) -> None:
        self.path = Path(path)
        # Bytes of whole lines in the file, lines that are not in it yet, and the last one's step:
        # exchanged at once, so that an interrupt at any moment finds them in agreement.
        size = self.path.stat().st_size if self.path.exists() else 0
        self._state: tuple[int, tuple[str, ...], int] = (size, (), last)
        self._patience = 0

    @property
    def complete(self) -> bool:
        """Whether everything has been written."""
        return not self._state[1]

    def append(self, record: Mapping[str, Any]) -> OSError | None:
        """Append one record; when this returns None, the line survives the death of the process.

        Parameters
        ----------
        record : mapping
            With a step; NaN and infinities, which JSON lacks, become null.

        Returns
        -------
        OSError or None
            Why it could not be written. The next attempt is made when twice as many wait.
        """
        size, lines, last = self._state
        if record["step"] <= last:
            return None
        self._state = (size, (*lines, to_json(record) + "\n"), record["step"])
        if len(lines) < self._patience:
            return None
        try:
            self.flush()
        except OSError as error:
            self._patience = 2 * len(lines) + 1
            return error
        self._patience = 0
        return None

    def flush(self, durably: bool = False) -> None:
        """Write what could not be written before; `durably` waits until the disk has it all.

        Raises
        ------
        OSError
            It still cannot be written.
        """
        size, lines, last = self._state
        if not lines and not (durably and size):
            return
        data = "".join(lines).encode()
        # A file with records in it that has gone is not made anew.
        flags = os.O_RDWR | (0 if size else os.O_CREAT)
        with naming(self.path), open(os.open(self.path, flags, 0o666), "r+b") as file:
            found = os.fstat(file.fileno()).st_size
            if found < size:
                raise OSError("expected the records of this run, found fewer")
            if found > size:  # the beginning of a line that could not be written
                file.truncate(size)
            file.seek(size)
            file.write(data)
            file.flush()
            if durably:
                os.fsync(file.fileno())
        self._state = (size + len(data), (), last)


def append_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    r"""Append one record to a file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     for step in (1, 2):
    ...         append_record(f"{directory}/metrics.jsonl", {"step": step})
    ...     Path(f"{directory}/metrics.jsonl").read_text()
    '{"step": 1}\n{"step": 2}\n'
    """
    if (error := RecordFile(path).append(record)) is not None:
        raise error


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


def read_evaluations(
    path: str | os.PathLike[str], until: int | None = None
) -> list[dict[str, Any]]:
    """Read the evaluations of a run: as `read_records`, and each with seconds and losses.

    Raises
    ------
    CheckpointError
        A record is not an evaluation.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     append_record(f"{directory}/e.jsonl", {"step": 0, "seconds": 0.0})
    ...     read_evaluations(f"{directory}/e.jsonl")
    Traceback (most recent call last):
    kfac_np.errors.CheckpointError: .../e.jsonl: expected an evaluation of step 0, with ...
    """
    records = read_records(path, until)
    for record in records:
        found = [record[name] for name in ("current", "averaged") if name in record]
        losses = [m["loss"] for m in found if isinstance(m, Mapping) and "loss" in m]
        numbers = [record.get("seconds"), *(0.0 if loss is None else loss for loss in losses)]
        if (
            "current" not in record
            or len(losses) < len(found)
            or not all(type(number) in (int, float) for number in numbers)
        ):
            raise CheckpointError(
                f"{path}: expected an evaluation of step {record['step']}, with seconds and the "
                "loss of the current parameters, got something else"
            )
    return records


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


def _whole_lines(path: Path, until: int | None) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
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
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

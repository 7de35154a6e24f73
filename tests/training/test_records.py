"""JSON lines: flushed, standard, and cut back cleanly."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from kfac_np.errors import CheckpointError
from kfac_np.training.files import write_atomically, write_text
from kfac_np.training.records import RecordFile, append_record, cut_after, read_records, to_json


def test_each_record_is_on_disk_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_record(path, {"step": step, "loss": 0.1 * step})
        assert len(path.read_text().splitlines()) == step
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]
    assert read_records(path)[0]["loss"] == 0.1


def test_json_is_standard() -> None:
    text = to_json({"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, 1: None, "d": True}})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [None, 1.5]],
        "b": {"c": None, "1": None, "d": True},
    }


@pytest.mark.parametrize("tail", [b"", b'{"step"', b'{"step": 3}', b"\xff\xfe", b"   "])
def test_a_half_written_last_line_is_left_out(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert [r["step"] for r in read_records(path)] == [1, 2]
    cut_after(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    cut_after(path, 0)
    assert path.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"x", b"[1]", b"{}", b'{"step": "1"}', b"\xff", b""])
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        cut_after(path, 5)
    cut_after(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("tail", [b'{"bad\n', b'{"bad', b'{"bad\n{"step": 4}\n', b"\xff\n\n"])
def test_damage_after_the_last_wanted_step_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + tail)
    assert [r["step"] for r in read_records(path, until=2)] == [1, 2]
    cut_after(path, 3)
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]


def test_no_file_is_no_records(tmp_path: Path) -> None:
    cut_after(tmp_path / "none.jsonl", 3)
    assert read_records(tmp_path / "none.jsonl") == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each time; half a line is written over, and there is no second record of a step."""
    path = tmp_path / "metrics.jsonl"
    file = RecordFile(path)
    assert file.append({"step": 1}) is None

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "open", full)
    tried = [file.append({"step": step}) is not None for step in range(2, 18)]
    assert [n for n, one in enumerate(tried) if one] == [0, 1, 3, 7, 15]
    assert not file.complete
    monkeypatch.undo()
    with path.open("ab") as other:
        other.write(b'{"ste')
    file.append({"step": 17})
    file.flush(durably=True)
    assert file.complete
    assert [r["step"] for r in read_records(path)] == list(range(1, 18))


def test_records_of_others_are_not_made_up_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = RecordFile(path)
    file.append({"step": 1})
    path.write_bytes(b"")
    error = file.append({"step": 2})
    assert "metrics.jsonl: expected the records of this run, found fewer" in str(error)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.flush()
    assert not path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        append_record("/dev/full", {"step": 1})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "full"), r"\[Errno 28\] full: '.*a\.txt'"),
        (OSError("12 requested and 4 written"), r"a\.txt: 12 requested and 4 written"),
        (FileNotFoundError(2, "gone", "b.txt"), r"\[Errno 2\] gone: 'b\.txt'"),
    ],
)
def test_a_failed_writing_names_the_file(tmp_path: Path, error: OSError, message: str) -> None:
    def write(_: object) -> None:
        raise error

    with pytest.raises(type(error), match=message):
        write_atomically(tmp_path / "a.txt", write)
    assert not list(tmp_path.iterdir())


def test_files_are_written_through_links_and_over_nothing_else(tmp_path: Path) -> None:
    """A link in the place of the file that is being written is not followed."""
    for name in ("precious", "real"):
        (tmp_path / name).write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / ".real.part").symlink_to("precious")
    write_text(tmp_path / "link", os.fsdecode(b"\xe9t\xe9"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"\xe9t\xe9"
    assert (tmp_path / "precious").read_text() == "old"
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path, tmp_path / "fifo", Path("/")):
        with pytest.raises(OSError, match="expected a file, found something else"):
            write_text(place, "new")

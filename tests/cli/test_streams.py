"""Output that cannot be written ends nothing: closed, full, or read by nobody."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_np.cli import main
from kfac_np.cli.streams import Stream, standard_streams

WORDS = ["--data", "digits", "--n-train", "60", "--n-test", "20", "--sizes", "4"]


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {"": io.StringIO, "full": Full, "closed": closed, "none": lambda: None}
PAIRS = [("", "full"), ("", "closed"), ("", "none"), ("full", ""), ("closed", "none")]


@pytest.mark.parametrize(("output", "errors"), [*PAIRS, ("none", "none")])
def test_a_run_finishes_whoever_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, errors: str
) -> None:
    for name, kind in (("stdout", output), ("stderr", errors)):
        monkeypatch.setattr(sys, name, STREAMS[kind]())
    monkeypatch.setattr("kfac_np.training.plots.plot_curves", lambda *_: None)  # it takes a while
    before = sys.stdout, sys.stderr
    code = main(["train", *WORDS, "--steps", "1", "--out", str(tmp_path)])
    assert (sys.stdout, sys.stderr) == before
    assert code == (output in ("full", "closed"))  # the table is not there
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
    if output == "full" and not errors:
        expected = "kfac-np: error: standard output: [Errno 28] No space left on device"
        assert sys.stderr.getvalue().splitlines()[-1] == expected


def test_a_bar_and_a_usage_error_on_a_broken_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Full()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("kfac_np.training.plots.plot_curves", lambda *_: None)
    assert main(["train", *WORDS, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert main(["train", "--stps"]) == 2


def test_what_a_stream_says_of_itself(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("w", encoding="latin-1") as file:
        stream = Stream(file)
        assert (stream.fileno(), stream.encoding) == (file.fileno(), "latin-1")
        assert not stream.isatty()
        file.close()
        print("lost", file=stream)
    assert isinstance(stream.failure, ValueError)
    assert Stream(None).encoding == "utf-8"
    with pytest.raises(io.UnsupportedOperation):
        Stream(None).fileno()


def test_a_descriptor_that_failed_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the interpreter would fail to flush it at its end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with standard_streams() as (output, _):
            print("lost")
        assert isinstance(output.failure, BrokenPipeError)
        pipe.flush()
    monkeypatch.undo()


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """As in `kfac-np train ... 2>&1 | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "kfac_np", "train", *WORDS, "--steps", "3", "--out", str(tmp_path)],
        stdout=writer,
        stderr=writer,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    os.close(writer)
    assert done.returncode == 1
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"

"""Checkpoints: what comes back is what was saved, and damage is always noticed."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfac_np.backend import get_backend, to_numpy
from kfac_np.errors import CheckpointError
from kfac_np.training import checkpoint


def bits(x: float) -> bytes:
    return struct.pack(">d", x)


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float) and not isinstance(a, np.generic):
        return bits(a) == bits(b)
    if isinstance(a, (np.ndarray, np.generic)):
        x, y = np.asarray(a), np.asarray(b)
        return (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()) and (
            x.flags.fnc == y.flags.fnc  # Fortran order, not C
        )
    return bool(a == b)


NAN_WITH_PAYLOAD = struct.unpack(">d", bytes.fromhex("7ff800000000abcd"))[0]

TREE: dict[str, Any] = {
    "none": None,
    "flags": [True, False, 0, 1],
    "integers": (0, -1, 2**127 + 1, -(2**128)),
    "floats": (0.0, -0.0, 1.0, 0.1, 5e-324, 1.7976931348623157e308, math.inf, -math.inf),
    "nan": [math.nan, NAN_WITH_PAYLOAD],
    "strings": ("", "é\n\x00\ud800", "7"),
    "empty": ((), [], {}),
    "keys": {7: "int", "7": "str", True: "bool"},
    "arrays": {
        "float32": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
        "float64": np.asarray([math.nan, -0.0, math.inf]),
        "int": np.arange(4, dtype=np.int64),
        "uint64": np.asarray([2**64 - 1], dtype=np.uint64),
        "bool": np.asarray([True, False]),
        "0-d": np.asarray(1.5, dtype=np.float32),
        "no entries": np.zeros((0, 3)),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "read-only": np.broadcast_to(np.ones(1), (3,)),
    },
    "scalars": (np.float32(0.1), np.float64(0.1), np.int64(3)),
}


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.npz", TREE, {"step": 3, "loss": math.inf})
    tree, metadata = checkpoint.load(tmp_path / "a.npz")
    assert same(tree, TREE)
    assert metadata == {"step": 3, "loss": math.inf}
    assert os.listdir(tmp_path) == ["a.npz"]


def test_no_pickle_inside(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.npz", TREE)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        manifest = json.loads(file["manifest"].tobytes())
        assert all(file[name].dtype.kind in "biufc" for name in file.files)
    assert manifest["version"] == 1


@pytest.mark.parametrize("name", ["numpy", "array_api_strict", "torch"])
def test_arrays_go_back_to_their_backend_with_their_dtype(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name)
    backend = get_backend(name, "float32")
    rescued = backend.asarray([0.1], dtype=backend.xp.float64)
    checkpoint.save(tmp_path / "a.npz", (backend.ones((2,)), rescued, backend.asarray([3])))
    (ones, double, integer), _ = checkpoint.load(tmp_path / "a.npz", backend)
    assert type(ones) is type(backend.ones((2,)))
    assert [to_numpy(x).dtype.str[1:] for x in (ones, double, integer)] == ["f4", "f8", "i8"]
    assert float(double[0]) == 0.1


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": (1, {2})}, "tree.a.1: expected an array, None, bool"),
        ({"a": 1j}, "got complex"),
        ([np.asarray(["text"])], "tree.0: expected an array of numbers, got dtype <U4"),
        ([np.asarray([None])], "got dtype object"),
        ({(1, 2): 3}, "expected a str or int as key"),
        ({"a": np.ma.masked_less(np.ones(2), 0)}, "tree.a: expected a plain array, got a MaskedA"),
        ([np.ones((2, 2)).view(np.matrix)], "tree.0: expected an array, None, .* got matrix"),
        ([np.recarray(2, "f4,f4")], "tree.0: expected a plain array, got a recarray"),
        ((10**5000,), "tree: expected what JSON can hold"),
        (nested(100_000), "tree: expected what JSON can hold"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_writing(
    tmp_path: Path, tree: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        checkpoint.save(tmp_path / "a.npz", tree)
    assert not list(tmp_path.iterdir())


def test_metadata_holds_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metadata\.x: expected .* got ndarray"):
        checkpoint.save(tmp_path / "a.npz", (), {"x": np.ones(2)})


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    checkpoint.save(path, TREE)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    tree = {"w": np.arange(3.0), "k": 2}
    checkpoint.save(path, tree, {"step": 1})
    whole = path.read_bytes()
    noticed = 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            loaded = checkpoint.load(path)
        except CheckpointError:
            noticed += 1
        else:  # a date in the archive's directory, say
            assert same(loaded, (tree, {"step": 1}))
    assert noticed > len(whole) / 3 / 2


def entries_of(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def rewrite(path: Path, manifest: bytes, keep_digest: bool = True) -> None:
    """Replace the manifest, leaving a valid archive."""
    entries = entries_of(path)
    entries["manifest"] = np.frombuffer(manifest, dtype=np.uint8)
    if not keep_digest:
        del entries["sha256"]
    np.savez(path, **entries)


def sign(path: Path, **changes: Any) -> None:
    """Replace parts of the manifest of a checkpoint, with the checksum that belongs to them."""
    arrays = entries_of(path)
    manifest, _ = json.loads(arrays.pop("manifest").tobytes()), arrays.pop("sha256")
    text = json.dumps({**manifest, **changes}).encode()
    text = text.replace(b'"!infinite"', b"Infinity").replace(b'"!deep"', b"[" * 999 + b"]" * 999)
    digest = checkpoint._digest(text, arrays)
    np.savez(
        path,
        manifest=np.frombuffer(text, np.uint8),
        sha256=np.frombuffer(digest, np.uint8),
        **arrays,
    )


def test_foreign_newer_and_altered_files_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def message() -> str:
        with pytest.raises(CheckpointError) as info:
            checkpoint.load(path)
        assert "\n" not in str(info.value)
        return str(info.value)

    assert "no such file" in message()
    path.write_text("not a zip file")
    assert "not a checkpoint" in message()
    path.write_bytes(b"")
    assert "not a checkpoint" in message()
    np.savez(path, x=np.ones(2))
    assert "not a checkpoint" in message()
    with path.open("wb") as file:
        np.save(file, np.ones(2))
    assert "not a checkpoint" in message()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest", "[]")
    assert "not a checkpoint" in message()

    def saved() -> dict[str, Any]:
        checkpoint.save(path, (1,))
        with np.load(path) as file:
            return dict(json.loads(file["manifest"].tobytes()))

    rewrite(path, json.dumps({**saved(), "format": "something else"}).encode())
    assert "got another npz file" in message()
    rewrite(path, json.dumps({**saved(), "version": 2}).encode())
    assert "expected checkpoint version 1, got 2" in message()
    rewrite(path, json.dumps({**saved(), "tree": {"tuple": [2]}}).encode())
    assert "checksum" in message()
    rewrite(path, b"[]")
    assert "not an object" in message()
    saved()
    rewrite(path, b"{}", keep_digest=False)
    assert "sha256" in message()


def test_a_refused_pickle_is_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", manifest=np.asarray([{}], dtype=object))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "a.npz")


def test_the_last_ones_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="found none"):
        checkpoint.load_latest(tmp_path)
    for step in (9, 10, 100):
        checkpoint.save_step(tmp_path, step, (step,), keep=2)
    (tmp_path / ".step-000000000200.npz.part").write_text("half")
    assert [int(p.stem[5:]) for p in checkpoint.checkpoints(tmp_path)] == [10, 100]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-000000000100.npz"
    assert checkpoint.load_latest(tmp_path) == (newest, (100,), {"step": 100})
    checkpoint.save_step(tmp_path, 101, (), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000000101.npz"]
    assert len(checkpoint.checkpoints(tmp_path)) == 1
    with pytest.raises(CheckpointError, match="keep: expected at least 1"):
        checkpoint.save_step(tmp_path, 102, (), keep=0)


def test_rewriting_an_older_step_after_falling_back_keeps_it(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save_step(tmp_path, step, (step,))
    checkpoint.save_step(tmp_path, 15, (15,))
    assert [int(p.stem[5:]) for p in checkpoint.checkpoints(tmp_path)] == [15, 20]


def test_falling_back_to_the_previous_one(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save_step(tmp_path, step, (step,))
    newest = checkpoint.checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"damaged.*an older one is there: step-000000000001"):
        checkpoint.load_latest(tmp_path)
    assert checkpoint.load_latest(tmp_path, fall_back=True)[1] == (1,)
    for path in checkpoint.checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-000000000002\.npz: .*damaged"):
        checkpoint.load_latest(tmp_path, fall_back=True)


def test_falling_back_from_whatever_cannot_be_read_or_restored(tmp_path: Path) -> None:
    def restore(path: Path, tree: Any, metadata: dict[str, Any]) -> Any:
        if tree == "foreign":
            raise CheckpointError(f"{path}: expected a state")
        return tree, metadata["step"]

    for step in range(1, 8):
        checkpoint.save_step(tmp_path, step, "foreign" if step == 7 else (step,), keep=9)
    good, renamed, note, packed, malformed, folder, _ = checkpoint.checkpoints(tmp_path)
    renamed.write_bytes(good.read_bytes())
    with zipfile.ZipFile(note, "a") as archive:
        archive.writestr("other", "a note")
    np.savez_compressed(packed, **entries_of(packed))
    sign(malformed, tree=[1])
    folder.unlink()
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"7\.npz: expected a state .an older one is there"):
        checkpoint.load_latest(tmp_path, restore=restore)
    for bad in checkpoint.checkpoints(tmp_path)[:0:-1]:
        found = checkpoint.load_latest(tmp_path, fall_back=True, restore=restore)
        assert found == (good, ((1,), 1), {"step": 1})
        with pytest.raises(CheckpointError, match=bad.name):
            checkpoint.load_latest(tmp_path, restore=restore)
        bad.rmdir() if bad == folder else bad.unlink()


def test_a_checkpoint_is_of_the_step_in_its_name(tmp_path: Path) -> None:
    path = checkpoint.save_step(tmp_path, np.int64(5), (), {"step": 3, "seconds": 0.5})
    assert checkpoint.load_latest(tmp_path)[2] == {"step": 5, "seconds": 0.5}
    path.rename(path.with_name("step-000000000010.npz"))
    with pytest.raises(CheckpointError, match=r"10\.npz: .* step in its name, got one of step 5:"):
        checkpoint.load_latest(tmp_path)
    for step in (-1, 10**12):
        with pytest.raises(CheckpointError, match="step: expected a number of at most 12 digits"):
            checkpoint.save_step(tmp_path, step, ())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    checkpoint.save(path, (1,))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, (2,))
    assert checkpoint.load(path)[0] == (1,)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_where_directories_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)  # as on Windows
    checkpoint.save(tmp_path / "a.npz", (1,))
    assert checkpoint.load(tmp_path / "a.npz")[0] == (1,)


def test_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    program = f"""
        import itertools, numpy as np
        from kfac_np.training import checkpoint
        for step in itertools.count():
            checkpoint.save_step({str(tmp_path)!r}, step, (np.full(300_000, float(step)), step))
            print(step, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    _, (array, step), metadata = checkpoint.load_latest(tmp_path)
    assert step == metadata["step"] >= last
    assert (array == step).all()


def test_the_advice_to_load_unsafely_is_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for write in (
        lambda: path.write_bytes(b"junk\n"),
        lambda: np.savez(path, manifest=np.asarray([{}], dtype=object)),
    ):
        write()
        with pytest.raises(CheckpointError, match="damaged one") as info:
            checkpoint.load(path)
        assert "pickle" not in str(info.value)


def test_nothing_is_read_that_is_longer_than_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npz"
    checkpoint.save(path, (np.zeros(1000),))
    entries = entries_of(path)
    np.savez_compressed(path, **entries)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(CheckpointError, match=r"damaged one \(manifest\.npy is compressed\)"):
        checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", bytes(10_000))
        for name in ("b.npy", "c.npy"):  # the same bytes again
            member = copy.copy(archive.getinfo("a.npy"))
            member.filename = name
            archive.filelist.append(member)
    with pytest.raises(CheckpointError, match="the members are longer than the file"):
        checkpoint.load(path)


@pytest.mark.parametrize("kind", ["no array", "text", "dates", "records"])
def test_members_that_are_no_arrays_of_numbers(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.npz"
    checkpoint.save(path, (1,))
    if kind == "no array":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("other", "a note")
    else:
        dtype = {"text": "U3", "dates": "M8[s]", "records": "f4,f4"}[kind]
        np.savez(path, **entries_of(path), other=np.zeros(2, dtype))
    with pytest.raises(CheckpointError, match=r"damaged one \(other is not an array of numbers\)"):
        checkpoint.load(path)


MALFORMED: dict[str, tuple[Any, str]] = {
    "a list": ([1], "tree: expected a value, or an object"),
    "no kind": ({"tuple": [{}]}, r"tree\.0: expected a value, or an object"),
    "two kinds": ({"tuple": [], "list": []}, "tree: expected a value, or an object"),
    "unknown kind": ({"set": []}, "tree: expected a kind of values or containers, got 'set'"),
    "tuple of what": ({"tuple": 3}, "tree: expected a list for the tuple, got 3"),
    "dict of what": ({"dict": {"w": 1}}, "tree: expected a list for the dict, got {'w': 1}"),
    "half a pair": ({"dict": [["w"]]}, "tree: expected pairs of a key and a value"),
    "no pair": ({"dict": [3]}, "tree: expected pairs of a key and a value"),
    "key": ({"dict": [[["w"], 1]]}, "tree: expected pairs of a key and a value"),
    "float": ({"float": "nan"}, "tree: expected 16 hexadecimal digits, got 'nan'"),
    "short float": ({"float": "7ff0"}, "tree: expected 16 hexadecimal digits"),
    "float of what": ({"float": 1.0}, "tree: expected a str for the float, got 1.0"),
    "no such array": ({"list": [{"array": "array_7"}]}, r"tree\.0: .* the file has no 'array_7'"),
    "array of what": ({"array": [0]}, "tree: expected a str for the array"),
    "scalar": ({"scalar": "array_0"}, r"tree: expected a scalar, got an array of shape \(2,\)"),
    "infinite": ("!infinite", "damaged one .Infinity in the manifest"),
    "deep": ("!deep", "recursion|expected a value, or an object"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_trees_with_a_valid_checksum(tmp_path: Path, name: str) -> None:
    tree, message = MALFORMED[name]
    path = tmp_path / "a.npz"
    checkpoint.save(path, (np.ones(2),))
    sign(path, tree={"tuple": [{"array": "array_0"}]})
    assert checkpoint.load(path)[0][0].tolist() == [1.0, 1.0]  # what `sign` writes is valid
    sign(path, tree=tree)
    for backend in (None, get_backend("numpy")):
        with pytest.raises(CheckpointError, match=message) as info:
            checkpoint.load(path, backend)
        assert "\n" not in str(info.value)


def test_malformed_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    checkpoint.save(path, (np.ones(2),))
    sign(path, metadata={"list": []})
    with pytest.raises(CheckpointError, match="metadata: expected a dict, got a list"):
        checkpoint.load(path)
    sign(path, metadata={"array": "array_0"})
    with pytest.raises(CheckpointError, match="metadata: expected an array, but the file has no"):
        checkpoint.load(path)

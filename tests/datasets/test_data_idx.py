"""Files in MNIST's format: read, found, downloaded, or refused with a reason."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hosts import serving
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kfac_np.data import fashion, fashion_mnist, idx_dataset, load, read_idx
from kfac_np.data.idx import FILE_NAMES
from kfac_np.data.sources import ENVIRONMENT_VARIABLE
from kfac_np.errors import DataError

KINDS = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def encode(array):
    """The bytes of an IDX file, from its published description."""
    kind = KINDS[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def arrays():
    """A data set of five and three images, 3 × 2 pixels, in four classes."""
    numbers = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": numbers.integers(0, 256, (5, 3, 2), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.asarray([0, 1, 2, 1, 0], dtype=np.uint8),
        "t10k-images-idx3-ubyte": numbers.integers(0, 256, (3, 3, 2), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.asarray([3, 0, 1], dtype=np.uint8),
    }


def write(directory, compress=False, **changes):
    """Write the four files, each replaced by the array or bytes in `changes`, if any."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, array in arrays().items():
        content = changes.get(name.rpartition("-idx")[0].replace("-", "_"), array)
        content = content if isinstance(content, bytes) else encode(content)
        if compress:
            (directory / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (directory / name).write_bytes(content)
    return directory


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    """No data on this machine, whatever is installed, until a test puts some there."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(fashion, "DEBIAN_DIRECTORY", str(tmp_path / "debian"))


# One file


@given(
    array=st.sampled_from(sorted(KINDS)).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
    ),
    compress=st.booleans(),
)
def test_round_trip(tmp_path_factory, array, compress):
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(encode(array)) if compress else encode(array))
    read = read_idx(path)
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    assert read.shape == array.shape
    assert read.tobytes() == array.tobytes()  # NaN too
    assert read.flags.writeable


WHOLE = encode(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_every_truncation_is_noticed(tmp_path, length, compress):
    path = tmp_path / "short"
    path.write_bytes(gzip.compress(WHOLE[:length]) if compress else WHOLE[:length])
    with pytest.raises(DataError, match=r"short: expected .* got"):
        read_idx(path)


@pytest.mark.parametrize("length", [3, 10, 20, -5])
def test_truncated_gzip(tmp_path, length):
    path = tmp_path / "short.gz"
    path.write_bytes(gzip.compress(WHOLE)[:length])
    with pytest.raises(DataError, match=r"short\.gz: damaged gzip file"):
        read_idx(path)


def test_damaged_gzip(tmp_path):
    content = bytearray(gzip.compress(encode(np.zeros(1000, np.uint8))))
    for place, message in ((12, "damaged gzip file"), (-6, "damaged gzip file: CRC")):
        damaged = content.copy()
        damaged[place] ^= 0xFF
        (tmp_path / "bad.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            read_idx(tmp_path / "bad.gz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX file, got 0 bytes"),
        (b"\x89PNG\r\n\x1a\n", "begins with 00 00 and a type from 08 to 0e, got 89 50 4e 47"),
        (b"\0\0\x0a\1\0\0\0\0", "got 00 00 0a 01"),
        (b"PK\3\4" + bytes(30), "got 50 4b 03 04"),
        (b"\0\0\x08\3\0\0\0\1", "header of 16 bytes for 3 dimensions, got 8 bytes: .* cut short"),
        (WHOLE + b"!", r"24 bytes of uint8 for shape \(2, 3, 4\), got 25: there is more"),
        (b"\0\0\x08\3" + b"\xff" * 12 + b"?", "got 1: the file is cut short"),
        (b"\0\0\x0c\1\0\0\0\2" + bytes(6), r"8 bytes of int32 for shape \(2,\), got 6"),
        (
            b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"!",
            "an array, got 255 dimensions of sizes 1 to 1 ",
        ),
        (b"\0\0\x08\xff" + bytes(4 * 255), "an array, got 255 dimensions of sizes 0 to 0 "),
        (b"\0\0\x08\4" + b"\xff" * 12 + bytes(4), "an array, got 4 dimensions of sizes 0 to 42949"),
    ],
)
def test_foreign_files(tmp_path, content, message):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"foreign: .*{message}"):
        read_idx(path)


def test_no_more_is_unpacked_than_the_header_says(tmp_path):
    path = tmp_path / "long.gz"
    path.write_bytes(gzip.compress(WHOLE + bytes(10**6)))
    with pytest.raises(DataError, match=r"24 bytes of uint8 .* got 25: there is more"):
        read_idx(path)


def test_absent_file(tmp_path):
    with pytest.raises(DataError, match="absent: expected a readable file: No such file"):
        read_idx(tmp_path / "absent")
    with pytest.raises(DataError, match="readable file: Is a directory"):
        read_idx(tmp_path)


# A directory of four


@pytest.mark.parametrize("compress", [False, True])
def test_directory(tmp_path, compress):
    data = idx_dataset(write(tmp_path / "tiny", compress))
    made = arrays()
    assert np.array_equal(
        data.x_train, made["train-images-idx3-ubyte"].reshape(5, 6) / np.float32(255)
    )
    assert data.x_train.dtype == np.float32
    assert np.array_equal(data.t_train, made["train-labels-idx1-ubyte"])
    assert np.array_equal(data.t_test, made["t10k-labels-idx1-ubyte"])
    assert (data.name, data.image_shape, data.num_classes) == ("tiny", (3, 2, 1), 4)
    assert str(tmp_path) in data.source


def test_full_range_of_bytes(tmp_path):
    images = np.asarray([0, 255] * 15, dtype=np.uint8).reshape(5, 3, 2)
    data = idx_dataset(write(tmp_path, train_images=images))
    assert set(data.x_train.ravel().tolist()) == {0.0, 1.0}


def test_images_of_floats(tmp_path):
    images = np.linspace(0, 1, 30).reshape(5, 3, 2)
    data = idx_dataset(write(tmp_path, train_images=images))
    assert np.array_equal(data.x_train, images.reshape(5, 6).astype(np.float32))
    with pytest.raises(DataError, match=r"x_train: expected values in \[0, 1\], got 0.0 to 255.0"):
        idx_dataset(write(tmp_path, train_images=255 * images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_labels": np.zeros(4, np.uint8)},
            r"train-labels-idx1-ubyte: expected 5 labels, one for each image, got shape \(4,\)",
        ),
        (
            {"t10k_images": np.zeros((3, 2, 2), np.uint8)},
            r"t10k-images-idx3-ubyte: expected images of \(3, 2\) pixels .* got \(2, 2\)",
        ),
        ({"train_images": np.zeros((5, 6), np.uint8)}, r"train-images.*got \(5, 6\)"),
        ({"train_images": np.zeros((0, 3, 2), np.uint8)}, r"train-images.*got \(0, 3, 2\)"),
        ({"t10k_images": np.zeros((3, 3, 2), np.int16)}, "bytes or floats, got int16"),
        ({"t10k_labels": np.zeros(3, np.float32)}, "integer labels, got float32"),
        (
            {"t10k_labels": np.full(3, -1, np.int8)},
            r"t10k-labels-idx1-ubyte: expected labels 0, 1, \.\.\., got -1",
        ),
        (
            {"train_labels": np.asarray([0, 1, 20_000_000, 2, 3], np.int32)},
            "without large gaps, got 20000000, the next below is 3, so that 19999996 of 20000001",
        ),
        (
            {"t10k_labels": np.asarray([3, 0, 255], np.uint8)},
            "without large gaps, got 255, the next below is 3, so that 251 of 256 classes have no",
        ),
        (
            {"train_labels": np.full(5, 255, np.uint8), "t10k_labels": np.full(3, 255, np.uint8)},
            "got 255, so that 255 of 256 classes have no example",
        ),
        ({"t10k_labels": b"PK\3\4"}, "t10k-labels-idx1-ubyte: expected an IDX file"),
    ],
)
def test_files_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        idx_dataset(write(tmp_path, **changes))


def test_some_classes_may_have_no_example(tmp_path):
    """A few images of two classes of many, and a large part of many classes."""
    labels = np.asarray([3, 60, 3, 60, 3], np.uint8)
    assert idx_dataset(write(tmp_path, train_labels=labels)).num_classes == 61
    labels = np.arange(120, 240, dtype=np.uint8)
    images = np.zeros((120, 3, 2), np.uint8)
    data = idx_dataset(write(tmp_path, train_images=images, train_labels=labels))
    assert data.num_classes == 240


def test_missing_files_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / FILE_NAMES[1]).unlink()
    (tmp_path / FILE_NAMES[3]).unlink()
    with pytest.raises(DataError, match=f": {FILE_NAMES[1]}, {FILE_NAMES[3]} missing"):
        idx_dataset(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        idx_dataset(tmp_path / "nowhere")


def test_load_idx(tmp_path):
    data = load(f"idx:{write(tmp_path / 'mine')}", n_train=2)
    assert (data.name, len(data.x_train), len(data.x_test)) == ("mine", 2, 3)


# Fashion-MNIST: where it is looked for


def marked(directory, label):
    """The four files, with a label that tells which directory they came from."""
    return write(directory, train_labels=np.full(5, label, np.uint8))


def found(**arguments):
    data = fashion_mnist(**arguments)
    assert data.name == "fashion-mnist"
    assert "MIT" in data.source
    return int(data.t_train[0])


def test_places_in_their_order(monkeypatch, tmp_path):
    given_place = marked(tmp_path / "given", 1)
    named = tmp_path / "named"
    inner = named / "fashion-mnist"
    marked(tmp_path / "debian", 4)
    assert found() == 4
    monkeypatch.setenv("KFAC_NP_DATA", str(named))
    assert found() == 4  # a variable that names nothing useful is passed over
    marked(named, 3)
    assert found() == 3
    marked(inner, 2)
    assert found() == 2
    assert found(directory=given_place) == 1
    assert load("fashion-mnist", given_place).t_train[0] == 1
    monkeypatch.setenv("KFAC_NP_DATA", "")
    assert found() == 4


def test_an_incomplete_place_is_passed_over(monkeypatch, tmp_path):
    marked(tmp_path / "debian", 4)
    (marked(tmp_path / "named", 3) / FILE_NAMES[2]).unlink()
    monkeypatch.setenv("KFAC_NP_DATA", str(tmp_path / "named"))
    assert found() == 4


def test_absent_data_tells_where_it_looked_and_all_three_ways(monkeypatch, tmp_path):
    (marked(tmp_path / "named", 3) / FILE_NAMES[2]).unlink()
    (tmp_path / "debian").mkdir()
    monkeypatch.setenv("KFAC_NP_DATA", str(tmp_path / "named"))
    with pytest.raises(DataError) as caught:
        fashion_mnist()
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        *FILE_NAMES,
        f"{tmp_path}/named/fashion-mnist (no such directory)",
        f"{tmp_path}/named (missing: {FILE_NAMES[2]})",
        f"{tmp_path}/debian (none there)",
        "(1) give the directory",
        "KFAC_NP_DATA",
        "(2) on Debian or Ubuntu, apt-get install dataset-fashion-mnist",
        "(3) allow the download (30 MB) with download=True",
    ):
        assert part in message, part


def test_a_given_directory_is_the_only_one_looked_in(tmp_path):
    marked(tmp_path / "debian", 4)
    with pytest.raises(DataError, match=r"looked in \S*/given \(no such directory\)\. Three ways"):
        fashion_mnist(tmp_path / "given")


# Fashion-MNIST: downloaded


@pytest.fixture
def host(monkeypatch, tmp_path):
    """The project's host, played by a server on this machine; returns what it serves."""
    pytest.importorskip("pooch")
    folder = write(tmp_path / "host", compress=True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    checksums = {
        name: hashlib.sha256((folder / f"{name}.gz").read_bytes()).hexdigest()
        for name in FILE_NAMES
    }
    monkeypatch.setattr(fashion, "_SHA256", checksums)
    with serving(folder) as address:
        monkeypatch.setattr(fashion, "_URL", address)
        yield folder


def test_download_into_a_directory_once(host, tmp_path):
    place = tmp_path / "fresh"
    data = fashion_mnist(place, download=True)
    assert np.array_equal(data.t_test, arrays()["t10k-labels-idx1-ubyte"])
    for file in host.iterdir():
        file.unlink()
    # Found there from now on, and not asked for again.
    assert len(fashion_mnist(place).x_train) == 5
    assert fashion.download_fashion_mnist(place) == place


def test_download_into_the_cache(host, monkeypatch, tmp_path):
    import pooch

    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    assert len(fashion_mnist(download=True).x_train) == 5
    assert (tmp_path / "cache/kfac_np/fashion-mnist" / f"{FILE_NAMES[0]}.gz").is_file()
    assert host.is_dir()


def test_no_download_when_the_data_are_there(monkeypatch, tmp_path):
    marked(tmp_path / "debian", 4)
    monkeypatch.setattr(fashion, "_URL", "http://127.0.0.1:9/")
    assert found(download=True) == 4


def test_a_wrong_checksum_is_refused(host, tmp_path):
    (host / f"{FILE_NAMES[1]}.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(
        DataError, match=r"could not download http\S*train-labels\S* .*hash"
    ) as caught:
        fashion_mnist(tmp_path / "fresh", download=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fresh" / f"{FILE_NAMES[1]}.gz").exists()


def test_a_host_that_lacks_the_file(host, tmp_path):
    (host / f"{FILE_NAMES[0]}.gz").unlink()
    with pytest.raises(DataError, match=r"could not download .*404"):
        fashion_mnist(tmp_path / "fresh", download=True)


def test_download_without_pooch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match="needs pooch: pip install pooch"):
        fashion_mnist(tmp_path / "fresh", download=True)


def test_checksums_are_those_of_the_published_files():
    # Debian's package has the same compressed streams; the published files differ in the header
    # only, which has the name and the date of compression.
    debian = Path("/usr/share/datasets/fashion-mnist")
    if not debian.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    assert set(fashion._SHA256) == set(FILE_NAMES)
    for name, checksum in fashion._SHA256.items():
        date = 1504176606 if name.startswith("train") else 1504176627
        header = struct.pack("<4sIBB", b"\x1f\x8b\x08\x08", date, 0, 3) + name.encode() + b"\0"
        stream = (debian / f"{name}.gz").read_bytes()[10:]
        assert hashlib.sha256(header + stream).hexdigest() == checksum
    images = read_idx(debian / f"{FILE_NAMES[2]}.gz")
    assert images.shape == (10_000, 28, 28)
    assert math.isclose(images.mean() / 255, 0.2868, abs_tol=1e-3)

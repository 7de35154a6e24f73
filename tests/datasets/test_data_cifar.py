"""Directories in CIFAR's format: read, found, downloaded, or refused with a reason."""

from __future__ import annotations

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
from hosts import serving

from kfac_np.data import cifar10, cifar100, cifar_dataset, cifar_sets, load, read_cifar
from kfac_np.data.sources import ENVIRONMENT_VARIABLE
from kfac_np.errors import ConfigError, DataError

LABELS = {f"data_batch_{i}.bin": [i - 1, 9] for i in range(1, 6)}


def pixels(name, count):
    """What a file's images are: (count, 3, 32, 32)."""
    seed = list(name.encode())
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def records(name, labels):
    """The bytes of a file, from the format's published description; labels are lists of bytes."""
    images = pixels(name, len(labels))
    rows = zip(labels, images, strict=True)
    return b"".join(bytes([*np.atleast_1d(label)]) + image.tobytes() for label, image in rows)


def write(directory, files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, labels in files.items():
        content = labels if isinstance(labels, bytes) else records(name, labels)
        (directory / name).write_bytes(content)
    return directory


def ten(directory, **changes):
    """A directory like CIFAR-10's, with two images a file."""
    return write(directory, {**LABELS, "test_batch.bin": [3, 4], **changes})


def hundred(directory, **changes):
    files = {"train.bin": [[1, 99], [19, 0], [2, 50]], "test.bin": [[0, 7]]}
    return write(directory, {**files, **changes})


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_one_label_byte(tmp_path):
    data = cifar_dataset(ten(tmp_path / "mine"))
    assert (data.name, data.image_shape, data.num_classes) == ("mine", (32, 32, 3), 10)
    assert data.t_train.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert data.t_test.tolist() == [3, 4]
    assert (data.x_train.dtype, data.x_train.shape) == (np.float32, (10, 3072))
    images = data.x_train.reshape(10, 32, 32, 3)
    for i, name in enumerate(LABELS):
        expected = pixels(name, 2).transpose(0, 2, 3, 1).astype(np.float32) / np.float32(255)
        assert np.array_equal(images[2 * i : 2 * i + 2], expected)
    assert repr(data).endswith("32 × 32 pixels of 3 channels, 10 classes)")


def test_two_label_bytes_of_which_the_second_is_the_class(tmp_path):
    data = cifar_dataset(hundred(tmp_path))
    assert (data.t_train.tolist(), data.t_test.tolist()) == ([99, 0, 50], [7])
    assert data.num_classes == 100
    assert np.array_equal(
        data.x_test.reshape(32, 32, 3),
        pixels("test.bin", 1)[0].transpose(1, 2, 0) / np.float32(255),
    )


def test_batches_come_in_the_order_of_their_numbers(tmp_path):
    files = {f"data_batch_{i}.bin": [i % 10] for i in range(11, 0, -1)}
    data = cifar_dataset(write(tmp_path, {**files, "test_batch.bin": [0]}))
    assert data.t_train.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize(
    "name", ["data_batch_1 (copy).bin", "data_batch_01.bin", "data_batch_.bin"]
)
def test_a_copy_of_a_batch_is_not_read(tmp_path, name):
    ten(tmp_path, **{name: [0]})
    with pytest.raises(DataError, match=r"each once, got '\S* ?\S*', too: move it") as caught:
        cifar_dataset(tmp_path)
    assert name in str(caught.value) or name == "data_batch_01.bin"
    assert len(cifar10(tmp_path).x_train) == 10  # the published files are known by name


def test_a_missing_batch_is_named(tmp_path):
    for name in ("data_batch_1.bin", "data_batch_4.bin"):
        (ten(tmp_path) / name).unlink()
        with pytest.raises(DataError, match=rf"up to data_batch_5\.bin, {name} is missing"):
            cifar_dataset(tmp_path)
        with pytest.raises(DataError, match=rf"looked in {tmp_path} \(missing: {name}\), "):
            cifar10(tmp_path)
    ten(tmp_path, **{f"data_batch_{10**12}.bin": [0]})
    with pytest.raises(DataError, match=r"data_batch_6\.bin is missing"):
        cifar_dataset(tmp_path)


@pytest.mark.parametrize(
    ("load_it", "version", "inside", "files"),
    [
        (cifar10, "Python", "cifar-10-batches-py", ["data_batch_1", "batches.meta"]),
        (cifar100, "Python", "cifar-100-python", ["train", "test", "meta"]),
        (cifar10, "MATLAB", "cifar-10-batches-mat", ["data_batch_1.mat"]),
        (cifar100, "MATLAB", "cifar-100-matlab", ["train.mat", "meta.mat"]),
    ],
)
def test_other_versions_are_named(tmp_path, load_it, version, inside, files):
    write(tmp_path / inside, dict.fromkeys(files, b""))
    for place, where in ((tmp_path / inside, "there"), (tmp_path, f"in {inside}")):
        for load_from in (cifar_dataset, load_it):
            with pytest.raises(DataError, match=f"the files {where} are of the {version} version"):
                load_from(place)


def test_a_pickle_by_the_name_of_a_binary_file_is_named(tmp_path):
    ten(tmp_path, **{"data_batch_2.bin": pickle.dumps({b"labels": [1], b"data": bytes(3072)})})
    with pytest.raises(DataError, match=r"data_batch_2\.bin: .* pickle, as the Python version"):
        cifar_dataset(tmp_path)


def test_classes_are_counted_where_they_have_names(tmp_path):
    ten(tmp_path, **{"batches.meta.txt": b"a\nb\nc\n\n" + b"d\n" * 8})
    assert cifar_dataset(tmp_path).num_classes == 11
    ten(tmp_path, **{"batches.meta.txt": b"a\nb\n"})
    with pytest.raises(DataError, match=r"data_batch_1\.bin: expected labels in 0\.\.1, .* got 9"):
        cifar_dataset(tmp_path)
    ten(tmp_path, **{"batches.meta.txt": b"\n\n"})
    with pytest.raises(DataError, match=r"meta\.txt: expected 1 to 256 names .* got none"):
        cifar_dataset(tmp_path)
    ten(tmp_path, **{"batches.meta.txt": b"a\n" * 257})
    with pytest.raises(DataError, match=r"meta\.txt: expected 1 to 256 names .* got 257"):
        cifar_dataset(tmp_path)
    ten(tmp_path, **{"batches.meta.txt": b"\xff"})
    with pytest.raises(DataError, match=r"meta\.txt: expected names of classes"):
        cifar_dataset(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data_batch_2.bin": [10]}, r"data_batch_2\.bin: expected labels in 0\.\.9, .* got 10"),
        ({"test_batch.bin": [255]}, r"test_batch\.bin: expected labels in 0\.\.9, .* got 255"),
        ({"test_batch.bin": b""}, r"expected records of 3073 bytes, .* got 0 bytes"),
        ({"test_batch.bin": bytes(3074)}, "got 3074 bytes: 1 records and 1 bytes"),
        ({"data_batch_5.bin": bytes(3072)}, "got 3072 bytes: 0 records and 3072 bytes"),
        ({"train.bin": [[0, 0]], "test.bin": [[0, 0]]}, "test.bin: both are there"),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    ten(tmp_path, **files)
    with pytest.raises(DataError, match=message) as caught:
        cifar_dataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_hundred(tmp_path):
    hundred(tmp_path, **{"test.bin": [[0, 100]]})
    with pytest.raises(DataError, match=r"test\.bin: expected labels in 0\.\.99, .* got 100"):
        cifar_dataset(tmp_path)
    hundred(tmp_path, **{"test.bin": bytes(3073)})
    with pytest.raises(DataError, match="expected records of 3074 bytes, 2 for labels"):
        cifar_dataset(tmp_path)


def test_directories_of_nothing(tmp_path):
    with pytest.raises(DataError, match="neither is there"):
        cifar_dataset(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        cifar_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected a readable file: Is a directory"):
        read_cifar(tmp_path)


def test_load_by_name(tmp_path):
    ten(tmp_path / "ten")
    hundred(tmp_path / "hundred")
    for data in (
        load(f"cifar:{tmp_path / 'ten'}", n_train=3),
        load("cifar", tmp_path / "ten", n_train=3),
    ):
        assert (data.name, len(data.x_train)) == ("ten", 3)
    assert load("cifar10", tmp_path / "ten").name == "cifar10"
    assert load("cifar100", tmp_path / "hundred").num_classes == 100
    with pytest.raises(ConfigError, match="cifar100 or cifar only, got it with 'cifar:x'"):
        load("cifar:x", tmp_path)


def test_places(monkeypatch, tmp_path):
    inner = ten(tmp_path / "data" / "cifar-10-batches-bin")
    assert len(cifar10(tmp_path / "data").x_train) == len(cifar10(inner).x_train) == 10
    with pytest.raises(DataError, match=r"looked in no place \(KFAC_NP_DATA names none\)\. Two"):
        cifar10()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "data"))
    assert "toronto" in cifar10().source
    (inner / "data_batch_3.bin").unlink()
    with pytest.raises(
        DataError, match=r"data_batch_3\.bin, .* looked in \S*/cifar-10-batches-bin"
    ):
        cifar10()
    hundred(tmp_path / "data")
    assert cifar100().num_classes == 100


# Downloaded


@pytest.fixture
def host(monkeypatch, tmp_path):
    """The authors' host, played by a server on this machine; returns what it serves."""
    pytest.importorskip("pooch")
    folder = tmp_path / "host"
    folder.mkdir()
    checksums = {}
    for name, make in (("cifar10", ten), ("cifar100", hundred)):
        inner = cifar_sets._FOLDERS[name]
        make(tmp_path / "packed" / inner)
        archive = folder / cifar_sets._ARCHIVES[name]
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "packed" / inner, inner)
        checksums[name] = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(cifar_sets, "_SHA256", checksums)
    with serving(folder) as address:
        monkeypatch.setattr(cifar_sets, "_URL", address)
        yield folder


@pytest.mark.parametrize(("load_it", "count"), [(cifar10, 10), (cifar100, 3)])
def test_download_into_a_directory_once(host, tmp_path, load_it, count):
    assert len(load_it(tmp_path / "fresh", download=True).x_train) == count
    for file in host.iterdir():
        file.unlink()
    assert len(load_it(tmp_path / "fresh", download=True).x_train) == count
    assert len(load_it(tmp_path / "fresh").x_train) == count


def test_download_into_the_cache(host, monkeypatch, tmp_path):
    import pooch

    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    assert len(cifar10(download=True).x_train) == 10
    assert (tmp_path / "cache/kfac_np/cifar10/cifar-10-batches-bin/test_batch.bin").is_file()


def test_a_wrong_checksum_is_refused(host, tmp_path):
    (host / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"cifar10: could not download http\S*gz .*hash") as caught:
        cifar10(tmp_path / "fresh", download=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fresh" / "cifar-10-batches-bin").exists()

"""CURVES, digits, and what every data set must satisfy."""

from __future__ import annotations

import hashlib
from importlib import resources

import numpy as np
import pytest

from kfac_np.data import Dataset, curves, digits, draw_curves, first, load
from kfac_np.errors import ConfigError, DataError, InputError


def checksum(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


# CURVES


def test_curves_have_the_same_bits_everywhere():
    data = curves(n_train=4, n_test=4)
    assert checksum(data.x_train) == "4e69ea9396423274"
    assert checksum(data.x_test) == "ab9daea6724fd91d"
    assert checksum(curves(4, 1, seed=2**64 - 1).x_train) == "21be59f24792e2da"


def test_an_image_depends_on_its_number_and_the_seed_alone():
    # 300 is more than is drawn in one go
    small, large = curves(n_train=5, n_test=300), curves(n_train=300, n_test=5)
    assert np.array_equal(small.x_train, large.x_train[:5])
    assert np.array_equal(small.x_test[:5], large.x_test)
    assert not np.array_equal(small.x_train, small.x_test[:5])
    assert not np.array_equal(small.x_train, curves(5, 5, seed=1).x_train)
    assert len(np.unique(large.x_train, axis=0)) == 300


def test_curves_are_as_hard_for_a_linear_code_as_the_original():
    # Hinton and Salakhutdinov (2006), Fig. 2A: standard PCA with 18 components, 5.90
    x = curves(n_train=4000, n_test=1).x_train.astype(np.float64)
    spectrum = np.linalg.eigvalsh(np.cov(x.T))
    assert 5.5 < spectrum[:-18].sum() < 6.5


def test_strokes_are_thin_smooth_and_inside():
    images = curves(n_train=500, n_test=1).x_train.reshape(-1, 28, 28)
    assert images.min() == 0
    assert 0.95 < images.max() <= 1
    assert np.all(images.max(axis=(1, 2)) > 0.7)
    assert 0.02 < images.mean() < 0.06
    border = np.concatenate([images[:, [0, -1], :].ravel(), images[:, :, [0, -1]].ravel()])
    assert np.all(border == 0)
    # grey pixels between black and white: the edges are blurred
    assert np.mean((images > 0.1) & (images < 0.9)) > 0.5 * np.mean(images > 0)


def test_curve_passes_its_three_points():
    points = np.random.default_rng(0).uniform(6.5, 20.5, (400, 3, 2))
    images = draw_curves(points)
    nearest = np.rint(points).astype(int)
    inked = images[np.arange(400)[:, None], nearest[..., 1], nearest[..., 0]]
    # A point is at most √½ from the centre of its pixel: (1 - 0.5/1.75²)² = 0.700
    assert inked.min() >= 0.699


def test_drawing_is_symmetric():
    points = np.random.default_rng(1).integers(7, 21, (50, 3, 2))
    images = draw_curves(points)
    assert np.allclose(draw_curves(points[:, ::-1]), images, atol=1e-5)  # drawn backwards
    assert np.array_equal(draw_curves(points[..., ::-1]), images.transpose(0, 2, 1))
    mirrored = draw_curves(points * [-1, 1] + [27, 0])
    assert np.allclose(mirrored, images[:, :, ::-1], atol=1e-5)


def test_stroke_has_no_gaps_where_the_pen_is_fastest():
    # there and back across the whole box: the most ink between two samples
    image = draw_curves(np.asarray([[[6.5, 6.5], [20.5, 20.5], [6.5, 6.5]]]))[0]
    assert np.diag(image)[7:21].min() > 0.9


def test_three_equal_points_are_a_dot():
    image = draw_curves(np.full((1, 3, 2), 14))[0]
    assert image[14, 14] == 1
    assert np.count_nonzero(image) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_train": 0}, "n_train: expected an integer > 0, got 0"),
        ({"n_test": 2.5}, "n_test: expected an integer > 0, got 2.5"),
        ({"seed": -1}, r"seed to be an integer in 0..2\*\*64-1, got -1"),
    ],
)
def test_curves_refuse(arguments, message):
    with pytest.raises(InputError, match=message):
        curves(**arguments)


def test_drawing_refuses():
    with pytest.raises(InputError, match=r"shape \(N, 3, 2\), got \(3, 2\)"):
        draw_curves(np.zeros((3, 2)))
    with pytest.raises(InputError, match="finite points"):
        draw_curves(np.full((1, 3, 2), np.nan))


# Digits


def test_digits_are_the_known_ones():
    data = digits()
    x = np.concatenate([data.x_train, data.x_test]) * 16
    t = np.concatenate([data.t_train, data.t_test])
    assert np.array_equal(x, np.rint(x))
    assert (x.shape, int(x.sum()), int(x.max())) == ((1797, 64), 561718, 16)
    # class counts as published for optdigits.tes
    assert np.bincount(t).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert x[0, :8].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert data.t_train[:10].tolist() == list(range(10))


def test_digits_come_with_their_licence():
    note = resources.files("kfac_np.data") / "files" / "digits-LICENSE.txt"
    text = note.read_text(encoding="utf-8")
    assert "CC BY 4.0" in text
    assert "Alpaydin" in text
    assert "CC BY 4.0" in digits().source


# What every data set satisfies


def made_up(**changes):
    fields = {
        "name": "made up",
        "x_train": np.full((3, 4), 0.5, dtype=np.float32),
        "t_train": np.asarray([0, 1, 2]),
        "x_test": np.zeros((2, 4), dtype=np.float32),
        "t_test": np.asarray([2, 2]),
        "image_shape": (2, 2, 1),
        "num_classes": 3,
        "source": "made up",
    }
    return Dataset(**(fields | changes))


def test_a_good_data_set_is_accepted():
    assert repr(made_up()) == (
        "Dataset('made up': 3 for training, 2 for testing, 2 × 2 pixels, 3 classes)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((3, 4))}, "x_train: expected dtype float32, got float64"),
        ({"x_train": np.zeros((3, 5), np.float32)}, r"x_train: .*\(N, 4\).*, got \(3, 5\)"),
        ({"x_test": np.zeros((2, 2, 2), np.float32)}, r"x_test: .*got \(2, 2, 2\)"),
        ({"x_test": np.zeros((0, 4), np.float32)}, r"x_test: .*N >= 1, got \(0, 4\)"),
        ({"x_train": np.full((3, 4), np.nan, np.float32)}, r"in \[0, 1\], got nan"),
        ({"x_train": np.full((3, 4), np.inf, np.float32)}, r"in \[0, 1\], got inf"),
        ({"x_train": np.full((3, 4), -1, np.float32)}, r"in \[0, 1\], got -1.0"),
        ({"t_train": np.asarray([0, 1])}, r"t_train: expected shape \(3,\).*got \(2,\)"),
        ({"t_train": np.ones(3)}, "t_train: .*float64"),
        ({"t_test": np.asarray([0, 3])}, "t_test: expected labels in 0..2, got 0 to 3"),
        ({"t_test": np.asarray([0, -1])}, "t_test: expected labels in 0..2, got -1 to 0"),
        ({"t_test": None}, "t_test: expected labels together .* got no labels"),
        ({"image_shape": (2, 2)}, r"image_shape: .*channels\), got \(2, 2\)"),
        ({"image_shape": (4, 1, 0)}, r"image_shape: .*got \(4, 1, 0\)"),
        ({"num_classes": None}, "t_train: .* got labels and num_classes=None"),
    ],
)
def test_a_bad_data_set_is_refused(changes, message):
    with pytest.raises(DataError, match=f"made up: .*{message}"):
        made_up(**changes)


def test_first_keeps_the_first():
    data = first(made_up(), n_train=2)
    assert (len(data.x_train), len(data.t_train), len(data.x_test)) == (2, 2, 2)
    assert first(curves(3, 3), n_test=1).t_test is None
    with pytest.raises(InputError, match="made up: n_test: expected 1 to 2, got 3"):
        first(made_up(), n_test=3)
    with pytest.raises(InputError, match="made up: n_train: expected 1 to 3, got 0"):
        first(made_up(), n_train=0)


def test_load_by_name():
    data = load("curves", n_train=3, n_test=2)
    assert np.array_equal(data.x_train, curves(3, 1).x_train)
    assert len(data.x_test) == 2
    assert len(load("digits", n_test=7).x_test) == 7


@pytest.mark.parametrize("name", ["", "mnist", "Curves", "idx:", "idx", "cifar", "cifar:"])
def test_load_lists_the_choices(name):
    with pytest.raises(ConfigError, match=r"curves, digits, .* cifar:DIR or idx:DIR, got"):
        load(name)


def test_load_refuses_a_directory_that_would_be_ignored():
    with pytest.raises(ConfigError, match=r"directory with fashion-mnist, .* only"):
        load("curves", directory="anywhere")

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images

from dinocli.apps.pack import pack
from dinocli.data.decode.image import decode
from dinocli.data.images import DEFAULTS
from dinocli.data.sources.open import image_folder, open_source
from dinocli.evals.balance import balanced_sample, describe_imbalance, number_within, shuffle_within, spaced_rows
from dinocli.features.inputs import given_images


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("count", "classes"), [(0, 3), (1, 1), (9, 1), (1000, 17)])
def test_rows_of_a_label_are_numbered_in_their_order(count: int, classes: int, dtype: type) -> None:
    labels = np.random.default_rng(0).integers(-1, classes, count).astype(dtype)
    seen: dict[int, int] = {}
    expected = []
    for label in labels.tolist():
        expected.append(seen.get(label, 0))
        seen[label] = expected[-1] + 1
    assert number_within(labels).tolist() == expected


def test_labels_are_sorted_once_however_many_classes_there_are() -> None:
    """A pass over all labels per class takes a minute for a million images of 10,000 classes."""
    passes = 0

    class Counted(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **options):  # type: ignore[no-untyped-def]
            nonlocal passes
            passes += 1
            return getattr(ufunc, method)(*(np.asarray(x) for x in inputs), **options)

    labels = np.random.default_rng(0).integers(0, 500, 2000)
    numbers = number_within(labels.view(Counted))
    assert passes < 10
    np.testing.assert_array_equal(numbers, number_within(labels))


def test_a_range_of_shuffled_numbers_is_the_same_share_of_every_class() -> None:
    labels = np.array([0] * 20 + [1] * 40 + [2] * 3)
    numbers = shuffle_within(labels, (5, 7))
    for label, size in enumerate((20, 40, 3)):
        assert sorted(numbers[labels == label]) == list(range(size))
    assert not np.array_equal(numbers, number_within(labels)), "in random order"
    np.testing.assert_array_equal(numbers, shuffle_within(labels, (5, 7)))
    assert not np.array_equal(numbers, shuffle_within(labels, 5))


def test_spaced_rows_include_both_ends() -> None:
    assert spaced_rows(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spaced_rows(101, 3).tolist() == [0, 50, 100]
    assert not len(spaced_rows(0, 3)) and not len(spaced_rows(3, 0))


def test_an_imbalance_above_three_is_described() -> None:
    labels = np.array([0] * 31 + [1] * 10 + [3] * 12)
    line = describe_imbalance(labels, ["cat", "dog", "none", "owl"])
    assert line.startswith("imbalanced classes: cat has 31 training images, dog has 10;")
    assert describe_imbalance(labels[1:], ["cat", "dog", "none", "owl"]) == "", "three times as many are normal"
    assert describe_imbalance(labels[:31], ["cat"]) == ""


def test_the_sample_of_a_large_set_is_balanced_over_classes(tmp_path: Path) -> None:
    for label, count in (("many", 30), ("few", 3), ("some", 10)):
        write_images(tmp_path / label, count, size=8)
    small = balanced_sample(image_folder(tmp_path), 12)
    counts = {small.classes[i]: int(n) for i, n in enumerate(np.bincount(small.labels))}
    assert counts == {"few": 3, "many": 5, "some": 4} or counts == {"few": 3, "many": 4, "some": 5}
    assert all(name.startswith(small.classes[label]) for name, label in zip(small.names, small.labels, strict=True))
    assert list(balanced_sample(image_folder(tmp_path), 12).names) == list(small.names)


def test_a_sample_of_packed_pixels_and_given_images_reads_the_images_that_it_names(tmp_path: Path) -> None:
    for i, label in enumerate("ab"):
        write_images(tmp_path / "images" / label, 6, size=8, seed=i)
    files = image_folder(tmp_path / "images")
    pack(files, tmp_path / "packed", pixels=True)
    arrays = [decode(files.read(i), DEFAULTS) for i in range(len(files))]
    for source in (open_source(str(tmp_path / "packed")), given_images(arrays)):
        source = replace(source, labels=files.labels, classes=files.classes)
        small = balanced_sample(balanced_sample(source, 8), 4)
        rows = [list(source.names).index(name) for name in small.names]
        assert rows != list(range(4)) and list(small.labels) == [0, 0, 1, 1]
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(decode(small.read(i), DEFAULTS), arrays[row])
        assert small.fingerprint != source.fingerprint

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_images

from dinocli.data.sources.indexed import folder_classes
from dinocli.data.sources.open import open_images


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["b/1.jpg", "a/x/2.jpg", "b/3.jpg"], ["a", "b"], [1, 0, 1]),
        (["10/1.jpg", "9/1.jpg"], ["9", "10"], [1, 0]),  # numbers are sorted as numbers
        (["a/1.jpg", "2.jpg"], [], [-1, -1]),
    ],
)
def test_top_folders_are_classes(names: list[str], classes: list[str], labels: list[int]) -> None:
    found = folder_classes(names)
    assert (found[0], found[1].tolist()) == (classes, labels)


def test_some_of_the_images(tmp_path: Path) -> None:
    for seed, folder in enumerate(("train/a", "train/b", "val/a")):
        write_images(tmp_path / folder, 1, seed=seed)
    whole = open_images(str(tmp_path))
    taken, below = whole.take(np.array([2, 0, 2])), whole.below("train", np.array([0, 1]))
    assert [taken.read(i) for i in range(3)] == [whole.read(i) for i in (2, 0, 2)]
    assert (list(below.names), below.classes, below.labels.tolist()) == (
        ["a/0000.png", "b/0000.png"],
        ["a", "b"],
        [0, 1],
    )
    assert below.where == f"{tmp_path}/train"
    assert below.in_files
    assert (below.root / below.names[1]).read_bytes() == below.read(1) == whole.read(1)
    assert len({source.fingerprint for source in (whole, taken, below)}) == 3

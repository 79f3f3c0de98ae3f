from __future__ import annotations

import os
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.apps.demo.drawings import CLASSES, Drawing, draw, write_set
from dinocli.core.errors import DinoError


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return [draw(index, size=32) for index in range(400)]


def test_there_are_ten_classes_in_alphabetical_order() -> None:
    assert len(CLASSES) == 10
    assert tuple(sorted(set(CLASSES))) == CLASSES


def test_a_drawing_is_uint8_rgb_with_a_boolean_mask_and_the_label_of_its_index() -> None:
    for index in range(20):
        drawing = draw(index, size=40)
        assert drawing.image.shape == (40, 40, 3) and drawing.image.dtype == np.uint8
        assert drawing.mask.shape == (40, 40) and drawing.mask.dtype == bool
        assert drawing.label == index % 10


def test_a_drawing_depends_only_on_its_arguments() -> None:
    first = draw(7, size=48, seed=3)
    draw(8, size=48, seed=3)
    again = draw(7, size=48, seed=3)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)


def test_index_and_seed_change_the_drawing() -> None:
    here = draw(7, size=48).image
    assert not np.array_equal(here, draw(17, size=48).image)
    assert not np.array_equal(here, draw(7, size=48, seed=1).image)


def test_size_changes_only_the_sharpness() -> None:
    for index in range(10):
        coarse, fine = draw(index, size=48), draw(index, size=96)
        shrunk = fine.image.reshape(48, 2, 48, 2, 3).mean((1, 3))
        assert np.abs(shrunk - coarse.image).mean() < 12
        assert (fine.mask[::2, ::2] == coarse.mask).mean() > 0.93


def test_the_object_covers_a_fair_part_of_every_image(drawings: list[Drawing]) -> None:
    areas = np.array([drawing.mask.mean() for drawing in drawings])
    assert areas.min() > 0.05 and areas.max() < 0.5
    assert 0.2 < areas.mean() < 0.4


def test_colours_vary_within_a_kind(drawings: list[Drawing]) -> None:
    for label in range(10):
        kind = drawings[label::10]
        for part in ([d.image[d.mask].mean(0) for d in kind], [d.image[~d.mask].mean(0) for d in kind]):
            assert np.std(part, axis=0).max() > 8  # of 255


def test_the_background_does_not_predict_the_class(drawings: list[Drawing]) -> None:
    scenes = np.stack([drawing.image[~drawing.mask].mean(0) for drawing in drawings])
    assert nearest(scenes, neighbours=10) < 0.25


def test_raw_pixels_barely_predict_the_class(drawings: list[Drawing]) -> None:
    pixels = np.stack([d.image.reshape(16, 2, 16, 2, 3).mean((1, 3)).ravel() for d in drawings])
    assert nearest(pixels, neighbours=10) < 0.62  # 0.1 is chance


def nearest(values: np.ndarray, neighbours: int) -> float:
    """Return the k-NN accuracy on the last quarter of the rows, which are in drawing order; the others vote."""
    labels, split = np.arange(len(values)) % 10, len(values) * 3 // 4
    bank, queries = values[:split], values[split:]
    order = np.argsort((bank**2).sum(1) - 2 * queries @ bank.T, axis=1)[:, :neighbours]
    votes = np.eye(10)[labels[order]].sum(1)
    return float((votes.argmax(1) == labels[split:]).mean())


def test_a_written_set_can_be_read_back(tmp_path: Path) -> None:
    write_set(tmp_path / "images", images=12, size=32, masks=tmp_path / "masks")
    assert sorted(folder.name for folder in (tmp_path / "images").iterdir()) == list(CLASSES)
    assert len(list((tmp_path / "images").rglob("*.jpg"))) == 12
    drawing, stem = draw(11, size=32), f"{CLASSES[1]}/00011"
    with Image.open(tmp_path / "images" / f"{stem}.jpg") as image:
        assert np.abs(np.asarray(image, dtype=float) - drawing.image).mean() < 12  # JPEG loses a little
    with Image.open(tmp_path / "masks" / f"{stem}.png") as mask:
        assert np.array_equal(np.asarray(mask), drawing.mask * 255)


def test_masks_are_written_only_if_requested(tmp_path: Path) -> None:
    write_set(tmp_path, images=3, size=32)
    assert not list(tmp_path.rglob("*.png"))
    assert sorted(path.name for path in tmp_path.rglob("*.jpg")) == ["00000.jpg", "00001.jpg", "00002.jpg"]


def test_several_processes_draw_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start = SpawnProcess.start
    monkeypatch.setattr(SpawnProcess, "start", lambda process: (start(process), started.append(process.pid)))
    before = dict(os.environ)
    for count in (1, 2):
        write_set(tmp_path / str(count), images=7, size=32, masks=tmp_path / f"{count}-masks", processes=count)
    for one, other in (("1", "2"), ("1-masks", "2-masks")):
        roots = tmp_path / one, tmp_path / other
        files = [{path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")} for root in roots]
        assert len(files[0]) == 7
        assert files[0] == files[1]
    assert len(started) == 2
    assert dict(os.environ) == before


def test_a_process_that_dies_is_an_error_and_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SpawnProcess.start

    def start_and_kill(process: SpawnProcess) -> None:
        start(process)
        process.kill()

    monkeypatch.setattr(SpawnProcess, "start", start_and_kill)
    with pytest.raises(DinoError, match="a process that draws has ended early"):
        write_set(tmp_path, images=4, size=32, processes=2)

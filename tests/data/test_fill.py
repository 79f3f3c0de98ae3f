from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from dinocli.data.crops import JitterConfig, ViewConfig, ViewsConfig
from dinocli.data.decode import ImagesConfig
from dinocli.data.fill import Cutter, StreamFiller, _on_grid
from dinocli.data.ring import Task
from dinocli.data.shards import Sample

JITTER = JitterConfig(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
GLOBAL = ViewConfig(size=64, scale=(0.4, 1.0), flip=0.5, jitter=JITTER)
LOCAL = GLOBAL.model_copy(update={"size": 32, "scale": (0.1, 0.4)})
VIEWS = ViewsConfig(
    mean=(0.5,) * 3, std=(0.5,) * 3, global_1=GLOBAL, global_2=GLOBAL, local=LOCAL, locals=2
)  # fmt: skip


def jpeg(width: int, height: int) -> bytes:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 127 + 100 * np.sin((x + y) / 40)], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_a_large_photo_is_decoded_smaller_and_its_crops_stay_what_they_were() -> None:
    data = jpeg(1600, 1200)
    small, whole = (Cutter(VIEWS, 0, ImagesConfig(reduce_above=above)) for above in (1.0, 100.0))
    sizes = set()
    for image in range(10):
        numbers, _ = small.numbers(0, image)
        [tries] = small.tries(numbers[None])
        (reduced, boxes), (full, exact) = small.pixels(data, tries), whole.pixels(data, tries)
        sizes.add(reduced.shape)
        assert full.shape == (1200, 1600, 3)
        ratio = full.shape[0] / reduced.shape[0]
        assert np.abs(np.array(boxes) * ratio - exact).max() <= ratio
        assert (np.array(boxes)[:, 2:].min(1) >= small.sides - 1).all(), "no crop is enlarged by it, but for rounding"
        slots = [slot_of(1), slot_of(1)]
        for cutter, slot, pixels, cuts in zip((small, whole), slots, (reduced, full), (boxes, exact), strict=True):
            cutter.place(cutter.places(slot, Task(0, 0, 0, 1))[0], pixels, cuts)
        for name in ("globals", "locals"):
            difference = (slots[0][name].float() - slots[1][name].float()).abs()
            assert difference.mean() < 3
    assert all(height < 1200 for height, _, _ in sizes)


def test_boxes_on_a_smaller_grid_stay_inside_and_keep_a_pixel() -> None:
    boxes = [(0, 0, 100, 200), (99, 199, 1, 1), (50, 100, 50, 100)]
    on = np.array(_on_grid(boxes, (100, 200), (13, 25)))
    assert on[0].tolist() == [0, 0, 13, 25]
    assert (on[:, 2:] >= 1).all()
    assert (on[:, :2] + on[:, 2:] <= [13, 25]).all()


def stream(bad: set[int]) -> Iterator[Sample]:
    good = jpeg(80, 60)
    for number in range(100):
        yield Sample(0, number, f"{number}.jpg", b"" if number in bad else good, -1)


def slot_of(batch: int) -> dict[str, torch.Tensor]:
    v = 4
    return {
        "keys": torch.zeros(batch, 2, dtype=torch.int64),
        "globals": torch.zeros(2, batch, 64, 64, 3, dtype=torch.uint8),
        "locals": torch.zeros(2, batch, 32, 32, 3, dtype=torch.uint8),
        "flip": torch.zeros(v, batch, dtype=torch.bool),
        "factors": torch.zeros(v, batch, 4),
        "order": torch.zeros(v, batch, 4, dtype=torch.uint8),
        "gray": torch.zeros(v, batch, dtype=torch.bool),
        "radius": torch.zeros(v, batch),
        "solarize": torch.zeros(v, batch, dtype=torch.bool),
    }


def test_a_bad_sample_of_a_stream_is_replaced_by_a_later_one_which_keeps_its_turn() -> None:
    fill = StreamFiller(Cutter(VIEWS, 0, ImagesConfig()), stream({1, 2}))
    rows, bad = [], []
    for batch in range(3):
        slot = slot_of(4)
        bad += fill(slot, Task(0, batch, 0, 4))
        rows += slot["keys"][:, 1].tolist()
    assert rows == [0, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [name for name, _ in bad] == ["1.jpg", "2.jpg", "2.jpg"]

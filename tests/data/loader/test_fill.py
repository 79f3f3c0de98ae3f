from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocli.data.decode.pixels import Data, Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.loader.cache import PixelCache
from dinocli.data.loader.fill import Cutter, FileFiller, ImageFiller, StreamFiller, _place_on_grid
from dinocli.data.loader.ring import Task
from dinocli.data.sources.clips import Clips
from dinocli.data.sources.indexed import StoredImages
from dinocli.data.sources.listing import Names
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.shards import Sample
from dinocli.data.views.augment import augment
from dinocli.data.views.crops import Draws, JitterConfig, ViewConfig, ViewsConfig
from dinocli.data.views.masking import MaskConfig, blocks, generator_of

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


def test_decoding_a_large_photo_smaller_hardly_changes_its_crops() -> None:
    data = jpeg(1600, 1200)
    small, whole = (Cutter(VIEWS, 0, ImagesConfig(reduce_above=above)) for above in (1.0, 100.0))
    sizes = set()
    for image in range(10):
        numbers, _ = small.numbers(0, image)
        [tries] = small.tries(numbers[None])
        slots = [slot_of(1), slot_of(1)]
        places = [small.places(slot, Task(0, 0, 0, 1))[0] for slot in slots]
        (reduced, boxes), (full, exact) = (
            cutter.pixels(data, tries, of) for cutter, of in zip((small, whole), places, strict=True)
        )
        sizes.add(reduced.shape)
        assert full.shape == (1200, 1600, 3)
        ratio = full.shape[0] / reduced.shape[0]
        assert np.abs(np.array(boxes) * ratio - exact).max() <= ratio
        assert (np.array(boxes)[:, 2:].min(1) >= np.array([64, 64, 32, 32]) - 1).all(), (
            "no crop is enlarged by it, but for rounding"
        )
        small.place(places[0], reduced, boxes)
        whole.place(places[1], full, exact)
        for name in ("globals", "locals"):
            difference = (slots[0][name].float() - slots[1][name].float()).abs()
            assert difference.mean() < 3
    assert all(height < 1200 for height, _, _ in sizes)


def test_scaled_boxes_stay_inside_the_image_and_are_not_empty() -> None:
    boxes = [(0, 0, 100, 200), (99, 199, 1, 1), (50, 100, 50, 100)]
    on = np.array(_place_on_grid(boxes, (100, 200), (13, 25)))
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


MASK = MaskConfig(share=0.5, ratio=(0.1, 0.5), smallest=2, aspect=(0.3, 1 / 0.3))
MASKED = VIEWS.model_copy(update={"mask": MASK})


def test_masks_depend_on_seed_epoch_image_and_view() -> None:
    # The slot was filled before: only the images of this chunk may change.
    slot = {"where": torch.ones(2, 4, 5, 6, dtype=torch.bool), "counts": torch.tensor([[0, 9, 15, 0], [3, 0, 12, 3]])}
    Cutter(MASKED, 7, ImagesConfig()).mask(slot, 1, [(2, 40), (3, 41)])
    assert slot["where"][:, [0, 3]].all()
    for g in range(2):
        for b, epoch, number in ((1, 2, 40), (2, 3, 41)):
            wanted = blocks(MASK, (5, 6), int(slot["counts"][g, b]), generator_of(7, epoch, number, g))
            assert slot["where"][g, b].equal(torch.from_numpy(wanted))


def test_a_bad_sample_of_a_stream_does_not_change_the_masks() -> None:
    wheres = []
    for bad in ({1, 2}, set()):
        slot = slot_of(4) | {"where": torch.zeros(2, 4, 8, 8, dtype=torch.bool), "counts": torch.full((2, 4), 20)}
        StreamFiller(Cutter(MASKED, 0, ImagesConfig()), stream(bad))(slot, Task(0, 0, 0, 4))
        wheres.append(slot["where"])
    assert wheres[0].equal(wheres[1])
    assert (wheres[0].sum((2, 3)) == 20).all()
    assert len({str(one.tolist()) for one in wheres[0].flatten(0, 1)}) == 8


def test_a_cutter_that_finishes_views_applies_the_draws_that_it_writes() -> None:
    slots = [slot_of(4) | {"clean": torch.zeros(2, 4, 64, 64, 3, dtype=torch.uint8)} for _ in range(2)]
    for slot, finish in zip(slots, (False, True), strict=True):
        StreamFiller(Cutter(VIEWS, 0, ImagesConfig(), finish=finish), stream(set()))(slot, Task(0, 0, 0, 4))
    crops, finished = slots
    drawn = Draws(*(crops[name] for name in Draws._fields))
    assert all(torch.equal(finished[name], crops[name]) for name in Draws._fields)
    for name, of_views in (("globals", slice(0, 2)), ("locals", slice(2, 4)), ("clean", slice(0, 2))):
        draws = drawn.flips_only(2) if name == "clean" else Draws(*(d[of_views] for d in drawn))
        wanted = 255 * augment(crops[name], draws, torch.zeros(3), torch.ones(3))
        # Four operations at most, each within 2 levels and mostly within one.
        torch.testing.assert_close(finished[name].view(wanted.shape).float(), wanted, rtol=0, atol=4)


# Two films, of six frames a second apart and of two, and two photos. Each view has another interpolation or size.
FRAMES = [*(f"a.mp4#time={t}" for t in range(6)), "photo.jpg", "b.mp4#time=0", "b.mp4#time=1", "other.png"]
REACHED = [{1, 2}, {0, 2, 3}, {0, 1, 3, 4}, {1, 2, 4, 5}, {2, 3, 5}, {3, 4}, {6}, {8}, {7}, {9}]
PAIRED = VIEWS.model_copy(update={"global_2": GLOBAL.model_copy(update={"resample": "bilinear"})})


@dataclass(frozen=True, eq=False)
class Pictures(StoredImages):
    """Images in memory. Those without a picture cannot be read."""

    pictures: list[Data | None]

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        picture = self.pictures[index]
        if picture is None:
            raise Refused("damaged: test")
        return picture


def noise(row: int) -> Pixels:
    return np.random.default_rng(row).integers(0, 256, (70 + 3 * row, 90 - 2 * row, 3), dtype=np.uint8)


def pictures(*shown: int, unread: tuple[int, ...] = ()) -> Pictures:
    """Return a source that shows the given picture in each row; by default each row shows its own."""
    rows = shown or tuple(range(len(FRAMES)))
    data = [None if row in unread else noise(row) for row in rows]
    return Pictures("test", Path(), Names.of(FRAMES), [], np.full(len(FRAMES), -1, np.int32), data)


def fill(
    source: Pictures,
    clips: Clips | None,
    *,
    epoch: int = 0,
    kind: type[ImageFiller] = ImageFiller,
    clean: bool = True,
    views: ViewsConfig = PAIRED,
    finish: bool = False,
    cache: PixelCache | None = None,
) -> tuple[dict[str, torch.Tensor], list[tuple[str, str]]]:
    """Fill a slot with all images of a source, with clean crops if `clean` is set."""
    slot = slot_of(len(FRAMES))
    slot["keys"][:, 0], slot["keys"][:, 1] = epoch, torch.arange(len(FRAMES))
    if clean:
        slot["clean"] = torch.zeros(2, len(FRAMES), 96, 96, 3, dtype=torch.uint8)
    if kind is FileFiller:
        slot["lengths"] = torch.full((len(FRAMES),), 7)
        slot["turns"] = torch.zeros(len(FRAMES), dtype=torch.int64)
        slot["refused"] = torch.zeros(1, dtype=torch.bool)
        slot["files"] = torch.zeros(len(FRAMES), 100_000, dtype=torch.uint8)
        slot["boxes"] = torch.zeros(len(FRAMES), 6 if clean else 4, 4, dtype=torch.int64)
    filler = kind(Cutter(views, 5, ImagesConfig(), finish=finish), source, cache, clips)
    return slot, filler(slot, Task(0, 0, 0, len(FRAMES)))


def partner_of(slot: dict[str, torch.Tensor], row: int, **options: object) -> int:
    """Return the image whose pixels alone give the second view and its clean crop, with the numbers of a row."""
    found = []
    for other in range(len(FRAMES)):
        alone, _ = fill(pictures(*[other] * len(FRAMES)), None, **options)  # type: ignore[arg-type]
        equal = {alone[name][1, row].equal(slot[name][1, row]) for name in ("globals", "clean") if name in slot}
        assert len(equal) == 1, "the second view and its clean crop are of the same frame"
        found += [other] if equal == {True} else []
    [partner] = found
    return partner


@pytest.mark.parametrize("options", [{}, {"clean": False}, {"finish": True}, {"kind": FileFiller}])
def test_the_second_global_view_is_cut_from_another_frame_and_the_others_are_unchanged(options: dict) -> None:
    clips = Clips(FRAMES, 2.0)
    plain, (slot, bad) = fill(pictures(), None, **options)[0], fill(pictures(), clips, **options)
    assert not bad
    for name in ("globals", "clean"):
        assert name not in slot or slot[name][0].equal(plain[name][0])
    assert slot["locals"].equal(plain["locals"])
    assert slot["keys"].equal(plain["keys"])
    assert all(slot[name].equal(plain[name]) for name in Draws._fields)
    for row, reached in enumerate(REACHED):
        assert partner_of(slot, row, **options) in reached


def test_partners_depend_on_the_epoch_and_repeat_with_fixed_views() -> None:
    clips = Clips(FRAMES, 2.0)

    def partners(epoch: int, views: ViewsConfig) -> list[int]:
        cutter = Cutter(views, 5, ImagesConfig())
        return [cutter.partner(clips, epoch, row) for row in range(len(FRAMES))]

    fixed = PAIRED.model_copy(update={"fixed": 2})
    assert len({tuple(partners(epoch, PAIRED)) for epoch in range(20)}) > 15
    assert [partners(epoch, fixed) for epoch in (2, 3, 4)] == [partners(epoch, PAIRED) for epoch in (0, 1, 0)]
    slots = [fill(pictures(), clips, epoch=epoch, views=fixed)[0]["globals"] for epoch in (0, 1, 2)]
    assert slots[0].equal(slots[2])
    assert not slots[0].equal(slots[1])


def test_an_unreadable_partner_is_reported_and_the_first_frame_gives_both_views() -> None:
    clips, plain = Clips(FRAMES, 2.0), fill(pictures(), None)[0]
    usual, _ = fill(pictures(), clips)
    partners = [partner_of(usual, row) for row in range(len(FRAMES))]
    broken = partners[2]
    slot, bad = fill(pictures(unread=(broken,)), clips)
    assert set(bad) == {(FRAMES[broken], "damaged: test")}
    # Each row with this partner reports it, and so does its own row until an image that can be read replaces it.
    assert len(bad) >= len(fill(pictures(unread=(broken,)), None)[1]) + partners.count(broken)
    for row in set(range(len(FRAMES))) - {broken}:
        wanted = plain if partners[row] == broken else usual
        assert all(slot[name][:, row].equal(wanted[name][:, row]) for name in ("globals", "locals", "clean"))
    assert slot["keys"][broken, 1] != broken, "an unreadable first frame is replaced as every image"


def test_a_cache_keeps_partners_too() -> None:
    cache = PixelCache(len(FRAMES), [GLOBAL.model_copy(update={"size": 300})], "ram")
    usual, _ = fill(pictures(), Clips(FRAMES, 2.0))
    for source in (pictures(), pictures(unread=tuple(range(len(FRAMES))))):  # the second time nothing is read
        slot, bad = fill(source, Clips(FRAMES, 2.0), cache=cache)
        assert not bad
        assert all(slot[name].equal(usual[name]) for name in ("globals", "locals", "clean"))


def test_frames_are_decoded_here_and_photos_beside_them_on_the_device() -> None:
    pytest.importorskip("torchvision.io")
    source = pictures()
    file = io.BytesIO()
    Image.fromarray(noise(6)).save(file, "JPEG", quality=95, subsampling=0)
    source.pictures[6] = file.getvalue()
    slot, bad = fill(source, Clips(FRAMES, 2.0), kind=FileFiller)
    assert not bad
    assert slot["lengths"].nonzero().tolist() == [[6]]

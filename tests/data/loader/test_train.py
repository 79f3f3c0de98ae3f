from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import write_film, write_images

from dinocli.apps.pack import pack
from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.loader import ring
from dinocli.data.loader.batch import ALONE, Batch, Shard
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import PackedImages, open_images, open_source, within
from dinocli.data.sources.several import open_sources
from dinocli.data.views.crops import (
    JitterConfig,
    LowResolutionConfig,
    MixedSizesConfig,
    SizeDraw,
    ViewConfig,
    ViewsConfig,
)
from dinocli.data.views.masking import MaskConfig, PatchMasks, masked_counts

CPU = torch.device("cpu")
JITTER = JitterConfig(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
GLOBAL = ViewConfig(size=24, scale=(0.4, 1.0), flip=0.5, jitter=JITTER, gray=0.2, blur=0.5, solarize=0.2)
VIEWS = ViewsConfig(
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    global_1=GLOBAL,
    global_2=GLOBAL,
    local=GLOBAL.model_copy(update={"size": 16}),
    locals=3,
)
MASKED = VIEWS.model_copy(
    update={"mask": MaskConfig(share=0.5, ratio=(0.1, 0.5), smallest=2, aspect=(0.3, 1 / 0.3)), "local": None}
)


def take(
    images: Path | str | list[str],
    count: int,
    *,
    batch_size: int = 4,
    start: int = 0,
    workers: int = 0,
    seed: int = 0,
    views: ViewsConfig = VIEWS,
    shard: Shard = ALONE,
    clean: float | None = None,
    cache: str | None = None,
    decoding: ImagesConfig = DEFAULTS,
) -> list[Batch]:
    stream = TrainBatches(
        within(open_sources(images if isinstance(images, list) else [str(images)]), decoding),
        views,
        batch_size=batch_size,
        seed=seed,
        start=start,
        workers=workers,
        device=CPU,
        shard=shard,
        steps_per_epoch=2,
        grid=lambda size: (size // 4, size // 4),
        clean=clean,
        cache=cache,
        images=decoding,
    )
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


def same(a: Batch, b: Batch) -> bool:
    return a.rows.equal(b.rows) and all(x.equal(y) for x, y in zip(a.crops, b.crops, strict=True))


def test_shapes_and_groups(images: Path) -> None:
    batch = take(images, 1)[0]
    assert [tuple(c.shape) for c in batch.crops] == [(2, 4, 3, 24, 24), (3, 4, 3, 16, 16)]
    assert batch.global_crops.dtype == torch.float32
    without = take(images, 1, views=VIEWS.model_copy(update={"local": None}))[0]
    assert without.local_crops is None
    assert len(without.crops) == 1


def test_every_image_appears_once_per_epoch_in_a_new_order(images: Path) -> None:
    rows = torch.stack([b.rows for b in take(images, 6)]).view(2, 12)
    assert rows.sort(1).values.tolist() == [list(range(12))] * 2
    assert rows[0].tolist() != rows[1].tolist()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_views_do_not_depend_on_the_number_of_workers(images: Path, workers: int) -> None:
    assert all(same(a, b) for a, b in zip(take(images, 7), take(images, 7, workers=workers), strict=True))


def test_views_are_the_same_with_spawned_processes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = take(images, 4)
    monkeypatch.setattr(ring, "_FORK", False)
    assert all(same(a, b) for a, b in zip(alone, take(images, 4, workers=1), strict=True))


def test_two_processes_share_each_batch_of_one(images: Path) -> None:
    whole = take(images, 5, batch_size=6)
    halves = [take(images, 5, batch_size=3, shard=Shard(rank, 2)) for rank in (0, 1)]
    for one, *two in zip(whole, *halves, strict=True):
        assert torch.equal(one.rows, torch.cat([half.rows for half in two]))
        for crops, *parts in zip(one.crops, *(half.crops for half in two), strict=True):
            torch.testing.assert_close(crops, torch.cat(parts, 1), rtol=0, atol=1e-6)


def test_views_that_are_made_on_a_device_have_the_type_asked_for(images: Path) -> None:
    # The meta device holds no numbers, but takes the way of a GPU: views are made there, of crops from here.
    stream = TrainBatches(
        open_images(str(images)),
        VIEWS,
        batch_size=4,
        seed=0,
        device=torch.device("meta"),
        clean=2.0,
        dtype=torch.bfloat16,
    )
    batch = next(iter(stream))
    stream.close()
    views = (batch.global_crops, batch.local_crops, batch.clean_crops)
    assert [(x.shape, x.dtype) for x in views if x is not None] == [
        ((2, 4, 3, 24, 24), torch.bfloat16),
        ((3, 4, 3, 16, 16), torch.bfloat16),
        ((2, 4, 3, 48, 48), torch.bfloat16),
    ]


def test_a_later_start_gives_the_same_batches(images: Path) -> None:
    assert all(same(a, b) for a, b in zip(take(images, 7)[4:], take(images, 3, start=4), strict=True))


def test_masking_adds_masks_and_does_not_change_the_views(images: Path) -> None:
    plain, masked = take(images, 4), take(images, 4, views=MASKED.model_copy(update={"local": VIEWS.local}))
    assert all(same(a, b) for a, b in zip(plain, masked, strict=True))
    assert plain[0].masks is None
    masks = [batch.masks for batch in masked]
    assert masks[0].where.shape == (2, 4, 36)
    # Each batch masks the same number of patches, with other counts per crop.
    wanted = sorted([0] * 4 + masked_counts(MASKED.mask, 8, 36))
    assert all(sorted(m.counts.flatten().tolist()) == wanted for m in masks)
    assert len({str(m.counts.tolist()) for m in masks}) == 4
    assert all(part.masks is None for part in plain[0].split(2))
    assert [part.masks.where.shape for part in masked[0].split(2)] == [(2, 2, 36)] * 2


def same_masks(a: PatchMasks, b: PatchMasks) -> bool:
    return all(getattr(a, name).equal(getattr(b, name)) for name in ("where", "rows", "weights", "counts"))


def test_masks_depend_on_neither_workers_nor_start(images: Path, shards: Path) -> None:
    whole = take(images, 7, views=MASKED)
    for other in (take(images, 7, views=MASKED, workers=workers) for workers in (1, 2)):
        assert all(same_masks(a.masks, b.masks) for a, b in zip(whole, other, strict=True))
    assert all(
        same_masks(a.masks, b.masks)
        for a, b in zip(whole[4:], take(images, 3, views=MASKED, start=4, workers=2), strict=True)
    )
    stream = take(shards, 7, views=MASKED)
    for other, start in (
        (take(shards, 7, views=MASKED, workers=1), 0),  # two workers read the images in another order
        (take(shards, 3, views=MASKED, start=4), 4),
    ):
        assert all(same_masks(a.masks, b.masks) for a, b in zip(stream[start:], other, strict=True))


def test_refilling_a_slot_does_not_change_the_masks_of_an_earlier_batch(images: Path) -> None:
    kept = take(images, 6, views=MASKED)  # two slots, each filled three times
    assert all(PatchMasks.of(batch.masks.where).rows.equal(batch.masks.rows) for batch in kept)
    assert len({str(batch.masks.rows.tolist()) for batch in kept}) == 6


def test_masks_differ_between_processes_and_seeds(images: Path) -> None:
    one = take(images, 3, views=MASKED)
    for other in (
        take(images, 3, views=MASKED, seed=1),
        take(images, 3, batch_size=4, views=MASKED, shard=Shard(1, 2)),
    ):
        assert not any(a.masks.counts.equal(b.masks.counts) for a, b in zip(one, other, strict=True))
        assert all(len(a.masks.rows) == len(b.masks.rows) for a, b in zip(one, other, strict=True))


def test_a_bad_file_does_not_change_the_masks(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 40)
    all_masked = MASKED.model_copy(update={"mask": MASKED.mask.model_copy(update={"share": 1.0})})
    before = take(folder, 5, batch_size=8, views=all_masked)
    (folder / "0003.png").write_bytes(b"no image")
    after = take(folder, 5, batch_size=8, views=all_masked)
    assert any(not a.rows.equal(b.rows) for a, b in zip(before, after, strict=True))
    assert all(same_masks(a.masks, b.masks) for a, b in zip(before, after, strict=True))


def test_masks_need_patches(images: Path) -> None:
    with pytest.raises(DinoError, match=r"views\.mask needs patches to mask"):
        TrainBatches(open_source(str(images)), MASKED, batch_size=4, seed=0, device=CPU)


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_crops_switch_to_full_size_between_two_batches(images: Path, shards: Path, kind: str, workers: int) -> None:
    """Before the switch, batches equal those of a run at low resolution; after it, those of a run at full resolution."""
    where = images if kind == "folder" else shards
    full = MASKED.model_copy(update={"local": VIEWS.local})
    low = full.model_copy(update={"low_resolution": LowResolutionConfig(epochs=2, global_size=16, local_size=8)})
    small = low.phases(1)[0][1]
    wanted = take(where, 4, views=small, workers=workers) + take(where, 7, views=full, workers=workers)[4:]
    assert [len(batch.global_crops[0, 0, 0]) for batch in wanted] == [16] * 4 + [24] * 3
    for start in (0, 3, 4, 5):
        batches = take(where, 7 - start, views=low, workers=workers, start=start)
        for ours, theirs in zip(batches, wanted[start:], strict=True):
            assert same(ours, theirs)
            assert same_masks(ours.masks, theirs.masks)
    # The order is that of a run without the switch, so each image still appears once per epoch.
    assert [b.rows.tolist() for b in wanted] == [b.rows.tolist() for b in take(where, 7, workers=workers)]


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_mixed_sizes_are_drawn_for_each_step_wherever_a_run_begins(
    images: Path, shards: Path, kind: str, workers: int
) -> None:
    """Each batch is that of a run of its size alone, with masks and clean crops; both processes draw the same."""
    where = images if kind == "folder" else shards
    plain = MASKED.model_copy(update={"local": VIEWS.local})
    sizes = (MixedSizesConfig(global_size=24, share=1), MixedSizesConfig(global_size=32, local_size=24, share=2))
    mixed = plain.model_copy(update={"mixed": sizes})
    alone = [take(where, 8, views=those, workers=workers, clean=1.5) for _, those in mixed.mixes]
    draw = SizeDraw(0, (1 / 3, 2 / 3))
    assert {draw(step) for step in range(8)} == {0, 1}
    for start in (0, 3):
        batches = take(where, 8 - start, views=mixed, workers=workers, start=start, clean=1.5)
        for step, batch in enumerate(batches, start):
            expected = alone[draw(step)][step]
            assert same(batch, expected) and same_masks(batch.masks, expected.masks)
            assert torch.equal(batch.clean_crops, expected.clean_crops)
    both = [take(images, 6, batch_size=2, views=mixed, shard=Shard(rank, 2)) for rank in (0, 1)]
    assert [b.global_crops.shape[-1] for b in both[0]] == [b.global_crops.shape[-1] for b in both[1]]


def test_smaller_crops_are_of_the_same_places_in_the_same_colors(images: Path) -> None:
    low = VIEWS.model_copy(update={"low_resolution": LowResolutionConfig(epochs=1, global_size=12, local_size=8)})
    plain = {"flip": 0.5, "jitter": None, "blur": 0.0}
    calm = {name: getattr(low, name).model_copy(update=plain) for name in ("global_1", "global_2", "local")}
    low = low.model_copy(update=calm)
    [small], [full] = take(images, 1, views=low), take(images, 1, views=low.model_copy(update={"low_resolution": None}))
    for less, more in zip(small.crops, full.crops, strict=True):
        again = torch.nn.functional.interpolate(
            more.flatten(0, 1), size=less.shape[-2:], mode="bicubic", antialias=True
        )
        # The test images are noise: crops at other places or in other colors would not correlate.
        both = torch.stack([again.flatten(), less.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.8


CALM = {"jitter": None, "gray": 0.0, "blur": 0.0, "solarize": 0.0}


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_clean_crops_are_the_global_crops_without_changes_of_color(
    images: Path, shards: Path, kind: str, workers: int
) -> None:
    """The clean crop of twice the side is what a run of that size would cut without colors; nothing else moves."""
    where = images if kind == "folder" else shards
    calm = {"global_1": GLOBAL.model_copy(update=CALM), "global_2": GLOBAL.model_copy(update=CALM)}
    for scale, size in ((1.0, 24), (2.0, 48)):
        sized = {name: view.model_copy(update={"size": size}) for name, view in calm.items()}
        wanted = take(where, 3, workers=workers, views=VIEWS.model_copy(update=sized))
        with_clean = take(where, 3, workers=workers, clean=scale)
        for plain, both, expected in zip(take(where, 3, workers=workers), with_clean, wanted, strict=True):
            assert same(plain, both) and plain.clean_crops is None
            assert torch.equal(both.clean_crops, expected.global_crops)
            assert not torch.allclose(
                expected.global_crops[..., ::2, ::2][..., :12, :12], plain.global_crops[..., :12, :12]
            )
    halves = both.split(2)
    assert torch.equal(torch.cat([half.clean_crops for half in halves], 1), both.clean_crops)


def test_the_cache_keeps_enough_pixels_for_clean_crops(tmp_path: Path) -> None:
    """Photos larger than any crop: with a cache sized for the global crops alone, clean crops would be enlarged."""
    folder = write_images(tmp_path / "large", 8, size=160)
    [plain] = take(folder, 1, clean=4.0)
    [cached] = take(folder, 1, clean=4.0, cache="ram")
    assert plain.clean_crops.shape[-1] == 96
    both = torch.stack([plain.clean_crops.flatten(), cached.clean_crops.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.7


def test_views_follow_the_seed(images: Path) -> None:
    assert not same(take(images, 1)[0], take(images, 1, seed=1)[0])


def test_a_bad_file_is_replaced_and_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 40)
    (folder / "0003.png").write_bytes(b"no image")
    stream = TrainBatches(open_source(str(folder)), VIEWS, batch_size=8, seed=0, device=CPU)
    batches = list(islice(stream, 5))
    bad = stream.bad
    assert all(b.global_crops.shape[1] == 8 and not (b.rows == 3).any() for b in batches)
    assert list(bad.reasons) == ["0003.png"]
    assert bad.summary() == "1 not an image"


@pytest.mark.parametrize("good", [0, 20])
def test_too_many_bad_files_end_the_run(tmp_path: Path, good: int) -> None:
    folder = write_images(tmp_path / "x", good)
    for i in range(8):
        (folder / f"bad{i}.png").write_bytes(b"no image")
    with pytest.raises(DinoError, match=r"cannot be read") as error:
        list(islice(TrainBatches(open_source(str(folder)), VIEWS, batch_size=4, seed=0, device=CPU), 8))
    assert "bad" in error.value.hint + error.value.message


@pytest.fixture(name="shards")
def three_shards(images: Path, tmp_path: Path) -> Path:
    """Pack the twelve images into three tar files; the last is shorter."""
    pack(open_images(str(images)), tmp_path / "shards", per_shard=5)
    return tmp_path / "shards"


def test_shards_give_each_image_once_per_epoch_and_resume(shards: Path) -> None:
    for workers in (0, 1, 2):
        whole = take(shards, 9, workers=workers)
        assert all(same(a, b) for a, b in zip(whole[4:], take(shards, 5, start=4, workers=workers), strict=True))
        seen = torch.cat([batch.rows for batch in whole[:3]]).tolist()
        assert (
            workers == 2 or len(set(seen)) == 12
        )  # two readers with unequal shares reach the next epoch at different batches


def test_the_views_of_an_image_in_a_shard_do_not_depend_on_workers(shards: Path) -> None:
    def by_row(workers: int) -> dict[int, torch.Tensor]:
        views: dict[int, torch.Tensor] = {}
        for batch in take(shards, 3, workers=workers, batch_size=4):
            for i, row in enumerate(batch.rows.tolist()):
                views.setdefault(row, batch.global_crops[:, i])  # keep those of the first epoch
        return views

    alone, two = by_row(0), by_row(2)
    both = alone.keys() & two.keys()
    assert len(both) > 6
    for row in both:
        torch.testing.assert_close(alone[row], two[row], rtol=0, atol=1e-5)


def test_fixed_views_repeat_after_their_epochs_and_keep_their_place(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 8, size=40)
    fixed = VIEWS.model_copy(update={"fixed": 2})
    epochs = [{}, {}, {}, {}]
    for i, batch in enumerate(take(folder, 8, views=fixed)):
        for b, (row, place) in enumerate(zip(batch.rows.tolist(), batch.places.tolist(), strict=True)):
            assert place == i // 2 % 2 * 8 + row
            epochs[i // 2][row] = batch.global_crops[:, b], batch.local_crops[:, b]
    for row in range(8):
        for one, other, same in ((0, 2, True), (1, 3, True), (0, 1, False)):
            pairs = zip(epochs[one][row], epochs[other][row], strict=True)
            assert all(torch.equal(a, b) == same for a, b in pairs)
    free = take(folder, 4)
    assert all(batch.places is None for batch in free)
    assert torch.equal(free[0].global_crops, take(folder, 1, views=fixed)[0].global_crops), (
        "the first epoch is the same"
    )
    parts = take(folder, 1, views=fixed)[0].split(2)
    assert torch.cat([part.places for part in parts]).equal(take(folder, 1, views=fixed)[0].places)


def test_fixed_views_in_order_are_those_of_training(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 5, size=40)
    fixed = VIEWS.model_copy(update={"fixed": 3})
    shuffled = {}
    for batch in take(folder, 15, views=fixed, batch_size=1):
        shuffled[int(batch.places)] = batch.global_crops[:, 0]
    assert set(shuffled) == set(range(15))
    stream = TrainBatches(open_source(str(folder)), fixed, batch_size=4, seed=0, device=CPU, in_order=True)
    batches = list(islice(stream, 4))
    stream.close()
    assert torch.cat([batch.places for batch in batches]).tolist() == [*range(15), 0]
    for batch in batches:
        for b, place in enumerate(batch.places.tolist()):
            assert int(batch.rows[b]) == place % 5
            assert torch.equal(batch.global_crops[:, b], shuffled[place])


def test_the_views_of_an_unreadable_image_keep_its_place(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 30, size=40)
    (folder / "0004.png").write_bytes(b"no image")
    fixed = VIEWS.model_copy(update={"fixed": 1})
    found = [
        (int(row), batch.global_crops[:, b])
        for batch in take(folder, 30, views=fixed, batch_size=2)
        for b, (row, place) in enumerate(zip(batch.rows, batch.places, strict=True))
        if place == 4
    ]
    assert len(found) == 2 and found[0][0] == found[1][0] != 4, "the same image replaces it in every epoch"
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_packed_pixels_equal_those_from_the_files(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path / "in", 9, size=30)
    pack(open_images(str(tmp_path / "in")), tmp_path / "same", side=30, per_shard=4, pixels=True)
    files, pixels = (take(tmp_path / name, 5, workers=workers) for name in ("in", "same"))
    assert all(same(a, b) for a, b in zip(files, pixels, strict=True))
    # The cache shrinks images in the same way, to the side below which a crop would be enlarged: ceil(24 / sqrt(0.4)).
    write_images(tmp_path / "large", 9, size=60)
    pack(open_images(str(tmp_path / "large")), tmp_path / "small", side=38, per_shard=4, pixels=True)
    files = take(tmp_path / "large", 5, workers=workers, cache="ram")
    assert all(same(a, b) for a, b in zip(files, take(tmp_path / "small", 5, workers=workers), strict=True))


def test_a_corrupt_image_among_packed_pixels_is_replaced_and_counted(tmp_path: Path) -> None:
    pack(open_images(str(write_images(tmp_path / "in", 8))), tmp_path / "out", pixels=True)
    source = open_images(str(tmp_path / "out"))
    assert isinstance(source, PackedImages)
    path = tmp_path / "out" / "images-000000.safetensors"
    data = bytearray(path.read_bytes())
    data[source.pixels.offsets[3]] ^= 1
    path.write_bytes(data)
    stream = TrainBatches(source, VIEWS, batch_size=4, seed=0, device=CPU)
    rows = torch.cat([batch.rows for batch in islice(stream, 4)])
    assert 3 not in rows.tolist() and set(rows.tolist()) == {0, 1, 2, 4, 5, 6, 7}
    assert stream.bad.reasons == {"0003.png": "damaged: its checksum in images-000000.safetensors does not match"}


def test_shares_do_not_depend_on_the_workers_and_survive_a_resume(tmp_path: Path) -> None:
    for seed, (name, count) in enumerate({"a": 3, "b": 21}.items()):
        write_images(tmp_path / name, count, size=16, seed=seed)
    (tmp_path / "b" / "0000.png").write_bytes(b"no image")
    mixture = [f"{tmp_path}/a:0.75", f"{tmp_path}/b:0.25"]
    alone = take(mixture, 9, batch_size=8)
    rows = [batch.rows.tolist() for batch in alone]
    assert [sum(row < 3 for row in some) for some in rows] == [6] * 9
    assert all(3 not in some for some in rows)  # the unreadable image is replaced by one of its source
    assert all(map(same, take(mixture, 9, batch_size=8, workers=2), alone))
    assert all(map(same, take(mixture, 4, batch_size=8, start=5, workers=1), alone[5:]))
    first = [batch.global_crops[:, i] for batch in alone for i in range(8) if batch.rows[i] == 0]
    assert len(first) > 9  # each draw of an image has other views
    assert len({crop.numpy().tobytes() for crop in first}) == len(first)


def test_two_frames_of_a_film_are_the_global_views_with_any_number_of_workers_and_after_a_resume(
    tmp_path: Path,
) -> None:
    for name, frames in (("a", 6), ("b", 4)):
        write_film(tmp_path / f"{name}.mp4", frames)
    write_images(tmp_path, 2)
    single, paired = ImagesConfig(every=0.5), ImagesConfig(every=0.5, pair_within=1.0)
    options = {"batch_size": 4, "clean": 1.5, "seed": 3}
    plain, whole = (take(tmp_path, 9, decoding=decoding, **options) for decoding in (single, paired))  # three epochs
    assert all(same(a, b) for a, b in zip(whole, take(tmp_path, 9, workers=2, decoding=paired, **options), strict=True))
    assert all(
        same(a, b) for a, b in zip(whole[5:], take(tmp_path, 4, start=5, decoding=paired, **options), strict=True)
    )
    for ours, theirs in zip(whole, plain, strict=True):
        assert ours.rows.equal(theirs.rows) and ours.local_crops.equal(theirs.local_crops)
        assert ours.global_crops[0].equal(theirs.global_crops[0]) and ours.clean_crops[0].equal(theirs.clean_crops[0])
        # The photos are rows 0 and 1, in the order of the names.
        for b, row in enumerate(ours.rows.tolist()):
            unchanged = row in (0, 1)
            assert ours.global_crops[1, b].equal(theirs.global_crops[1, b]) == unchanged
            assert ours.clean_crops[1, b].equal(theirs.clean_crops[1, b]) == unchanged
    cached = take(tmp_path, 9, decoding=paired, cache="ram", **options)
    assert all((a.global_crops - b.global_crops).abs().mean() < 0.2 for a, b in zip(whole, cached, strict=True)), (
        "the cache resizes each frame once more"
    )


def test_a_loader_of_pairs_needs_pairs_but_one_view_does_not(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    decoding = ImagesConfig(every=0.5, pair_within=1.0)
    with pytest.raises(DinoError, match=r"no image in .* has another frame within 1 seconds"):
        take(tmp_path, 1, decoding=decoding)
    assert take(tmp_path, 1, decoding=decoding, views=VIEWS.model_copy(update={"global_2": None}))

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dinocli.core.config import Config
from dinocli.core.errors import DinoError
from dinocli.data.views.masking import (
    Grid,
    MaskConfig,
    PatchMasks,
    Where,
    blocks,
    deal,
    generator_of,
    masked_counts,
    masked_in_all,
)

MASK = MaskConfig(share=0.5, ratio=(0.1, 0.5), smallest=4, aspect=(0.3, 1 / 0.3))


def changed(**values: object) -> MaskConfig:
    return MASK.model_copy(update=values)


def touching(where: Where) -> float:
    """Return the mean number of masked patches among the four neighbours of a masked patch."""
    padded = np.pad(where, 1).astype(int)
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return float(around[where].mean())


def plain_blocks(grid: Grid, count: int, generator: np.random.Generator) -> Where:
    """Draw blocks as in BEiT: up to ten tries per block, stopping after ten failures."""
    where = np.zeros(grid, dtype=bool)
    tries = 0
    while (left := count - where.sum()) > 0 and tries < 10:
        tries += 1
        area = 4 + generator.random() * (left - 4)
        ratio = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height >= grid[0] or width >= grid[1]:
            continue
        top, first = generator.integers(0, grid[0] - height + 1), generator.integers(0, grid[1] - width + 1)
        more = where.copy()
        more[top : top + height, first : first + width] = True
        if 0 < more.sum() - where.sum() <= left:
            where, tries = more, 0
    return where


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (3, 5), (6, 6), (14, 14), (16, 12), (37, 37)])
@pytest.mark.parametrize("mask", [MASK, changed(smallest=1), changed(smallest=50), changed(aspect=(1.0, 1.0))])
def test_a_crop_has_exactly_the_requested_number_of_masked_patches(grid: Grid, mask: MaskConfig) -> None:
    patches = grid[0] * grid[1]
    for index, count in enumerate(np.linspace(0, patches, 23).round().astype(int).tolist()):
        where = blocks(mask, grid, count, generator_of(0, 0, index, 0))
        assert where.shape == grid
        assert where.dtype == np.bool_
        assert where.sum() == count


@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (16, 12)])
def test_masked_patches_form_blocks_as_in_beit(grid: Grid) -> None:
    generator = np.random.default_rng(0)
    counts = masked_counts(MASK, 800, grid[0] * grid[1])
    ours = np.mean([touching(blocks(MASK, grid, count, generator)) for count in counts])
    beits = np.mean([touching(plain_blocks(grid, count, generator)) for count in counts])
    scattered = np.mean(
        [touching((generator.permutation(grid[0] * grid[1]) < count).reshape(grid)) for count in counts]
    )
    assert ours > 2 * scattered
    # A rest below the smallest block is scattered here, while BEiT adds a block of one or two patches.
    assert abs(ours - beits) < 0.15 * beits


def test_a_mask_of_one_block_is_a_rectangle_at_any_place() -> None:
    places = set()
    for index in range(300):
        where = blocks(changed(smallest=6, aspect=(1.5, 1.5)), (5, 4), 6, generator_of(0, 0, index, 0))
        rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
        assert (len(rows), len(columns)) == (3, 2)  # 6 patches with an aspect of 1.5
        assert where[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        places.add((rows[0], columns[0]))
    assert places == {(top, first) for top in range(3) for first in range(3)}


def test_every_patch_is_masked_sometimes() -> None:
    share = np.mean([blocks(MASK, (8, 8), 20, generator_of(0, 0, i, 0)) for i in range(600)], axis=0)
    assert share.min() > 0.03
    assert share.mean() == pytest.approx(20 / 64)
    # No side is preferred: a quarter turn changes the frequencies only by chance, which is 0.02 here.
    assert np.abs(share - np.rot90(share)).max() < 0.1


def test_blocks_depend_only_on_seed_epoch_image_and_view() -> None:
    def drawn(*key: int) -> bytes:
        return blocks(MASK, (14, 14), 60, generator_of(*key)).tobytes()

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert all(drawn(*key) == drawn(*key) for key in keys)
    # They share no random numbers with the crops of the image.
    assert not np.array_equal(generator_of(3, 4, 5, 0).random(8), np.random.default_rng((3, 4, 5)).random(8))


@pytest.mark.parametrize("crops", [1, 2, 3, 5, 7, 64, 128, 129])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("patches", [1, 4, 36, 196])
def test_batches_of_one_size_have_equally_many_masked_patches(crops: int, share: float, patches: int) -> None:
    counts = masked_counts(changed(share=share), crops, patches)
    assert len(counts) == round(share * crops)
    assert counts == sorted(counts)
    assert all(max(1, math.floor(0.1 * patches)) <= count <= max(1, round(0.5 * patches)) for count in counts)
    if counts:
        assert counts[-1] == max(1, round(0.5 * patches))
    if len(counts) >= 32 and patches == 196:
        assert np.mean(counts) / patches == pytest.approx(0.3 + 0.2 / len(counts), abs=0.002)
        # Steps are equal: each quarter of the range holds a quarter of the counts.
        quarters, _ = np.histogram(np.array(counts) / patches, bins=4, range=(0.1, 0.5))
        assert quarters.min() >= len(counts) // 4 - 1


def test_masked_counts_are_shuffled_per_batch_and_process() -> None:
    def dealt(seed: int = 0, batch: int = 0, rank: int = 0) -> Tensor:
        return deal(MASK, (2, 9), 196, seed=seed, batch=batch, rank=rank)

    assert dealt().shape == (2, 9)
    assert sorted(dealt()[dealt() > 0].tolist()) == masked_counts(MASK, 18, 196)
    assert dealt().equal(dealt())
    others = [dealt(seed=1), dealt(batch=1), dealt(rank=1)]
    assert not any(dealt().equal(other) for other in others)
    assert all(other.sum() == dealt().sum() for other in others)
    # Each crop gets each count at some time.
    often = torch.stack([dealt(batch=batch) for batch in range(400)]).double()
    assert often.mean(0).sub(often.mean()).abs().max() < 4 * often.std() / 20
    assert (often > 0).double().mean(0).sub(0.5).abs().max() < 0.1


@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_several_processes_get_the_counts_of_one(processes: int, share: float) -> None:
    mask, each = changed(share=share), 192 // processes
    whole = deal(mask, (2, 192), 36, seed=0, batch=5, rank=0)
    parts = [deal(mask, (2, each), 36, seed=0, batch=5, rank=rank) for rank in range(processes)]
    assert torch.cat(parts, 1).equal(whole)
    assert {int(part.sum()) for part in parts} == {masked_in_all(mask, (2, each), 36)}
    assert masked_in_all(mask, (2, 192), 36) == whole.sum()
    masked = (whole > 0).double()
    assert masked.mean() == pytest.approx(share, abs=0.01)
    if share:
        assert len({str(group.tolist()) for group in whole.split(32, 1)}) == 6, "each group is shuffled separately"


@pytest.mark.parametrize("images", [1, 5, 33, 48])
def test_a_batch_that_is_no_multiple_of_32_is_one_group(images: int) -> None:
    dealt = deal(MASK, (2, images), 196, seed=0, batch=0, rank=0)
    assert sorted(dealt[dealt > 0].tolist()) == masked_counts(MASK, 2 * images, 196)
    assert dealt.sum() == masked_in_all(MASK, (2, images), 196)


def made(views: int, images: int, grid: Grid = (4, 5), share: float = 0.6) -> PatchMasks:
    counts = deal(changed(share=share), (views, images), grid[0] * grid[1], seed=0, batch=0, rank=0)
    where = [
        [blocks(MASK, grid, int(count), generator_of(0, 0, b, g)) for b, count in enumerate(view)]
        for g, view in enumerate(counts)
    ]
    return PatchMasks.of(torch.from_numpy(np.array(where)).flatten(2))


@pytest.mark.parametrize(("views", "images", "share"), [(2, 6, 0.6), (1, 4, 1.0), (2, 5, 0.3), (2, 1, 0.2)])
def test_rows_and_weights_equal_plain_loops(views: int, images: int, share: float) -> None:
    masks = made(views, images, share=share)
    rows, weights = [], []
    for g in range(views):
        for b in range(images):
            for n in range(20):
                if masks.where[g, b, n]:
                    rows.append((g * images + b) * 20 + n)
                    weights.append(1 / int(masks.where[g, b].sum()) / (views * images))
    assert masks.rows.tolist() == rows
    assert masks.rows.dtype == torch.int64
    assert masks.counts.tolist() == masks.where.sum(-1).tolist()
    torch.testing.assert_close(masks.weights, torch.tensor(weights))
    masked = round(share * views * images)
    assert masks.weights.sum().item() == pytest.approx(masked / (views * images))


@pytest.mark.parametrize(("images", "parts"), [(6, 1), (6, 2), (6, 3), (6, 6), (5, 5)])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_mean_over_split_masks_equals_the_whole(images: int, parts: int, share: float) -> None:
    masks = made(2, images, share=share)
    values = torch.rand(2, images, 20)
    whole = (values.flatten()[masks.rows] * masks.weights).sum()
    cut = masks.split(parts)
    assert len(cut) == parts
    losses = []
    for i, part in enumerate(cut):
        size = images // parts
        mine = slice(i * size, (i + 1) * size)
        alone = PatchMasks.of(masks.where[:, mine])
        assert part.where.equal(alone.where)
        assert part.rows.equal(alone.rows)
        assert part.counts.equal(alone.counts)
        torch.testing.assert_close(part.weights, alone.weights)
        losses.append((values[:, mine].flatten()[part.rows] * part.weights).sum())
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


class Holder(Config):
    mask: MaskConfig


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("share", 1.1),
        ("ratio", [0.5, 0.1]),
        ("ratio", [0.0, 0.0]),
        ("ratio", [0.1, 1.5]),
        ("smallest", 0),
        ("aspect", [0.0, 1.0]),
        ("aspect", [2.0, 1.0]),
    ],
)
def test_invalid_mask_settings_are_an_error(key: str, value: object) -> None:
    with pytest.raises(DinoError, match=rf"mask\.{key}"):
        Holder.parse({"mask": MASK.model_dump() | {key: value}}, "preset x")


def test_visible_patches_are_read_with_their_own_weight_also_in_parts() -> None:
    """Crops: four masked patches of six, none, all, and one; each kind of patch has a mean of its own."""
    where = torch.zeros(2, 2, 6, dtype=torch.bool)
    where[0, 0, [0, 2, 3, 5]] = where[1, 0] = where[1, 1, 4] = True
    masks = PatchMasks.of(where).with_visible(0.5)
    table = torch.zeros(2, 2, 6)
    for crop in ((0, 0), (1, 0), (1, 1)):
        masked = where[crop]
        table[crop][masked] = 1 / masked.sum() / 4
        table[crop][~masked] = 0.5 / max(1, (~masked).sum()) / 4
    read = torch.zeros(24)
    read[masks.rows] = masks.weights
    torch.testing.assert_close(read.view(2, 2, 6), table)
    assert masks.rows.tolist() == sorted(masks.rows.tolist()) and masks.counts.tolist() == [[6, 0], [6, 6]]
    for part, alone in zip(masks.split(2), where.chunk(2, 1), strict=True):
        expected = PatchMasks.of(alone).with_visible(0.5)
        assert part.rows.equal(expected.rows) and part.counts.equal(expected.counts)
        torch.testing.assert_close(part.weights, expected.weights)

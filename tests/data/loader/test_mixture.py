from __future__ import annotations

import numpy as np
import pytest

from dinocli.data.loader.mixture import epoch_order

PARTS = [(range(50), 0.7), (range(50, 1000), 0.3)]


def test_without_a_mixture_each_image_occurs_once() -> None:
    rows, passes = epoch_order(7, [], 0, 3)
    assert (sorted(rows.tolist()), passes.tolist()) == (list(range(7)), [3] * 7)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_shares_hold_in_every_part_of_an_epoch(epoch: int) -> None:
    rows, _ = epoch_order(1000, PARTS, 0, epoch)
    first = np.cumsum(rows < 50)
    assert first[-1] == 700
    assert np.abs(first - 0.7 * np.arange(1, 1001)).max() <= 2


def test_no_image_repeats_before_all_others_of_its_source_were_drawn() -> None:
    drawn = [epoch_order(1000, PARTS, 1, epoch) for epoch in range(4)]
    rows, passes = np.concatenate([r for r, _ in drawn]), np.concatenate([p for _, p in drawn])
    assert len({*zip(rows.tolist(), passes.tolist(), strict=True)}) == 4000  # so that no two draws have the same views
    small = rows[rows < 50]
    assert np.bincount(small).tolist() == [4 * 700 // 50] * 50
    large = np.bincount(rows[rows >= 50] - 50, minlength=950)
    assert set(large.tolist()) == {1, 2}  # 1200 draws of 950 images
    assert sorted(rows[(passes == 0) & (rows >= 50)].tolist()) == list(range(50, 1000))


def test_the_order_depends_on_seed_and_epoch() -> None:
    orders = [epoch_order(1000, PARTS, seed, epoch)[0].tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


def test_whole_numbers_sum_to_the_epoch() -> None:
    thirds = [(range(4), 1 / 3), (range(4, 8), 1 / 3), (range(8, 10), 1 / 3)]
    rows, _ = epoch_order(10, thirds, 0, 0)
    assert sorted(np.bincount(rows // 4, minlength=3).tolist()) == [3, 3, 4]


def test_runs_of_rows_are_read_together() -> None:
    ends = np.arange(10, 101, 10)
    rows, passes = epoch_order(100, [], 0, 2, (ends, 2))
    assert sorted(rows.tolist()) == list(range(100))
    assert passes.tolist() == [2] * 100
    groups = rows // 10
    windows = [set(groups[at : at + 20].tolist()) for at in range(0, 100, 20)]
    assert [len(window) for window in windows] == [2] * 5  # so that a worker holds two runs at a time
    assert len(set(np.diff(groups[:20]).tolist())) > 2  # and draws from both
    assert epoch_order(100, [], 0, 3, (ends, 2))[0].tolist() != rows.tolist()


def test_runs_of_one_row_are_spread_between_the_others() -> None:
    ends = np.concatenate([np.arange(10, 101, 10), np.arange(101, 301)])
    rows, _ = epoch_order(300, [], 0, 0, (ends, 2))
    assert sorted(rows.tolist()) == list(range(300))
    grouped = rows[rows < 100] // 10
    assert [len(set(grouped[at : at + 20].tolist())) for at in range(0, 100, 20)] == [2] * 5
    assert np.abs(np.cumsum(rows >= 100) - np.arange(1, 301) * 2 / 3).max() < 30
    assert np.bincount(rows[rows >= 100][:100] // 50, minlength=6)[2:].min() > 10  # single rows come in any order


def test_a_mixture_reads_the_runs_of_a_source_together() -> None:
    # Source one has ten runs of five rows, source two has 950 single rows.
    blocks = np.concatenate([np.arange(5, 51, 5), np.arange(51, 1001)]), 2
    drawn = [epoch_order(1000, PARTS, 0, epoch, blocks) for epoch in range(4)]
    rows, passes = np.concatenate([r for r, _ in drawn]), np.concatenate([p for _, p in drawn])
    assert len({*zip(rows.tolist(), passes.tolist(), strict=True)}) == 4000
    first = np.cumsum(drawn[1][0] < 50)
    assert np.abs(first - 0.7 * np.arange(1, 1001)).max() <= 2
    small = rows[rows < 50] // 5  # 56 passes of 50 rows
    assert {len(set(small[at : at + 10].tolist())) for at in range(0, 2800, 10)} == {2}
    assert sorted(rows[(passes == 0) & (rows >= 50)].tolist()) == list(range(50, 1000))

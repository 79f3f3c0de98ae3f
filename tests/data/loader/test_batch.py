"""Splitting of batches, number of slots, and counts of bad files."""

from __future__ import annotations

import pytest
import torch

from dinocli.data.loader.batch import BadFiles, Batch, slots_for, view_fields
from dinocli.data.views.crops import ViewConfig, ViewsConfig


def views(size: int = 32) -> ViewsConfig:
    view = ViewConfig(size=size, scale=(0.4, 1.0))
    return ViewsConfig(mean=(0.5,) * 3, std=(0.5,) * 3, global_1=view, global_2=view, local=None, locals=0)


@pytest.mark.parametrize("local", [True, False])
def test_a_split_batch_keeps_the_order_of_its_images(local: bool) -> None:
    rows = torch.arange(6)
    crops = rows.view(1, 6, 1, 1, 1).expand(2, 6, 3, 8, 8).float()
    batch = Batch(crops, crops[:, ..., :4, :4] if local else None, rows)
    parts = batch.split(3)
    assert [part.rows.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    for part in parts:
        assert len(part.crops) == 1 + local
        for group in part.crops:
            assert group.shape[:2] == (2, 2)
            assert torch.equal(group[1, :, 0, 0, 0].long(), part.rows)
    assert batch.split(1) == [batch]


def test_bad_files_are_counted_by_reason() -> None:
    bad = BadFiles({"a": "damaged: x", "b": "damaged: y", "c": "truncated"})
    assert bad.summary() == "2 damaged, 1 truncated"


def test_large_batches_get_fewer_slots() -> None:
    assert slots_for(view_fields(views(), 4)) == 4
    assert slots_for(view_fields(views(4096), 256)) == 2

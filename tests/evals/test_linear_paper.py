from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_images

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import splits
from dinocli.evals.linear_paper import linear_on_images
from dinocli.features.encoder import Encoder


def test_the_papers_protocol_learns_from_images(tmp_path: Path, encoder: Encoder) -> None:
    from PIL import Image

    for split, count in (("train", 16), ("val", 8)):
        for name, color in (("dark", (40, 30, 60)), ("light", (200, 220, 190))):
            folder = write_images(tmp_path / split / name, count, 24)
            for path in folder.iterdir():
                Image.blend(Image.open(path), Image.new("RGB", (24, 24), color), 0.8).save(path)
    parts = splits(str(tmp_path))
    done = []
    result = linear_on_images(
        encoder,
        parts["train"],
        parts["val"],
        blocks=2,
        epochs=8,
        lr=0.5,
        batch_size=8,
        report=lambda d, total: done.append((d, total)),
    )
    assert (result.protocol, result.top1) == ("paper", 100.0)
    assert done[-1] == (32, 32)
    with pytest.raises(DinoError, match="--batch-size 1024 is larger than the"):
        linear_on_images(encoder, parts["train"], parts["val"])

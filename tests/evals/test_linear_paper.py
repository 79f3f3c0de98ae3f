from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
    probe = linear_on_images(
        encoder,
        parts["train"],
        parts["val"],
        blocks=2,
        epochs=8,
        lr=0.5,
        batch_size=8,
        report=lambda d, total: done.append((d, total)),
    )
    result = probe.result
    assert (result.protocol, result.top1, result.macro, result.test_images) == ("paper", 100.0, 100.0, 16)
    assert result.interval == (pytest.approx(80.6, abs=0.1), 100), "Wilson's interval of 16 of 16"
    assert result.calibration is None, "no image was held out"
    assert [Path(name).parent.name for name in probe.predictions.names] == ["dark"] * 8 + ["light"] * 8
    assert probe.weight.shape == (2, 2 * encoder.features(torch.zeros(1, 3, 16, 16)).shape[1])
    assert done[-1] == (32, 32)
    with pytest.raises(DinoError, match="--batch-size 1024 is larger than the"):
        linear_on_images(encoder, parts["train"], parts["val"])

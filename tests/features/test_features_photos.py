from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import photos
from dinocli.features.encoder import Encoder
from dinocli.features.photos import encode, same_encoder
from dinocli.features.store import Provenance

PROVENANCE = Provenance("x", "0123", "cls+avg", 2, 24, "d")


def test_another_encoder_is_an_error(encoder: Encoder) -> None:
    same_encoder(encoder, PROVENANCE)
    with pytest.raises(DinoError, match=r"the features were made by x \(0123\); x has other weights \(4567\)"):
        same_encoder(replace(encoder, fingerprint="4567"), PROVENANCE)


def test_photos_are_encoded_with_the_stored_settings(tmp_path: Path, images: Path, encoder: Encoder) -> None:
    (tmp_path / "torn.png").write_bytes(b"torn")
    done: list[int] = []
    asked = photos([images / "a", tmp_path / "torn.png"])
    found = encode(encoder, asked, PROVENANCE, batch_size=4, report=done.append)
    assert found.names == [str(path) for path in sorted((images / "a").iterdir())]
    assert list(found.skipped) == [str(tmp_path / "torn.png")]
    assert done[-1] == 7
    expected = encoder(found.names, "cls+avg", 2, 24).numpy()
    assert found.values.shape == expected.shape
    assert abs(found.values - expected).max() < 1e-5
    with pytest.raises(DinoError, match="none of the photos can be read"):
        encode(encoder, photos([tmp_path / "torn.png"]), PROVENANCE)

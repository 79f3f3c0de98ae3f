from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinocli.apps.search.index import About, Index
from dinocli.apps.search.search import search
from dinocli.data.sources.open import photos, splits
from dinocli.features.encoder import Encoder
from dinocli.features.extract import extract
from dinocli.features.gallery import open_gallery
from dinocli.features.photos import encode, same_encoder


@pytest.mark.parametrize(("tokens", "blocks", "size"), [("cls", 1, None), ("cls+avg", 2, 24)])
def test_a_photo_of_the_gallery_finds_itself(
    tmp_path: Path, images: Path, encoder: Encoder, tokens: str, blocks: int, size: int | None
) -> None:
    options = {"data": str(images), "tokens": tokens, "blocks": blocks, "size": size}
    extract(encoder, splits(str(images))["all"], tmp_path / "f" / "all.safetensors", **options)
    gallery = open_gallery(tmp_path / "f")
    (tmp_path / "torn.png").write_bytes(b"torn")
    asked = [images / "a" / "0003.png", tmp_path / "torn.png", images / "b"]
    queries = encode(encoder, photos(asked), gallery.provenance, batch_size=3)
    assert list(queries.skipped) == [str(tmp_path / "torn.png")]
    same_encoder(encoder, gallery.provenance)
    hits = list(search(Index(About("exact", 12, ""), gallery.values), gallery, queries, 5))
    assert [h.query for h in hits] == [
        str(images / "a" / "0003.png"),
        *(str(p) for p in sorted((images / "b").iterdir())),
    ]
    for hit in hits:
        first = hit.neighbours[0]
        assert (images / first.image).samefile(hit.query)
        assert first.cosine == pytest.approx(1, abs=1e-5)
        assert first.label == Path(hit.query).parent.name
        near = [n.cosine for n in hit.neighbours]
        assert near == sorted(near, reverse=True)
        assert len(near) == 5


def test_missing_neighbours_are_omitted(tmp_path: Path, images: Path, encoder: Encoder) -> None:
    extract(encoder, splits(str(images))["all"], tmp_path / "f" / "all.safetensors", data=str(images))
    gallery = open_gallery(tmp_path / "f")
    queries = encode(encoder, photos([images / "a" / "0000.png"]), gallery.provenance)

    class Few:
        def search(self, values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            return np.array([[0.5, -np.inf]]), np.array([[3, -1]])

    [hit] = search(Few(), gallery, queries, 2)
    assert [n.image for n in hit.neighbours] == ["a/0003.png"]

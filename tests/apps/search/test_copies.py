from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from dinocli.apps.search.copies import Whitening, copies, describe, generalized_mean, originals_of, score
from dinocli.core.errors import DinoError
from dinocli.features.encoder import Encoder


def test_the_generalized_mean_equals_a_plain_loop() -> None:
    patches = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    for b in range(2):
        for d in range(3):
            powers = [max(float(patches[b, n, d]), 1e-6) ** 4 for n in range(5)]
            assert float(generalized_mean(patches)[b, d]) == pytest.approx((sum(powers) / 5) ** 0.25, rel=1e-5)


def test_a_descriptor_is_the_class_token_and_the_pooled_patches(encoder: Encoder) -> None:
    images = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    found = torch.from_numpy(describe(encoder, images))
    torch.testing.assert_close(found[:, :16], encoder.features(images))
    torch.testing.assert_close(found[:, 16:], generalized_mean(encoder.features(images, "patches")))


def test_whitening_makes_the_second_moments_of_its_training_features_the_identity() -> None:
    generator = np.random.default_rng(0)
    values = (generator.normal(size=(500, 4)) @ generator.normal(size=(4, 4)) + 1).astype(np.float32)
    whitening = Whitening.learn(values)
    plain = values @ whitening.matrix.T
    np.testing.assert_allclose(plain.T @ plain / 500, np.eye(4), atol=1e-3)
    np.testing.assert_allclose(whitening(values).mean(0), 0, atol=1e-4)
    flat = np.concatenate([values, np.zeros((500, 1), np.float32)], 1)
    assert np.isfinite(Whitening.learn(flat)(flat)).all(), "a direction without variance"


def test_scores_equal_those_of_plain_loops() -> None:
    generator = np.random.default_rng(0)
    cosines = -np.sort(-generator.random((9, 6)).astype(np.float32), axis=1)
    rows = np.stack([generator.permutation(20)[:6] for _ in range(9)])
    wanted = [np.array([row[2], row[4]]) if q % 2 else np.array([99]) for q, row in enumerate(rows.tolist())]
    found = score("strong", cosines, rows, wanted)
    average = []
    for q in range(9):
        area, hits = 0.0, 0
        for place, row in enumerate(rows[q].tolist()):
            if row in wanted[q]:
                area += ((hits / place if place else 1.0) + (hits + 1) / (place + 1)) / 2 / len(wanted[q])
                hits += 1
        average.append(area)
    pairs = sorted(((cosines[q, c], rows[q, c] in wanted[q]) for q in range(9) for c in range(6)), reverse=True)
    precision = [sum(hit for _, hit in pairs[: n + 1]) / (n + 1) for n, (_, hit) in enumerate(pairs) if hit]
    assert found.mean_ap == pytest.approx(100 * np.mean(average))
    assert found.micro_ap == pytest.approx(100 * sum(precision) / sum(map(len, wanted)))
    assert 0 < found.mean_ap < 100


def test_originals_are_found_by_name() -> None:
    assert originals_of("200301", ["200200", "200300"], "strong").tolist() == [1]
    assert originals_of("car10_crop", ["car1", "car10", "dog"], "crop").tolist() == [1]
    assert originals_of("dog", ["car1", "car10", "dog"], "strong").tolist() == [2]
    with pytest.raises(DinoError, match="no original"):
        originals_of("cat_1", ["car1", "dog"], "crop")


def test_six_digit_names_match_exactly_and_by_four_digits_only_for_strong() -> None:
    counted = ["000001", "000002", "000003"]
    for kind in ("jpegqual/3", "original", "strong"):
        assert originals_of("000002", counted, kind).tolist() == [1]
    assert originals_of("0000021", counted, "crops/10").tolist() == [1]
    with pytest.raises(DinoError, match="no original"):
        originals_of("000004", counted, "jpegqual/3")
    assert originals_of("000004", counted, "strong").tolist() == [0, 1, 2], "as in the original"
    assert originals_of("200301", ["200200", "200300"], "jpegqual/3").tolist() == [1]


def test_missing_photos_are_reported_and_do_not_stop_the_scoring(tmp_path: Path, encoder: Encoder) -> None:
    folder = tmp_path / "set"
    for kind in ("original", "jpegqual"):
        write_images(folder / kind, 4)
    for lost in ("jpegqual/0001.png", "original/0002.png"):
        (folder / lost).unlink()
        (folder / lost).symlink_to(tmp_path / "nowhere.png")
    result = copies(encoder, folder, size=16)
    told = {str(Path(path).relative_to(folder)): reason for path, reason in result.skipped.items()}
    assert sorted(told) == ["jpegqual/0001.png", "jpegqual/0002.png", "original/0002.png"]
    assert "original" in told["jpegqual/0002.png"], "its original cannot be read"
    assert (result.originals, [(s.kind, s.queries) for s in result.scores]) == (3, [("original", 3), ("jpegqual", 2)])
    assert result.scores[1].mean_ap == pytest.approx(100)


def test_copies_find_their_originals(tmp_path: Path, encoder: Encoder) -> None:
    folder = tmp_path / "set"
    write_images(folder / "original", 5)
    for quality in (95, 5):
        (folder / "jpegqual" / str(quality)).mkdir(parents=True)
        for path in (folder / "original").iterdir():
            Image.open(path).save(folder / "jpegqual" / str(quality) / f"{path.stem}_q.jpg", quality=quality)
    (folder / "original" / "0009.png").write_bytes(b"torn")
    others, learned = write_images(tmp_path / "others", 4, seed=1), write_images(tmp_path / "learned", 40, seed=2)
    told = []
    result = copies(
        encoder, folder, distractors=others, whiten=learned, size=16, batch_size=3, report=lambda *s: told.append(s)
    )
    assert (result.originals, result.distractors, result.whitened) == (5, 4, 40)
    assert [s.kind for s in result.scores] == ["original", "jpegqual/5", "jpegqual/95"]
    assert result.scores[0].mean_ap == result.scores[0].micro_ap == pytest.approx(100)
    assert result.scores[2].mean_ap > 80
    assert [Path(p).name for p in result.skipped] == ["0009.png"]
    assert told[-1] == ("whitening", 40, 40)
    plain = copies(encoder, folder, size=16)
    assert (plain.distractors, plain.whitened) == (0, 0)
    for wrong in (folder / "jpegqual", folder / "original"):
        with pytest.raises(DinoError, match="original"):
            copies(encoder, wrong, size=16)


def test_the_generalized_mean_of_large_numbers_does_not_overflow() -> None:
    patches = torch.rand(2, 5, 3)
    torch.testing.assert_close(generalized_mean(patches * 1e20), generalized_mean(patches) * 1e20)

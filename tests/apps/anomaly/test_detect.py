from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from dinocli.apps.anomaly.bank import BankSettings
from dinocli.apps.anomaly.detect import build, detect, enlarged
from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder, photos
from dinocli.evals.units import unit
from dinocli.features.encoder import Encoder

SETTINGS = BankSettings(short_side=48, area=0.1)


def plain(folder: Path, count: int) -> Path:
    """Write gray photos with a little noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(120, 136, (48, 72, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_the_distance_of_a_patch_is_one_minus_its_largest_cosine(tmp_path: Path, encoder: Encoder) -> None:
    folder = write_images(tmp_path / "normal", 4, 48)
    told: list[tuple[str, int, int]] = []
    bank, skipped = build(encoder, image_folder(folder), SETTINGS, count=10**6, report=lambda *one: told.append(one))
    features = [
        unit(encoder.patches(encoder.photo(np.array(Image.open(path)), 48))[0].flatten(0, 1).numpy())
        for path in sorted(folder.iterdir())
    ]
    rows = sum(map(len, features))
    assert bank.patches.shape == (rows, features[0].shape[1]) and not skipped
    assert told[-1] == ("score normal photos", 4, 4)
    for i, own in enumerate(features):  # each photo against the others
        distances = np.sort(1 - (own @ np.concatenate(features[:i] + features[i + 1 :]).T).max(1))
        assert bank.scores[i] == pytest.approx(distances[-round(0.1 * len(own)) :].mean(), abs=1e-5)
    other = write_images(tmp_path / "test", 1, 48, seed=9)
    [one] = detect(encoder, bank, photos([other])).photos
    [mine] = [
        unit(encoder.patches(encoder.photo(np.array(Image.open(path)), 48))[0].flatten(0, 1).numpy())
        for path in other.iterdir()
    ]
    assert one.distances.ravel() == pytest.approx(1 - (mine @ bank.patches.T).max(1), abs=1e-5)
    assert one.percentile == 100 * np.mean(bank.scores < one.score)
    [known] = detect(encoder, bank, photos([folder / "0000.png"])).photos
    assert known.score == 0, "its patches are in the bank"


def test_a_spot_has_the_largest_distances(tmp_path: Path, encoder: Encoder) -> None:
    bank, _ = build(encoder, image_folder(plain(tmp_path / "normal", 6)), SETTINGS)
    spot = np.array(Image.open(plain(tmp_path / "test", 1) / "0.png"))
    spot[8:24, 40:56] = (250, 20, 20)
    Image.fromarray(spot).save(tmp_path / "test" / "spot.png")
    fine, bad = detect(encoder, bank, photos([tmp_path / "test"])).photos
    assert bad.score > fine.score and bad.percentile == 100
    assert bad.distances.shape == (6, 9)
    rows, columns = np.unravel_index(np.argsort(bad.distances.ravel())[-2:], bad.distances.shape)
    assert set(rows.tolist()) <= {1, 2} and set(columns.tolist()) <= {5, 6}


def test_the_same_seed_gives_the_same_bank(tmp_path: Path, encoder: Encoder) -> None:
    normal = image_folder(plain(tmp_path / "normal", 6))
    first, again = (build(encoder, normal, SETTINGS, count=20)[0] for _ in range(2))
    assert (first.patches == again.patches).all() and len(first.patches) == 20
    other, _ = build(encoder, normal, SETTINGS, count=20, seed=1)
    assert not np.array_equal(first.patches, other.patches)


def test_unreadable_photos_are_skipped_and_one_photo_is_not_enough(tmp_path: Path, encoder: Encoder) -> None:
    folder = plain(tmp_path / "normal", 2)
    (folder / "torn.png").write_text("torn")
    bank, skipped = build(encoder, image_folder(folder), SETTINGS)
    assert list(skipped) == ["torn.png"] and len(bank.scores) == 2
    found = detect(encoder, bank, photos([folder]))
    assert len(found.photos) == 2 and list(found.skipped) == [str(folder / "torn.png")]
    with pytest.raises(DinoError, match="none of the photos can be read"):
        detect(encoder, bank, photos([folder / "torn.png"]))
    (folder / "1.png").unlink()
    with pytest.raises(DinoError, match=r"has 1 readable photos; .*torn\.png"):
        build(encoder, image_folder(folder), SETTINGS)


def test_a_map_is_enlarged_linearly() -> None:
    large = enlarged(np.array([[0, 1], [0, 1]], np.float32), 4, 8)
    assert large.shape == (4, 8) and (np.diff(large, axis=1) >= 0).all()
    assert (large == large[0]).all() and (large[0, 0], large[0, -1]) == (0, 1)

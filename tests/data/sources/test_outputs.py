from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from conftest import write_images
from PIL import Image

from dinocli.core.tensors import write_tensors
from dinocli.data.sources import listing
from dinocli.data.sources.open import image_folder, splits
from dinocli.data.sources.outputs import MARKER, is_output, marked
from dinocli.data.sources.shards import is_shards


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path, 3)
    return tmp_path


def named(root: Path) -> list[str]:
    return list(image_folder(root).names)


OWN = ["0000.png", "0001.png", "0002.png"]


def test_a_folder_that_a_command_makes_is_ignored_and_named(photos: Path) -> None:
    before = image_folder(photos).fingerprint
    with marked(photos / "sheets", "attn-map", [photos / "sheets" / "a.png"]):
        touch(photos, "sheets/a.png", "sheets/deep/b.png")
    source = image_folder(photos)
    assert (list(source.names), source.fingerprint) == (OWN, before)
    assert source.notes == (f"ignoring sheets/ in {photos}: written by dino",)
    assert json.loads((photos / "sheets" / MARKER).read_text())["written by dino"] == "attn-map"
    assert named(photos / "sheets") == ["a.png", "deep/b.png"], "the folder that is named is read"


def test_in_a_users_own_folder_only_written_files_are_ignored(photos: Path) -> None:
    touch(photos, "mixed/mine.png")
    for name in ("mixed/made.png", "mixed/again.png"):
        with marked(photos / "mixed", "attn-map", [photos / name]):
            touch(photos, name)
    with marked(photos, "search", [photos / "search.png", photos / "below" / "x.png"]):
        touch(photos, "search.png", "below/x.png")
    source = image_folder(photos)
    assert list(source.names) == [*OWN, "mixed/mine.png"]
    assert "below/, mixed/again.png, mixed/made.png and search.png" in source.notes[0]


def test_a_command_that_writes_nothing_leaves_no_folder(photos: Path) -> None:
    with pytest.raises(ValueError, match="no"), marked(photos / "sheets", "match"):
        raise ValueError("no")
    assert not (photos / "sheets").exists()
    with pytest.raises(ValueError, match="no"), marked(photos, "match", [photos / "a-b.png"]):
        raise ValueError("no")
    assert not (photos / MARKER).exists()
    (photos / MARKER).write_text("{torn")
    assert named(photos) == OWN


def test_a_marker_of_deeply_nested_json_is_ignored(photos: Path) -> None:
    (photos / MARKER).write_text("[" * 100_000)
    before = list(image_folder(photos).names)
    made = photos / "made.png"
    with marked(photos, "attn-map", [made]):
        made.write_bytes((photos / before[0]).read_bytes())
    assert list(image_folder(photos).names) == before


def test_outputs_without_a_marker_are_recognized_by_their_content(photos: Path) -> None:
    touch(
        photos,
        "runs/tiny-1/preset.json", "runs/tiny-1/metrics.jsonl", "runs/tiny-1/curves.png", "runs/tiny-1/state/2/state.json",
        "runs/tiny-1/pictures/photos.json", "runs/tiny-1/pictures/photos.jpg", "runs/tiny-1/pictures/attention-2.jpg",
        "dedup/histogram.png", "dedup/groups.jpg", "dedup/groups-2.jpg", "dedup/keep.txt",
        "track/track.gif", "track/strip.png", "track/masks/00000.png",
        "shards/pack.json", "shards/index.json", "shards/images-000000.tar",
        "dino-demo/data/train/cat/1.jpg", "dino-demo/masks/cat/1.png", "dino-demo/run/preset.json",
        "tiny-1-hub/config.json", "tiny-1-hub/model.safetensors", "tiny-1-hub/curves.png",
    )  # fmt: skip
    (photos / "tiny-1-hub" / "README.md").write_text("card\n<!-- dinocli wrote this; 00 -->\n")
    source = image_folder(photos)
    assert list(source.names) == OWN
    assert len(source.notes) == 1, "outputs are reported once, and nothing else"
    assert named(photos / "dino-demo" / "data" / "train") == ["cat/1.jpg"]


def test_a_users_own_folders_of_such_names_are_input(photos: Path) -> None:
    own = ["attention/x.png", "dedup/x.jpg", "features/x.jpg", "runs/a/x.jpg", "segments/x.png", "state/x.jpg"]
    own += ["run/pictures/photos.jpg", "pictures/photos.jpg", "track/strip.png", "x/curves.png", "x/search.png"]
    touch(photos, *own, "run/preset.json")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(photos / "x" / "search.png")
    source = image_folder(photos)
    assert list(source.names) == sorted([*OWN, *own])
    assert not source.notes


@pytest.mark.parametrize("level", [0, 9])
def test_sheets_of_version_0_1_are_recognized_by_their_margin(photos: Path, level: int) -> None:
    sheet = Image.effect_noise((40, 30), 80).convert("RGB")
    sheet.paste((255, 255, 255), (0, 0, 40, 4))
    file = io.BytesIO()
    sheet.save(file, "PNG", compress_level=level)
    touch(photos, "attention/a.png", "search-2.png", "segments/a-mask.png", "attention/photo.png")
    for name in ("attention/a.png", "search-2.png", "segments/a.png"):
        (photos / name).write_bytes(file.getvalue())
    assert named(photos) == [*OWN, "attention/photo.png"]


def test_the_cached_listing_contains_no_outputs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos / ".cache"))
    monkeypatch.setattr(listing, "_REMEMBERED", 3)
    monkeypatch.setattr(listing, "_SETTLED", -(10**12))
    touch(photos, "film.mp4", "runs/t-1/preset.json", "runs/t-1/metrics.jsonl", "runs/t-1/curves.png")
    first = image_folder(photos)
    assert len(list((photos / ".cache" / "dinocli" / "listing").iterdir())) == 1
    again = image_folder(photos)
    assert (list(again.names), again.notes, again.fingerprint) == (OWN, first.notes, first.fingerprint)
    assert len(again.notes) == 2
    with marked(photos / "attention", "attn-map"):
        touch(photos, "attention/a.png")
    assert named(photos) == OWN


def test_shards_and_splits_are_recognized_next_to_outputs(tmp_path: Path) -> None:
    shards = touch(tmp_path / "s", "a.tar", "runs/t-1/preset.json", "runs/t-1/metrics.jsonl", "runs/t-1/curves.png")
    (shards / "features").mkdir()
    write_tensors(shards / "features" / "all.safetensors", {}, {"dinocli": "features"})
    with marked(shards, "search", [shards / "search.png"]):
        touch(shards, "search.png")
    assert is_shards(str(shards))
    touch(shards, "mine.png")
    assert not is_shards(str(shards))
    write_images(tmp_path / "d" / "test" / "a", 1)
    assert set(splits(str(tmp_path / "d"))) == {"test"}
    (shards / "features").rename(tmp_path / "d" / "features")
    assert set(splits(str(tmp_path / "d"))) == {"test"}
    assert not is_output(str(tmp_path / "d" / "test"))

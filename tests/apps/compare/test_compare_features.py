from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images

from dinocli.apps.compare.features import VIEWS, Setting, prepare, prepare_views
from dinocli.data.sources.open import splits
from dinocli.features.encoder import Encoder
from dinocli.features.extract import extract


def setting(images: Path, **changes: object) -> Setting:
    return replace(Setting(str(images), splits(str(images)), Path("compare/features")), **changes)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_features_are_extracted_once_and_then_reused(encoder: Encoder, images: Path) -> None:
    seen: list[int] = []
    first = prepare(encoder, setting(images), seen.append)
    assert first.reused is None and seen[-1] == 12
    own = Path("compare/features") / setting(images).identify(encoder)
    again = prepare(encoder, setting(images), seen.append)
    assert again.reused == own and len(seen) == 1, "nothing is encoded again"
    np.testing.assert_array_equal(again.features["all"].values[:], first.features["all"].values[:])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_of_dino_extract_are_reused(encoder: Encoder, images: Path, dtype: str) -> None:
    source = splits(str(images))["all"]
    extract(encoder, source, Path("features/all.safetensors"), data="images", views=2, dtype=dtype)  # type: ignore[arg-type]
    assert prepare(encoder, setting(images)).reused == Path("features")
    run = replace(encoder, run="runs/x")
    shutil.move("features", "runs/x/features")
    assert prepare(run, setting(images)).reused == Path("runs/x/features")


def _change_files(encoder: Encoder, images: Path) -> Encoder:
    write_images(images / "a", 6, seed=8)
    write_images(images / "b", 6, seed=9)
    return encoder


def _add_a_file(encoder: Encoder, images: Path) -> Encoder:
    write_images(images / "a", 7)
    return encoder


def _move_a_file(encoder: Encoder, images: Path) -> Encoder:
    (images / "a" / "0003.png").rename(images / "b" / "0009.png")
    return encoder


def _train(encoder: Encoder, images: Path) -> Encoder:
    return replace(encoder, fingerprint="4567")


def _normalize(encoder: Encoder, images: Path) -> Encoder:
    return replace(encoder, mean=(0.1, 0.5, 0.9))


def _round(encoder: Encoder, images: Path) -> Encoder:
    return replace(encoder, precision="bfloat16")


def _corrupt(encoder: Encoder, images: Path) -> Encoder:
    for file in (*Path("features").glob("*"), *Path("compare/features").glob("*/*")):
        file.write_bytes(file.read_bytes()[:-5])
    return encoder


@pytest.mark.parametrize("change", [_change_files, _add_a_file, _move_a_file, _train, _normalize, _round, _corrupt])
def test_features_that_do_not_match_are_extracted_again(
    encoder: Encoder, images: Path, change: Callable[[Encoder, Path], Encoder]
) -> None:
    extract(encoder, splits(str(images))["all"], Path("features/all.safetensors"), data=str(images))
    prepare(encoder, setting(images))
    assert prepare(encoder, setting(images)).reused
    changed = change(encoder, images)
    assert prepare(changed, setting(images)).reused is None
    assert prepare(changed, setting(images)).reused, "and stored for the next time"


def test_another_size_or_other_images_are_other_features(encoder: Encoder, images: Path, tmp_path: Path) -> None:
    prepare(encoder, setting(images))
    assert prepare(encoder, setting(images, size=24)).reused is None
    shutil.copytree(images, tmp_path / "copy")
    assert prepare(encoder, setting(tmp_path / "copy")).reused is None


def test_unreadable_images_are_skipped_and_reported_again(encoder: Encoder, images: Path) -> None:
    (images / "a" / "0001.png").write_bytes(b"no image")
    first = prepare(encoder, setting(images))
    again = prepare(encoder, setting(images))
    assert list(first.skipped) == list(again.skipped) == ["a/0001.png"]
    assert again.reused and len(again.features["all"]) == 11


def test_views_are_those_of_the_learned_split(encoder: Encoder, labelled: Path) -> None:
    found = prepare_views(encoder, setting(labelled))
    assert found and list(found.features) == ["train"]
    views = found.features["train"].views
    assert views is not None and views.shape == (20, VIEWS, 16)
    assert views[:].std(1).min() > 0, "the views of an image differ"
    again = prepare_views(encoder, setting(labelled))
    assert again and again.reused

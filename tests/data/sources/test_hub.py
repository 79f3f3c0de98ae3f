from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import write_images
from huggingface_hub.errors import LocalEntryNotFoundError

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import open_images


@pytest.mark.parametrize(
    ("spec", "revision", "patterns", "count"),
    [
        ("hf://datasets/me/pets", None, None, 3),
        ("hf://datasets/me/pets@v1.0/", "v1.0", None, 3),
        ("hf://datasets/me/pets@main/data/cat", "main", "data/cat/**", 1),
    ],
)
def test_a_data_set_is_downloaded_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, revision: str | None, patterns: str | None, count: int
) -> None:
    write_images(tmp_path / "data" / "cat", 1)
    write_images(tmp_path / "data" / "dog", 2)
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(open_images(spec)) == count
    assert asked == [("me/pets", {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns})]


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DinoError, match=r"hf://datasets/me/pets could not be downloaded: no network") as error:
        open_images("hf://datasets/me/pets")
    assert "\n" not in error.value.message
    with pytest.raises(DinoError, match="names no data set"):
        open_images("hf://datasets/pets")

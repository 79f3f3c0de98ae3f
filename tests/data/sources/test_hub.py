from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from conftest import write_images
from huggingface_hub.errors import LocalEntryNotFoundError
from remote_servers import Hub, serve

from dinocli.core.errors import DinoError
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import open_images, splits


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


def test_a_real_download_is_cut_fails_and_is_read_from_the_hubs_cache(tmp_path: Path) -> None:
    """The hub's own package against a server with its interface, in processes of their own: it reads its address once."""
    for seed, name in enumerate(("train/cat", "train/dog", "test/dog")):
        write_images(tmp_path / "set" / name, 2, size=16, seed=seed)
    (tmp_path / "set" / "README.md").write_text("pets")
    faults = {"train/cat/0001.png": ["503", "cut"], "test/dog/0000.png": ["cut"]}
    server, address = serve(functools.partial(Hub, folder=tmp_path / "set", faults=faults))
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf")}

    def read() -> subprocess.CompletedProcess[str]:
        text = (
            "from dinocli.data.sources.open import splits; import zlib\n"
            "for name, part in splits('hf://datasets/me/pets@main').items():\n"
            "    print(name, part.classes, [zlib.crc32(part.read(i)) for i in range(len(part))])"
        )
        return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)

    expected = ""
    for split, part in splits(str(tmp_path / "set")).items():
        assert isinstance(part, Images)
        expected += f"{split} {part.classes} {[zlib.crc32(part.read(i)) for i in range(len(part))]}\n"
    online = read()
    assert online.stdout == expected, online.stderr
    assert not any(faults.values())
    server.shutdown()
    server.server_close()
    assert read().stdout == expected, "from the cache"
    shutil.rmtree(tmp_path / "hf")
    assert "hf://datasets/me/pets@main could not be downloaded" in read().stderr


def test_splits_take_the_settings_of_images_and_several_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.npz", y=np.zeros((2, 8, 8)))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    assert list(splits("hf://datasets/me/pets", ImagesConfig(key="y"))["all"].names) == ["x.npz#row=0", "x.npz#row=1"]
    write_images(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text("file_name,label\n0000.png,cat\n0000.png,dog\n")
    assert splits("hf://datasets/me/pets", several=True)["all"].classes == ["cat;dog"]
    with pytest.raises(DinoError, match="the labels cat"):
        splits("hf://datasets/me/pets")


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DinoError, match=r"hf://datasets/me/pets could not be downloaded: no network") as error:
        open_images("hf://datasets/me/pets")
    assert "\n" not in error.value.message
    with pytest.raises(DinoError, match="names no data set"):
        open_images("hf://datasets/pets")

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from dinocli.core.errors import DinoError
from dinocli.features.store import Provenance, read_features, read_splits
from dinocli.features.writer import write_features

PROVENANCE = Provenance("ckpt.safetensors", "0123456789abcdef", "cls", 1, 224, "data")
ROW = 4 * 4  # bytes


def write(path: Path, rows: int = 3, shard_bytes: int = 2**31, dtype: str = "float32") -> Path:
    with write_features(path, PROVENANCE, ["a", "b"], dtype=dtype, shard_bytes=shard_bytes) as writer:
        for i in range(rows):
            writer.append(np.full((1, 4), i, dtype=np.float32), [i % 2], [f"a/ünïcode {i}.png"])
        writer.skipped["bad.png"] = "no image"
    return writer.place


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", [3, 4, 5])
def test_large_features_are_written_as_shards_and_read_as_one(tmp_path: Path, rows: int, dtype: str) -> None:
    place = write(tmp_path / "x" / "train.safetensors", rows, 2 * ROW, dtype)
    shards = -(-rows * (4 if dtype == "float32" else 2) * 4 // (2 * ROW))
    assert place == tmp_path / "x" / ("train" if shards > 1 else "train.safetensors")
    files = [f"train/{i:05}.safetensors" for i in range(shards)] + ["train/index.json"]
    assert names(tmp_path / "x") == (files if shards > 1 else ["train.safetensors"])
    read = read_splits(tmp_path / "x")["train"]
    assert read.values.shape == (rows, 4)
    assert read.values[:].dtype == np.float32
    assert read.values[:][:, 0].tolist() == list(range(rows))
    assert read.labels.tolist() == [i % 2 for i in range(rows)]
    assert list(read.paths) == [f"a/ünïcode {i}.png" for i in range(rows)]
    assert (read.classes, read.skipped, read.provenance) == (["a", "b"], {"bad.png": "no image"}, PROVENANCE)


def test_a_batch_larger_than_a_shard_is_not_split(tmp_path: Path) -> None:
    assert write(tmp_path / "f.safetensors", 2, 1) == tmp_path / "f"
    assert len(names(tmp_path / "f")) == 3


def test_a_file_replaces_shards_and_the_reverse(tmp_path: Path) -> None:
    for shard_bytes, found in (
        (2**31, ["f.safetensors"]),
        (2 * ROW, ["f/00000.safetensors", "f/00001.safetensors", "f/index.json"]),
        (ROW, ["f/00000.safetensors", "f/00001.safetensors", "f/00002.safetensors", "f/index.json"]),
        (2 * ROW, ["f/00000.safetensors", "f/00001.safetensors", "f/index.json"]),
        (2**31, ["f.safetensors"]),
    ):
        write(tmp_path / "f.safetensors", 3, shard_bytes)
        assert names(tmp_path) == found
        assert list(read_splits(tmp_path)) == ["f"]
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_an_unfinished_extraction_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "f.safetensors", 3, ROW).rename(tmp_path / ".f.4711.part")
    write(tmp_path / "f.safetensors", 2)
    assert {name: len(found) for name, found in read_splits(tmp_path).items()} == {"f": 2}


def test_a_folder_of_the_users_own_is_never_touched(tmp_path: Path) -> None:
    """With `--out data`, the features' folder `data/train/` may already hold the user's images."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat.jpg").write_bytes(b"mine")
    write(tmp_path / "train.safetensors", 3)
    with pytest.raises(DinoError, match="already exists with other contents"):
        write(tmp_path / "train.safetensors", 3, ROW)
    (tmp_path / "train" / "index.json").write_text("{}")
    write(tmp_path / "train.safetensors", 3)
    assert (tmp_path / "train" / "cat.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("before", [2**31, ROW])
@pytest.mark.parametrize("shard_bytes", [2**31, ROW])
def test_a_failure_leaves_the_old_files_unchanged(tmp_path: Path, before: int, shard_bytes: int) -> None:
    path = tmp_path / "f.safetensors"
    write(path, 2, before)
    found = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(OSError, match="full"), write_features(path, PROVENANCE, [], shard_bytes=shard_bytes) as writer:
        for _ in range(3):
            writer.append(np.zeros((1, 4), dtype=np.float32), [-1], ["x"])
        raise OSError(errno.ENOSPC, "full")
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == found
    with pytest.raises(OSError, match="full"), write_features(tmp_path / "new" / "f.safetensors", PROVENANCE, []):
        raise OSError(errno.ENOSPC, "full")
    assert not (tmp_path / "new").exists()


def test_faults_of_shards_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "f.safetensors", 3, ROW)
    second, index = folder / "00001.safetensors", folder / "index.json"
    content, told = second.read_bytes(), index.read_text()
    second.write_bytes(content[:-1])
    with pytest.raises(DinoError, match=r"00001\.safetensors is damaged"):
        read_features(folder)
    second.unlink()
    with pytest.raises(DinoError, match=r"00001\.safetensors is missing"):
        read_features(folder)
    second.write_bytes(content)
    for text in ("", "{}", "[]", json.dumps({"dinocli": "features"}), '{"dinocli": "features", "images": {}}'):
        index.write_text(text)
        with pytest.raises(DinoError, match=r"index\.json cannot be read"):
            read_features(folder)
    index.write_text(told.replace('"00001.safetensors": 1', '"00001.safetensors": 2'))
    with pytest.raises(DinoError, match="its checksum does not match"):
        read_features(folder)
    index.write_text(json.dumps({"dinocli": "features", "images": {"00001.safetensors": 2}}))  # of an earlier version
    with pytest.raises(DinoError, match="it has 1 images; expected 2"):
        read_features(folder)
    index.write_text(told)
    write(tmp_path / "f.part.safetensors")
    (tmp_path / "f.part.safetensors").rename(tmp_path / "f.safetensors")
    with pytest.raises(DinoError, match=r"has both f\.safetensors and the folder f; expected only one"):
        read_splits(tmp_path)


def test_values_beyond_float16_are_an_error(tmp_path: Path) -> None:
    for values, fails in (([7e4], True), ([6e4], False)):
        data = np.array([values], dtype=np.float32)
        if fails:
            with (
                pytest.raises(DinoError, match="70000"),
                write_features(tmp_path / "f.safetensors", PROVENANCE, [], dtype="float16") as writer,
            ):
                writer.append(data, [0], ["x"])
        else:
            with write_features(tmp_path / "f.safetensors", PROVENANCE, [], dtype="float16") as writer:
                writer.append(data, [0], ["x"])
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert file.get_tensor("values").dtype.itemsize == 2


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from dinocli.features.store import Provenance, read_features
from dinocli.features.writer import write_features

def anonymous():  # resident memory in MB, without pages of mapped files
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) / 1024

values = np.random.default_rng(0).normal(size=(1000, 384)).astype(np.float32)
paths = [f"n01440764/n01440764_{i:08}.JPEG" for i in range(1000)]
before, most = anonymous(), 0
with write_features(Path(sys.argv[1]), Provenance("x", "0", "cls", 1, 8, "d"), ["a"], dtype="float16", shard_bytes=2**26) as writer:
    for _ in range(200):
        writer.append(values, [0] * 1000, paths)
        most = max(most, anonymous() - before)
opened = read_features(writer.place)
assert len(opened.values) == 200_000
blocks = sum(float(opened.values[i : i + 1000].sum()) for i in range(0, 200_000, 1000))
print(most, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_features(tmp_path: Path) -> None:
    """Write and read 154 MB of features and 6 MB of paths with a few batches of 1.5 MB in memory."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "f.safetensors")], capture_output=True, text=True, check=True
    )
    writing, reading = (float(part) for part in done.stdout.split())
    assert writing < 12
    assert reading < 12


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_non_finite_features_are_not_stored(tmp_path: Path, dtype: str) -> None:
    with (
        pytest.raises(DinoError, match="the features of x or of later images in its batch are not finite"),
        write_features(tmp_path / "f.safetensors", PROVENANCE, [], dtype=dtype) as writer,
    ):
        writer.append(np.array([[1, 2], [np.inf, 1]], np.float32), [0, 0], ["x", "y"])
    assert not (tmp_path / "f.safetensors").exists()

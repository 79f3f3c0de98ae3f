from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images

from dinocli.core.atomic import write_json
from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources import pixels as module
from dinocli.data.sources.open import PackedImages, image_folder, open_images, splits
from dinocli.data.sources.pixels import INDEX, PixelShards, PixelWriter, is_pixels, open_pixels, write_index
from dinocli.data.sources.regular import Refused

SIZES = [(5, 7), (3, 3), (8, 2), (1, 9)]


def arrays(channels: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, channels), dtype=np.uint8) for size in SIZES]


def write(folder: Path, decoding: ImagesConfig = DEFAULTS) -> PixelShards:
    """Write four images to two shards and an empty one, and open them."""
    folder.mkdir(exist_ok=True)
    shards: dict[str, dict[str, int | str]] = {}
    for i, rows in enumerate(([0, 1, 2], [], [3])):
        path = folder / f"x-{i}.safetensors"
        writer = PixelWriter(path)
        for row in rows:
            writer.add(f"d\udcff/{row}.png", row - 1, arrays(decoding.channels)[row])
        table = writer.finish()
        writer.close()
        shards[path.name] = {"images": len(rows), "bytes": path.stat().st_size, "table": table}
    write_index(folder, ["a", "b", "c"], decoding, shards)
    return open_pixels(folder)


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_pixels_names_and_labels_come_back(tmp_path: Path, channels: int) -> None:
    opened = write(tmp_path, ImagesConfig(channels=channels))
    assert list(opened.names) == [f"d\udcff/{row}.png" for row in range(4)]
    assert (opened.labels.tolist(), opened.classes) == ([-1, 0, 1, 2], ["a", "b", "c"])
    for row, expected in enumerate(arrays(channels)):
        np.testing.assert_array_equal(opened.read(row, opened.decoding), expected)


def test_writing_to_pixels_changes_no_file(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in write(tmp_path).folder.iterdir()}
    open_pixels(tmp_path).read(0)[:] = 7
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_worker_maps_its_own_files_and_only_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = write(tmp_path)
    kept = opened.read(0)
    assert len(opened.maps._mapped) == 1
    other = pickle.loads(pickle.dumps(opened))
    assert not other.maps._mapped
    monkeypatch.setattr(module, "_MAPPED", 1)
    for row in (0, 3, 1, 3):
        np.testing.assert_array_equal(other.read(row), arrays()[row])
        assert len(other.maps._mapped) == 1
    opened.read(3)
    np.testing.assert_array_equal(kept, arrays()[0])  # outlives its mapping


def test_the_digest_depends_on_every_pixel(tmp_path: Path) -> None:
    first = open_images(str(write(tmp_path / "a").folder))
    assert isinstance(first, PackedImages)
    writer = PixelWriter(tmp_path / "a" / "x-2.safetensors")
    changed = arrays()[3]
    changed[0, 0, 0] ^= 1
    writer.add("d\udcff/3.png", 2, changed)
    table = writer.finish()
    writer.close()
    index = module.unseal((tmp_path / "a" / INDEX).read_bytes())
    index["shards"]["x-2.safetensors"]["table"] = table
    write_json(tmp_path / "a" / INDEX, index)
    assert open_images(str(tmp_path / "a")).fingerprint != first.fingerprint
    assert open_images(str(write(tmp_path / "b").folder)).fingerprint == first.fingerprint


def test_other_channels_or_windows_are_an_error_that_names_both(tmp_path: Path) -> None:
    opened = write(tmp_path, ImagesConfig(channels=3, window=(0, 4095)))
    opened.check(ImagesConfig(window=(0.0, 4095.0), max_aspect=7))
    with pytest.raises(DinoError, match=r"images.channels=3; expected 1\n"):
        opened.read(0, ImagesConfig(channels=1, window=(0, 4095)))
    with pytest.raises(DinoError, match=r"images.window=\[0.0, 4095.0\]; expected none\n") as error:
        opened.read(0)
    assert "--set images.window=none" in error.value.hint


def test_a_corrupt_image_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    opened = write(tmp_path)
    path = tmp_path / "x-0.safetensors"
    data = bytearray(path.read_bytes())
    data[opened.offsets[1] + 4] ^= 16
    path.write_bytes(data)
    opened = open_pixels(tmp_path)
    with pytest.raises(Refused, match="damaged: its checksum in x-0"):
        opened.read(1)
    np.testing.assert_array_equal(opened.read(0), arrays()[0])


@pytest.mark.parametrize("left", [0, 1, 700])
def test_a_shard_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path, left: int) -> None:
    opened = write(tmp_path)
    path = tmp_path / "x-0.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(Refused, match="truncated: x-0"):
        opened.read(2)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def clear_header(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "said"), [(cut, "bytes; expected"), (flip_last, "checksum does not match"), (clear_header, "")]
)
def test_a_damaged_shard_gives_one_line_and_a_hint(tmp_path: Path, damage, said: str) -> None:
    write(tmp_path)
    damage(tmp_path / "x-0.safetensors")
    with pytest.raises(DinoError, match="x-0.safetensors is corrupt: .*" + said) as error:
        open_images(str(tmp_path))
    assert "\n" not in error.value.message
    assert "remove this file and run the same `dino pack --pixels` again" in error.value.hint


def test_a_missing_shard_gives_the_command_to_run(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "x-0.safetensors").unlink()
    with pytest.raises(DinoError, match=r"is incomplete: it has no x-0\.safetensors") as error:
        open_images(str(tmp_path))
    assert error.value.hint == "run the same `dino pack` again"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"classes": [], "images": {}, "shards": {}}',
        '{"classes": [], "images": {"channels": 0}, "shards": {"x": {"bytes": 1, "table": ""}}}',
        '{"classes": [], "images": {}, "shards": {"x": {"bytes": 1}}}',
        '{"classes": [], "images": {}, "shards": {"../x": {"bytes": 1, "table": ""}}}',
        '{"classes": [], "images": {}, "shards": {}, "crc32": "00000000"}',
    ],
)
def test_a_damaged_index_gives_one_line_and_a_hint(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(DinoError, match=r"pixels\.json is corrupt: ") as error:
        open_images(str(tmp_path))
    assert "\n" not in error.value.message


def test_folders_of_pixels_are_recognised_as_such_and_as_output(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 2)
    assert not is_pixels(str(tmp_path / "photos"))
    for split in ("train", "val"):
        (tmp_path / "photos" / split).mkdir()
        write(tmp_path / "photos" / split)
        (tmp_path / "photos" / split / "pack.json").write_text("{}")
    assert {name: len(source) for name, source in splits(str(tmp_path / "photos")).items()} == {"train": 4, "val": 4}
    assert list(image_folder(tmp_path / "photos").names) == ["0000.png", "0001.png"]
    assert "written by dino" in " ".join(image_folder(tmp_path / "photos").notes)


def test_taken_images_have_their_own_pixels_and_labels(tmp_path: Path) -> None:
    write(tmp_path)
    taken = open_images(str(tmp_path)).take(np.array([3, 1, 3]))
    assert list(taken.names) == [f"d\udcff/{row}.png" for row in (3, 1, 3)]
    assert taken.labels.tolist() == [2, 0, 2]
    for i, row in enumerate((3, 1, 3)):
        np.testing.assert_array_equal(taken.read(i), arrays()[row])

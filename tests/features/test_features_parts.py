"""Parts of an extraction, joined to the bytes of a single one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_images

from dinocli.apps.pack import pack
from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder, open_source
from dinocli.features import writer
from dinocli.features.encoder import Encoder
from dinocli.features.extract import Extracted, count_in_part, extract
from dinocli.features.parts import find_parts, join, part_path
from dinocli.features.store import read_splits
from dinocli.features.writer import WHOLE, Part

Extract = Callable[..., Extracted]


@pytest.fixture
def run(images: Path, encoder: Encoder) -> Extract:
    """Return a function that extracts 17 images, two of them unreadable, in batches of two."""
    write_images(images / "c", 5, seed=7)
    for name in ("a/0001.png", "b/0003.png"):
        (images / name).write_bytes(b"no image")

    def run(path: Path, spec: Path = images, **options: Any) -> Extracted:
        return extract(encoder, open_source(str(spec)), path, **({"data": "d", "batch_size": 2} | options))

    return run


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("count", "kind", "shard_bytes", "options"),
    [
        (3, "folder", 2**31, {}),
        (2, "folder", 5 * 64, {"views": 1, "dtype": "float16"}),
        (4, "tar", 3 * 64, {"workers": 2}),
        (12, "folder", 2**31, {"tokens": "patches"}),  # more parts than batches
    ],
)
def test_joined_parts_have_the_bytes_of_a_single_extraction(
    tmp_path: Path,
    images: Path,
    run: Extract,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    kind: str,
    shard_bytes: int,
    options: dict[str, Any],
) -> None:
    monkeypatch.setitem(writer.write_features.__wrapped__.__kwdefaults__, "shard_bytes", shard_bytes)
    spec = images
    if kind == "tar":
        pack(image_folder(images), tmp_path / "packed", side=None, per_shard=5, name="x", report=lambda *a: None)
        spec = tmp_path / "packed"
    whole = run(tmp_path / "whole" / "f.safetensors", spec, **options)
    for number in reversed(range(1, count + 1)):
        part = Part(number, count)
        done = run(part_path(tmp_path / "parts" / "f.safetensors", part), spec, part=part, **options)
        if kind == "folder":
            assert done.images + len(done.skipped) == count_in_part(17, 2, part)
    with pytest.raises(DinoError, match="holds no features"):
        read_splits(tmp_path / "parts")
    found = find_parts([tmp_path / "parts"])
    assert list(found) == ["f"]
    joined = join(found["f"], tmp_path / "joined" / "f.safetensors")
    assert (joined.images, joined.shape, joined.skipped) == (whole.images, whole.shape, whole.skipped)
    assert bytes_below(tmp_path / "joined") == bytes_below(tmp_path / "whole")


def test_missing_double_and_foreign_parts_are_refused(tmp_path: Path, run: Extract, encoder: Encoder) -> None:
    whole = run(tmp_path / "f.safetensors").path
    one, three = (run(part_path(tmp_path / "f.safetensors", Part(n, 3)), part=Part(n, 3)).path for n in (1, 3))
    again = run(part_path(tmp_path / "g.safetensors", Part(1, 3)), part=Part(1, 3)).path
    other = run(part_path(tmp_path / "h.safetensors", Part(2, 3)), part=Part(2, 3), batch_size=3, dtype="float16").path
    half = run(part_path(tmp_path / "h.safetensors", Part(2, 2)), part=Part(2, 2)).path
    for paths, message, hint in (
        ([one, three], r"1 of 3 parts are missing beside .*1-of-3.safetensors: 2/3", "DATA --part 2/3"),
        ([three], r"2 of 3 parts are missing beside .*: 1/3, 2/3", "--part 1/3"),
        ([one, again, three], rf"{one} and {again} are the same part, 1/3", f"omit {again}"),
        ([one, other, three], rf"{one} and {other} are parts of different extractions: other batch size, dtype", ""),
        ([one, half], r"are parts of different extractions: other numbers of parts", ""),
        ([whole], rf"{whole} is not a part of an extraction", "--part 1/2"),
    ):
        with pytest.raises(DinoError, match=message) as error:
            join(paths, tmp_path / "joined.safetensors")
        assert hint in error.value.hint
        assert not (tmp_path / "joined.safetensors").exists()
    with pytest.raises(DinoError, match="holds no parts"):
        find_parts([tmp_path / "images"])
    with pytest.raises(DinoError, match="nowhere does not exist"):
        find_parts([tmp_path / "nowhere"])
    assert find_parts([one, three.parent]) == {"f": [one, one, three]}


def test_parts_without_any_readable_image_are_an_error(tmp_path: Path, images: Path, run: Extract) -> None:
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    paths = [run(tmp_path / f"{n}-of-2.safetensors", part=Part(n, 2)).path for n in (1, 2)]
    with pytest.raises(DinoError, match=r"the 2 parts in .* hold no features"):
        join(paths, tmp_path / "f.safetensors")


def test_the_images_of_all_parts_are_all_images() -> None:
    assert count_in_part(17, 4, WHOLE) == 17
    assert [count_in_part(17, 4, Part(n, 3)) for n in (1, 2, 3)] == [8, 5, 4]

"""Several images in one file: their names, random access, resume, and reasons."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import Extra
from dinocli.data.decode.image import decode
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.open import Images, image_folder, open_source, photos, splits, within
from dinocli.data.sources.parts import Part, part_of, read_image
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.several import open_sources
from dinocli.data.sources.shards import open_shards

tifffile: Any = pytest.importorskip("tifffile")
STACK = np.random.default_rng(0).integers(0, 255, (3, 16, 24), dtype=np.uint8)
GREY = ImagesConfig(channels=1, pages="all")


def stacks(folder: Path) -> Path:
    """Write two classes: a stack of three pages and a picture, and a stack of two pages."""
    for name, values in {"a/s.tif": STACK, "a/t.tif": STACK[0], "b/u.tif": STACK[1:]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / name, values, metadata=None, photometric="minisblack")
    return folder


def test_names_of_parts() -> None:
    assert part_of("x/a.tif#page=3") == Part("x/a.tif", "page", "3")
    assert part_of("a.tif") is None and part_of("a#1.tif") is None and part_of("a.tif#page=x") is None


def test_every_page_is_an_image_with_the_class_of_its_file(tmp_path: Path) -> None:
    source = within(open_source(str(stacks(tmp_path))), GREY)
    assert isinstance(source, Images)
    assert list(source.names) == ["a/s.tif#page=1", "a/s.tif#page=2", "a/s.tif#page=3", "a/t.tif", "b/u.tif#page=1", "b/u.tif#page=2"]  # fmt: skip
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1] and source.classes == ["a", "b"]
    for row, values in ((5, STACK[2]), (1, STACK[1]), (3, STACK[0]), (0, STACK[0])):
        np.testing.assert_array_equal(decode(source.read(row, GREY), GREY), values[..., None])
    again = within(open_source(str(tmp_path)), GREY)
    assert again.fingerprint == source.fingerprint != image_folder(tmp_path).fingerprint
    taken = source.take(np.array([5, 0]))
    np.testing.assert_array_equal(decode(taken.read(0, GREY), GREY), STACK[2][..., None])


def test_tiles_that_need_an_extra_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, tiles = open_source(str(stacks(tmp_path))), ImagesConfig(channels=1, tile=8)
    assert not within(opened, tiles).notes or not Extra("slides", "tiffslide", frozenset()).installed
    monkeypatch.setattr(Extra, "installed", False)
    (note,) = within(opened, tiles).notes
    assert note == "3 .tif are read whole, pyramids too; pip install 'dinocli[slides]' reads the tiles of pyramids"


def test_only_the_first_page_is_an_image_unless_the_preset_says_otherwise(tmp_path: Path) -> None:
    source = open_source(str(stacks(tmp_path)))
    assert within(source, DEFAULTS) is source and source.count == 3


def test_planes_are_the_channels_of_one_image(tmp_path: Path) -> None:
    planes = ImagesConfig(channels=3, pages="channels")
    source = splits(str(stacks(tmp_path)), planes)["all"]
    assert isinstance(source, Images) and list(source.names) == ["a/s.tif#planes=1,2,3", "a/t.tif", "b/u.tif"]
    np.testing.assert_array_equal(decode(source.read(0, planes), planes), STACK.transpose(1, 2, 0))


def test_a_list_may_name_pages_with_labels(tmp_path: Path) -> None:
    (stacks(tmp_path) / "list.txt").write_text("a/s.tif#page=3 one\nb/u.tif#page=1 two\n")
    source = within(open_source(str(tmp_path / "list.txt")), GREY)
    assert isinstance(source, Images) and list(source.names) == ["a/s.tif#page=3", "b/u.tif#page=1"]
    assert [source.classes[label] for label in source.labels] == ["one", "two"]
    np.testing.assert_array_equal(decode(source.read(0, GREY), GREY), STACK[2][..., None])


def test_a_file_whose_name_looks_like_a_part_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.tif#page=1").write_bytes(b"whole")
    assert read_image(tmp_path / "a.tif#page=1") == b"whole"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("s.tif#page=4", "no such page: 4; the file has pages 1 to 3"),
        ("s.tif#page=0", "no such page: 0; the file has pages 1 to 3"),
        ("x.jpg#page=1", "not read here: pages of a file other than TIFF, DICOM and NIfTI"),
        ("empty.tif#page=1", "empty: the file has no bytes"),
    ],
)
def test_a_part_that_cannot_be_read_has_a_reason(tmp_path: Path, name: str, reason: str) -> None:
    folder = stacks(tmp_path) / "a"
    (folder / "x.jpg").write_bytes(b"\xff\xd8\xff" + bytes(40))
    (folder / "empty.tif").touch()
    with pytest.raises(Refused, match=reason):
        read_image(folder / name)


def test_a_folder_or_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path / "folder#page=1")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.tif#page=1")


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = stacks(tmp_path) / "a" / "s.tif"
    read_image(f"{path}#page=3")
    tifffile.imwrite(path, STACK[::-1], metadata=None, photometric="minisblack")
    np.testing.assert_array_equal(decode(read_image(f"{path}#page=3"), GREY), STACK[0][..., None])


def test_frames_of_dicom_are_images_and_need_no_suffix(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", minversion="3")
    from medical_files import dicom

    frames = np.stack([STACK[0], STACK[1]])
    (tmp_path / "1.2.840.1").write_bytes(dicom(frames, frames=2))
    (tmp_path / "b.dcm").write_bytes(dicom(STACK[2]))
    source = within(open_source(str(tmp_path)), GREY)
    assert isinstance(source, Images)
    assert list(source.names) == ["1.2.840.1#page=1", "1.2.840.1#page=2", "b.dcm"]
    for row in range(3):
        np.testing.assert_array_equal(decode(source.read(row, GREY), GREY), STACK[row][..., None])


def test_volumes_are_read_by_slices_or_named_with_the_setting(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    stacks(tmp_path)
    nibabel.save(nibabel.Nifti1Image(STACK.transpose(2, 1, 0)[:, ::-1], np.eye(4)), tmp_path / "b" / "v.nii.gz")
    opened = open_source(str(tmp_path))
    source = within(opened, GREY)
    assert isinstance(opened, Images) and isinstance(source, Images) and source.notes == ()
    assert list(source.names)[-3:] == [f"b/v.nii.gz#page={n}" for n in (1, 2, 3)] and source.labels.tolist()[-1] == 1
    np.testing.assert_array_equal(decode(source.read(source.count - 1, GREY), GREY), STACK[2][..., None])
    first = within(opened, DEFAULTS)
    assert list(first.names) == ["a/s.tif", "a/t.tif", "b/u.tif"]
    assert first.notes == ("not read: 1 .nii.gz; --set images.pages=all reads their slices",)
    assert photos([tmp_path]).notes == ("not read: 1 .nii.gz",), "single photos have no slices"


def test_files_that_no_setting_takes_change_neither_classes_nor_labels(tmp_path: Path) -> None:
    stacks(tmp_path)
    np.savez(tmp_path / "labels.npz", y=np.arange(3))
    folder = within(open_source(str(tmp_path)), DEFAULTS)
    assert isinstance(folder, Images)
    assert (folder.classes, folder.labels.tolist()) == (["a", "b"], [0, 0, 1])
    (tmp_path / "arrays").mkdir()
    (tmp_path / "labels.npz").rename(tmp_path / "arrays" / "x.npz")
    every = splits(str(tmp_path), DEFAULTS)["all"]
    assert every.classes == ["a", "b"], "a folder without images is no class"
    rows = within(open_source(str(tmp_path)), ImagesConfig(key="y"))
    assert rows.classes == ["a", "arrays", "b"]
    table = ["file_name,label", "a/s.tif,new", "a/t.tif,old", "b/u.tif,old", "arrays/x.npz,none"]
    for name in ("list.csv", "metadata.csv"):
        (tmp_path / name).write_text("\n".join(table))
        described = within(open_source(str(tmp_path / name if name == "list.csv" else tmp_path)), DEFAULTS)
        assert isinstance(described, Images)
        assert (described.classes, described.labels.tolist()) == (["new", "old"], [0, 1, 1]), name
    (tmp_path / "metadata.csv").write_text("\n".join(table[:4]))
    assert not [note for note in within(open_source(str(tmp_path)), DEFAULTS).notes if "metadata" in note]


def test_arrays_beside_files_that_no_setting_takes_are_images(tmp_path: Path) -> None:
    for name in ("a/1", "b/2"):
        (tmp_path / name).parent.mkdir()
        np.save(tmp_path / name, STACK[0])
    np.savez(tmp_path / "x.npz", y=STACK)
    arrays = within(open_source(str(tmp_path)), DEFAULTS)
    assert isinstance(arrays, Images)
    assert (list(arrays.names), arrays.classes) == (["a/1.npy", "b/2.npy"], ["a", "b"])
    assert arrays.notes == ("not read: 1 .npz; --set images.key=NAME reads the rows of that array",)
    rows = within(open_source(str(tmp_path)), ImagesConfig(channels=1, key="y"))
    assert isinstance(rows, Images)
    assert list(rows.names) == [f"x.npz#row={n}" for n in range(3)], "arrays beside images are mostly their features"
    assert (rows.classes, rows.notes) == ([], ("not read: 2 .npy",))


def test_a_folder_of_volumes_alone_needs_the_setting(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(STACK, np.eye(4)), tmp_path / "v.nii")
    source = open_source(str(tmp_path))
    with pytest.raises(DinoError, match=r"it holds 1 \.nii") as error:
        within(source, DEFAULTS)
    assert error.value.hint == "--set images.pages=all reads their slices"
    (tmp_path / "list.csv").write_text("path,label\nv.nii,x\n")
    listed = within(open_source(str(tmp_path / "list.csv")), GREY)
    assert list(listed.names)[:1] == ["v.nii#page=1"] and listed.classes == ["x"]  # type: ignore[union-attr]


def test_videos_are_read_by_time_or_named_with_the_setting(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "f.mkv"), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 240, 20):  # three seconds
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    source = open_source(str(tmp_path))
    with pytest.raises(DinoError, match=r"it holds 1 \.mkv, 1 \.mp4") as error:
        within(source, DEFAULTS)
    assert error.value.hint == "--set images.every=1 reads a frame per second"
    often = ImagesConfig(every=0.75)
    frames = within(source, often)
    assert isinstance(frames, Images)
    assert list(frames.names) == ["broken.mp4", *(f"f.mkv#time={t}" for t in ("0", "0.75", "1.5", "2.25"))]
    levels = [np.mean(decode(frames.read(row, often), often)) for row in (4, 2, 1, 3)]  # type: ignore[arg-type]
    np.testing.assert_allclose(levels, [180, 60, 0, 120], atol=4)
    with pytest.raises(Refused, match="damaged: not a video: Invalid data found"):
        frames.read(0, often)


def test_rows_of_arrays_and_tiles_are_images(tmp_path: Path) -> None:
    pytest.importorskip("tiffslide")
    np.savez(tmp_path / "a.npz", x=STACK)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with tifffile.TiffWriter(tmp_path / "p.tif") as writer:
        level = np.random.default_rng(3).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        writer.write(level, tile=(32, 32), photometric="rgb", metadata=None, subifds=1)
        writer.write(level[::2, ::2], tile=(32, 32), photometric="rgb", metadata=None, subfiletype=1)
    source = open_source(str(tmp_path))
    settings = ImagesConfig(channels=1, key="x", tile=32)
    rows = within(source, settings)
    assert isinstance(rows, Images)
    tiles = [f"p.tif#tile={x},{y}" for y in (0, 32) for x in (0, 32, 64)]
    assert list(rows.names) == ["a.npz#row=0", "a.npz#row=1", "a.npz#row=2", "broken.npz", *tiles]
    np.testing.assert_array_equal(decode(rows.read(1, settings), settings), STACK[1][..., None])
    color = ImagesConfig(tile=32)
    np.testing.assert_array_equal(decode(rows.read(9, color), color), level[32:, 64:])
    with pytest.raises(Refused, match="damaged: File is not a zip file"):
        rows.read(3, settings)
    assert within(source, DEFAULTS).notes == ("not read: 2 .npz; --set images.key=NAME reads the rows of that array",)


def test_sources_other_than_folders_and_lists_name_the_settings_that_they_ignore(tmp_path: Path) -> None:
    for split in ("train", "val"):
        stacks(tmp_path / "photos" / split)
    archives = [shutil.make_archive(str(tmp_path / name), "zip", tmp_path / "photos") for name in ("one", "two")]
    note = "ignoring images.pages=all, images.key=x for {}: only the files of folders and lists are read this way"
    asked = GREY.model_copy(update={"key": "x"})
    source = within(open_source(archives[0]), asked)
    assert (source.count, source.notes) == (6, (note.format(archives[0]),))
    assert within(source, asked).notes == source.notes, "the note is not repeated"
    assert within(open_source(archives[0]), DEFAULTS).notes == ()
    both = within(open_sources(archives), asked)
    assert both.notes == (note.format(" ".join(archives)),)
    with_folder = within(open_sources([archives[0], str(tmp_path / "photos")]), asked)
    assert (with_folder.count, with_folder.notes) == (6 + 12, (note.format(archives[0]),))
    assert splits(archives[1], asked)["train"].notes == (note.format(f"{archives[1]}/train"),)
    shutil.make_archive(str(tmp_path / "images-000000"), "tar", tmp_path / "photos" / "train" / "a")
    shards = within(open_shards(str(tmp_path / "images-000000.tar")), asked)
    assert (shards.count, shards.notes[-1:]) == (2, (note.format(tmp_path / "images-000000.tar"),))

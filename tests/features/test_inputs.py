from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.features.inputs import given_images, given_pixels, given_source

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_a_path_an_image_and_an_array_give_the_same_pixels(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as opened:
        ways = [str(tmp_path / "x.png"), tmp_path / "x.png", Image.fromarray(PIXELS), opened, PIXELS, PIXELS[:, ::-1]]
        read = [given_pixels(way, DEFAULTS) for way in ways]
    assert all(np.array_equal(each, PIXELS) for each in read[:-1])
    assert np.array_equal(read[-1], PIXELS[:, ::-1])


def test_a_pillow_image_is_rotated_like_its_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        assert np.array_equal(given_pixels(opened, DEFAULTS), np.rot90(PIXELS, -1))


def test_an_array_is_read_like_its_npy_file(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 4000, (20, 30, 5), dtype=np.uint16)
    np.save(tmp_path / "x.npy", deep)
    images = ImagesConfig(channels=5, window=(0, 4095))
    expected = decode((tmp_path / "x.npy").read_bytes(), images)
    assert np.array_equal(given_pixels(deep, images), expected)
    assert np.array_equal(given_pixels(deep.transpose(2, 0, 1), images), expected)
    assert given_pixels(PIXELS[..., 0], ImagesConfig(channels=1)).shape == (20, 30, 1)


def test_bytes_and_tensors_give_the_pixels_of_the_file(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    planes = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for way in ((tmp_path / "x.png").read_bytes(), torch.from_numpy(PIXELS), planes):
        assert np.array_equal(given_pixels(way, DEFAULTS), PIXELS)
    assert len(given_images(planes)) == 1
    assert len(given_images(torch.stack([planes] * 3))) == 3
    assert len(given_images([b"one", b"two"])) == 2


@pytest.mark.filterwarnings("error")
def test_the_pixels_of_an_array_can_be_written() -> None:
    assert torch.from_numpy(given_pixels(PIXELS, DEFAULTS)).shape == (20, 30, 3)


def test_other_pixels_are_another_source() -> None:
    ways = [PIXELS, PIXELS[::-1], Image.fromarray(PIXELS), b"file", b"flie"]
    found = [given_images([way]).fingerprint for way in ways]
    assert len(set(found)) == len(ways)
    assert found == [given_images([way]).fingerprint for way in ways]


class Discs(torch.utils.data.Dataset):
    def __init__(self, items: list[object]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> object:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def test_a_torch_data_set_is_a_source(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    items = [PIXELS, (Image.fromarray(PIXELS), 3), [torch.from_numpy(PIXELS), "label"], str(tmp_path / "x.png")]
    source = given_source(Discs(items))
    assert next(iter(source.names)) == "Discs 0"
    for index in range(4):
        assert np.array_equal(decode(source.read(index)), PIXELS)
    with pytest.raises(DinoError, match=r"a tensor of torch\.float32 is not an image"):
        given_source(Discs([torch.zeros(3, 4, 4)])).read(0)
    with pytest.raises(DinoError, match="the data set Discs is empty"):
        given_source(Discs([]))


def test_paths_may_name_pages_and_lists_of_files_are_read_by_pages(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    stack = np.random.default_rng(1).integers(0, 255, (2, 20, 30), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", stack, metadata=None, photometric="minisblack")
    np.savez(tmp_path / "x.npz", y=stack)
    grey, page = ImagesConfig(channels=1, pages="all"), f"{tmp_path}/s.tif#page=2"
    assert np.array_equal(given_pixels(page, grey)[..., 0], stack[1])
    assert np.array_equal(given_pixels(Path(page), grey)[..., 0], stack[1])
    assert np.array_equal(decode(given_source(Discs([page])).read(0, grey), grey)[..., 0], stack[1])
    source = given_source([stack[0], tmp_path / "s.tif", f"{tmp_path}/x.npz"], grey)
    assert list(source.names) == ["input image 0", f"{tmp_path}/s.tif#page=1", page, f"{tmp_path}/x.npz"]
    for row, expected in ((0, stack[0]), (1, stack[0]), (2, stack[1])):
        assert np.array_equal(decode(source.read(row, grey), grey)[..., 0], expected)
    assert isinstance(decode(source.read(3, grey), grey), BadImage), "no setting takes it, and reading gives a reason"
    assert list(given_source([tmp_path / "s.tif"]).names) == [f"{tmp_path}/s.tif"]


def test_a_data_set_without_a_length_is_refused() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield PIXELS

    with pytest.raises(DinoError, match="Endless has no length"):
        given_source(Endless())


def test_several_images_are_a_list_or_a_four_dimensional_array() -> None:
    assert len(given_images(PIXELS)) == 1
    assert len(given_images([PIXELS, "a.jpg"])) == 2
    assert len(given_images(np.stack([PIXELS] * 3))) == 3
    assert list(given_images(["a.jpg", PIXELS]).names) == ["a.jpg", "input image 1"]


@pytest.mark.parametrize(
    ("images", "says", "hint"),
    [
        ([], "is empty; expected at least one image", "a path"),
        (torch.zeros(2, 3, 8, 8), "^a tensor of torch.float32 is not an image; exp", "encoder.features(images)"),
        ([torch.zeros(3, 8, 8)], "^a tensor of torch.float32 is not an image; exp", "tensor.to(torch.uint8)"),
        (np.array(["a.jpg"]), "an array of <U5 is not an image", "encoder"),
        (7, "^an int is not an image; expected a path", "encoder"),
        ({"a.jpg"}, "a set is not an image; expected a path", "encoder"),
    ],
)
def test_an_input_that_is_not_an_image_is_an_error(images: object, says: str, hint: str) -> None:
    with pytest.raises(DinoError, match=says) as caught:
        given_images(images)
    assert hint in caught.value.hint


def test_an_unreadable_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"no image")
    with pytest.raises(DinoError, match=r"torn\.jpg cannot be read: not an image"):
        given_pixels(tmp_path / "torn.jpg", DEFAULTS)
    with pytest.raises(DinoError, match=r"gone\.jpg cannot be read: No such file"):
        given_pixels(str(tmp_path / "gone.jpg"), DEFAULTS)
    with pytest.raises(DinoError, match="Is a directory") as caught:
        given_pixels(tmp_path, DEFAULTS)
    assert "glob" in caught.value.hint
    with pytest.raises(DinoError, match="input image 0 cannot be read: other channels: an array of 20x30"):
        given_pixels(PIXELS[..., 0], DEFAULTS)

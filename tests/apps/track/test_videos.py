from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.apps.track.propagate import Looking, Rule
from dinocli.apps.track.videos import first_mask, overlay, too_small, track_video
from dinocli.core.errors import DinoError
from dinocli.data.sources.frames import open_frames
from dinocli.data.sources.label_maps import LabelMap, read_labels, write_labels
from dinocli.features.encoder import Encoder

PALETTE = bytes([0, 0, 0, 10, 200, 30, 0, 0, 250]) + bytes(759)
LOOKING = Looking(short_side=32, layer=1)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Write eleven frames of a moving speckled square, without leading zeros in their names, and their masks."""
    generator = np.random.default_rng(0)
    ground, thing = (generator.integers(0, 256, (32, 112, 3), dtype=np.uint8) for _ in range(2))
    (tmp_path / "frames").mkdir()
    for i in range(11):
        frame, values = ground.copy(), np.zeros((32, 112), np.uint8)
        frame[8:24, 8 * i : 8 * i + 16], values[8:24, 8 * i : 8 * i + 16] = thing[:16, :16], 1
        Image.fromarray(frame).save(tmp_path / f"frames/f{i}.png")
        write_labels(tmp_path / f"masks/f{i}.png", LabelMap(values, PALETTE))
    return tmp_path


def test_a_folder_of_frames_gives_masks_a_film_and_scores(video: Path, encoder: Encoder) -> None:
    files = open_frames(video / "frames")
    first = first_mask(video / "masks" / "f0.png", files, encoder.images)
    progress: list[int] = []
    done = track_video(
        encoder,
        files,
        first,
        video / "out",
        rule=Rule(),
        looking=LOOKING,
        truth=video / "masks",
        advance=progress.append,
    )
    assert done.frames == 11 and progress[-1] == 11 and not done.skipped
    assert sorted(path.stem for path in done.masks.iterdir()) == sorted(path.stem for path in files.files)
    np.testing.assert_array_equal(read_labels(done.masks / "f0.png").values, first[0].values)
    last = read_labels(done.masks / "f10.png")
    assert last.palette == PALETTE and last.values.shape == (32, 112)
    with Image.open(done.gif) as film:
        assert film.n_frames == 11
    with Image.open(done.strip) as strip:
        assert strip.width > 4 * 112
    assert done.score.frames == done.still.frames == 9, "without the first and the last"
    assert done.still.mean.j == pytest.approx(1 / 3 / 9), (
        "the squares overlap by half in the second frame, then not at all"
    )
    assert done.score.mean.j > 0.6


def test_unreadable_frames_are_skipped(video: Path, encoder: Encoder) -> None:
    (video / "frames/f3.png").write_bytes(b"no image")
    Image.new("RGB", (20, 20)).save(video / "frames/f10.png")
    files = open_frames(video / "frames")
    first = first_mask(video / "masks" / "f0.png", files, encoder.images)
    done = track_video(encoder, files, first, video / "out", rule=Rule(), looking=LOOKING)
    assert done.frames == 9 and done.score is None
    assert not (done.masks / "f3.png").exists() and (done.masks / "f4.png").exists()
    reasons = list(done.skipped.values())
    assert "not an image" in reasons[0] and "another size: 20x20 pixels; the first frame has 112x32" in reasons[1]


def test_a_bad_true_mask_skips_only_its_own_frame(video: Path, encoder: Encoder) -> None:
    files = open_frames(video / "frames")
    first = first_mask(video / "masks" / "f0.png", files, encoder.images)
    (video / "masks/f4.png").write_bytes(b"no image")
    write_labels(video / "masks/f6.png", LabelMap(np.ones((8, 8), np.uint8)))
    done = track_video(encoder, files, first, video / "out", rule=Rule(), looking=LOOKING, truth=video / "masks")
    assert done.frames == 11 and done.score.frames == done.still.frames == 7
    assert done.gif.exists() and done.strip.exists() and (done.masks / "f4.png").exists()
    assert list(done.skipped) == ["f4.png", "f6.png"]
    assert "f4.png: damaged" in done.skipped["f4.png"] and "another size" in done.skipped["f6.png"]
    for path in (video / "masks").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DinoError, match=r"none of the true masks can be scored; f1.png: .*damaged"):
        track_video(encoder, files, first, video / "out", rule=Rule(), looking=LOOKING, truth=video / "masks")


def test_the_void_of_a_first_mask_is_not_tracked(video: Path, encoder: Encoder) -> None:
    files = open_frames(video / "frames")
    values = np.zeros((32, 112), np.uint8)
    values[8:24, :16], values[8:24, 40:80] = 1, 255
    write_labels(video / "void.png", LabelMap(values, PALETTE))
    first = first_mask(video / "void.png", files, encoder.images)
    done = track_video(encoder, files, first, video / "out", rule=Rule(), looking=LOOKING, truth=video / "masks")
    assert {int(v) for path in done.masks.iterdir() for v in np.unique(np.array(Image.open(path)))} == {0, 1}
    assert set(done.score.objects) == {1}


def test_masks_that_do_not_fit_the_frames_are_errors(video: Path, encoder: Encoder) -> None:
    files = open_frames(video / "frames")
    for name, values, palette, words in (
        ("small", np.ones((8, 8), np.uint8), None, "has 8x8 pixels; the first frame has 112x32"),
        ("empty", np.zeros((32, 112), np.uint8), None, "is 0 everywhere; expected a mask with an object\nhint"),
        ("void", np.full((32, 112), 255, np.uint8), PALETTE, r"255 \(void in a palette\)"),
    ):
        write_labels(video / f"{name}.png", LabelMap(values, palette))
        with pytest.raises(DinoError, match=words):
            first_mask(video / f"{name}.png", files, encoder.images)
    with pytest.raises(DinoError, match="its pixels are RGB"):
        first_mask(files.files[0], files, encoder.images)
    first = first_mask(video / "masks" / "f0.png", files, encoder.images)
    (video / "frames/f0.png").write_bytes(b"no image")
    with pytest.raises(DinoError, match=r"the first frame of .*frames cannot be read: not an image"):
        first_mask(video / "masks" / "f0.png", files, encoder.images)
    (video / "other").mkdir()
    write_labels(video / "other" / "x.png", first[0])
    with pytest.raises(DinoError, match="no true mask is named like"):
        track_video(encoder, files, first, video / "out", rule=Rule(), looking=LOOKING, truth=video / "other")


def test_an_object_at_no_patch_center_is_reported(encoder: Encoder) -> None:
    values = np.zeros((32, 32), np.uint8)
    values[:16], values[31, 31] = 1, 2
    assert too_small(encoder, LabelMap(values), np.zeros((32, 32, 3), np.uint8), LOOKING) == [2]


def test_objects_are_drawn_in_the_palettes_colors() -> None:
    values = np.zeros((40, 40), np.uint8)
    values[10:30, 10:30] = 1
    grey = np.full((40, 40, 3), 100, np.uint8)
    drawn = overlay(grey, LabelMap(values, PALETTE))
    np.testing.assert_array_equal(drawn[values == 0], grey[values == 0])
    assert drawn[20, 20].tolist() == [60, 145, 68]
    assert drawn[10, 10].tolist() == [10, 200, 30]
    values[:, :3] = 1
    right_border = overlay(grey, LabelMap(values, PALETTE))[:, 39]
    assert (right_border == 100).all(), "a line at the left side is not drawn at the right one"
    assert not (overlay(grey, LabelMap(values)) == drawn).all()


def test_a_video_file_is_tracked_and_its_masks_are_numbered(video: Path, encoder: Encoder) -> None:
    av = pytest.importorskip("av")
    with av.open(str(video / "v.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 112, 32, "yuv420p"
        for path in open_frames(video / "frames").files:
            file.mux(stream.encode(av.VideoFrame.from_image(Image.open(path))))
        file.mux(stream.encode())
    frames = open_frames(video / "v.mp4")
    first = first_mask(video / "masks" / "f0.png", frames, encoder.images)
    done = track_video(encoder, frames, first, video / "out", rule=Rule(), looking=LOOKING)
    assert sorted(path.name for path in done.masks.iterdir()) == [f"{i:05}.png" for i in range(11)]
    with Image.open(done.gif) as film:
        assert film.n_frames == 11 and film.info["duration"] == 40

"""Reading within limits: files that are too large or not regular give a reason and are never read."""

from __future__ import annotations

import os
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from dinocli.apps.doctor.inspection import inspect
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import ImagesConfig
from dinocli.data.loader.plain import plain_batches
from dinocli.data.sources import regular
from dinocli.data.sources.frames import open_frames
from dinocli.data.sources.masks import read_index, read_object
from dinocli.data.sources.open import image_folder, open_source, photos
from dinocli.data.sources.photos import named_photos, read_photo
from dinocli.data.sources.regular import Refused, begins_with, read_file, why_unread
from dinocli.features.inputs import given_images

LIMITED = ImagesConfig(max_megabytes=1)


@pytest.fixture
def specials(tmp_path: Path) -> Iterator[Path]:
    """A folder with two images, and FIFOs, devices, a socket and a huge file with names of images."""
    folder = write_images(tmp_path / "specials", 2)
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no FIFOs")
    os.mkfifo(folder / "fifo.png")
    os.mkfifo(folder / "fifo")
    (folder / "linked.png").symlink_to("fifo.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "zero").symlink_to("/dev/zero")
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(20 * 2**30)
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path is short
        try:
            listening.bind("socket.png")
        finally:
            os.chdir(here)
        yield folder


REASONS = {
    "fifo.png": "not a file: a FIFO",
    "linked.png": "not a file: a FIFO",
    "socket.png": "not a file: a socket",
    "sparse.png": "too large: 21475 megabytes, over 500",
    "zero.png": "not a file: a device",
}


def test_a_file_is_its_bytes_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for size in (0, 1, 70_000, 1_000_000):
        path.write_bytes(os.urandom(size))
        assert read_file(path, LIMITED) == path.read_bytes()
    path.write_bytes(bytes(1_000_001))
    with pytest.raises(Refused, match=r"too large: 1\.000001 megabytes, over 1$"):
        read_file(path, LIMITED)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "gone")
    with pytest.raises(OSError, match="null"):
        read_file("a\0b")


def test_a_sparse_file_takes_no_memory(specials: Path) -> None:
    tracemalloc.start()
    with pytest.raises(Refused):
        read_file(specials / "sparse.png")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_file_that_grows_while_it_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    read = os.read

    def growing(descriptor: int, count: int) -> bytes:
        with path.open("ab") as file:
            file.write(b"y" * 400_000)
        return read(descriptor, count)

    monkeypatch.setattr(regular.os, "read", growing)
    with pytest.raises(Refused, match="too large: the file grew to over 1 megabytes"):
        read_file(path, LIMITED)


def test_a_file_that_becomes_a_fifo_before_it_is_opened_does_not_hang(specials: Path, monkeypatch) -> None:
    usual = os.stat(specials / "0000.png")
    monkeypatch.setattr(regular.os, "stat", lambda path: usual)
    found: list[object] = []

    def attempt() -> None:
        try:
            found.append(read_file(specials / "fifo.png"))
        except OSError as error:
            found.append(why_unread(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert found == ["not a file: a FIFO"]


def test_special_files_are_never_opened(specials: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object) -> int:
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr(regular.os, "open", forbidden)
    for name in ("fifo", "zero"):
        assert not begins_with(specials / name, (b"\0", b"II*\0"))
    for name, reason in REASONS.items():
        with pytest.raises(Refused) as refused:
            read_file(specials / name)
        assert why_unread(refused.value) == reason


def test_a_folder_with_fifos_devices_and_sparse_files_is_listed_and_each_is_skipped_with_a_reason(
    specials: Path, tmp_path: Path
) -> None:
    source = image_folder(specials)
    assert list(source.names) == ["0000.png", "0001.png", *sorted(REASONS)], "files without a suffix are ignored"
    assert inspect(source).bad == REASONS
    batches = plain_batches(
        source, size=32, mean=(0.0,) * 3, std=(1.0,) * 3, batch_size=8, workers=0, device=torch.device("cpu")
    )
    (batch,) = list(batches)
    assert (batch.names, dict(batch.bad)) == (["0000.png", "0001.png"], REASONS)
    frames = {frame.name: frame.data for frame in open_frames(specials).read(range(99))}
    assert {name: data.reason for name, data in frames.items() if isinstance(data, BadImage)} == REASONS
    for name, reason in REASONS.items():
        assert read_photo(specials / name, ImagesConfig()) == BadImage(reason)
        for read in (read_index, read_object):
            assert read(specials / name) == BadImage(reason)
        with pytest.raises(Refused):
            given_images(specials / name).read(0)
        assert list(named_photos([specials / name])) == [specials / name], (
            "a file given by name is listed; reading it gives the reason"
        )
        with pytest.raises(Refused):
            photos([specials / name]).read(0)
    (tmp_path / "list.txt").write_text("specials/0000.png\nspecials/fifo.png\nspecials/zero.png\n")
    assert inspect(open_source(str(tmp_path / "list.txt"))).bad == {
        f"specials/{name}": REASONS[name] for name in ("fifo.png", "zero.png")
    }


def test_the_presets_limit_holds_before_a_file_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    small = ImagesConfig(max_megabytes=0.01)
    source = image_folder(tmp_path)
    with pytest.raises(Refused, match=r"too large: 0\.01\d+ megabytes, over 0\.01"):
        source.read(0, small)
    reason = next(iter(inspect(source, images=small).bad.values()))
    assert reason.startswith("too large")
    assert isinstance(source.read(0), bytes)

"""Packed pixels: decoded images in shards, which are mapped into memory and need no decoding."""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.core.atomic import write_json
from dinocli.core.checksums import unseal
from dinocli.core.errors import DinoError
from dinocli.core.tensors import TensorStream, map_tensors
from dinocli.data.decode.pixels import Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.listing import Names
from dinocli.data.sources.regular import Refused

INDEX = "pixels.json"
SUFFIX = ".safetensors"
_MAPPED = 128  # files that a process keeps mapped
_PACK = "pack.json"  # settings of `dino pack`, which exist before the index does
_WORD = np.dtype("<u8")  # unit of an image's checksum; every image starts at a multiple of its size
_TABLE = ("sizes", "sums", "labels", "ends", "names")  # tensors of a shard after its pixels


@dataclass(frozen=True, eq=False)
class PixelShards:
    """Decoded images in shards.

    Attributes:
        folder: Folder with the shards and their index, `pixels.json`.
        classes: Class names; empty for unlabelled images.
        names: File names that the images had.
        labels: Class index per image, -1 if unlabelled. [S]
        decoding: Settings by which the images were decoded.
        digest: Checksum of names, labels and pixels.
        maps: Files of the shards.
        shards: Index of each image's shard. [S]
        offsets: Position of each image's pixels in its file, in bytes. [S]
        sizes: Height and width of each image. [S, 2]
        sums: Checksum of each image's pixels. [S]
    """

    folder: Path
    classes: list[str]
    names: Names
    labels: NDArray[np.int32]
    decoding: ImagesConfig
    digest: str
    maps: ShardMaps
    shards: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int32]
    sums: NDArray[np.uint64]

    def check(self, images: ImagesConfig) -> None:
        """Check that images decoded by these settings are what a preset or checkpoint expects.

        Raises:
            DinoError: If it expects another number of channels or another window.
        """
        for key in ("channels", "window"):
            values = getattr(self.decoding, key), getattr(images, key)
            if values[0] != values[1]:
                packed, expected = map(_format_value, values)
                raise DinoError(
                    f"the pixels in {self.folder} have images.{key}={packed}; expected {expected}",
                    f"pack the images again with --pixels --set images.{key}={expected}, or use images.{key}={packed}",
                )

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Pixels:
        """Return the pixels of an image. Writing to them does not change the file. [H, W, C]

        Raises:
            DinoError: If `images` expects pixels that were decoded in another way.
            Refused: If the pixels are corrupt or truncated.
            OSError: If the shard cannot be read.
        """
        self.check(images)
        height, width = self.sizes[index].tolist()
        shape, start, shard = (height, width, self.decoding.channels), int(self.offsets[index]), int(self.shards[index])
        stored = self.maps[shard][start : start + _padded_bytes(shape)]
        if len(stored) < _padded_bytes(shape):
            raise Refused(f"truncated: {self.maps.files[shard]} is shorter than when it was packed")
        if _checksum(stored.view(_WORD)) != self.sums[index]:
            raise Refused(f"damaged: its checksum in {self.maps.files[shard]} does not match")
        return stored[: math.prod(shape)].reshape(shape)


class ShardMaps:
    """Files mapped into memory: those that were read last, in each process its own.

    A mapping stays until it is evicted, so that later epochs find their pages in place. Its pages are private: torch
    warns of read-only memory. Pages that nobody writes to are shared with all processes.
    """

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files
        self._mapped: dict[int, Pixels] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # a spawned worker maps its own
        return ShardMaps, (self.folder, self.files)

    def __getitem__(self, shard: int) -> Pixels:
        """Return the bytes of a file."""
        mapped = self._mapped.pop(shard, None)
        if mapped is None:
            file = os.open(self.folder / self.files[shard], os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                mapped = np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_COPY), np.uint8)
            except ValueError:
                raise Refused(f"truncated: {self.files[shard]} is empty") from None
            finally:
                os.close(file)
        self._mapped[shard] = mapped
        if len(self._mapped) > _MAPPED:  # each holds a file descriptor
            # A list, because other threads may change the dictionary.
            self._mapped.pop(list(self._mapped)[0], None)  # noqa: RUF015
        return mapped


class PixelWriter:
    """Writer of one shard, image by image.

    Args:
        path: Path of the shard; use a draft, because the file is incomplete until `finish`.
    """

    def __init__(self, path: Path) -> None:
        self._stream = TensorStream(path, ("pixels", *_TABLE), {"dinocli": "pixels"})
        self._stream.append("pixels", np.empty(0, np.uint8))
        self._sizes: list[tuple[int, int]] = []
        self._sums: list[int] = []
        self._labels: list[int] = []
        self._names: list[str] = []

    def add(self, name: str, label: int, pixels: Pixels) -> None:
        """Add an image. [H, W, C]"""
        padded = np.zeros(_padded_bytes(pixels.shape), np.uint8)
        padded[: pixels.size] = pixels.ravel()
        self._stream.append("pixels", padded)
        self._sizes.append(pixels.shape[:2])
        self._sums.append(_checksum(padded.view(_WORD)))
        self._labels.append(label)
        self._names.append(name)

    def finish(self) -> str:
        """Complete the file, and return the checksum of all that it states about its images, for the index."""
        names = Names.of(self._names)
        table: dict[str, NDArray[Any]] = {
            "sizes": np.array(self._sizes, np.int32).reshape(-1, 2),
            "sums": np.array(self._sums, np.uint64),
            "labels": np.array(self._labels, np.int32),
            "ends": names.ends,
            "names": names.text,
        }
        for name in _TABLE:
            self._stream.append(name, table[name])
        self._stream.finish()
        return _table_checksum(table)

    def close(self) -> None:
        """Close the file, complete or not."""
        self._stream.close()


def write_index(
    folder: Path, classes: Sequence[str], decoding: ImagesConfig, shards: dict[str, dict[str, int | str]]
) -> None:
    """Write the index, which completes a folder of shards.

    Args:
        folder: Folder with the shards and their index, `pixels.json`.
        classes: Class names; empty for unlabelled images.
        decoding: Settings by which the images were decoded.
        shards: `images`, `bytes` and `table` of each shard, by file name: number of images, size of the file, and the
            checksum that `PixelWriter.finish` returned.
    """
    images = decoding.model_dump(mode="json", exclude_defaults=True)
    write_json(folder / INDEX, {"classes": list(classes), "images": images, "shards": shards}, indent=1)


def is_pixels(place: str) -> bool:
    """Return whether a path is a folder of packed pixels, complete or not."""
    if os.path.isfile(os.path.join(place, INDEX)):
        return True
    return os.path.isfile(os.path.join(place, _PACK)) and any(name.endswith(SUFFIX) for name in os.listdir(place))


def open_pixels(folder: Path) -> PixelShards:
    """Open a folder of packed pixels. Their checksums are verified later, whenever an image is read.

    Raises:
        DinoError: If the folder is incomplete, or one of its files is missing, truncated or corrupt.
    """
    try:
        index = unseal((folder / INDEX).read_bytes())
        shards, classes = index["shards"], [str(name) for name in index["classes"]]
        decoding = ImagesConfig.parse(index["images"], INDEX)
        _check_index(shards)
    except FileNotFoundError:
        raise DinoError(f"{folder} is incomplete: it has no {INDEX}", "run the same `dino pack` again") from None
    except (ValueError, LookupError, TypeError, DinoError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise _damaged(folder / INDEX, why) from error
    tables = []
    for name, shard in shards.items():
        try:
            tables.append(_read_table(folder / name, shard, decoding.channels))
        except FileNotFoundError:
            raise DinoError(f"{folder} is incomplete: it has no {name}", "run the same `dino pack` again") from None
        except (OSError, ValueError) as error:
            raise _damaged(folder / name, getattr(error, "strerror", None) or str(error)) from error
    counts = [len(table["labels"]) for table in tables]
    together = {key: np.concatenate([table[key] for table in tables]) for key in ("offsets", *_TABLE)}
    before = np.cumsum([0, *(len(table["names"]) for table in tables)])[:-1]
    return PixelShards(
        folder,
        classes,
        Names(together["names"], together["ends"] + np.repeat(before, counts)),
        together["labels"],
        decoding,
        f"{zlib.crc32(''.join(shard['table'] for shard in shards.values()).encode()):08x}",
        ShardMaps(folder, list(shards)),
        np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        together["offsets"],
        together["sizes"],
        together["sums"],
    )


def _check_index(shards: Any) -> None:
    """Check the form of the index.

    Raises:
        ValueError: If a shard is not in this folder, or the size or a checksum is missing.
    """
    if not isinstance(shards, dict) or not shards:
        raise ValueError("it names no shards")
    for name, shard in shards.items():
        if name != os.path.basename(name) or "\\" in name:
            raise ValueError(f"it names {name}, which is not in this folder")
        if not isinstance(shard, dict) or type(shard.get("bytes")) is not int or not isinstance(shard["table"], str):
            raise ValueError(f"it does not state the size and checksum of {name}")


def _read_table(path: Path, shard: dict[str, Any], channels: int) -> dict[str, NDArray[Any]]:
    """Return the table of a shard, and the offset of each image in its file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is truncated, or its table is corrupt.
    """
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise ValueError(f"it has {size} bytes; expected {shard['bytes']}")
    tensors, _ = map_tensors(path, verify=False)
    table = {name: np.array(tensors[name]) for name in _TABLE if name in tensors}
    if len(table) < len(_TABLE) or _table_checksum(table) != shard["table"]:
        raise ValueError("its checksum does not match")
    start = getattr(tensors["pixels"], "offset", 0)
    each = [_padded_bytes((*shape, channels)) for shape in table["sizes"].tolist()]
    table["offsets"] = start + np.cumsum([0, *each], dtype=np.int64)[:-1]
    if sum(each) > tensors["pixels"].nbytes:
        raise ValueError("it has fewer pixels than its images")
    return table


def _padded_bytes(shape: Iterable[int]) -> int:
    """Return the size of an image in its file."""
    count = math.prod(shape)
    return count + -count % _WORD.itemsize


def _checksum(words: NDArray[Any]) -> int:
    """Return the sum of an image's 64-bit words, modulo 2**64.

    A tenth of the time of a CRC, so that every read can afford it. It detects flipped bits and missing blocks, and
    misses only words that swap places.
    """
    return int(words.sum(dtype=np.uint64))


def _table_checksum(table: dict[str, NDArray[Any]]) -> str:
    crc = 0
    for name in _TABLE:
        crc = zlib.crc32(table[name].tobytes(), crc)
    return f"{crc:08x}"


def _format_value(value: object) -> str:
    return "none" if value is None else str(value).replace("(", "[").replace(")", "]")


def _damaged(path: Path, why: str) -> DinoError:
    return DinoError(f"{path} is corrupt: {why}", "remove this file and run the same `dino pack --pixels` again")

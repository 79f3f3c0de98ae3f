"""Packing of images into tar shards, which are read sequentially instead of file by file."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray
from PIL import Image

from dinocli.core.atomic import atomic, write_json
from dinocli.core.checksums import unseal
from dinocli.core.drafts import sweep
from dinocli.core.errors import DinoError
from dinocli.core.resources import cores
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.listing import ARRAY, SUFFIXES
from dinocli.data.sources.regular import why_unread
from dinocli.data.sources.shards import INDEX, open_shards
from dinocli.data.views.crops import shrink

if TYPE_CHECKING:
    from dinocli.data.sources.open import Images

SETTINGS = "pack.json"
_AT_ONCE = 64  # images decoded at once and held in memory
_TIMED, _TIMES = 500, 3  # images and repetitions of the speed measurement
_LONGEST_SIDE = 65_000  # pixels; JPEG cannot store more


@dataclass(frozen=True)
class Packed:
    """Result of packing.

    Attributes:
        shards: Number of shards.
        kept: Number of shards that existed already.
        images: Number of images in all shards.
        bytes: Size of all shards.
        seconds: Duration of the packing.
        bad: Name and reason of each skipped image.
        faster: Read speed of the shards relative to the source's files; None if it cannot be measured.
        cold: True if the speed was measured from disk, not from the system's cache, where the difference is smaller.
    """

    shards: int
    kept: int
    images: int
    bytes: int
    seconds: float
    bad: dict[str, str]
    faster: float | None
    cold: bool


class _Entry(NamedTuple):
    """Image to write, or the reason to skip it."""

    key: str = ""
    suffix: str = ""
    data: bytes = b""
    reason: str = ""


def pack(
    source: Images,
    out: Path,
    *,
    side: int | None = None,
    quality: int = 92,
    per_shard: int = 1000,
    name: str = "images",
    seed: int = 0,
    images: ImagesConfig = DEFAULTS,
    report: Callable[[int], None] = lambda images: None,
) -> Packed:
    """Write tar shards in WebDataset format, each a random sample of the source, and an index next to them.

    A repeated call keeps complete shards. Every image is decoded once, so that a bad one is found now and not during
    training.

    Args:
        source: Images to pack.
        out: Folder for the shards.
        side: Short side, in pixels, to which larger images are resized. They are stored as JPEG, or as .npy if they
            have neither one nor three channels. Smaller images, and all images if None, keep their files unchanged.
        quality: JPEG quality, 1 to 95.
        per_shard: Number of source images per shard, including bad ones.
        name: Prefix of the shards' names.
        seed: Seed of the order.
        images: Decoding settings: limits for readable images, and the conversion of deep ones to 8 bits.
        report: Progress callback with the number of images done.

    Raises:
        DinoError: If the folder holds shards with other settings, or no image can be read.
        OSError: If the disk is full or the place is not writable.
    """
    start = time.monotonic()
    repeated, digest = _find_repeated_keys(source)
    settings = {
        "source": source.where, "images": len(source), "listing": digest, "side": side, "quality": quality,
        "per_shard": per_shard, "name": name, "seed": seed,
    }  # fmt: skip
    if images != DEFAULTS:
        settings["read as"] = images.model_dump(mode="json", exclude_defaults=True)
    done: dict[str, Any] = _resume(out, settings)
    order = np.random.default_rng(seed).permutation(len(source))
    make = partial(_make_entry, source, repeated, images, side, quality)
    kept = 0
    with ThreadPoolExecutor(min(16, cores())) as pool:  # Pillow decodes without the interpreter lock
        for first in range(0, len(order), per_shard):
            rows, shard = order[first : first + per_shard], f"{name}-{first // per_shard:06}.tar"
            if shard in done and _file_size(out / shard) == done[shard]["bytes"]:
                kept += 1
                report(first + len(rows))
                continue
            bad, packed = {}, 0
            with atomic(out / shard) as draft, tarfile.open(draft, "w", format=tarfile.GNU_FORMAT) as tar:
                for part in range(0, len(rows), _AT_ONCE):
                    block = rows[part : part + _AT_ONCE].tolist()
                    for row, entry in zip(block, pool.map(make, block), strict=True):
                        if entry.reason:
                            bad[source.names[row]] = entry.reason
                            continue
                        packed += 1
                        _add_member(tar, f"{entry.key}{entry.suffix}", entry.data)
                        if source.labels[row] >= 0:
                            _add_member(tar, f"{entry.key}.cls", b"%d" % source.labels[row])
                    report(first + part + len(block))
            done[shard] = {"images": packed, "bytes": _file_size(out / shard), "bad": bad}
            _write_settings(out, settings, done)
    return _finish(source, out, images, done, order, kept, start)


def _find_repeated_keys(source: Images) -> tuple[NDArray[np.bool_], str]:
    """Return a mask of images that share their key (`a.jpg` and `a.png`), and a digest of names and labels."""
    digest = hashlib.sha256(np.asarray(source.labels, dtype=np.int32).tobytes())
    codes = np.empty(len(source), dtype=np.uint64)  # not the keys themselves: ten million of them fill the memory
    for i in range(len(source)):
        name = os.fsencode(source.names[i])
        digest.update(name + b"\0")
        codes[i] = int.from_bytes(hashlib.blake2b(os.fsencode(_key(source.names[i])), digest_size=8).digest())
    _, place, counts = np.unique(codes, return_inverse=True, return_counts=True)
    return counts[place] > 1, digest.hexdigest()[:16]


def _key(name: str) -> str:
    """Return an image's name in the shards, without suffix: WebDataset ends it at a dot and skips `__x__`.

    It never contains `~`, so it cannot equal a repeated name, which gets `~` and a number.
    """
    key = re.sub(r"[.~\x00-\x1f\x7f]", "_", os.path.splitext(name)[0].lstrip("/"))
    return "x" + key if key.startswith("__") else key


def _resume(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the shards that an earlier call with these settings wrote.

    Raises:
        DinoError: If its settings differ, their file is corrupt, or the folder holds other tar files.
    """
    sweep(out)
    try:
        stored = unseal((out / SETTINGS).read_bytes())
        before, shards = stored["settings"], stored["shards"]
        _check_shards(before, shards)
    except FileNotFoundError:
        if any(out.glob("*.tar")):
            raise DinoError(f"{out} holds tar files that `dino pack` did not write", "name a new folder") from None
        _write_settings(out, settings, {})
        return {}
    except (ValueError, LookupError, TypeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DinoError(f"{out / SETTINGS} is corrupt: {why}", "name a new folder, or remove this one") from error
    for key in before | settings:
        if before.get(key) != settings.get(key):
            raise DinoError(
                f"{out} was packed with {key} {before.get(key)}; this call has {settings.get(key)}",
                "name a new folder, or use the same images and settings to resume",
            )
    return dict(shards)


def _check_shards(settings: object, shards: object) -> None:
    """Check the form of the stored settings and shards.

    Raises:
        ValueError: If a value has the wrong type.
    """
    if not isinstance(settings, dict) or not isinstance(shards, dict):
        raise ValueError("its settings or its shards have the wrong type")
    for name, shard in shards.items():
        numbers = [shard["images"], shard["bytes"]]
        if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(shard["bad"], dict):
            raise ValueError(f"an entry of {name} has the wrong type")


def _write_settings(out: Path, settings: dict[str, Any], done: dict[str, Any]) -> None:
    write_json(out / SETTINGS, {"settings": settings, "shards": done}, indent=1)


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _make_entry(
    source: Images, repeated: NDArray[np.bool_], images: ImagesConfig, side: int | None, quality: int, row: int
) -> _Entry:
    try:
        data = source.read(row, images)
    except OSError as error:
        return _Entry(reason=why_unread(error))
    pixels = decode(data, images)
    if isinstance(pixels, BadImage):
        return _Entry(reason=pixels.reason)
    key = _key(source.names[row]) + (f"~{row}" if repeated[row] else "")
    height, width = pixels.shape[:2]
    short = min(height, width)
    if side and short > side and max(height, width) * side // short <= _LONGEST_SIDE:
        return _Entry(key, *_encode(shrink(pixels, side), "JPEG", quality=quality))
    if not isinstance(data, bytes):
        return _Entry(key, *_encode(pixels, "PNG"))
    suffix = os.path.splitext(source.names[row])[1].lower()
    # A file without an image suffix gets one from its content, which readers check anyway.
    return _Entry(key, suffix if suffix in SUFFIXES or suffix == ARRAY else _guess_suffix(data), data)


def _encode(pixels: Pixels, kind: Literal["JPEG", "PNG"], **options: Any) -> tuple[str, bytes]:
    """Encode an image as the given kind, or as .npy if it is neither color nor gray; return suffix and bytes."""
    file = io.BytesIO()
    if pixels.shape[2] not in (1, 3):
        np.save(file, pixels)
        return ARRAY, file.getvalue()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(file, kind, **options)
    return {"JPEG": ".jpg", "PNG": ".png"}[kind], file.getvalue()


def _guess_suffix(data: bytes) -> str:
    if data.startswith(MAGIC_PREFIX):
        return ARRAY
    with Image.open(io.BytesIO(data)) as image:
        suffix = f".{image.format or ''}".lower()
    return suffix if suffix in SUFFIXES else ".jpg"


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # No time, user or group: the same images give the same bytes.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _finish(
    source: Images,
    out: Path,
    images: ImagesConfig,
    done: dict[str, Any],
    order: NDArray[np.int64],
    kept: int,
    start: float,
) -> Packed:
    bad = {name: reason for shard in done.values() for name, reason in shard["bad"].items()}
    count = sum(shard["images"] for shard in done.values())
    if not count:
        first = next(iter(bad.items()))
        raise DinoError(
            f"none of the {len(source)} images in {source.where} can be read; {first[0]}: {first[1]}",
            "check that file; then name a new folder",
        )
    index = {
        "classes": source.classes,
        "shards": {name: shard["images"] for name, shard in done.items()},
        "bytes": {name: shard["bytes"] for name, shard in done.items()},
    }
    write_json(out / INDEX, index, indent=1)
    seconds = time.monotonic() - start
    good = [row for row in order[:_TIMED].tolist() if source.names[row] not in bad]
    faster, cold = _measure_speedup(source, out, images, good)
    size = sum(shard["bytes"] for shard in done.values())
    return Packed(len(done), kept, count, size, seconds, bad, faster, cold)


def _measure_speedup(source: Images, out: Path, images: ImagesConfig, rows: list[int]) -> tuple[float | None, bool]:
    """Return the read speed of the shards relative to the source's files, and whether both came from disk."""
    root = Path(getattr(source, "root", source.where))
    files = [root / source.names[row] for row in rows]
    if not files or not all(file.is_file() for file in files):
        return None, False  # usually a torchvision set, which does more than read a file per image
    shards = open_shards(str(out))
    of_files, cold = _time(files, (map(source.read, rows, repeat(images)) for _ in range(_TIMES)))
    of_shards, colder = _time(map(Path, shards.urls), (islice(shards.stream(0, 1), len(rows)) for _ in range(_TIMES)))
    return of_files / of_shards, cold and colder


def _time(paths: Iterable[Path], readings: Iterable[Iterator[object]]) -> tuple[float, bool]:
    """Return the seconds of the fastest reading, the least disturbed one, and whether all came from disk."""
    paths, seconds, cold = list(paths), [], True
    for reading in readings:
        cold = all([_drop_from_cache(path) for path in paths]) and cold  # a list, because every file must be dropped
        began = time.perf_counter()
        deque(reading, maxlen=0)
        seconds.append(time.perf_counter() - began)
    return min(seconds), cold


def _drop_from_cache(path: Path) -> bool:
    """Ask the system to drop a file from its cache, and return whether it did."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT)  # reads from memory only, never from disk
        return False
    except OSError as error:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return error.errno == errno.EAGAIN
    finally:
        os.close(file)

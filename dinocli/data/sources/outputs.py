"""Outputs of this tool among a user's images: marked when written, recognised when a folder is listed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dinocli.core.atomic import write_text
from dinocli.core.checksums import parse
from dinocli.core.distributed import rank
from dinocli.core.tensors import read_metadata

MARKER = ".dinocli"
_COMMAND, _FILES = "written by dino", "files"
# File names that may indicate an output. A listing collects them as it goes, so other folders cost nothing extra.
SIGNS = frozenset(
    f"{MARKER} preset.json metrics.jsonl ckpt.safetensors state photos.json photos.jpg pack.json index.json "
    "pixels.json README.md config.json model.safetensors histogram.png keep.txt track.gif strip.png data masks "
    "run".split()
)
_NOTHING = re.compile(r"(?!)")
# Outputs that version 0.1 wrote without a marker: folder names, a file name, and a line in model cards.
SHEETS = {"attention", "matches", "segments"}
_SEARCH = re.compile(r"search(-\d+)?\.png")
_HUB = b"<!-- dinocli wrote this;"
_HEAD = 2**16  # bytes of a picture or a header to read


class Ours(NamedTuple):
    """Recognised outputs in a folder.

    Attributes:
        whole: True if the whole folder is output.
        hides: Pattern of the names that are output, if not all are.
    """

    whole: bool = False
    hides: re.Pattern[str] = _NOTHING


@contextlib.contextmanager
def marked(folder: Path, command: str, files: Iterable[Path] = ()) -> Iterator[None]:
    """Mark a folder as output before anything is written to it; remove the mark if nothing was.

    A new or empty folder is marked as a whole. In a folder with the user's own files, only `files` are marked.

    Args:
        folder: Output folder of a command.
        command: Name of the command, for people who open the marker.
        files: Images that the command writes, in the folder and below.

    Raises:
        OSError: If the folder cannot be written to.
    """
    if rank() > 0:
        yield
        return
    names: dict[Path, list[str]] = {}
    if is_fresh(folder):
        names[folder] = []
    else:
        for path in files:
            names.setdefault(path.parent, []).append(path.name)
    before = {parent for parent in names if (parent / MARKER).exists()}
    fresh = {parent for parent in names if is_fresh(parent)}
    for parent, some in names.items():
        _mark(parent, command, None if parent in fresh else some)
    try:
        yield
    finally:
        for parent, some in names.items():
            with contextlib.suppress(OSError):
                if parent in fresh and os.listdir(parent) == [MARKER]:
                    (parent / MARKER).unlink()
                    parent.rmdir()
                elif parent not in fresh | before and not any((parent / name).exists() for name in some):
                    (parent / MARKER).unlink()


def is_fresh(folder: Path) -> bool:
    """Return whether a folder does not exist, or holds nothing but a marker."""
    return not folder.exists() or all(name == MARKER for name in os.listdir(folder))


def _mark(folder: Path, command: str, names: list[str] | None) -> None:
    before = _read_marker(folder)
    if not (before and before.whole):
        # In a folder that existed before, a list of names keeps the user's own files as input.
        listed = None if names is None else sorted({*names, *_read_listed(folder)})
        write_text(folder / MARKER, json.dumps({_COMMAND: command, _FILES: listed}))


def recognise(folder: str, signs: Collection[str]) -> Ours:
    """Recognise the contents of a folder that this tool wrote.

    Args:
        folder: Path of the folder.
        signs: Names in the folder that are in `SIGNS`.
    """
    told = _read_marker(Path(folder)) if MARKER in signs else None
    if told and told.whole:
        return told
    if {"data", "masks", "run"} <= set(signs) and os.path.isfile(os.path.join(folder, "run", "preset.json")):
        return Ours(whole=True)  # from `dino demo`, version 0.1
    hides = [told.hides.pattern] if told else []
    if "preset.json" in signs and not {"metrics.jsonl", "ckpt.safetensors", "state"}.isdisjoint(signs):
        hides.append(r"curves\.png")
    if {"photos.json", "photos.jpg"} <= set(signs):
        hides.append(r"(photos|attention-\d+|neighbours-\d+)\.jpg")
    if {"pack.json", "index.json"} <= set(signs):
        hides.append(r".+\.tar")
    if {"pack.json", "pixels.json"} <= set(signs):
        hides.append(r".+\.safetensors")
    if {"README.md", "config.json", "model.safetensors"} <= set(signs) and _is_hub(folder):
        hides.append(r"curves\.png")
    if "histogram.png" in signs and ("keep.txt" in signs or os.path.basename(folder) == "dedup"):
        hides.append(r"histogram\.png|groups(-\d+)?\.jpg")
    if {"track.gif", "strip.png", "masks"} <= set(signs):
        hides.append(r"track\.gif|strip\.png|masks")
    return Ours(hides=re.compile("|".join(f"(?:{pattern})" for pattern in hides))) if hides else Ours()


def is_sheet(folder: str, name: str) -> bool:
    """Recognise a picture of version 0.1 by its place, its name and its white margin."""
    if not name.endswith(".png") or not (os.path.basename(folder) in SHEETS or _SEARCH.fullmatch(name)):
        return False
    path = os.path.join(folder, name)
    with contextlib.suppress(OSError, ValueError, zlib.error):
        mask_of = path.removesuffix("-mask.png") + ".png"
        if mask_of != path and name.endswith("-mask.png") and os.path.isfile(mask_of):
            path = mask_of
        return os.path.isfile(path) and _begins_white(_read_beginning(path))
    return False


def is_output(folder: str) -> bool:
    """Return whether all images and features in a folder are output: a run, `runs/`, features, shards, pictures."""
    signs, below, others, tensors = set[str](), list[str](), list[str](), list[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in SIGNS:
                signs.add(entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                below.append(entry.name)
            elif entry.name.endswith(".safetensors"):
                tensors.append(entry.name)
            else:
                others.append(entry.name)
    ours = recognise(folder, signs)
    if ours.whole or (ours != Ours() and {"preset.json", "pack.json"} & signs):
        return True
    if tensors:
        return not others and _is_tensors(os.path.join(folder, tensors[0]))
    return bool(below) and not others and all(is_output(os.path.join(folder, name)) for name in below)


def _read_marker(folder: Path) -> Ours | None:
    """Return the outputs that a folder's marker names; None if there is no valid marker."""
    try:
        return parse_marker((folder / MARKER).read_bytes())
    except OSError:
        return None


def parse_marker(text: bytes) -> Ours | None:
    """Return the outputs that the text of a marker names; None if it is not valid."""
    try:
        told = parse(text)
        if not isinstance(told, dict) or _COMMAND not in told:
            return None
        names = told[_FILES]
        return Ours(whole=True) if names is None else Ours(hides=re.compile("|".join(map(re.escape, names)) or r"(?!)"))
    except (ValueError, LookupError, TypeError):
        return None


def _read_listed(folder: Path) -> set[str]:
    """Return the names in the existing marker, which a new one keeps."""
    try:
        return {str(name) for name in parse((folder / MARKER).read_bytes())[_FILES] or ()}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _read_beginning(path: str, end: bool = False) -> bytes:
    with open(path, "rb") as file:
        if end:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _HEAD))
        return file.read(_HEAD)


def _is_hub(folder: str) -> bool:
    """Recognise a folder of `dino push` by the last line of its model card."""
    try:
        return os.path.isfile(f"{folder}/README.md") and _HUB in _read_beginning(f"{folder}/README.md", end=True)
    except OSError:
        return False


def _is_tensors(path: str) -> bool:
    """Recognise features and checkpoints of this tool by the metadata in their header."""
    try:
        return os.path.isfile(path) and "dinocli" in read_metadata(Path(path))
    except (OSError, ValueError):
        return False


def _begins_white(png: bytes) -> bool:
    """Return whether the first row of an 8-bit RGB PNG is white, as the margin of every sheet is.

    Source: PNG, RFC 2083, sections 3, 4.1 and 6: chunks, header, row filters.
    """
    if not png.startswith(b"\x89PNG\r\n\x1a\n") or png[24:26] != b"\x08\x02":
        return False
    width, place, packed = int.from_bytes(png[16:20]), 8, b""
    while place + 8 <= len(png):
        size, kind = int.from_bytes(png[place : place + 4]), png[place + 4 : place + 8]
        if kind == b"IDAT":
            packed += png[place + 8 : place + 8 + size]
        place += 12 + size
    row = zlib.decompressobj().decompress(packed, 1 + 3 * width)
    filtered, values = row[:1], row[1:]
    if len(values) < 3 * width or not width:
        return False
    # Filters take the row above the first as zeros, so Up changes nothing and Paeth equals Sub.
    white = {
        b"\0": b"\xff" * (3 * width),
        b"\1": b"\xff" * 3 + b"\0" * (3 * width - 3),
        b"\3": b"\xff" * 3 + b"\x80" * (3 * width - 3),
    }
    return values == white.get({b"\2": b"\0", b"\4": b"\1"}.get(filtered, filtered))

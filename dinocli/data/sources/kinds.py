"""Kinds of files that are not read as images: their counts in words, and a remedy for each."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping

from dinocli.data.decode.extras import EXTRAS, HOLDERS, VIDEO, extra_for
from dinocli.data.sources.regular import begins_with

# Suffixes of files that accompany images. No message is needed when these are not read.
_BESIDE = frozenset(
    ".txt .json .jsonl .xml .csv .tsv .md .rst .html .htm .yaml .yml .toml .ini .cfg .log .py .ipynb .sh .js .css "
    ".safetensors .pth .pt .onnx .pkl .pickle .db .lst .idx .xmp .aae .url .lnk .bat .md5 .sha1 .sha256 .cls".split()
)
_DOCUMENTS = frozenset("README LICENSE LICENCE COPYING NOTICE AUTHORS CHANGELOG CITATION MAKEFILE DOCKERFILE".split())
_PACKED = frozenset(".gz .bz2 .xz .zst".split())
_ARCHIVES = frozenset(".zip .7z .rar .gz .bz2 .xz .tgz .tar.gz .tar.bz2 .tar.xz .tar.zst .zst".split())


def kind_of(name: str) -> str:
    """Return the suffix that identifies a file's kind, in lower case: `.heic`, `.nii.gz`; "" if it has none."""
    stem, suffix = os.path.splitext(name.lower())
    inner = os.path.splitext(stem)[1]
    if suffix in _PACKED and 1 < len(inner) <= 4 and inner[1:].isalpha():
        return inner + suffix
    if name.upper() in _DOCUMENTS:
        return ".txt"
    # DICOM names (1.2.840.10008) and sentences with a dot have no suffix.
    return suffix if 1 < len(suffix) <= 12 and not suffix[1:].isdecimal() and suffix.isprintable() else ""


def unread(kinds: Mapping[str, int], most: int = 8) -> str:
    """Return the counts of files by kind in words: `12 .heic, 3 .mp4`."""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count} {kind or 'without a suffix'}" for kind, count in ordered[:most]]
    rest = sum(count for _, count in ordered[most:])
    return ", ".join([*words, f"{rest} of {len(ordered) - most} other kinds"] if rest else words)


def not_beside(kinds: Mapping[str, int]) -> dict[str, int]:
    """Drop the kinds that accompany images: texts, tables, weights."""
    return {kind: count for kind, count in kinds.items() if kind not in _BESIDE}


def notes_of(kinds: Mapping[str, int], begin: str = "not read") -> Iterator[str]:
    """Yield one line per extra that would read some of the files, and one with the counts of all other kinds."""
    left = not_beside(kinds)
    for extra in (*EXTRAS, *HOLDERS):
        if not extra.installed and (missed := {kind: left.pop(kind) for kind in [*left] if kind in extra.suffixes}):
            yield f"{begin}: {unread(missed)}; {extra.pip} reads them"
    if left:
        yield f"{begin}: {unread(left)}"


def remedy(where: str, kinds: Mapping[str, int], first: Mapping[str, str]) -> str:
    """Return a hint for a folder without images: how to convert or use its most common kind of file.

    Args:
        where: Folder, as written on the command line.
        kinds: Number of files by suffix.
        first: Path of one file of each kind; empty if unknown.
    """
    for kind in sorted(kinds, key=lambda kind: -kinds[kind]):
        if (extra := extra_for(kind)) and not extra.installed:
            return extra.pip
        if kind == ".tar":
            return f"these are tar shards: name their folder, or {shlex.quote(f'{where}/**/*.tar')}"
        if kind in _ARCHIVES:
            if kind == ".zip" and kind in first:
                return f"name an archive itself: {shlex.quote(first[kind])}"
            return f"unpack them into a folder with 7z x or tar -xf, and name that folder ({first.get(kind, kind)})"
        if kind in VIDEO.suffixes:
            return (
                "extract frames from videos first: ffmpeg -i FILM frames/%06d.jpg; `dino attn-map --film` and "
                "`dino track` read videos themselves"
            )
    return "name a folder with files such as .jpg, .png, .webp or .tif"


def looks_like_dicom(path: str) -> bool:
    """Recognise a DICOM file, which often has no suffix, by its mark after a preamble of 128 bytes."""
    return begins_with(path, (b"DICM",), 128)

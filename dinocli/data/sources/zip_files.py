"""ZIP archives of images as they are: nothing is unpacked, and each image is read by its place in the file."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.data.images import DEFAULTS, ImagesConfig, megabytes_over
from dinocli.data.sources.indexed import StoredImages
from dinocli.data.sources.members import select_images
from dinocli.data.sources.regular import Refused, read_span

ZIP = ".zip"  # suffix of the files
_HEADER, _SIGNATURE = 30, b"PK\3\4"  # bytes of a local header before the name and the extra field
_ENCRYPTED = 1  # bit of a member's flags
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_NAMES = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 98: "PPMd"}
# Image files hardly compress: whole archives of them reach a ratio of 2, and of blank bitmaps 100.
_LARGEST_RATIO, _HARMLESS = 500, 10**9  # real size per size in the archive, above so many bytes


@dataclass(frozen=True, eq=False)
class ZipImages(StoredImages):
    """Images in a ZIP archive.

    Attributes:
        table: Offset of the header, size in the archive, size, checksum and method of each image. [S, 5]
    """

    table: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """Checksum of the names, their order, and the checksums of the contents in the archive."""
        return f"{zlib.crc32(self.table[:, 3].tobytes(), int(super().fingerprint, 16)):08x}"

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> bytes:
        """Return the bytes of an image.

        Raises:
            Refused: If it is too large or corrupt.
            OSError: If the archive cannot be read.
        """
        return _read_member(str(self.root), self.table[index].tolist(), images.max_megabytes)


def open_zip(path: Path) -> ZipImages:
    """Open a ZIP archive by its directory, which states each member's place, sizes and checksum.

    Raises:
        DinoError: If the archive is corrupt, encrypted or a decompression bomb, or holds no image.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DinoError(f"{path} is not a valid ZIP archive: {error}", "copy or download it again") from error
    except OSError as error:
        raise DinoError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error
    _check_bomb(path, members)
    table = np.array([_row(member) for member in members], np.int64).reshape(-1, 5)

    def marker(row: int, most: int) -> bytes:
        try:
            return _read_member(str(path), table[row].tolist(), most / 1e6)
        except OSError:
            return b""

    # Some tools on Windows write backslashes between folders.
    selected = select_images(str(path), [member.filename.replace("\\", "/") for member in members], marker)
    for row in selected.rows.tolist():
        _check_readable(path, members[row])
    rows, names, classes, labels, notes = selected
    return ZipImages(str(path), path, names, classes, labels, table[rows], notes=notes)


def _row(member: zipfile.ZipInfo) -> list[int]:
    return [member.header_offset, member.compress_size, member.file_size, member.CRC, member.compress_type]


def _check_bomb(path: Path, members: list[zipfile.ZipInfo]) -> None:
    size = path.stat().st_size
    stored, real = sum(member.compress_size for member in members), sum(member.file_size for member in members)
    if stored > size:
        wrong = f"its members claim {stored / 1e6:.0f} MB of its {size / 1e6:.1f} MB, so they overlap"
    elif real > max(_HARMLESS, _LARGEST_RATIO * size):
        wrong = f"{real / 1e9:.1f} GB in {size / 1e6:.1f} MB"
    else:
        return
    raise DinoError(f"{path} is a decompression bomb: {wrong}", "get the images from a source that you trust")


def _check_readable(path: Path, member: zipfile.ZipInfo) -> None:
    if member.flag_bits & _ENCRYPTED:
        raise DinoError(
            f"{path} is encrypted: {member.filename} needs a password", f"unpack it: 7z x {path} -o{path.stem}"
        )
    if member.compress_type not in _METHODS:
        method = _NAMES.get(member.compress_type, f"method {member.compress_type}")
        raise DinoError(
            f"{path} compresses {member.filename} by {method}; expected store or deflate",
            f"unpack it: 7z x {path} -o{path.stem}",
        )


def _read_member(path: str, row: list[int], most: float) -> bytes:
    """Read a member by its row of the table; memory stays below `most` megabytes whatever the archive claims."""
    start, packed, size, checksum, method = row
    if max(size, packed) > most * 1e6:
        raise Refused(f"too large: {megabytes_over(max(size, packed), most)}")
    header = read_span(path, start, _HEADER)
    if not header.startswith(_SIGNATURE):
        raise Refused("damaged: the archive has no header where its directory states one")
    start += _HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    data = read_span(path, start, packed)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise Refused(f"damaged: {error}") from error
    if len(data) != size or zlib.crc32(data) != checksum:
        raise Refused("damaged: its size or checksum differs from the one in the archive")
    return data

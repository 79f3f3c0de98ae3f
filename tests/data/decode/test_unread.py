"""Names of formats that are not read."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage
from dinocli.data.decode.unread import name_unread

SIDES = bytes([0b1000111, 0]) + bytes(30)  # the first fields of a JPEG XL of 32 x 32 pixels


def jpeg(kind: int, bits: int) -> bytes:
    """Return a JPEG whose frame header states another kind or depth."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "JPEG")
    data = file.getvalue()
    at = data.index(b"\xff\xc0")
    return data[: at + 1] + bytes([kind]) + data[at + 2 : at + 4] + bytes([bits]) + data[at + 5 :]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypisom\0\0\0\0mp41avc1" + bytes(50), "a video (MP4 or QuickTime)"),
        (b"\x1a\x45\xdf\xa3" + bytes(50), "a video (Matroska or WebM)"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(50), "a video (AVI)"),
        (b"%PDF-1.7\n", "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"  <svg width='9'/>", "SVG"),
        (b"\x76\x2f\x31\x01" + bytes(50), "OpenEXR"),
        (b"#?RADIANCE\n", "Radiance HDR"),
        (b"8BPS\0\1" + bytes(50), "a Photoshop file of this kind"),
        (b"SIMPLE  =                    T", "FITS"),
        (b"PK\3\4" + bytes(50), "a ZIP archive"),
        (jpeg(0xC1, 12), "JPEG of 12 bits"),
        (jpeg(0xC3, 16), "lossless JPEG of 16 bits"),
        (jpeg(0xC3, 8), "lossless JPEG of 8 bits"),
        (jpeg(0xF7, 8), "JPEG-LS"),
    ],
)  # fmt: skip
def test_the_reason_names_the_format_and_how_to_convert_it(data: bytes, name: str) -> None:
    bad = decode(data)
    assert isinstance(bad, BadImage)
    assert bad.reason.startswith(f"not read here: {name}; ")


@pytest.mark.parametrize(
    ("data", "name", "extra"),
    [
        (b"\xff\x0a" + bytes(50), "JPEG XL", "jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL", "jxl"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "HEIC", "heic"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50), "HEIC", "heic"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf" + bytes(50), "HEIF", "heic"),
        (bytes(128) + b"DICM" + bytes(50), "DICOM", "medical"),
        (b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom" + bytes(50), "a camera's raw file", "raw"),
        (b"FUJIFILMCCD-RAW 0201", "a camera's raw file", "raw"),
        (
            b"II*\0\x10\0\0\0CR\2\0" + bytes(4) + struct.pack("<HHHIIHHIII", 2, 256, 3, 1, 9, 257, 3, 1, 9, 0),
            "a camera's raw file",
            "raw",
        ),
    ],
)
def test_the_reason_names_the_extra_that_reads_the_format(
    monkeypatch: pytest.MonkeyPatch, data: bytes, name: str, extra: str
) -> None:
    for package in ("pillow_heif", "imagecodecs", "pydicom", "rawpy"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    if name == "JPEG XL":
        data = data[:-50] + (b"\xff\x0a" + SIDES if data[:1] == b"\0" else SIDES)
        data = data.replace(b"\x87\n\xff", b"\x87\n\0\0\0\0jxlc\xff")
    assert decode(data) == BadImage(f"not read here: {name}; pip install 'dinocli[{extra}]'")


def test_files_that_are_not_images_are_named() -> None:
    assert name_unread(b"hello") == "not an image: unknown format"
    assert name_unread(b"version https://git-lfs.github.com/spec/v1\n").startswith("not an image: a Git LFS pointer")
    assert name_unread(b"<!DOCTYPE html><html>").startswith("not an image: an HTML page")
    assert name_unread(b"") == name_unread(b"\xff\xd8\xff") == "not an image: unknown format"

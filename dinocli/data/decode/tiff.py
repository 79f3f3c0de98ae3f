"""TIFF files: detection of layouts that Pillow misreads, which tifffile reads instead."""

from __future__ import annotations

import io
import logging
import struct
from importlib import import_module
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from dinocli.data.decode import jpeg2000
from dinocli.data.decode.bit_depth import Alpha, Colors, Layout, depth_range
from dinocli.data.decode.jpeg_header import find_frame
from dinocli.data.decode.raster import MISSING, ArrayFile, UnfitArray, other_channels
from dinocli.data.decode.raw import open_raw
from dinocli.data.decode.tiff_tags import ALPHAS, Facts, read_facts

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # otherwise it logs to stderr

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _INKED, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_GREYS = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, 4)  # 4 is a transparency mask
_UNASSOCIATED, _ASSOCIATED = 2, 1
_OLD_JPEG, _JPEG = 6, 7
_BY_PILLOW = {1, 5, 8, 32773, 32946, 34925, 50000}  # compressions that Pillow decodes as tifffile does, at any depth
_FAX = (2, 3, 4)
_JPEG2000, _PNG, _WEBP, _LERC = (33003, 33004, 33005, 34712), (34933,), (34927, 50001), (34887,)
_BY_TIFFFILE = {*_BY_PILLOW, *_FAX, _JPEG, *_JPEG2000, *_PNG, *_WEBP, *_LERC}
_TILE = 64e6  # bytes of a tile that are accepted for an image of any size
_PIECES = 50_000  # strips or tiles above which tifffile is faster than Pillow; a million are too slow for both


def open_tiff(data: bytes, channels: int) -> ArrayFile | Facts | None:
    """Read the header of a TIFF.

    Returns:
        The header; `Facts` if Pillow reads the file equally well; None for other and for corrupt files.

    Raises:
        UnfitArray: If the number of channels does not fit `channels`, or nothing here reads the layout.
    """
    facts = read_facts(data)
    if facts is None:
        return None
    if facts.raw:
        return open_raw(data, channels)
    if fault := _tile_fault(facts):
        raise UnfitArray(fault)
    by_pillow = _is_pillows(facts, channels)
    sparse, short = _pieces_missing(facts, len(data))
    if by_pillow and not sparse and not (len(facts.offsets) > _PIECES and _has_tifffile()):
        return facts
    layout = _layout(facts, channels)
    mixed = facts.photometric == _YCBCR and facts.compression not in (_JPEG, *_BY_PILLOW)
    if facts.compression not in _BY_TIFFFILE or facts.depth > 1 or mixed:
        raise UnfitArray(f"not read here: {facts.words}; rewrite it as one image with deflate")
    if short:
        raise EOFError("strips or tiles point beyond the end of the file")
    if len(facts.offsets) > 20 * _PIECES:
        raise UnfitArray(f"too slow: a TIFF of {len(facts.offsets)} pieces")
    if fault := _piece_fault(data, facts):
        raise UnfitArray(fault)
    return _open_with_tifffile(data, facts, layout)


def _is_pillows(facts: Facts, channels: int) -> bool:
    """Check that Pillow reads a layout as tifffile does; tests/data/decode/test_tiff.py compares the two."""
    if (facts.big and facts.order == ">") or (facts.fill_order != 1 and set(facts.bits) != {1}):
        return False
    if (facts.planar != 1 and facts.samples > 1) or len(set(facts.bits)) != 1 or len(facts.bits) != facts.samples:
        return False
    kind = facts.photometric, facts.samples, facts.bits[0]
    if facts.compression not in _BY_PILLOW:
        if facts.compression in _FAX:
            return kind[1:] == (1, 1)
        if facts.compression not in (_JPEG, _OLD_JPEG) or kind[2] != 8:
            return False
    if facts.compression in (1, 32773) and facts.predictor != 1:
        return False
    if facts.samples == 1:
        return _is_pillows_single(facts)
    extra = facts.extra or ()
    if facts.format != 1 or kind[2] != 8:
        return False
    return (
        kind[:2] in ((_RGB, 3), (_LAB, 3))
        or (kind[:2] == (_YCBCR, 3) and facts.compression in (_JPEG, _OLD_JPEG))
        or (
            kind[:2] == (_RGB, 4)
            and (extra in ((), (_UNASSOCIATED,)) or (channels in (1, 3) and extra in ((0,), (_ASSOCIATED,))))
        )
        or (kind[:2] == (_BLACK_IS_ZERO, 2) and extra == (_UNASSOCIATED,))
        or (kind[:2] == (_INKED, 4) and facts.inks == 1 and not extra)
    )


def _is_pillows_single(facts: Facts) -> bool:
    bits, plain = facts.bits[0], facts.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
    little = facts.order == "<"
    if facts.format == 1 and bits in (1, 2, 4, 8):
        return plain or facts.photometric == _PALETTE
    if facts.format == 1 and bits == 16:
        return facts.photometric == _BLACK_IS_ZERO or (little and facts.photometric == _WHITE_IS_ZERO)
    native = little or facts.compression == 1  # otherwise Pillow swaps the bytes once too often
    if facts.format == 1 and bits == 32:
        return little and facts.photometric == _BLACK_IS_ZERO
    if facts.format == 2 and bits in (16, 32):
        return native and facts.photometric == _BLACK_IS_ZERO
    return facts.format == 3 and bits == 32 and native and plain


def _layout(facts: Facts, channels: int) -> Layout:
    """Return the meaning of the bands. For `channels` other than 1 and 3, all bands stay unconverted."""
    samples, kind, first = facts.samples, facts.photometric, facts.bits[0] if facts.bits else 1
    even = facts.format == 1 and first < 32 and len(set(facts.bits)) == 1
    stated = depth_range(first, facts.highest if first == 16 else None) if even else None
    grey = kind in _GREYS
    if channels not in (1, 3):
        inks = " (CMYK)" if kind == _INKED and samples == 4 and facts.inks == 1 else ""
        if samples != channels or inks or kind == _PALETTE:
            raise UnfitArray(other_channels(f"{samples}{inks}{' (a palette)' if kind == _PALETTE else ''}", channels))
    if kind == _WHITE_IS_ZERO and (samples > 2 or (samples == 2 and not facts.alpha) or channels == 2):
        raise UnfitArray(f"not read here: {facts.words}; rewrite it with photometric minisblack")
    if channels not in (1, 3):
        return Layout("bands", stated, guessed=first == 16)
    colors, alpha = _colors_and_alpha(facts)
    if not colors and (grey or kind == _RGB or samples not in (1, 3, 4)):
        raise UnfitArray(other_channels(f"{samples}", channels))
    if not colors:
        raise UnfitArray(f"not read here: {facts.words}; convert it to RGB")
    palette = facts.colors if kind == _PALETTE else None
    return Layout(colors, stated, alpha, inverted=kind == _WHITE_IS_ZERO, palette=palette, guessed=first == 16)


def _colors_and_alpha(facts: Facts) -> tuple[Colors, Alpha]:
    """Return the meaning of the color bands and of the band after them; empty if they cannot become RGB."""
    samples, kind, alpha = facts.samples, facts.photometric, facts.alpha
    alone = samples == 1 or (samples == 2 and alpha != "")
    if kind in _GREYS and alone:
        return "gray", alpha
    if kind in _GREYS and not alpha and samples == 3:  # measurements: three bands count as RGB, in order
        return "rgb", ""
    if kind in _GREYS and not alpha and samples == 4:
        alpha = ALPHAS.get((facts.extra or ())[2:3], "")
        return ("rgb" if alpha else ""), alpha
    if kind == _RGB and samples in (3, 4):
        return "rgb", "straight" if samples == 4 and facts.extra is None else alpha
    if kind == _PALETTE and facts.colors is not None and alone:
        return "rgb", alpha
    if kind == _INKED and samples == 4 and facts.inks == 1:
        return "cmyk", ""
    if kind == _YCBCR and samples == 3 and facts.compression == _JPEG:  # tifffile converts it to RGB
        return "rgb", ""
    # tifffile does not read subsampled chroma.
    return ("ycbcr", "") if (kind, samples, facts.subsampling) == (_YCBCR, 3, (1, 1)) else ("", "")


def _pieces_missing(facts: Facts, size: int) -> tuple[bool, bool]:
    """Check for empty strips or tiles, as in sparse files, and for those beyond the end of the file."""
    few = min(len(facts.offsets), len(facts.counts))
    offsets, counts = facts.offsets[:few], facts.counts[:few]
    empty = (offsets == 0) | (counts == 0)
    return bool(empty.any()), bool((offsets + counts)[~empty].max(initial=0) > size or (offsets < 0).any())


def _tile_fault(facts: Facts) -> str:
    """Return the fault of tiles far larger than their image; empty if there is none."""
    values = facts.samples * max(facts.bits, default=1) / 8
    if facts.piece[0] * facts.piece[1] * values <= max(_TILE, 4 * facts.width * facts.height * values):
        return ""
    tile, size = ("x".join(map(str, each)) for each in (facts.piece, (facts.width, facts.height)))
    return f"too large: tiles of {tile} pixels in a TIFF of {size}"


def _piece_fault(data: bytes, facts: Facts) -> str:
    """Return the fault of a strip or tile whose own header states a wrong size; empty if there is none."""
    kind = facts.compression
    if kind not in (_JPEG, *_JPEG2000, *_PNG, *_WEBP, *_LERC):
        return ""
    room = -(-facts.piece[0] // 16) * -(-facts.piece[1] // 16) * 256  # JPEGs may be padded to their blocks
    for offset, count in zip(facts.offsets.tolist(), facts.counts.tolist(), strict=False):
        if piece := data[offset : offset + count]:
            width, height, bands = _size_of(piece, kind)
            if not 0 < width * height <= room or bands > max(4, facts.samples):
                return (
                    f"damaged: a piece of {width}x{height} pixels in a TIFF; expected {facts.piece[0]}x{facts.piece[1]}"
                )
    return ""


def _size_of(piece: bytes, kind: int) -> tuple[int, int, int]:
    """Return width, height and bands from the header of an image within a TIFF; zeros if unknown."""
    if kind == _JPEG:
        frame = find_frame(piece)
        return (frame.width, frame.height, frame.bands) if frame else (0, 0, 0)
    if kind in _JPEG2000:
        header = jpeg2000.read_header(piece)
        return (header.width, header.height, len(header.bits)) if header else (0, 0, 0)
    if kind in _LERC:
        version = piece[6] if piece[:6] == b"Lerc2 " and len(piece) > 26 else 0
        height, width, depth = struct.unpack_from("<III", piece, 14 if version > 2 else 10) if version else (0, 0, 0)
        return width, height, depth if version > 3 else 1
    try:
        return *Image.open(io.BytesIO(piece), formats=("PNG", "WEBP")).size, 1
    except Exception:  # corrupt files raise nearly any exception
        return 0, 0, 0


def _has_tifffile() -> bool:
    try:
        import_module("tifffile")
    except ImportError:
        return False
    return True


def _open_with_tifffile(data: bytes, facts: Facts, layout: Layout) -> ArrayFile:
    if not _has_tifffile():
        raise UnfitArray(f"not read here: {facts.words} {MISSING}")
    tifffile = import_module("tifffile")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        height, width, axes, dtype = int(page.imagelength), int(page.imagewidth), str(page.axes), page.dtype
    if axes not in ("YX", "YXS", "SYX") or dtype is None or dtype.kind not in "buif":
        raise UnfitArray(f"not read here: {facts.words}; rewrite it with 8, 16 or 32 bits")

    def read() -> NDArray[Any]:
        try:
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                values: NDArray[Any] = file.pages[0].asarray(maxworkers=1)
        except (ValueError, ImportError) as error:
            if "imagecodecs" in str(error):
                raise UnfitArray(f"not read here: {facts.words} {MISSING}") from error
            raise
        if axes == "YX":
            return values[..., None]
        return values if axes == "YXS" else values.transpose(1, 2, 0)

    turn = facts.orientation if 1 <= facts.orientation <= 8 else 1
    return ArrayFile("TIFF", height, width, facts.samples, dtype, layout, read, turn, facts.pages)

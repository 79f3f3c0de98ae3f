"""Pictures: maps in color, masks over photos, sheets of tiles with captions, and contact sheets of photos."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dinocli.core.atomic import atomic
from dinocli.data.decode.pixels import Pixels

SHEET_ROWS = 20  # rows of a contact sheet on disk
_PAPER, _INK, _PALE = (255, 255, 255), (40, 40, 40), (200, 200, 200)
_SIDE, _GAP, _LINE = 144, 6, 16  # pixels, in a contact sheet
# Largest photo in a sheet. A sheet has two rows of up to 14 tiles, and viewers fail to open one of larger photos.
_PANEL_PIXELS = 4_000_000
_COLUMNS = 8  # tiles side by side
_TILE_SIDE = 160  # pixels; captions of smaller tiles overlap

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """Picture [H, W, 3] with a caption below it."""

    pixels: Pixels
    caption: str


def heat(
    values: NDArray[np.floating],
    height: int,
    width: int,
    scale: tuple[float, float] | None = None,
    margins: tuple[float, float] = (0.0, 0.0),
) -> Pixels:
    """Draw a map in color at a photo's size. [H, W, 3]

    Args:
        values: Map to draw. [rows, columns]
        height: Height of the photo, in pixels.
        width: Width of the photo, in pixels.
        scale: Values of black and yellow. If None, the lowest and highest value.
        margins: Share of the height, and of the width, beyond the map at each end, where its edge is repeated.
    """
    from matplotlib import colormaps  # only here: training draws no map before its first report

    low, high = scale or (float(values.min()), float(values.max()))
    small = Image.fromarray(((values - low) / ((high - low) or 1.0)).astype(np.float32))
    inner = [max(1, round(side * (1 - 2 * margin))) for side, margin in zip((height, width), margins, strict=True)]
    large = np.clip(np.asarray(small.resize((inner[1], inner[0]), Image.Resampling.BICUBIC)), 0, 1)
    (top, left), (below, right) = (
        [(outer - own + more) // 2 for outer, own in zip((height, width), inner, strict=True)] for more in (0, 1)
    )
    large = np.pad(large, [(top, below), (left, right)], mode="edge")
    return (colormaps["inferno"](large)[..., :3] * 255 + 0.5).astype(np.uint8)


def visible(pixels: Pixels) -> Pixels:
    """Return the first three channels as colors, or the first one as gray. [H, W, C] -> [H, W, 3]"""
    colors = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, -1)
    return np.ascontiguousarray(colors)


def spotlight(pixels: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """Draw everything outside a mask in pale gray. [H, W, 3], [H, W] -> [H, W, 3]"""
    gray = pixels @ np.array([0.299, 0.587, 0.114])
    pale = (170 + gray * 0.3).astype(np.uint8)[..., None]
    return np.where(mask[..., None], pixels, pale)


def bounded(pixels: Pixels, blocks: int = 1) -> Pixels:
    """Enlarge a tiny photo, so that captions fit, and reduce a huge one, so that viewers can open the sheet.

    Args:
        pixels: Photo. [H, W, 3]
        blocks: Number of blocks in the sheet; each shows the photo.
    """
    most = _PANEL_PIXELS / blocks
    height, width = pixels.shape[:2]
    if min(height, width) < _TILE_SIDE:
        repeats = min(-(-_TILE_SIDE // min(height, width)), max(1, int((most / (height * width)) ** 0.5)))
        return np.repeat(np.repeat(pixels, repeats, 0), repeats, 1)
    factor = (most / (height * width)) ** 0.5
    if factor >= 1:
        return pixels
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def outline(pixels: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """Draw a line along the inner edge of a mask, white beside black, visible on any color. [H, W, 3]"""
    drawn = pixels.copy()
    drawn[inner_edge(mask, 2)] = _INK
    drawn[inner_edge(mask)] = _PAPER
    return drawn


def inner_edge(mask: NDArray[np.bool_], lines: int = 1) -> NDArray[np.bool_]:
    """Return the pixels of a mask within `lines` lines of its edge; lines are thicker in larger photos. [H, W]"""
    return mask & ~_erode(mask, lines * max(1, min(mask.shape) // 200))


def _erode(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """Erode a mask by a number of pixels, but not at the photo's border."""
    for _ in range(by):
        padded = np.pad(mask, 1, constant_values=True)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def palette(count: int) -> NDArray[np.uint8]:
    """Return distinguishable colors, the first one gray. [count, 3]"""
    colors = [(110, 110, 110)] + [
        tuple(round(255 * part) for part in hsv_to_rgb(i * 0.382 % 1, 0.85 - 0.3 * (i % 3 == 2), 1 - 0.35 * (i % 2)))
        for i in range(count - 1)
    ]
    return np.array(colors[:count], dtype=np.uint8)


def tinted(pixels: Pixels, classes: NDArray[np.uint8], colors: NDArray[np.uint8], share: float = 0.6) -> Pixels:
    """Blend a photo with its class colors, whose weight is `share`. [H, W, 3], [H, W], [K, 3] -> [H, W, 3]"""
    return ((1 - share) * pixels + share * colors[classes]).round().astype(np.uint8)


def legend(pixels: Pixels, entries: Sequence[tuple[str, NDArray[np.uint8]]]) -> Pixels:
    """Draw names beside their colors in the upper left corner of a photo. [H, W, 3]"""
    line = max(12, round(min(pixels.shape[:2]) / 16))
    font = ImageFont.load_default(size=line * 0.8)
    page = Image.fromarray(pixels)
    pen = ImageDraw.Draw(page)
    for i, (name, color) in enumerate(entries[: max(1, page.height // line - 1)]):
        top = line * (i + 0.5)
        box = (line * 0.5, top, line * 2 + font.getlength(name), top + line)
        pen.rectangle(box, fill=_PAPER)
        pen.rectangle((box[0] + 3, top + 3, box[0] + line - 3, top + line - 3), fill=tuple(color.tolist()))
        pen.text((box[0] + line, top + line / 2), name, _INK, font, anchor="lm")
    return np.asarray(page)


def sheet(rows: Sequence[Sequence[Tile | None]]) -> Image.Image:
    """Arrange tiles of one size in rows; None stays empty."""
    height, width = next(tile for row in rows for tile in row if tile).pixels.shape[:2]
    gap = max(4, min(height, width) // 40)
    line = max(12, round(min(height, width) / 14))
    font = ImageFont.load_default(size=line * 0.8)
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (gap + columns * (width + gap), gap + len(rows) * (height + line + gap)), _PAPER)
    pen = ImageDraw.Draw(page)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            if tile:
                left, top = gap + c * (width + gap), gap + r * (height + line + gap)
                page.paste(Image.fromarray(tile.pixels), (left, top))
                pen.text((left + width / 2, top + height + line * 0.55), tile.caption, _INK, font, anchor="mm")
    return page


def block_sheet(blocks: Sequence[tuple[str, Sequence[Sequence[Tile | None]]]]) -> Image.Image:
    """Arrange blocks of tiles below each other, all with the same columns.

    More than eight columns per block are wrapped at the same column in all blocks, so that the sheet fits a screen.

    Args:
        blocks: Title of each block, or an empty string, and its lines of tiles of one size; None stays empty.
    """
    length = max(len(line) for _, lines in blocks for line in lines)
    columns = -(-length // -(-length // (_COLUMNS * len(blocks))))  # as even as possible
    pages = []
    for title, lines in blocks:
        padded = [[*line, *[None] * (length - len(line))] for line in lines]
        page = sheet([line[first : first + columns] for first in range(0, length, columns) for line in padded])
        pages.append(_add_title(title, page, padded) if title else page)
    joined = Image.new("RGB", (pages[0].width, sum(page.height for page in pages)), _PAPER)
    for i, page in enumerate(pages):
        joined.paste(page, (0, sum(above.height for above in pages[:i])))
    return joined


def _add_title(title: str, page: Image.Image, lines: Sequence[Sequence[Tile | None]]) -> Image.Image:
    """Add a line with a title above a page, larger than the captions of its tiles."""
    line = max(16, round(min(next(tile for row in lines for tile in row if tile).pixels.shape[:2]) / 9))
    font = ImageFont.load_default(size=line * 0.7)
    titled = Image.new("RGB", (page.width, page.height + line), _PAPER)
    titled.paste(page, (0, line))
    words = _shorten(title, font, page.width - 2 * _GAP)
    ImageDraw.Draw(titled).text((_GAP, line * 0.55), words, _INK, font, anchor="lm")
    return titled


def contact_sheet(
    rows: Sequence[Sequence[Tile | str | None]], *, title: str = "", lead: int = 0, side: int = _SIDE
) -> Image.Image:
    """Arrange photos of any shape in a grid of squares, each scaled to fit, with its caption below.

    Args:
        rows: Content of each cell: a photo, the reason for a missing photo, or None.
        title: Line above the grid, cut if it is too long.
        lead: Number of leading columns, such as queries, which a line separates from the others.
        side: Side of a square, in pixels.
    """
    font = ImageFont.load_default(size=_LINE * 0.8)
    columns = max(len(row) for row in rows)
    tiles = [cell for row in rows for cell in row if isinstance(cell, Tile)]
    lines = max((tile.caption.count("\n") + 1 for tile in tiles if tile.caption), default=0)
    top = 2 * _LINE if title else _GAP
    pitch = side + lines * _LINE + _GAP
    lefts = [_GAP + c * (side + _GAP) + (2 * _GAP if lead and c >= lead else 0) for c in range(columns)]
    page = Image.new("RGB", (lefts[-1] + side + _GAP, top + len(rows) * pitch), _PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((_GAP, _LINE), _shorten(title, font, page.width - 2 * _GAP), _INK, font, anchor="lm")
    if 0 < lead < columns:
        pen.line([(lefts[lead] - 1.5 * _GAP, top), (lefts[lead] - 1.5 * _GAP, page.height - _GAP)], _PALE)
    for r, row in enumerate(rows):
        for left, cell in zip(lefts, row, strict=False):
            if cell is not None:
                _draw_cell(page, pen, cell, left, top + r * pitch, side, font)
    return page


def write_contact_sheets(
    rows: Sequence[Sequence[Tile | str | None]], out: Path, title: str, *, lead: int = 0, side: int = _SIDE
) -> list[Path]:
    """Write contact sheets of at most 20 rows; the suffix `.jpg` selects JPEG, any other PNG. Return their paths.

    Args:
        rows: Content of each cell, as for `contact_sheet`.
        out: Path of the first sheet; further ones get a number.
        title: Line above each sheet.
        lead: Number of leading columns that a line separates.
        side: Side of a square, in pixels.
    """
    written = []
    for first in range(0, len(rows), SHEET_ROWS):
        path = sheet_page(out, first // SHEET_ROWS + 1)
        with atomic(path) as draft:
            drawn = contact_sheet(rows[first : first + SHEET_ROWS], title=title, lead=lead, side=side)
            drawn.save(draft, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=85)
        written.append(path)
    return written


def sheet_page(out: Path, number: int) -> Path:
    """Return the path of a contact sheet, by its number from 1."""
    return out if number == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")


def _draw_cell(
    page: Image.Image, pen: ImageDraw.ImageDraw, cell: Tile | str, left: int, top: int, side: int, font: Font
) -> None:
    if isinstance(cell, str):
        pen.rectangle((left, top, left + side - 1, top + side - 1), outline=_PALE)
        text = "\n".join(_shorten(line, font, side - 2 * _GAP) for line in cell.split("\n"))
        pen.multiline_text((left + side / 2, top + side / 2), text, _INK, font, anchor="mm", align="center")
        return
    photo = fitted(cell.pixels, side)
    height, width = photo.shape[:2]
    page.paste(Image.fromarray(photo), (left + (side - width) // 2, top + (side - height) // 2))
    for i, line in enumerate(cell.caption.split("\n")):
        middle = (left + side / 2, top + side + (i + 0.55) * _LINE)
        pen.text(middle, _shorten(line, font, side), _INK, font, anchor="mm")


def fitted(pixels: Pixels, side: int) -> Pixels:
    """Scale a photo to fit into a square, enlarging a small one. [H, W, C] -> [<= side, <= side, 3]"""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pixels of a tiny photo are enlarged to squares, not blurred.
    resampling = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(visible(pixels)).resize(size, resampling))


def _shorten(text: str, font: Font, width: float) -> str:
    """Cut the start of a text to fit a width: the end of a path matters most."""
    text = text.encode("utf-8", "replace").decode()  # file names may hold any bytes
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text

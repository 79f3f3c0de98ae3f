"""Segmentation pictures: sheets of foregrounds or classes, masks, and sheets of patch colors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinocli.apps.segment.colors import Colors
from dinocli.apps.segment.edges import refine
from dinocli.apps.segment.foreground import By, foreground
from dinocli.apps.segment.linear_head import SegmentationHead
from dinocli.core.atomic import atomic
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.sources.photos import read_photo
from dinocli.evals.attention import enlarge
from dinocli.features.encoder import Encoder, NotFinite
from dinocli.viz.picture import (
    Tile,
    bounded,
    contact_sheet,
    heat,
    legend,
    outline,
    palette,
    sheet,
    spotlight,
    tinted,
    visible,
)

_ACROSS, _DOWN, _SIDE = 6, 4, 240  # photos per row and rows per sheet of colors, and pixels per side of each
_NAMED = 0.01  # smallest share of the photo for a class in the legend


@dataclass(frozen=True)
class Segmented:
    """Files written for a photo.

    Attributes:
        image: Path of the photo.
        picture: Path of the sheet.
        mask: Path of the mask, or None.
        shares: Share of the photo per class, or of the foreground alone.
    """

    image: Path
    picture: Path
    mask: Path | None
    shares: dict[str, float]


_CAPTIONS: dict[By, str] = {
    "attention": "attention, mean of heads",
    "cut": "eigenvector of the cut",
    "border": "distance from the border's features",
}


def draw_foreground(
    encoder: Encoder, image: Path, name: Path, *, by: By, keep: float, tau: float, short_side: int, masks: bool
) -> Segmented | str:
    """Write the sheet of a photo's foreground, or return the reason why the photo cannot be read.

    Args:
        encoder: Frozen encoder.
        image: Path of the photo.
        name: Path of the output files, without a suffix.
        by: Method of `foreground`.
        keep: Share of the attention that the foreground holds.
        tau: Cosine threshold of the cut.
        short_side: Short side in pixels after resizing.
        masks: If True, also write the mask at the photo's size, 0 and 255.
    """
    pixels = read_photo(image, encoder.images)
    if isinstance(pixels, BadImage):
        return pixels.reason
    try:
        result = foreground(encoder, pixels, short_side, by, keep=keep, tau=tau)
    except NotFinite as error:
        return error.reason
    mask = refine(result.mask, visible(pixels))
    shown = bounded(visible(pixels))
    height, width = shown.shape[:2]
    large = enlarge(mask, height, width).astype(bool)
    caption = _CAPTIONS[by]
    row = [
        Tile(shown, "photo"),
        Tile(heat(result.values, height, width), caption),
        Tile(outline(spotlight(shown, large), large), f"foreground, {mask.mean():.0%}"),
    ]
    picture = _save(sheet([row]), name, ".png")
    return Segmented(
        image,
        picture,
        _save(Image.fromarray(mask.astype(np.uint8) * 255), name, "-mask.png") if masks else None,
        {"foreground": float(mask.mean())},
    )


def draw_classes(
    encoder: Encoder, head: SegmentationHead, image: Path, name: Path, *, short_side: int | None, masks: bool
) -> Segmented | str:
    """Write the sheet of a photo's classes, or return the reason why the photo cannot be read.

    Args:
        encoder: Frozen encoder.
        head: Segmentation head.
        image: Path of the photo.
        name: Path of the output files, without a suffix.
        short_side: Short side in pixels after resizing. If None, the head's training size.
        masks: If True, also write the mask of class numbers.
    """
    pixels = read_photo(image, encoder.images)
    if isinstance(pixels, BadImage):
        return pixels.reason
    try:
        classes = head.classify(encoder, pixels, short_side)
    except NotFinite as error:
        return error.reason
    colors = palette(len(head.classes))
    shares = np.bincount(classes.ravel(), minlength=len(head.classes)) / classes.size
    shown = bounded(visible(pixels))
    large = enlarge(classes, *shown.shape[:2]).astype(np.uint8)
    named = [(head.classes[i], colors[i]) for i in np.argsort(-shares) if shares[i] >= _NAMED]
    row = [Tile(shown, "photo"), Tile(legend(tinted(shown, large, colors), named), "classes")]
    picture = _save(sheet([row]), name, ".png")
    return Segmented(
        image,
        picture,
        _save(_make_index_image(classes, colors), name, "-mask.png") if masks else None,
        {head.classes[i]: float(shares[i]) for i in np.flatnonzero(shares)},
    )


def draw_colors(
    encoder: Encoder,
    colors: Colors,
    photos: Sequence[Path],
    folder: Path,
    *,
    short_side: int,
    report: Callable[[int], None] = lambda done: None,
) -> tuple[list[Path], dict[Path, str]]:
    """Write sheets of 24 photos with their patch colors below; one full photo is in memory at a time.

    Args:
        encoder: Frozen encoder.
        colors: Mapping from patches to colors.
        photos: Photo files in display order.
        folder: Folder for `pca.png`, `pca-2.png` and so on.
        short_side: Short side in pixels after resizing.
        report: Callback after each photo, with the number done.

    Returns:
        Paths of the sheets; unreadable photos, with reasons.
    """
    skipped: dict[Path, str] = {}
    pages: list[Path] = []
    painted = _paint(encoder, colors, photos, short_side, skipped, report)
    while block := list(islice(painted, _ACROSS * _DOWN)):
        rows: list[list[Tile]] = []
        for first in range(0, len(block), _ACROSS):
            rows += [list(row) for row in zip(*block[first : first + _ACROSS], strict=True)]
        name = folder / (f"pca-{len(pages) + 1}" if pages else "pca")
        pages.append(_save(contact_sheet(rows, side=_SIDE), name, ".png"))
    return pages, skipped


def _paint(
    encoder: Encoder,
    colors: Colors,
    photos: Sequence[Path],
    short_side: int,
    skipped: dict[Path, str],
    report: Callable[[int], None],
) -> Iterator[tuple[Tile, Tile]]:
    """Yield each readable photo at small size, and its patch colors."""
    for done, path in enumerate(photos, 1):
        pixels = read_photo(path, encoder.images)
        if isinstance(pixels, BadImage):
            skipped[path] = pixels.reason
        elif isinstance(tokens := _encode(encoder, pixels, short_side), BadImage):
            skipped[path] = tokens.reason
        else:
            scale = _SIDE / max(pixels.shape[:2])
            size = (max(1, round(pixels.shape[0] * scale)), max(1, round(pixels.shape[1] * scale)))
            yield Tile(_resize(visible(pixels), size), ""), Tile(colors.paint(tokens, *size), "")
        report(done)


def _encode(encoder: Encoder, pixels: Pixels, short_side: int) -> Tensor | BadImage:
    try:
        return encoder.patches(encoder.photo(pixels, short_side))[0]
    except NotFinite as lost:
        return BadImage(lost.reason)


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS))


def _make_index_image(classes: NDArray[np.uint8], colors: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(classes)  # mode L, which a palette turns into P
    image.putpalette(colors.ravel().tolist())
    return image


def _save(image: Image.Image, name: Path, end: str) -> Path:
    path = name.with_name(name.name + end)
    with atomic(path) as draft:
        image.save(draft, format="PNG")
    return path

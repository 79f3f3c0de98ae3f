"""Pictures of detection: the map of each photo, a contact sheet of the most anomalous ones, and the table of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.apps.anomaly.bank import Bank
from dinocli.apps.anomaly.detect import Scored, enlarged
from dinocli.core import tables
from dinocli.core.atomic import atomic
from dinocli.core.errors import DinoError
from dinocli.core.tables import first_line
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.parts import read_image
from dinocli.data.sources.photos import display_pixels
from dinocli.data.sources.regular import why_unread
from dinocli.viz.picture import Tile, bounded, fitted, heat, outline, visible, write_contact_sheets

SHOWN = 40  # photos in the contact sheet
_PAIRS = 5  # photos per row, each with its map
_SIDE = 144  # pixels per side of a tile
_FACTOR = 3  # a scale's least upper end, as a multiple of the usual distance
_COLUMNS = ("image", "score", "above_normal", "label")


def scale_of(bank: Bank, photos: Sequence[Scored]) -> tuple[float, float]:
    """Return the distances of black and yellow, the same for all photos: the usual and the largest one.

    The upper end is at least three times the usual distance, so that photos without anomalies stay dark.
    """
    largest = max(float(one.distances.max()) for one in photos)
    return bank.usual, max(largest, _FACTOR * bank.usual, bank.usual + 1e-6)


def draw_map(one: Scored, path: Path, scale: tuple[float, float], images: ImagesConfig) -> None:
    """Write the map of a photo over the photo, as a PNG of the photo's shape."""
    pixels = _read(one, None, images)
    if isinstance(pixels, BadImage):  # deleted since it was scored
        return
    from PIL import Image

    with atomic(path) as draft:
        Image.fromarray(overlay(bounded(visible(pixels)), one, scale)).save(draft, format="PNG")


def draw_sheet(
    ranked: Sequence[Scored],
    labels: Mapping[str, str],
    masks: Mapping[str, NDArray[np.bool_]],
    out: Path,
    scale: tuple[float, float],
    images: ImagesConfig,
) -> None:
    """Draw the photos with the highest scores, each beside its map.

    Args:
        ranked: Photos compared with a bank, the highest score first; `SHOWN` are drawn.
        labels: Label by photo, for the captions.
        masks: Mask of defects by photo, drawn as an outline. [h, w]
        out: Path of the sheet.
        scale: Distances of black and yellow.
        images: Settings and limits of image decoding.
    """
    cells: list[list[Tile | str | None]] = [_draw_pair(one, labels, masks, scale, images) for one in ranked[:SHOWN]]
    rows = [list(chain(*cells[first : first + _PAIRS])) for first in range(0, len(cells), _PAIRS)]
    title = "highest scores first: the photo, and the distances of its patches to those of normal photos"
    write_contact_sheets(rows, out, title, side=_SIDE)


def overlay(pixels: Pixels, one: Scored, scale: tuple[float, float]) -> Pixels:
    """Blend a photo, in gray, with its map: the larger the distance, the stronger the color. [H, W, 3]"""
    height, width = pixels.shape[:2]
    gray = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    low, high = scale
    share = np.clip((enlarged(one.distances, height, width) - low) / (high - low), 0, 1)[..., None] ** 0.5
    colors = heat(one.distances, height, width, scale)
    return ((1 - share) * gray + share * colors).round().astype(np.uint8)


def check_table_file(path: Path) -> None:
    """Check that the table would replace no other file.

    Raises:
        DinoError: If the path is a file without the columns of `write_table`.
    """
    if path.is_file() and not first_line(path).startswith(",".join(_COLUMNS).encode()):
        raise DinoError(f"{path} exists and holds no scores; it would be overwritten", "use another --out")


def write_table(path: Path, ranked: Sequence[Scored], labels: Mapping[str, str]) -> None:
    """Write a CSV file with the score of each photo, in this order, and the percent of normal photos below it."""
    rows = ((one.image, f"{one.score:.6f}", f"{one.percentile:.1f}", labels.get(one.image, "")) for one in ranked)
    tables.write_table(path, _COLUMNS, rows)


def _draw_pair(
    one: Scored,
    labels: Mapping[str, str],
    masks: Mapping[str, NDArray[np.bool_]],
    scale: tuple[float, float],
    images: ImagesConfig,
) -> list[Tile | str | None]:
    name = Path(one.image).name
    pixels = _read(one, _SIDE, images)
    if isinstance(pixels, BadImage):
        return [f"{pixels.reason.partition(':')[0]}\n{name}", None]
    photo = fitted(pixels, _SIDE)
    drawn = overlay(photo, one, scale)
    if one.image in masks:
        mask = masks[one.image]
        rows, columns = (np.arange(new) * old // new for new, old in zip(photo.shape[:2], mask.shape, strict=True))
        photo = outline(photo, mask[rows[:, None], columns])
    label = labels.get(one.image, "")
    return [
        Tile(photo, f"{one.score:.3f} {label}\n{name}"),
        Tile(drawn, f"above {one.percentile:.0f} %\nof normal photos"),
    ]


def _read(one: Scored, side: int | None, images: ImagesConfig) -> Pixels | BadImage:
    """Read a photo, reduced to no less than `side` pixels if given. [H, W, C]"""
    try:
        return display_pixels(read_image(one.image, images), side or 2**15, images)
    except OSError as error:  # deleted since it was scored
        return BadImage(why_unread(error))

"""Contact sheets of classified photos: one row per class, with the least certain photos first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dinocli.apps.classify.classify import Classified
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.parts import read_image
from dinocli.data.sources.photos import display_pixels
from dinocli.data.sources.regular import why_unread
from dinocli.viz.picture import SHEET_ROWS, Tile, write_contact_sheets

PHOTOS = 10  # photos per row
PAGES = 10  # sheets; more classes are not drawn
_SIDE = 144  # pixels per side of a photo


def draw_classes(groups: Mapping[str, Sequence[Classified]], out: Path, images: ImagesConfig = DEFAULTS) -> list[Path]:
    """Draw the least certain photos of each class, with their confidence.

    Args:
        groups: Photos by class, the least certain first; see `by_class`. At most 200 classes are drawn.
        out: Path of the first sheet; further ones get a number.
        images: Settings and limits of image decoding.

    Returns:
        Paths of the sheets.
    """
    rows: list[list[Tile | str | None]] = []
    for label, found in list(groups.items())[: PAGES * SHEET_ROWS]:
        several = "image" if len(found) == 1 else "images"
        rows.append([f"{label}\n{len(found)} {several}", *(_draw(one, images) for one in found[:PHOTOS])])
    title = "images by predicted class, the least certain first, with their confidence"
    return write_contact_sheets(rows, out, title, lead=1, side=_SIDE)


def _draw(one: Classified, images: ImagesConfig) -> Tile | str:
    path = Path(one.image)
    try:
        pixels = display_pixels(read_image(path, images), _SIDE, images)
    except OSError as error:  # deleted since it was classified
        pixels = BadImage(why_unread(error))
    if isinstance(pixels, BadImage):
        return f"{pixels.reason.partition(':')[0]}\n{path.name}"
    return Tile(pixels, f"{100 * one.best.confidence:.1f} %\n{path.name}")

"""Gallery pictures: search results and near-duplicates as contact sheets on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinocli.apps.search.dedup import Group
from dinocli.apps.search.search import Hits
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.parts import read_image
from dinocli.data.sources.photos import display_pixels
from dinocli.features.gallery import Gallery
from dinocli.viz.picture import SHEET_ROWS, Tile, sheet_page, write_contact_sheets

SHOWN = 10  # results per row
_SIDE = 144  # pixels per side of a photo

Place = Tile | str | None


def draw_hits(
    gallery: Gallery, hits: Sequence[Hits], out: Path, images: ImagesConfig = DEFAULTS
) -> tuple[list[Path], dict[str, str]]:
    """Draw sheets with one query per row, followed by its neighbours and their cosines.

    Args:
        gallery: Gallery that was searched.
        hits: Search results per query.
        out: Path of the first sheet; further ones get a number.
        images: Settings and limits of image decoding.

    Returns:
        Paths of the sheets, and the reason of each result that cannot be shown.
    """
    rows: list[list[Place]] = []
    unread: dict[str, str] = {}
    for hit in hits:
        row = [_draw_query(Path(hit.query), images)]
        for neighbour in hit.neighbours[:SHOWN]:
            pixels = gallery.photo(neighbour.row, _SIDE, images)
            if isinstance(pixels, BadImage):
                unread[neighbour.image] = pixels.reason
            row.append(
                _make_cell(pixels, neighbour.image, f"{neighbour.cosine:.4f}\n{neighbour.label or neighbour.image}")
            )
        rows.append(row)
    return write_contact_sheets(rows, out, f"photo, and its nearest of {len(gallery)} images by cosine", lead=1), unread


def draw_groups(
    gallery: Gallery, groups: Sequence[Group], out: Path, pages: int, images: ImagesConfig = DEFAULTS
) -> list[Path]:
    """Draw sheets with one group of near-duplicates per row: the kept image, followed by the dropped ones.

    Args:
        gallery: Gallery of the images.
        groups: Groups in display order.
        out: Path of the first sheet; further ones get a number.
        pages: Largest number of sheets.
        images: Settings and limits of image decoding.

    Returns:
        Paths of the sheets; surplus sheets of an earlier call are deleted.
    """
    rows: list[list[Place]] = []
    for group in groups[: pages * SHEET_ROWS]:
        kept = _draw_image(gallery, group.kept, f"kept\n{gallery.name(group.kept)}", images)
        shown = list(zip(group.dropped, group.cosines, strict=True))[:SHOWN]
        dropped = [_draw_image(gallery, row, f"{cosine:.4f}\n{gallery.name(row)}", images) for row, cosine in shown]
        more = len(group.dropped) - len(shown)
        rows.append([kept, *dropped, f"and {more} more" if more else None])
    written = write_contact_sheets(
        rows, out, "kept image, and dropped images with their cosine to the nearest of the group", lead=1
    )
    number = len(written) + 1
    while (old := sheet_page(out, number)).is_file():
        old.unlink()
        number += 1
    return written


def _draw_image(gallery: Gallery, row: int, caption: str, images: ImagesConfig) -> Place:
    return _make_cell(gallery.photo(row, _SIDE, images), gallery.name(row), caption)


def _draw_query(path: Path, images: ImagesConfig) -> Place:
    return _make_cell(display_pixels(read_image(path, images), _SIDE, images), path.name, f"\n{path.name}")


def _make_cell(pixels: Pixels | BadImage, name: str, caption: str) -> Place:
    if isinstance(pixels, BadImage):
        return f"{pixels.reason.partition(':')[0]}\n{Path(name).name}"
    return Tile(pixels, caption)

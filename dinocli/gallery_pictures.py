"""Gallery pictures: what was found in a gallery as contact sheets on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinocli.atomic import atomic
from dinocli.data.decode import DEFAULTS, BadImage, ImagesConfig
from dinocli.evals.dedup import Group
from dinocli.evals.search import Hits
from dinocli.gallery import Gallery, small
from dinocli.picture import Panel, contact_sheet

ROWS = 20  # of a sheet
_COLUMNS = 10
_SIDE = 144  # pixels of a photo

Place = Panel | str | None


def draw_hits(gallery: Gallery, hits: Sequence[Hits], out: Path, images: ImagesConfig = DEFAULTS) -> list[Path]:
    """Sheets with a query at the left of each row, and behind it what was found, with its cosine.

    Args:
        gallery: That was searched.
        hits: Of each query.
        out: The first sheet; others get a number.
        images: How files become pixels.

    Returns:
        What was written.
    """
    rows: list[list[Place]] = []
    for each in hits:
        found = [_place(gallery, n.row, f"{n.cosine:.4f}\n{n.label or n.image}", images) for n in each.neighbours]
        rows.append([_query(Path(each.query), images), *found[:_COLUMNS]])
    return _write(rows, out, f"photo, and the nearest of {len(gallery)} images by cosine", lead=1)


def draw_groups(
    gallery: Gallery, groups: Sequence[Group], out: Path, pages: int, images: ImagesConfig = DEFAULTS
) -> list[Path]:
    """Sheets with a group of near-duplicates a row: what is kept at the left, and behind it what is dropped.

    Args:
        gallery: Of the images.
        groups: As they are to be looked at.
        out: The first sheet; others get a number.
        pages: At most so many.
        images: How files become pixels.

    Returns:
        What was written.
    """
    rows: list[list[Place]] = []
    for group in groups[: pages * ROWS]:
        kept = _place(gallery, group.kept, f"kept\n{gallery.name(group.kept)}", images)
        shown = list(zip(group.dropped, group.cosines, strict=True))[:_COLUMNS]
        dropped = [_place(gallery, row, f"{cosine:.4f}\n{gallery.name(row)}", images) for row, cosine in shown]
        more = len(group.dropped) - len(shown)
        rows.append([kept, *dropped, f"and {more} more" if more else None])
    return (
        _write(rows, out, "kept, and what is dropped with its cosine to the nearest of its group", lead=1)
        if rows
        else []
    )


def _write(rows: list[list[Place]], out: Path, title: str, lead: int) -> list[Path]:
    written = []
    for first in range(0, len(rows), ROWS):
        path = out if not first else out.with_name(f"{out.stem}-{first // ROWS + 1}{out.suffix}")
        with atomic(path) as draft:
            sheet = contact_sheet(rows[first : first + ROWS], title=title, lead=lead, side=_SIDE)
            sheet.save(draft, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", quality=85)
        written.append(path)
    return written


def _place(gallery: Gallery, row: int, caption: str, images: ImagesConfig) -> Place:
    pixels = gallery.photo(row, _SIDE, images)
    return _bad(pixels, gallery.name(row)) if isinstance(pixels, BadImage) else Panel(pixels, caption)


def _query(path: Path, images: ImagesConfig) -> Place:
    pixels = small(path.read_bytes(), _SIDE, images)
    return _bad(pixels, path.name) if isinstance(pixels, BadImage) else Panel(pixels, f"\n{path.name}")


def _bad(bad: BadImage, name: str) -> str:
    return f"{bad.reason.partition(':')[0]}\n{Path(name).name}"

"""Points of a photo on the command line, whose patch is compared with all others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinocli.cli.layout import OUTPUT
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.data.decode.pixels import Pixels

Point = tuple[float, float]
Points = Annotated[
    list[str] | None,
    typer.Option(
        "--point",
        metavar="X,Y",
        help="Draw the similarity of the patch at this pixel of the photo (A, if there are two) to all patches; may be "
        "repeated.",
        rich_help_panel=OUTPUT,
    ),
]


def parse_points(texts: Sequence[str] | None) -> list[Point]:
    """Parse the values of --point.

    Raises:
        Misuse: If one is not two numbers.
    """
    return [_parse(text) for text in texts or []]


def _parse(text: str) -> Point:
    try:
        x, y = map(float, text.split(","))
    except ValueError as error:
        raise Misuse(f"--point {text} is not valid; expected x and y in pixels", "such as --point 120,80") from error
    return x, y


def check_points(points: Sequence[Point], path: Path, photo: Pixels) -> None:
    """Check that points are inside a photo.

    Raises:
        DinoError: If one is outside.
    """
    height, width = photo.shape[:2]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise DinoError(
                f"--point {x:g},{y:g} is outside {path}, which has {width}x{height} pixels",
                f"use --point {width // 2},{height // 2}, or another point inside",
            )

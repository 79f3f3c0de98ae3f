"""Page of a plot: one HTML file that needs only a browser, to pan, zoom, inspect and select images."""

from __future__ import annotations

import io
import json
import os
from base64 import b64encode
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from dinocli.apps.plot.columns import NONE, Column
from dinocli.core.atomic import write_text
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.evals.units import Floats
from dinocli.features.gallery import Gallery
from dinocli.viz.page import text_of
from dinocli.viz.picture import fitted, palette

_SIDE = 64  # pixels of a thumbnail
_LARGEST = 65_535  # coordinates are stored as 16 bits


def thumbnails_of(
    gallery: Gallery,
    rows: Sequence[int],
    images: ImagesConfig = DEFAULTS,
    report: Callable[[int], None] = lambda done: None,
) -> tuple[dict[int, str], dict[str, str]]:
    """Return small JPEGs of images as base64 by row, and the reason by name of each image that cannot be read.

    Args:
        gallery: Images behind the features.
        rows: Rows of the images.
        images: Settings and limits of image decoding.
        report: Callback with the number of images done.
    """
    made, skipped = dict[int, str](), dict[str, str]()
    for done, row in enumerate(rows, 1):
        pixels = gallery.photo(row, _SIDE, images)
        if isinstance(pixels, BadImage):
            skipped[gallery.name(row)] = pixels.reason
        else:
            buffer = io.BytesIO()
            Image.fromarray(fitted(pixels, _SIDE)).save(buffer, format="JPEG", quality=70)
            made[row] = b64encode(buffer.getvalue()).decode()
        report(done)
    return made, skipped


def write_page(
    path: Path,
    gallery: Gallery,
    points: Floats,
    columns: Sequence[Column],
    thumbnails: dict[int, str],
    title: str,
    subtitle: str,
) -> None:
    """Write the page of a plot.

    Args:
        path: Path of the HTML file.
        gallery: Images behind the features.
        points: Coordinates. [S, 2]
        columns: Columns to color by, the first one at the start.
        thumbnails: JPEGs as base64 by row.
        title: Heading, and title of the browser's tab.
        subtitle: Line beside the title.
    """
    names, root = _names(gallery)
    data: dict[str, Any] = {
        "points": _pack(_quantized(points)),
        "names": names,
        "root": root or "",
        "files": root is not None,
        "why": f"the images are in {gallery.data}, which has no image files to list",
        "columns": [_describe(column) for column in columns],
        "thumbnails": [thumbnails.get(row, "") for row in range(len(points))],
        "ramp": ramp(),
    }
    # "</script>" in a name would end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    write_text(path, template.substitute(title=text_of(title), subtitle=text_of(subtitle), data=text))


def colors_of(kinds: Sequence[str]) -> list[list[int]]:
    """Return a color per name; gray for images without a value."""
    named = iter(palette(len(kinds) + 1)[1:].tolist())
    return [[150, 150, 150] if kind == NONE else next(named) for kind in kinds]


def ramp() -> list[list[int]]:
    """Return 256 colors for numbers, from low to high."""
    from matplotlib import colormaps

    return (colormaps["viridis"](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(int).tolist()


def _names(gallery: Gallery) -> tuple[list[str], str | None]:
    """Return the names of all images, and the folder that makes files of them; None if there are no files."""
    paths = [gallery.file(row) for row in range(len(gallery))]
    if not all(paths):
        return [gallery.name(row) for row in range(len(gallery))], None
    texts = [str(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(text) for text in texts])
    root = root if root.endswith(os.sep) else root + os.sep
    return [text[len(root) :] for text in texts], root


def _quantized(points: Floats) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return the points in a square of 16-bit numbers, with one scale for both axes; y points down. [S, 2]"""
    low, high = points.min(0), points.max(0)
    size = max(float((high - low).max()), 1e-30)
    share = (points - (low + high) / 2) / size + 0.5
    share[:, 1] = 1 - share[:, 1]
    return np.clip((share * _LARGEST).round(), 0, _LARGEST).astype("<u2")


def _describe(column: Column) -> dict[str, Any]:
    known = column.values[np.isfinite(column.values)]
    return {
        "name": column.name,
        "kinds": column.kinds,
        "colors": colors_of(column.kinds),
        "values": _pack(column.values.astype("<f4")),
        "low": float(known.min()) if len(known) else 0.0,
        "high": float(known.max()) if len(known) else 0.0,
    }


def _pack(values: np.ndarray[Any, Any]) -> str:
    return b64encode(np.ascontiguousarray(values).tobytes()).decode()

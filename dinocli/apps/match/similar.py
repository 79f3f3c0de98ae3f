"""Similarity of one patch to all others: in its own photo, and in another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dinocli.apps.match.correspond import PatchMap
from dinocli.core.atomic import atomic
from dinocli.data.decode.pixels import Pixels
from dinocli.viz.picture import Tile, bounded, contact_sheet, heat, visible

_SIDE = 300  # pixels of a tile
_RING = 0.02  # radius of a mark, as a share of the photo's longer side


def similarities(a: PatchMap, b: PatchMap, point: tuple[float, float]) -> NDArray[np.float32]:
    """Return the cosine of the patch of A that holds a point with each patch of B. [hB, wB]

    Args:
        a: Patch features of A.
        b: Patch features of B; may be A itself.
        point: x and y in pixels of A.
    """
    feature = a.features.flatten(0, 1)[int(a.holding(np.array([point]))[0])]
    return (b.features @ feature).clamp(-1, 1).float().cpu().numpy()


def draw_similarities(
    path: Path, photos: tuple[Pixels, Pixels], maps: tuple[PatchMap, PatchMap], points: Sequence[tuple[float, float]]
) -> list[tuple[tuple[float, float], float]]:
    """Draw a row per point: photo A with the point, its similarities in A, and in B, with the most similar place.

    Args:
        path: Path of the PNG.
        photos: Pixels of A and B.
        maps: Patch features of A and B.
        points: x and y in pixels of A.

    Returns:
        Position in pixels of B and cosine of the patch most similar to each point's patch.
    """
    a, b = maps
    rows: list[list[Tile | str | None]] = []
    best = []
    for point in points:
        here, there = similarities(a, a, point), similarities(a, b, point)
        top = int(there.argmax())
        x, y = b.centers[top].tolist()
        best.append(((x, y), float(there.flat[top])))
        # One scale for both photos; the patch itself has 1 and would darken all others.
        scale = float(min(here.min(), there.min())), float(max(np.partition(here.ravel(), -2)[-2], there.max()))
        tiles = [Tile(_mark(visible(photos[0]), point), f"point {point[0]:g},{point[1]:g}")]
        for which, values, place in ((0, here, point), (1, there, (x, y))):
            height, width = photos[which].shape[:2]
            drawn = _mark(heat(values, height, width, scale), place)
            tiles.append(Tile(drawn, f"similarity in {'AB'[which]}, {scale[0]:.2f} to {scale[1]:.2f}"))
        tiles.append(Tile(_mark(visible(photos[1]), (x, y)), f"best match: {x:.0f},{y:.0f}, cosine {best[-1][1]:.2f}"))
        rows.append([*tiles])
    with atomic(path) as draft:
        contact_sheet(rows, side=_SIDE).save(draft, format="PNG", optimize=True)
    return best


def _mark(pixels: Pixels, point: tuple[float, float]) -> Pixels:
    """Draw a ring around a point, white beside black, in a copy of the photo that is large enough. [H', W', 3]"""
    large = bounded(pixels)
    x, y = (value * new / old for value, new, old in zip(point, large.shape[1::-1], pixels.shape[1::-1], strict=True))
    page = Image.fromarray(large)
    radius = max(4.0, _RING * max(large.shape[:2]))
    pen = ImageDraw.Draw(page)
    pen.circle((x, y), radius * 1.5, outline=(0, 0, 0), width=max(2, round(radius / 2)))
    pen.circle((x, y), radius * 1.2, outline=(255, 255, 255), width=max(1, round(radius / 3)))
    return np.asarray(page)

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
from dinocli.evals.photo_maps import photo_map
from dinocli.evals.units import normalized
from dinocli.features.encoder import Encoder
from dinocli.viz.picture import Tile, block_sheet, bounded, contact_sheet, heat, visible

_SIDE = 300  # pixels of a tile
_RING = 0.02  # radius of a mark, as a share of the photo's longer side
Point = tuple[float, float]
Scale = tuple[float, float]


def patch_map(
    encoder: Encoder, pixels: Pixels, short_side: int, tile: int | None = None
) -> tuple[PatchMap, int | None]:
    """Compute the patch tokens of a photo, in tiles if it is larger than a tile; see `photo_map`.

    Returns:
        The patches, and the short side of the network's input in pixels if the photo had too many patches, else None.
    """
    made = photo_map(encoder, pixels, short_side, lambda image: encoder.patches(image)[0].permute(2, 0, 1), tile)
    height, width = pixels.shape[:2]
    return PatchMap(normalized(made.values.permute(1, 2, 0)), (height, width), made.margins), made.reduced_to


def similarities(a: PatchMap, b: PatchMap, point: Point) -> NDArray[np.float32]:
    """Return the cosine of the patch of A that holds a point with each patch of B. [hB, wB]

    Args:
        a: Patch features of A.
        b: Patch features of B; may be A itself.
        point: x and y in pixels of A.
    """
    feature = a.features.flatten(0, 1)[int(a.holding(np.array([point]))[0])]
    return (b.features @ feature).clamp(-1, 1).float().cpu().numpy()


def draw_own_similarities(
    path: Path, photo: Pixels, maps: Sequence[tuple[str, PatchMap]], points: Sequence[Point]
) -> list[list[Scale]]:
    """Draw a block per network: the photo with the points, and the similarity of each point's patch to all others.

    Args:
        path: Path of the PNG.
        photo: Pixels of the photo.
        maps: Name of each network, and its patch features of the photo.
        points: x and y in pixels of the photo.

    Returns:
        Lowest and highest cosine in color, for each network and point. The patch itself has 1, and is not counted.
    """
    shown = bounded(visible(photo), len(maps))
    height, width = shown.shape[:2]
    marks = [(x * width / photo.shape[1], y * height / photo.shape[0]) for x, y in points]
    blocks, scales = [], list[list[Scale]]()
    for name, own in maps:
        cosines = [similarities(own, own, point) for point in points]
        scales.append([_scale_of(values) for values in cosines])
        line: list[Tile | None] = [Tile(_ring(shown, marks), "photo")]
        for values, scale, mark, (x, y) in zip(cosines, scales[-1], marks, points, strict=True):
            drawn = _ring(heat(values, height, width, scale, own.margins), [mark])
            line.append(Tile(drawn, f"{x:g},{y:g}: {scale[0]:.2f} to {scale[1]:.2f}"))
        blocks.append((name if len(maps) > 1 else "", [line]))
    with atomic(path) as draft:
        block_sheet(blocks).save(draft, format="PNG", optimize=True)
    return scales


def draw_similarities(
    path: Path,
    photos: tuple[Pixels, Pixels],
    maps: Sequence[tuple[str, tuple[PatchMap, PatchMap]]],
    points: Sequence[Point],
) -> list[list[tuple[Point, float]]]:
    """Draw a row per network and point: photo A with the point, its similarities in A, and in B, with the best place.

    Args:
        path: Path of the PNG.
        photos: Pixels of A and B.
        maps: Name of each network, and its patch features of A and B.
        points: x and y in pixels of A.

    Returns:
        Position in pixels of B and cosine of the patch most similar to each point's patch, for each network.
    """
    rows: list[list[Tile | str | None]] = []
    best = []
    for name, (a, b) in maps:
        found = []
        for point in points:
            here, there = similarities(a, a, point), similarities(a, b, point)
            top = int(there.argmax())
            x, y = b.centers[top].tolist()
            found.append(((x, y), float(there.flat[top])))
            low, high = _scale_of(here)
            scale = min(low, float(there.min())), max(high, float(there.max()))  # one scale for both photos
            lines = [f"point {point[0]:g},{point[1]:g}", *[name] * (len(maps) > 1)]
            tiles = [Tile(_mark(visible(photos[0]), point), "\n".join(lines))]
            for which, values, place in ((0, here, point), (1, there, (x, y))):
                height, width = photos[which].shape[:2]
                drawn = _mark(heat(values, height, width, scale), place)
                tiles.append(Tile(drawn, f"similarity in {'AB'[which]}, {scale[0]:.2f} to {scale[1]:.2f}"))
            caption = f"best match: {x:.0f},{y:.0f}, cosine {found[-1][1]:.2f}"
            tiles.append(Tile(_mark(visible(photos[1]), (x, y)), caption))
            rows.append([*tiles])
        best.append(found)
    with atomic(path) as draft:
        contact_sheet(rows, side=_SIDE).save(draft, format="PNG", optimize=True)
    return best


def _scale_of(own: NDArray[np.float32]) -> Scale:
    """Return the lowest cosine, and the highest but the patch itself, whose 1 would darken all others."""
    flat = own.ravel()
    return float(flat.min()), float(np.partition(flat, -2)[-2]) if len(flat) > 1 else float(flat[0])


def _mark(pixels: Pixels, point: Point) -> Pixels:
    """Draw a ring around a point in a copy of the photo that is large enough. [H', W', 3]"""
    large = bounded(pixels)
    x, y = (value * new / old for value, new, old in zip(point, large.shape[1::-1], pixels.shape[1::-1], strict=True))
    return _ring(large, [(x, y)])


def _ring(pixels: Pixels, points: Sequence[Point]) -> Pixels:
    """Draw a ring around each point, white beside black, in a copy of the picture. [H, W, 3]"""
    page = Image.fromarray(pixels)
    radius = max(4.0, _RING * max(pixels.shape[:2]))
    pen = ImageDraw.Draw(page)
    for x, y in points:
        pen.circle((x, y), radius * 1.5, outline=(0, 0, 0), width=max(2, round(radius / 2)))
        pen.circle((x, y), radius * 1.2, outline=(255, 255, 255), width=max(1, round(radius / 3)))
    return np.asarray(page)

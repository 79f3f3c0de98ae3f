"""Attention pictures: sheets of attention maps and masks on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.core.atomic import atomic
from dinocli.core.tensors import write_tensors
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.sources.photos import read_photo
from dinocli.evals.attention import AttentionMaps, attention_maps, default_size, enlarge
from dinocli.features.encoder import Encoder, NotFinite
from dinocli.viz.picture import Tile, bounded, heat, sheet, spotlight, visible

_COLUMNS = 8  # tiles side by side


@dataclass(frozen=True)
class Drawn:
    """Files written for a photo.

    Attributes:
        image: Path of the photo.
        picture: Path of the sheet.
        raw: Path of the maps, or None.
    """

    image: Path
    picture: Path
    raw: Path | None


def draw(encoder: Encoder, image: Path, name: Path, *, keep: float, size: int | None, raw: bool) -> Drawn | str:
    """Write the attention sheet of a photo, or return the reason why the photo cannot be read.

    Args:
        encoder: Encoder with a vision transformer.
        image: Path of the photo.
        name: Path of the output files, without a suffix.
        keep: Share of the attention that the masks hold.
        size: Short side in pixels after resizing. If None, `default_size` of the encoder.
        raw: If True, also write the tensors `heads` and `masks`, both [heads, rows, columns], to a safetensors file.
    """
    pixels = read_photo(image, encoder.images)
    if isinstance(pixels, BadImage):
        return pixels.reason
    try:
        maps = attention_maps(encoder, pixels, size or default_size(encoder))
    except NotFinite as error:
        return error.reason
    picture = name.with_name(name.name + ".png")
    with atomic(picture) as draft:
        attention_sheet(visible(pixels), maps, keep).save(draft, format="PNG")
    tensors = name.with_name(name.name + ".safetensors") if raw else None
    if tensors:
        arrays: dict[str, NDArray[Any]] = {"heads": maps.heads, "masks": maps.masks(keep).astype(np.uint8)}
        write_tensors(tensors, arrays, {"keep": str(keep), "source": encoder.source})
    return Drawn(image, picture, tensors)


def attention_sheet(pixels: Pixels, maps: AttentionMaps, keep: float) -> Image.Image:
    """Draw the photo, each head's map and their mean; below each map, the photo inside its mask.

    More than eight columns are wrapped, so that the sheet of twelve or more heads fits a screen.
    """
    pixels = bounded(pixels)
    height, width = pixels.shape[:2]
    maps_by_name = [(f"head {i + 1}", m) for i, m in enumerate(maps.heads)] + [("mean of heads", maps.heads.mean(0))]
    masks = [*maps.masks(keep), AttentionMaps(maps.heads.mean(0, keepdims=True)).masks(keep)[0]]
    above: list[Tile | None] = [Tile(pixels, "photo")]
    above += [Tile(heat(m, height, width), name) for name, m in maps_by_name]
    below: list[Tile | None] = [None]
    below += [
        Tile(spotlight(pixels, enlarge(mask, height, width)), f"{keep:.0%} of {name.split(' of')[0]}")  # type: ignore[arg-type]
        for mask, (name, _) in zip(masks, maps_by_name, strict=True)
    ]
    parts = -(-len(above) // _COLUMNS)
    columns = -(-len(above) // parts)  # as even as possible
    starts = range(0, len(above), columns)
    return sheet([line[first : first + columns] for first in starts for line in (above, below)])

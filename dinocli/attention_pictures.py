"""Attention pictures: photos to sheets of maps and masks on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.atomic import atomic, write_tensors
from dinocli.data.decode import BadImage, Pixels
from dinocli.data.named import read_photo
from dinocli.encoder import Encoder, NotFinite
from dinocli.evals.attention import AttentionMaps, attention_maps, default_size, enlarge
from dinocli.picture import Panel, bounded, heat, sheet, spotlight, visible


@dataclass(frozen=True)
class Drawn:
    """What was written for a photo.

    Attributes:
        image: The photo.
        picture: The sheet.
        raw: The maps, if they were asked for.
    """

    image: Path
    picture: Path
    raw: Path | None


def draw(encoder: Encoder, image: Path, name: Path, *, keep: float, size: int | None, raw: bool) -> Drawn | str:
    """Write the sheet of a photo, and the maps if asked for; or return why the photo cannot be read.

    Args:
        encoder: A vision transformer.
        image: The photo.
        name: Of the files to write, without a suffix.
        keep: Share of the attention that the masks hold.
        size: Short side to look at the photo with, in pixels; absent, what fits the encoder.
        raw: Whether to write the maps too: `heads` [heads, rows, columns] and `masks` of the same shape.
    """
    pixels = read_photo(image, encoder.images)
    if isinstance(pixels, BadImage):
        return pixels.reason
    try:
        maps = attention_maps(encoder, pixels, size or default_size(encoder))
    except NotFinite as lost:
        return lost.reason
    picture = name.with_name(name.name + ".png")
    with atomic(picture) as draft:
        attention_sheet(visible(pixels), maps, keep).save(draft, format="PNG")
    tensors = name.with_name(name.name + ".safetensors") if raw else None
    if tensors:
        arrays: dict[str, NDArray[Any]] = {"heads": maps.heads, "masks": maps.masks(keep).astype(np.uint8)}
        write_tensors(tensors, arrays, {"keep": str(keep), "source": encoder.source})
    return Drawn(image, picture, tensors)


def attention_sheet(pixels: Pixels, maps: AttentionMaps, keep: float) -> Image.Image:
    """The photo beside each head's map and their mean; below, what each keeps of the photo."""
    pixels = bounded(pixels)
    height, width = pixels.shape[:2]
    every = [(f"head {i + 1}", m) for i, m in enumerate(maps.heads)] + [("mean of heads", maps.heads.mean(0))]
    masks = [*maps.masks(keep), AttentionMaps(maps.heads.mean(0, keepdims=True)).masks(keep)[0]]
    above = [Panel(pixels, "photo")] + [Panel(heat(m, height, width), name) for name, m in every]
    below: list[Panel | None] = [None]
    below += [
        Panel(spotlight(pixels, enlarge(mask, height, width)), f"{keep:.0%} of {name.split(' of')[0]}")  # type: ignore[arg-type]
        for mask, (name, _) in zip(masks, every, strict=True)
    ]
    return sheet([above, below])

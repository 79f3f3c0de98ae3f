"""Attention pictures: photos to sheets of maps and masks on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from dinocli.atomic import atomic
from dinocli.data.decode import BadImage, Pixels, decode
from dinocli.encoder import Encoder
from dinocli.evals.attention import AttentionMaps, attention_maps, default_size, enlarge
from dinocli.picture import Panel, heat, sheet, spotlight

# A sheet has two rows of up to 14 panels; of a photo beyond this many pixels it would not open in a viewer any more.
_PANEL_PIXELS = 4_000_000


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
    pixels = decode(image.read_bytes())
    if isinstance(pixels, BadImage):
        return pixels.reason
    maps = attention_maps(encoder, pixels, size or default_size(encoder))
    picture = name.with_name(name.name + ".png")
    with atomic(picture) as draft:
        attention_sheet(pixels, maps, keep).save(draft, format="PNG")
    tensors = name.with_name(name.name + ".safetensors") if raw else None
    if tensors:
        with atomic(tensors) as draft:
            save_file(
                {"heads": maps.heads, "masks": maps.masks(keep).astype(np.uint8)},
                draft,
                {"keep": str(keep), "source": encoder.source},
            )
    return Drawn(image, picture, tensors)


def attention_sheet(pixels: Pixels, maps: AttentionMaps, keep: float) -> Image.Image:
    """The photo beside each head's map and their mean; below, what each keeps of the photo."""
    pixels = _bounded(pixels)
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


def _bounded(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    factor = (_PANEL_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return pixels
    return np.asarray(
        Image.fromarray(pixels).resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
    )

"""Attention pictures: sheets of attention maps and masks on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.core.atomic import atomic
from dinocli.core.tensors import write_tensors
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.sources.masks import read_objects
from dinocli.data.sources.photos import read_photo
from dinocli.evals.attention import AttentionMaps, Overlap, attention_maps, default_size, enlarge, overlap
from dinocli.features.encoder import Encoder, NotFinite
from dinocli.viz.picture import Tile, block_sheet, bounded, heat, outline, spotlight, visible

Objects = Sequence[NDArray[np.bool_]]


@dataclass(frozen=True)
class Block:
    """Maps of a photo by one network.

    Attributes:
        source: Source of the network's weights, as the user named it.
        maps: Attention maps.
        overlap: Overlap with the objects of the photo. None without a mask.
    """

    source: str
    maps: AttentionMaps
    overlap: Overlap | None = None

    @property
    def title(self) -> str:
        """Title in the sheet: the network, and its overlap."""
        if self.overlap is None:
            return self.source
        heads = list(dict.fromkeys(self.overlap.heads))
        named = f"head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))}"
        return f"{self.source}: Jaccard {self.overlap.jaccard:.3f}, {named}"


@dataclass(frozen=True)
class Drawn:
    """Files written for a photo.

    Attributes:
        image: Path of the photo.
        picture: Path of the sheet.
        raw: Path of the maps, or None.
        blocks: Maps of each network.
    """

    image: Path
    picture: Path
    raw: Path | None
    blocks: list[Block]


def draw(
    encoders: Sequence[Encoder],
    image: Path,
    name: Path,
    *,
    keep: float,
    size: int | None,
    raw: bool,
    tile: int | None = None,
    mask: Path | None = None,
) -> Drawn | str:
    """Write the attention sheet of a photo, or return the reason why the photo cannot be read.

    Args:
        encoders: Encoders with a vision transformer. Each has a block of rows in the sheet.
        image: Path of the photo.
        name: Path of the output files, without a suffix.
        keep: Share of the attention that the masks hold.
        size: Short side in pixels after resizing. If None, `default_size` of each encoder.
        raw: If True, also write the tensors `heads` and `masks` of the first encoder, both [heads, rows, columns], to a
            safetensors file.
        tile: Side of the tiles that a larger photo is cut into. If None, no tiles.
        mask: Path of a mask of the photo's objects, with which the attention is compared.
    """
    objects = read_objects(mask) if mask else None
    if isinstance(objects, BadImage):
        return f"its mask: {objects.reason}"
    blocks: list[Block] = []
    shown: Pixels | None = None
    for encoder in encoders:
        pixels = read_photo(image, encoder.images)
        if isinstance(pixels, BadImage):
            return pixels.reason
        if objects and objects[0].shape != pixels.shape[:2]:
            (height, width), (high, wide) = pixels.shape[:2], objects[0].shape
            return f"it has {width}x{height} pixels, but its mask has {wide}x{high}"
        shown = visible(pixels) if shown is None else shown
        try:
            maps = attention_maps(encoder, pixels, size or default_size(encoder, pixels if tile else None), tile)
        except NotFinite as error:
            return error.reason
        blocks.append(Block(encoder.source, maps, overlap(maps, objects, keep) if objects else None))
    assert shown is not None
    picture = name.with_name(name.name + ".png")
    with atomic(picture) as draft:
        attention_sheet(shown, blocks, keep, objects).save(draft, format="PNG")
    tensors = name.with_name(name.name + ".safetensors") if raw else None
    if tensors:
        maps = blocks[0].maps
        arrays: dict[str, NDArray[Any]] = {"heads": maps.heads, "masks": maps.masks(keep).astype(np.uint8)}
        write_tensors(tensors, arrays, {"keep": str(keep), "source": encoders[0].source})
    return Drawn(image, picture, tensors, blocks)


def attention_sheet(
    pixels: Pixels, blocks: Sequence[Block], keep: float, objects: Objects | None = None
) -> Image.Image:
    """Draw the photo, each head's map and their mean; below each map, the photo inside its mask.

    Args:
        pixels: Photo. [H, W, 3]
        blocks: Maps of each network. A single one without overlap has no title.
        keep: Share of the attention that the masks hold.
        objects: Objects of the photo, whose outline is drawn. [H, W] each
    """
    pixels = bounded(pixels, len(blocks))
    height, width = pixels.shape[:2]
    photo = Tile(pixels, "photo")
    if objects:
        everything = enlarge(np.any(objects, axis=0), height, width).astype(bool)
        photo = Tile(outline(pixels, everything), "photo and mask")
    most = max(len(block.maps.heads) for block in blocks)
    titled = len(blocks) > 1 or objects
    return block_sheet(
        [(block.title if titled else "", _arrange_block(photo, pixels, block, keep, most)) for block in blocks]
    )


def _arrange_block(photo: Tile, pixels: Pixels, block: Block, keep: float, most: int) -> list[list[Tile | None]]:
    """Return the line of maps and the line of masks; with fewer heads than `most`, their mean stays the last column."""
    height, width = pixels.shape[:2]
    maps, missing = block.maps, [None] * (most - len(block.maps.heads))
    mean = AttentionMaps(maps.heads.mean(0, keepdims=True))
    names = [f"head {i + 1}" for i in range(len(maps.heads))]
    scores = [f": {score:.2f}" for score in block.overlap.per_head] if block.overlap else [""] * len(names)

    def map_tile(values: NDArray[np.float32], caption: str) -> Tile:
        return Tile(heat(values, height, width, margins=maps.margins), caption)

    def mask_tile(mask: NDArray[np.bool_], caption: str) -> Tile:
        inside = enlarge(mask, height, width, maps.margins).astype(bool)
        return Tile(spotlight(pixels, inside), f"{keep:.0%} of {caption}")

    above = [map_tile(values, name) for values, name in zip(maps.heads, names, strict=True)]
    below = [mask_tile(mask, name + score) for mask, name, score in zip(maps.masks(keep), names, scores, strict=True)]
    return [
        [photo, *above, *missing, map_tile(mean.heads[0], "mean of heads")],
        [None, *below, *missing, mask_tile(mean.masks(keep)[0], "mean")],
    ]

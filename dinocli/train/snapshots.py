"""Fixed photos that a run evaluates and draws at intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinocli.core.atomic import atomic, write_text
from dinocli.data.decode.image import Opened, open_image, reduction
from dinocli.data.decode.pixels import BadImage, Data, Pixels
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import Source
from dinocli.data.sources.shards import Shards
from dinocli.data.views.crops import ViewsConfig, resize_and_center, resize_for
from dinocli.evals.attention import attention_maps, default_size
from dinocli.evals.spread import effective_rank, lidar, uniformity
from dinocli.evals.units import normalized
from dinocli.features.encoder import Encoder
from dinocli.method.preset import Preset
from dinocli.models.network import Network
from dinocli.train.knn_monitor import at_rest, class_tokens
from dinocli.viz.picture import heat, visible

POOL, SHOWN, NEIGHBOURS = 256, 6, 5
TILE = 144  # side of a photo or map in pixels; neighbours have two thirds of it
VIEWS = 4  # random crops per photo for LiDAR
_TRIES = 2 * POOL  # candidates, because some cannot be read
_WORD = 2**63 - 2  # keeps this choice independent of other uses of the seed


@dataclass(frozen=True)
class Photos:
    """Sample of a source's photos in CPU memory: 40 MB at 224 pixels.

    Attributes:
        pool: All photos at the evaluation size, the shown ones first. [S, C, size, size], uint8
        shown: The first few photos, at the size for attention maps. [side, side, C] each
        names: Names of the shown photos.
        preset: Preset with the image settings of the network.
    """

    pool: Tensor
    shown: list[Pixels]
    names: list[str]
    preset: Preset

    @classmethod
    def of(cls, source: Source, preset: Preset) -> Photos:
        """Choose photos by the run's seed, or the first photos of shards; skip unreadable ones."""
        size = preset.views.global_1.size
        large = round(size * 480 / 224)
        pool: list[Tensor] = []
        shown: list[Pixels] = []
        names: list[str] = []
        for name, opened in _candidates(source, preset):
            short, wanted = min(opened.height, opened.width), resize_for(large if len(shown) < SHOWN else size)
            # Decode large photos at a reduced size, because they become small squares.
            pixels = opened.pixels(reduction(short / (2 * wanted)))
            if isinstance(pixels, BadImage):
                continue
            pool.append(resize_and_center(pixels, resize_for(size), size))
            if len(shown) < SHOWN:
                shown.append(resize_and_center(pixels, resize_for(large), large).permute(1, 2, 0).contiguous().numpy())
                names.append(name)
            if len(pool) == POOL:
                break
        return cls(
            torch.stack(pool) if pool else torch.empty(0, preset.views.channels, size, size), shown, names, preset
        )

    @torch.no_grad()
    def snapshot(self, network: Network, step: int, folder: Path, *, views: int = 0) -> dict[str, float]:
        """Write pictures of a network's output on the photos, and return statistics of its features.

        The network is not changed and no random number is drawn, so the run is not affected.

        Args:
            network: Network with unsharded weights, on any device.
            step: Number of completed steps, for the file names.
            folder: Run folder. Its `pictures/` receives `photos.jpg` with `photos.json`, `attention-STEP.jpg` (only for
                networks with attention) and `neighbours-STEP.jpg`.
            views: Number of random crops per photo for LiDAR, which is omitted if 0.

        Returns:
            `rank` and `uniformity` of the pool's features, and `lidar`. Empty if the pool has fewer than two photos.

        Raises:
            NotFinite: If the network's output is infinite or NaN.
        """
        if len(self.pool) < 2:
            return {}
        pictures = folder / "pictures"
        if not (pictures / "photos.json").is_file():
            _save([[_tile(photo, TILE) for photo in self.shown]], pictures / "photos.jpg")
            write_text(pictures / "photos.json", json.dumps({"names": self.names}))
        from dinocli.models.transformer import Transformer  # only here: it imports timm

        if isinstance(network.backbone, Transformer):
            _save([self._maps(network)], pictures / f"attention-{step}.jpg")
        features = class_tokens(network, self.pool, self.preset.views)
        nearest = _nearest(features, len(self.shown), NEIGHBOURS)
        tiles = [[_tile(_upright(self.pool[i]), TILE * 2 // 3) for i in row] for row in nearest]
        _save(tiles, pictures / f"neighbours-{step}.jpg")
        return measure_spread(network, self.pool, features, self.preset.views, views)

    def _maps(self, network: Network) -> list[Pixels]:
        """Return the class token's attention map of each shown photo, averaged over the heads."""
        views = self.preset.views
        size, images = views.global_1.size, self.preset.images
        encoder = Encoder(network.backbone, "teacher", "", size, views.mean, views.std, images)
        with at_rest(network):
            maps = [attention_maps(encoder, photo, default_size(encoder)) for photo in self.shown]
        return [heat(m.heads.mean(0), TILE, TILE) for m in maps]


def measure_spread(
    network: Network, pool: Tensor, features: Tensor, settings: ViewsConfig, views: int
) -> dict[str, float]:
    """Return label-free statistics of a network's features: `rank`, `uniformity` and, if `views` is not 0, `lidar`.

    Args:
        network: Network in evaluation or training; it is not changed.
        pool: At least two photos. [S, C, H, H], uint8
        features: Class tokens of the photos. [S, D]
        settings: Settings with the mean and standard deviation of each channel.
        views: Number of random crops per photo for LiDAR.
    """
    figures = {"rank": effective_rank(features), "uniformity": uniformity(features)}
    if views:
        crops = class_tokens(network, random_crops(pool, views), settings)
        figures["lidar"] = lidar(crops.unflatten(0, (len(pool), views)))
    return figures


def random_crops(photos: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return random crops of photos with at least two fifths of their area, always the same ones.

    Args:
        photos: [S, C, H, H], uint8
        count: Number of crops per photo.
        seed: Seed of the crops' places and sizes.

    Returns:
        Crops, grouped by photo, at the size of the photos. [S*count, C, H, H], uint8
    """
    generator, side = torch.Generator().manual_seed(seed), photos.shape[-1]
    crops = []
    for photo in photos:
        for _ in range(count):
            share, top, left = torch.rand(3, generator=generator).tolist()
            size = max(1, round(side * (0.4 + 0.6 * share) ** 0.5))
            y, x = round(top * (side - size)), round(left * (side - size))
            crop = photo[None, :, y : y + size, x : x + size].float()
            crops.append(F.interpolate(crop, (side, side), mode="bilinear", antialias=True).round().byte())
    return torch.cat(crops)


def _candidates(source: Source, preset: Preset) -> Iterator[tuple[str, Opened]]:
    """Yield the name and header of each image that can be opened, in order of choice."""
    for name, data in _first(source) if isinstance(source, Shards) else _sample(source, preset):
        if not isinstance(opened := open_image(data, preset.images), BadImage):
            yield name, opened


def _first(source: Shards) -> Iterator[tuple[str, bytes]]:
    return ((sample.name, sample.data) for sample in islice(source.stream(0, 1), _TRIES))


def _sample(source: Images, preset: Preset) -> Iterator[tuple[str, Data]]:
    rows = np.random.default_rng((preset.training.seed, _WORD)).choice(
        len(source), min(_TRIES, len(source)), replace=False
    )
    for row in rows.tolist():
        try:
            data = source.read(row, preset.images)
        except OSError:
            continue
        yield source.names[row], data


def _nearest(features: Tensor, queries: int, count: int) -> list[list[int]]:
    """Return a row per query: its own index, then its nearest neighbours by cosine similarity."""
    unit = normalized(features)
    similarity = unit[:queries] @ unit.T  # [Q, S]
    similarity.fill_diagonal_(torch.inf)
    return similarity.argsort(dim=1, descending=True, stable=True)[:, : count + 1].tolist()


def _upright(image: Tensor) -> Pixels:
    return image.permute(1, 2, 0).numpy()


def _tile(pixels: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(visible(pixels)).resize((side, side), Image.Resampling.LANCZOS))


def _save(rows: Sequence[Sequence[Pixels]], path: Path) -> None:
    """Save square tiles without gaps, so that readers can split the file again."""
    page = np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
    with atomic(path) as draft:
        Image.fromarray(page).save(draft, format="JPEG", quality=85)

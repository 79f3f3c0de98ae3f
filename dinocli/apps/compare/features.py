"""Features of the compared networks: stored ones that match, else extracted and stored for the next comparison."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinocli.core.errors import DinoError
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import TORCHVISION, Source
from dinocli.data.sources.shards import Shards
from dinocli.data.sources.tar import PIPE
from dinocli.evals.balance import balanced_sample
from dinocli.features.encoder import Encoder, whole_patches
from dinocli.features.extract import extract
from dinocli.features.store import FOLDER, Features, learned_from, read_features

VIEWS = 4  # random views per image for LiDAR
_VIEWED = 1024  # images with random views; LiDAR is at most their number
_TRIED = 8  # images encoded again before stored features are used
_SAME = 0.999  # cosine; bfloat16 in batches of other sizes moves it by 1e-4

Report = Callable[[int], None]


@dataclass(frozen=True)
class Setting:
    """Images that all networks are compared on, and the way to encode them.

    Attributes:
        data: Location of the images, as the user named it.
        parts: Sources by split.
        folder: Folder of the features that comparisons store.
        size: Side of the images, in pixels. If None, each network's training size.
        workers: Number of decoding processes.
    """

    data: str
    parts: Mapping[str, Source]
    folder: Path
    size: int | None = None
    batch_size: int = 64
    workers: int = 0

    @property
    def viewed(self) -> dict[str, Source]:
        """Images whose random views LiDAR compares; none of tar shards, which cannot be sampled."""
        name = learned_from(self.parts)
        source = self.parts[name]
        return {name: balanced_sample(source, _VIEWED)} if isinstance(source, Images) else {}

    def identify(self, encoder: Encoder) -> str:
        """Return a name for the features of a network: equal for equal weights, preprocessing and images."""
        facts = [_locate(self.data), self.size or encoder.size, encoder.precision, encoder.mean, encoder.std]
        text = json.dumps([*facts, encoder.images.model_dump(mode="json")])
        return f"{encoder.fingerprint}-{zlib.crc32(text.encode()):08x}"


@dataclass(frozen=True)
class Prepared:
    """Features of a network.

    Attributes:
        features: Features by split.
        reused: Folder of the stored features that were used. None if they were extracted.
        skipped: Path and reason of each image that could not be used.
    """

    features: dict[str, Features]
    reused: Path | None
    skipped: dict[str, str]


def prepare(encoder: Encoder, setting: Setting, report: Report = lambda images: None) -> Prepared:
    """Return the features of all images: those of an earlier comparison or of `dino extract` if they match.

    Args:
        encoder: Network to compare.
        setting: Images to encode.
        report: Callback that receives the number of encoded images of all splits.

    Raises:
        DinoError: If the size does not fit the network, or no image can be read.
    """
    own = setting.folder / setting.identify(encoder)
    stored = [own, FOLDER, *([Path(encoder.run) / FOLDER] if encoder.run else [])]
    return _prepare(encoder, setting, setting.parts, stored, 0, report)


def prepare_views(encoder: Encoder, setting: Setting, report: Report = lambda images: None) -> Prepared | None:
    """Return features of random views of a sample of the images, as `prepare`; None for tar shards."""
    own = setting.folder / f"{setting.identify(encoder)}-views"
    parts = setting.viewed
    return _prepare(encoder, setting, parts, [own], VIEWS, report) if parts else None


def _prepare(
    encoder: Encoder, setting: Setting, parts: Mapping[str, Source], places: Sequence[Path], views: int, report: Report
) -> Prepared:
    size = whole_patches(encoder, setting.size) or encoder.size
    for place in places:
        try:
            found = {name: read_features(_file_of(place, name)) for name in parts}
        except DinoError:  # missing, or corrupt: extracted again
            continue
        if all(_matches(found[name], encoder, source, setting, size, views) for name, source in parts.items()):
            skipped = {name: reason for part in found.values() for name, reason in part.skipped.items()}
            return Prepared(found, place, skipped)
    written, done = {}, 0
    for name, source in parts.items():
        written[name] = extract(
            encoder,
            source,
            places[0] / f"{name}.safetensors",
            data=setting.data,
            size=size,
            views=views,
            batch_size=setting.batch_size,
            workers=setting.workers,
            report=lambda images, before=done: report(before + images),  # type: ignore[misc]
        )
        done += written[name].images + len(written[name].skipped)
    skipped = {name: reason for part in written.values() for name, reason in part.skipped.items()}
    return Prepared({name: read_features(part.path) for name, part in written.items()}, None, skipped)


def _file_of(place: Path, split: str) -> Path:
    """Return the features of a split: a file, or a folder of shards."""
    file = place / f"{split}.safetensors"
    return file if file.exists() else place / split


def _matches(features: Features, encoder: Encoder, source: Source, setting: Setting, size: int, views: int) -> bool:
    """Return True if stored features are those that the encoder would compute of a source.

    The provenance does not name everything that changes features, such as the window of deep images, and files may
    have changed. So a few images are encoded again.
    """
    made = features.provenance
    same = (made.fingerprint, made.tokens, made.blocks, made.size, made.precision, _locate(made.data)) == (
        *(encoder.fingerprint, "cls", 1, size, encoder.precision, _locate(setting.data)),
    )
    if not same or (views and made.views != views) or features.classes != source.classes:
        return False
    if isinstance(source, Shards):
        return not any(url.startswith(PIPE) for url in source.urls) and _agrees(features, encoder, source, size)
    kept = np.array([row for row, name in enumerate(source.names) if name not in features.skipped], np.int64)
    if [source.names[row] for row in kept.tolist()] != list(features.paths):
        return False
    if not np.array_equal(features.labels, source.labels[kept]):
        return False
    return _agrees(features, encoder, source.take(kept[np.linspace(0, len(kept) - 1, _TRIED).astype(np.int64)]), size)


def _agrees(features: Features, encoder: Encoder, source: Source, size: int) -> bool:
    """Return True if the first images of a source have the stored features, up to rounding."""
    batches = encoder.batches(source, size=size, batch_size=_TRIED, workers=0)
    batch = next(batches, None)
    if batch is None or not len(batch.images):
        return False
    now = encoder.features(batch.images).float().cpu().numpy().astype(np.float64)
    rows = {name: row for row, name in enumerate(features.paths)}
    if any(name not in rows for name in batch.names):
        return False
    then = features.values[np.array([rows[name] for name in batch.names], np.int64)].astype(np.float64)
    lengths = np.linalg.norm(now, axis=1) * np.linalg.norm(then, axis=1)
    return now.shape == then.shape and bool(((now * then).sum(1) > _SAME * lengths).all())


def _locate(data: str) -> str:
    """Return a location that does not depend on the working directory."""
    return data if data.startswith((TORCHVISION, PIPE)) or "://" in data else os.path.realpath(data)

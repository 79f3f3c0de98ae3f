"""Pairs of photos and index masks, for training pixel classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.label_maps import IGNORED
from dinocli.data.sources.masks import MaskFolder, read_index, with_masks
from dinocli.data.sources.photos import named_photos, read_photo

IMAGES, MASKS, NAMES = "images", "masks", "classes.txt"
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
_EVERY = 10  # without splits, every tenth photo is held out


@dataclass(frozen=True)
class Pairs:
    """Photos with masks.

    Attributes:
        masks: Mask of each photo, by path.
        binary: True if the masks hold only 0 and 255. Then 255 is class 1, and nothing is ignored.
    """

    masks: dict[Path, Path]
    binary: bool = False

    def read(self, photo: Path, images: ImagesConfig) -> tuple[Pixels, NDArray[np.uint8]] | str:
        """Return a photo and the class of each pixel (255 if ignored), or the reason for failure."""
        pixels, mask = read_photo(photo, images), read_index(self.masks[photo])
        if isinstance(pixels, BadImage):
            return pixels.reason
        if isinstance(mask, BadImage):
            return f"its mask: {mask.reason}"
        if mask.shape != pixels.shape[:2]:
            return f"it is {pixels.shape[1]}x{pixels.shape[0]}, its mask {mask.shape[1]}x{mask.shape[0]}"
        return pixels, (mask > 0).astype(np.uint8) if self.binary else mask


@dataclass(frozen=True)
class LabelledSet:
    """Training and validation pairs with their classes.

    Attributes:
        classes: Names of the classes; numbers if no file names them.
        split_off: True if `val` was drawn at random from the training photos.
        skipped: Reason for each photo without a mask or with an unreadable one.
    """

    train: Pairs
    val: Pairs
    classes: list[str]
    split_off: bool
    skipped: dict[Path, str]


def labelled_set(
    root: Path, *, seed: int = 0, report: Callable[[int, int], None] = lambda done, of: None
) -> LabelledSet:
    """Find photos and masks, and read the masks for their classes.

    Args:
        root: Folder with `train/` and `val/`, each with `images/` and `masks/`; or with `images/` and `masks/`, each
            with `train/` and `val/`, or without splits. Without splits, a tenth of the photos is held out.
            `classes.txt` may name the classes, one per line, from 0.
        seed: Seed of the validation split.
        report: Callback after each mask, with the number of masks read and the total.

    Raises:
        DinoError: If the folders do not exist, or there are too few photos or classes.
    """
    parts, skipped = dict[str, dict[Path, Path]](), dict[Path, str]()
    for part, (images, masks) in _find_folders(root).items():
        parts[part], unmatched = with_masks(named_photos([images]), MaskFolder(masks))
        skipped |= unmatched
    split_off = "val" not in parts
    if split_off:
        all_pairs = next(iter(parts.values()))
        photos = sorted(all_pairs)
        held = {photos[i] for i in np.random.default_rng(seed).permutation(len(photos))[_EVERY - 1 :: _EVERY]}
        parts = {
            "train": {p: all_pairs[p] for p in photos if p not in held},
            "val": {p: all_pairs[p] for p in sorted(held)},
        }
    counts, done, total = np.zeros(256, dtype=np.int64), 0, sum(map(len, parts.values()))
    for pairs in parts.values():
        for photo, path in list(pairs.items()):
            mask = read_index(path)
            if isinstance(mask, BadImage):
                skipped[photo] = f"its mask: {mask.reason}"
                del pairs[photo]
            else:
                counts += np.bincount(mask.ravel(), minlength=256)
            report(done := done + 1, total)
    present = np.flatnonzero(counts)
    binary = set(present.tolist()) == {0, IGNORED}
    count = 2 if binary else int(present[present != IGNORED].max(initial=0)) + 1
    if count < 2 or not all(parts.values()):
        raise DinoError(
            f"{root} has {len(parts['train'])} training and {len(parts['val'])} validation photos with masks, of "
            f"{count} classes; expected photos for both, and two classes",
            f"put photos into DATA/{IMAGES}/*.jpg, and masks with class numbers into DATA/{MASKS}/*.png",
        )
    return LabelledSet(
        Pairs(parts["train"], binary), Pairs(parts["val"], binary), _read_names(root, count, binary), split_off, skipped
    )


def _find_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of photos and of masks for each split."""
    folders_of_split: dict[str, tuple[Path, Path]] = {}
    for part, names in _SPLITS.items():
        inside = [(root / name / IMAGES, root / name / MASKS) for name in names]
        beside = [(root / IMAGES / name, root / MASKS / name) for name in names]
        existing = [folders for folders in inside + beside if folders[0].is_dir()]
        if existing:
            folders_of_split[part] = existing[0]
    return folders_of_split if "train" in folders_of_split else {"all": (root / IMAGES, root / MASKS)}


def _read_names(root: Path, count: int, binary: bool) -> list[str]:
    try:
        names = [line.strip() for line in (root / NAMES).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        names = ["background", "object"] if binary else []
    return names[:count] + [str(i) for i in range(len(names), count)]

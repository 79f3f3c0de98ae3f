"""Evaluation of detection: AUROC of photos and pixels against class folders and masks of defects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.apps.anomaly.detect import Scored, enlarged
from dinocli.core.errors import DinoError
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.masks import MaskFolder, read_object
from dinocli.evals.roc import auroc

_GOOD = ("good", "normal", "ok")  # class names of normal photos, as in MVTec AD
_PIXELS = 256  # long side of the maps and masks that the AUROC of pixels compares

Mask = NDArray[np.bool_]  # True on defects, reduced to at most 256 pixels on the long side. [h, w]


@dataclass(frozen=True)
class Truth:
    """Labels and masks of test photos.

    Attributes:
        labels: Class folder by photo; empty if the photos are not in class folders.
        normal: Class of normal photos, or None if no class is known to be.
        masks: Mask of defects by photo; all False for photos of the normal class.
        skipped: Reason by photo whose mask is missing or cannot be read.
    """

    labels: dict[str, str]
    normal: str | None
    masks: dict[str, Mask]
    skipped: dict[str, str]

    @property
    def defective(self) -> dict[str, bool]:
        """True by photo with a defect: by its class if the normal class is known, else by its mask."""
        if self.normal is not None:
            return {image: label != self.normal for image, label in self.labels.items()}
        return {image: bool(mask.any()) for image, mask in self.masks.items()}


def read_truth(names: Mapping[str, Path], normal_photos: str, good: str | None, masks: Path | None) -> Truth:
    """Find the labels and masks of test photos.

    Args:
        names: Name of each photo relative to its folder, without suffix; its first part is the class.
        normal_photos: Place of the normal photos, whose last part may name the normal class.
        good: Class of normal photos. If None, `good`, `normal`, `ok`, or the name of the normal photos' folder.
        masks: Folder of masks. If None, there are none.

    Raises:
        DinoError: If no photo has the class `good`, or no mask has the name of a photo.
    """
    inside = all(len(name.parts) > 1 for name in names.values())
    labels = {image: name.parts[0] for image, name in names.items()} if inside else {}
    classes = sorted(set(labels.values()))
    if good is not None and good not in classes:
        there = f"the classes {', '.join(classes)}" if classes else "no class folders"
        raise DinoError(f"--good {good} is no class of the test photos; they have {there}", "name one of them")
    usual = (*_GOOD, Path(normal_photos).stem.lower())
    normal = good or next((label for label in classes if label.lower() in usual), None)
    if masks is None:
        return Truth(labels, normal, {}, {})
    folder = MaskFolder(masks)
    found, skipped = dict[str, Mask](), dict[str, str]()
    some = False
    for image, name in names.items():
        place = folder.of(name)
        if normal is not None and labels[image] == normal:
            found[image] = np.zeros((1, 1), bool)  # its own mask, if any, shows no defect
        elif place is None:
            skipped[image] = f"no mask with its name in {masks}"
        else:
            some, mask = True, _read_small(place)
            if isinstance(mask, BadImage):
                skipped[image] = f"its mask: {mask.reason}"
            else:
                found[image] = mask
    if not some:
        raise DinoError(f"no mask in {masks} has the name of a test photo", "name masks like their photos, as PNG")
    return Truth(labels, normal, found, skipped)


@dataclass(frozen=True)
class Separation:
    """AUROC in percent; None if there are no labels or masks, or only normal or only defective ones.

    Attributes:
        images: AUROC of the scores of photos.
        pixels: AUROC of the distances of pixels.
        by_class: AUROC of each class of defects against the normal photos.
    """

    images: float | None
    pixels: float | None
    by_class: dict[str, float]


def evaluate(photos: Sequence[Scored], truth: Truth) -> Separation:
    """Compute the AUROC of photos, classes of defects and pixels."""
    defective, normal = truth.defective, truth.normal
    by_class = {}
    if normal is not None:
        for label in sorted(set(truth.labels.values()) - {normal}):
            some = {image: bad for image, bad in defective.items() if truth.labels[image] in (label, normal)}
            if (area := _auroc_of_images(photos, some)) is not None:
                by_class[label] = area
    return Separation(_auroc_of_images(photos, defective), _auroc_of_pixels(photos, truth), by_class)


def _auroc_of_images(photos: Sequence[Scored], defective: Mapping[str, bool]) -> float | None:
    known = [one for one in photos if one.image in defective]
    positive = np.array([defective[one.image] for one in known], bool)
    return _percent(np.array([one.score for one in known]), positive)


def _auroc_of_pixels(photos: Sequence[Scored], truth: Truth) -> float | None:
    maps, positive = [], []
    for one in photos:
        if one.image in truth.masks:
            mask = truth.masks[one.image]
            if not mask.any():  # a photo without defects counts as much as one with a mask
                rows, columns = one.distances.shape
                scale = _PIXELS / max(rows, columns)
                mask = np.zeros((max(1, round(rows * scale)), max(1, round(columns * scale))), bool)
            maps.append(enlarged(one.distances, *mask.shape).ravel())
            positive.append(mask.ravel())
    return _percent(np.concatenate(maps), np.concatenate(positive)) if maps else None


def _percent(scores: NDArray[np.floating], positive: Mask) -> float | None:
    return 100 * auroc(scores, positive) if positive.any() and not positive.all() else None


def _read_small(path: Path) -> Mask | BadImage:
    mask = read_object(path)
    if isinstance(mask, BadImage):
        return mask
    step = max(1.0, max(mask.shape) / _PIXELS)
    rows, columns = (((np.arange(max(1, round(side / step))) + 0.5) * step).astype(int) for side in mask.shape)
    return mask[np.minimum(rows, mask.shape[0] - 1)[:, None], np.minimum(columns, mask.shape[1] - 1)]

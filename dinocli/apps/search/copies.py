"""Copy detection: find the originals of cropped, compressed or otherwise edited photos, as in Copydays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinocli.apps.search.retrieval import average_precision
from dinocli.core.device import autocast
from dinocli.core.errors import DinoError
from dinocli.core.tensors import Indices
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.open import image_folder
from dinocli.data.sources.photos import read_photo
from dinocli.data.views.augment import normalize
from dinocli.evals.nearest import nearest
from dinocli.evals.units import Floats, unit
from dinocli.features.encoder import Encoder, finite_rows

ORIGINAL = "original"
_STRONG = "strong"
TOP = 20  # images ranked per query
_POWER = 4  # exponent of the generalized mean
_SMALLEST = 1e-6
_LARGE = 1e8
_FLAT = 1e-5  # smallest variance of a direction, relative to the largest


@dataclass(frozen=True)
class CopyScore:
    """Copy detection score of one kind of copies, in percent.

    Attributes:
        kind: Folder of the copies.
        queries: Number of copies.
        mean_ap: Mean over copies of the average precision, as the original tool reports it.
        micro_ap: Average precision over one ranking of all pairs by cosine; high if one threshold suits all.
    """

    kind: str
    queries: int
    mean_ap: float
    micro_ap: float


@dataclass(frozen=True)
class CopiesResult:
    """Result of copy detection.

    Attributes:
        scores: One score per kind of copies.
        distractors: Number of distractor images.
        whitened: Number of images the whitening was learned from; 0 without whitening.
        skipped: Path and reason of each image that cannot be read, or whose original cannot be read.
    """

    scores: list[CopyScore]
    originals: int
    distractors: int
    whitened: int
    skipped: dict[str, str]


def generalized_mean(patches: Tensor) -> Tensor:
    """Return the fourth root of the mean of fourth powers, with negative values clamped to 1e-6. [B, N, D] -> [B, D]"""
    positive = patches.clamp(min=_SMALLEST)
    largest = positive.amax(1, keepdim=True)
    scale = torch.where(largest > _LARGE, largest, 1)  # fourth powers of larger values overflow float32
    return (positive / scale).pow(_POWER).mean(1).pow(1 / _POWER) * scale[:, 0]


@torch.no_grad()
def describe(encoder: Encoder, images: Tensor) -> Floats:
    """Return the class token followed by the generalized mean of the patch tokens. [B, C, H, W] -> [B, 2*D]

    Source: facebookresearch/dino@7c446df eval_copy_detection.py.
    """
    with autocast(encoder.device, encoder.precision):
        [tokens] = encoder.backbone.last_tokens(images, 1)
    return torch.cat([tokens.cls.float(), generalized_mean(tokens.patches.float())], 1).cpu().numpy()


@dataclass(frozen=True)
class Whitening:
    """Linear map that gives all directions of its training features the same variance.

    Attributes:
        mean: Mean of the features. [D]
        matrix: Scaled principal directions, one per row. [D, D]
    """

    mean: Floats
    matrix: Floats

    @classmethod
    def learn(cls, values: Floats) -> Whitening:
        """Learn from features [S, D].

        The directions come from the uncentered second moments of the features, as in the original.

        Source: facebookresearch/dino@7c446df utils.py PCA, eval_copy_detection.py.
        """
        plain = values.astype(np.float64)
        sizes, directions = np.linalg.eigh(plain.T @ plain / len(plain))
        sizes = np.maximum(sizes, sizes.max() * _FLAT)
        matrix = (directions / np.sqrt(sizes)).T[::-1]
        return cls(plain.mean(0).astype(np.float32), np.ascontiguousarray(matrix, np.float32))

    def __call__(self, values: Floats) -> Floats:
        return np.asarray((values - self.mean) @ self.matrix.T, np.float32)


def copies(
    encoder: Encoder,
    folder: Path,
    *,
    distractors: Path | None = None,
    whiten: Path | None = None,
    size: int,
    batch_size: int = 16,
    report: Callable[[str, int, int], None] = lambda what, done, all: None,
) -> CopiesResult:
    """Encode originals and copies, and score how well each copy finds its original.

    Args:
        encoder: Encoder with a vision transformer of three channels.
        folder: Folder with `original/` and folders of copies at any depth, such as `strong/` and `jpegqual/3/`. The
            name of a copy equals or begins with the name of its original; in Copydays' six-digit names, the first four
            digits identify it.
        distractors: Folder of unrelated images, added to the database.
        whiten: Folder of images to learn the whitening from. If None, features are not whitened.
        size: Side in pixels to which photos are stretched.
        batch_size: Images encoded at once.
        report: Callback with the name of the current part, the number of its photos done, and their total.

    Raises:
        DinoError: If there is no `original/`, no copy, or a copy without an original.
    """
    groups = _list_groups(folder)
    skipped: dict[str, str] = {}

    def encode(files: Sequence[Path], what: str) -> tuple[list[Path], Floats]:
        return _encode(encoder, files, size, batch_size, skipped, lambda done: report(what, done, len(files)))

    encoded = {kind: encode(files, kind) for kind, files in groups.items()}
    originals, values = encoded[ORIGINAL]
    others = encode(_list_files(distractors), "distractors")[1] if distractors else values[:0]
    database = np.concatenate([values, others])
    training_values = encode(_list_files(whiten), "whitening")[1] if whiten else values[:0]
    whitening: Callable[[Floats], Floats] = (
        Whitening.learn(training_values) if len(training_values) else lambda features: features
    )
    database = unit(whitening(database))
    row_of = {file: row for row, file in enumerate(originals)}  # readable originals only
    stems = [file.stem for file in groups[ORIGINAL]]
    scores = []
    for kind, (files, queries) in encoded.items():
        originals_by_query, scored = [], []
        for query, file in enumerate(files):
            own = [groups[ORIGINAL][i] for i in originals_of(file.stem, stems, kind)]
            if rows := [row_of[original] for original in own if original in row_of]:
                originals_by_query.append(np.array(rows))
                scored.append(query)
            else:
                skipped[str(file)] = "its original cannot be read"
        if scored:
            cosines, rows_found = nearest(database, whitening(queries[scored]), min(TOP, len(database)))
            scores.append(score(kind, cosines, rows_found, originals_by_query))
    return CopiesResult(scores, len(originals), len(others), len(training_values), skipped)


def score(kind: str, cosines: Floats, rows: Indices, wanted: Sequence[Indices]) -> CopyScore:
    """Score the retrieved rows of one kind of copies.

    Args:
        kind: Name of the kind of copies.
        cosines: Cosines of the retrieved images, in descending order. [Q, K]
        rows: Rows of the retrieved images. [Q, K]
        wanted: Rows of each query's originals.
    """
    right = np.array([np.isin(found, own) for found, own in zip(rows, wanted, strict=True)])  # [Q, K]
    each = [average_precision(np.flatnonzero(r), len(own)) for r, own in zip(right, wanted, strict=True)]
    return CopyScore(
        kind, len(rows), 100 * float(np.mean(each)), 100 * _average_all_pairs(cosines, right, sum(map(len, wanted)))
    )


def _average_all_pairs(cosines: Floats, right: NDArray[np.bool_], wanted: int) -> float:
    """Return the average precision over one ranking of all pairs."""
    order = np.argsort(-cosines, axis=None, kind="stable")
    hits = right.ravel()[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].sum() / wanted)


def originals_of(stem: str, originals: Sequence[str], kind: str) -> Indices:
    """Return the rows of a copy's originals: those with its name, else those whose name is a prefix of its name.

    In Copydays' `strong` copies, the first four of six digits identify the original. For other kinds,
    the source relies on the order of files; here, the four digits must belong to exactly one original.

    Args:
        stem: Name of the copy, without suffix.
        originals: Names of the originals, without suffix.
        kind: Kind of the copy.

    Raises:
        DinoError: If the copy has no original.

    Source: facebookresearch/dino@7c446df eval_copy_detection.py.
    """
    rows = [i for i, name in enumerate(originals) if name == stem]
    if not rows and len(stem) == 6 and stem.isdecimal():
        same = [i for i, name in enumerate(originals) if name[:4] == stem[:4]]
        rows = same if kind == _STRONG or len(same) == 1 else []
    if not rows:  # `car10_crop` belongs to `car10`, not to `car1`
        begins = [i for i, name in enumerate(originals) if stem.startswith(name)]
        longest = max((len(originals[i]) for i in begins), default=0)
        rows = [i for i in begins if len(originals[i]) == longest]
    if not rows:
        raise DinoError(f"the copy {stem} has no original", f"begin its name with that of its original in {ORIGINAL}/")
    return np.array(rows)


def _list_groups(folder: Path) -> dict[str, list[Path]]:
    """Return the files of the originals and of each kind of copies, by folder."""
    groups: dict[str, list[Path]] = {ORIGINAL: []}
    for name in image_folder(folder).names:
        groups.setdefault(PurePosixPath(name).parent.as_posix(), []).append(folder / name)
    if not groups[ORIGINAL] or len(groups) < 2:
        raise DinoError(
            f"{folder} has {', '.join(groups)}; expected {ORIGINAL}/ and folders of copies"
            if groups[ORIGINAL]
            else f"{folder} has no {ORIGINAL}/; expected {ORIGINAL}/ and folders of copies",
            "use the layout of Copydays: original/, strong/, jpegqual/3/, crops/10/, ...",
        )
    return groups


def _list_files(folder: Path) -> list[Path]:
    return [folder / name for name in image_folder(folder).names]


def _encode(
    encoder: Encoder,
    files: Sequence[Path],
    size: int,
    batch_size: int,
    skipped: dict[str, str],
    report: Callable[[int], None],
) -> tuple[list[Path], Floats]:
    """Return the readable files and their features; add the others to `skipped`."""
    mean, std = (torch.tensor(v, device=encoder.device) for v in (encoder.mean, encoder.std))
    readable: list[Path] = []
    parts: list[Floats] = []
    for first in range(0, len(files), batch_size):
        photos, names = [], []
        for file in files[first : first + batch_size]:
            pixels = read_photo(file, encoder.images)
            if isinstance(pixels, BadImage):
                skipped[str(file)] = pixels.reason
                continue
            photos.append(np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)))
            names.append(str(file))
        if photos:
            batch = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).to(encoder.device).float() / 255
            features = describe(encoder, normalize(batch, mean, std))
            finite, not_finite = finite_rows(torch.from_numpy(features), names)
            parts.append(features[finite])
            readable += [Path(names[i]) for i in finite]
            skipped |= dict(not_finite)
        report(min(len(files), first + batch_size))
    if not readable:
        raise DinoError(f"none of {len(files)} photos, such as {files[0]}, can be read", "check that file")
    return readable, np.concatenate(parts)

"""Copies: photos that were cropped, compressed or worse are to be found by their originals, as Copydays asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinocli.data.augment import normalize
from dinocli.data.decode import BadImage
from dinocli.data.named import read_photo
from dinocli.data.sources import image_folder
from dinocli.device import autocast
from dinocli.encoder import Encoder, finite_rows
from dinocli.errors import DinoError
from dinocli.evals.nearest import nearest
from dinocli.evals.retrieval import average_precision
from dinocli.evals.units import Floats, unit
from dinocli.mapped import Indices

ORIGINAL = "original"
_STRONG = "strong"
TOP = 20  # images that are looked at for each query
_POWER = 4  # of the generalized mean
_LEAST = 1e-6
_LARGE = 1e8
_FLAT = 1e-5  # times the largest variance: directions with less are taken to have that much


@dataclass(frozen=True)
class CopyScore:
    """How well the originals of one kind of copies were found, in percent.

    Attributes:
        kind: Folder of the copies.
        queries: How many copies there are.
        mean_ap: Mean over copies of the average precision, as the original tool reports it.
        micro_ap: Average precision of all pairs in one ranking by their cosine: it asks for one threshold.
    """

    kind: str
    queries: int
    mean_ap: float
    micro_ap: float


@dataclass(frozen=True)
class CopiesResult:
    """Copy detection.

    Attributes:
        scores: One a kind.
        originals: Images to be found.
        distractors: Images among them that are none.
        whitened: Images by which the features were whitened; 0 where they were not.
        skipped: Path and reason of each image that cannot be read, or whose original cannot.
    """

    scores: list[CopyScore]
    originals: int
    distractors: int
    whitened: int
    skipped: dict[str, str]


def generalized_mean(patches: Tensor) -> Tensor:
    """The fourth root of the mean of fourth powers of what is positive. [B, N, D] -> [B, D]"""
    positive = patches.clamp(min=_LEAST)
    largest = positive.amax(1, keepdim=True)
    scale = torch.where(largest > _LARGE, largest, 1)  # fourth powers of more overflow float32
    return (positive / scale).pow(_POWER).mean(1).pow(1 / _POWER) * scale[:, 0]


@torch.no_grad()
def describe(encoder: Encoder, images: Tensor) -> Floats:
    """Class token, and the generalized mean of the patch tokens behind it. [B, C, H, W] -> [B, 2*D]

    Source: facebookresearch/dino@7c446df eval_copy_detection.py.
    """
    with autocast(encoder.device, encoder.precision):
        [tokens] = encoder.backbone.blocks(images, 1)
    return torch.cat([tokens.cls.float(), generalized_mean(tokens.patches.float())], 1).cpu().numpy()


@dataclass(frozen=True)
class Whitening:
    """Turns features so that those it was learned from vary by as much in each direction.

    Attributes:
        mean: [D]
        matrix: A direction a row. [D, D]
    """

    mean: Floats
    matrix: Floats

    @classmethod
    def learn(cls, values: Floats) -> Whitening:
        """Of features [S, D].

        The directions are those of the products of the features as they are, without their mean taken off, as the
        original has it.

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
    """Encode originals and copies, and look how well each copy finds its original.

    Args:
        encoder: A vision transformer of three channels.
        folder: With `original/`, and folders of copies of any depth, such as `strong/` and `jpegqual/3/`. A copy's name
            is that of its original or begins with it; of six digits, as Copydays has them, the first four tell it.
        distractors: Folder of images that are no originals, among which these are to be found.
        whiten: Folder of images to learn the whitening from; absent, there is none.
        size: To which photos are stretched, in pixels a side.
        batch_size: Images at once.
        report: Called with what is done, how many photos of it, and of how many.

    Raises:
        DinoError: There is no `original/`, no copy, or a copy without an original.
    """
    groups = _groups(folder)
    skipped: dict[str, str] = {}

    def encode(files: Sequence[Path], what: str) -> tuple[list[Path], Floats]:
        return _encode(encoder, files, size, batch_size, skipped, lambda done: report(what, done, len(files)))

    found = {kind: encode(files, kind) for kind, files in groups.items()}
    originals, values = found[ORIGINAL]
    others = encode(_files(distractors), "distractors")[1] if distractors else values[:0]
    database = np.concatenate([values, others])
    learned = encode(_files(whiten), "whitening")[1] if whiten else values[:0]
    whitening: Callable[[Floats], Floats] = Whitening.learn(learned) if len(learned) else lambda same: same
    database = unit(whitening(database))
    row_of = {file: row for row, file in enumerate(originals)}  # of those that can be read
    stems = [file.stem for file in groups[ORIGINAL]]
    scores = []
    for kind, (files, queries) in found.items():
        wanted, asked = [], []
        for query, file in enumerate(files):
            own = [groups[ORIGINAL][i] for i in originals_of(file.stem, stems, kind)]
            if rows := [row_of[original] for original in own if original in row_of]:
                wanted.append(np.array(rows))
                asked.append(query)
            else:
                skipped[str(file)] = "its original cannot be read"
        if asked:
            cosines, nearby = nearest(database, whitening(queries[asked]), min(TOP, len(database)))
            scores.append(score(kind, cosines, nearby, wanted))
    return CopiesResult(scores, len(originals), len(others), len(learned), skipped)


def score(kind: str, cosines: Floats, rows: Indices, wanted: Sequence[Indices]) -> CopyScore:
    """How well originals were found.

    Args:
        kind: Of copies.
        cosines: Of what was found, the nearest first. [Q, K]
        rows: Of what was found. [Q, K]
        wanted: Rows of each query's originals.
    """
    right = np.array([np.isin(found, own) for found, own in zip(rows, wanted, strict=True)])  # [Q, K]
    each = [average_precision(np.flatnonzero(r), len(own)) for r, own in zip(right, wanted, strict=True)]
    return CopyScore(kind, len(rows), 100 * float(np.mean(each)), 100 * _micro(cosines, right, sum(map(len, wanted))))


def _micro(cosines: Floats, right: NDArray[np.bool_], wanted: int) -> float:
    """Mean over all that is wanted of the precision where it was found, in one ranking of all pairs."""
    order = np.argsort(-cosines, axis=None, kind="stable")
    hits = right.ravel()[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].sum() / wanted)


def originals_of(stem: str, originals: Sequence[str], kind: str) -> Indices:
    """Rows of the originals of a copy by its name: of the same, else of what it begins with.

    Copydays names its `strong` copies otherwise: of six digits the first four tell the original. Elsewhere, where the
    source goes by the order of the files, they do so if there is but one such original.

    Args:
        stem: Name of the copy, without suffix.
        originals: Names of the originals, without suffix.
        kind: Of the copy.

    Raises:
        DinoError: It has none.

    Source: facebookresearch/dino@7c446df eval_copy_detection.py.
    """
    rows = [i for i, name in enumerate(originals) if name == stem]
    if not rows and len(stem) == 6 and stem.isdecimal():
        same = [i for i, name in enumerate(originals) if name[:4] == stem[:4]]
        rows = same if kind == _STRONG or len(same) == 1 else []
    if not rows:  # `car10_crop` is of `car10` and not of `car1`
        begins = [i for i, name in enumerate(originals) if stem.startswith(name)]
        longest = max((len(originals[i]) for i in begins), default=0)
        rows = [i for i in begins if len(originals[i]) == longest]
    if not rows:
        raise DinoError(
            f"the copy {stem} has no original", f"name it as its original in {ORIGINAL}/, with more behind it"
        )
    return np.array(rows)


def _groups(folder: Path) -> dict[str, list[Path]]:
    """Files of the originals and of each kind of copies, by their folder."""
    groups: dict[str, list[Path]] = {ORIGINAL: []}
    for name in image_folder(folder).names:
        groups.setdefault(PurePosixPath(name).parent.as_posix(), []).append(folder / name)
    if not groups[ORIGINAL] or len(groups) < 2:
        raise DinoError(
            f"a folder with {ORIGINAL}/ and folders of copies was wanted; {folder} has {', '.join(groups)}"
            if groups[ORIGINAL]
            else f"a folder with {ORIGINAL}/ and folders of copies was wanted; {folder} has no {ORIGINAL}/",
            "the layout of Copydays: original/, strong/, jpegqual/3/, crops/10/, ...",
        )
    return groups


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in image_folder(folder).names]


def _encode(
    encoder: Encoder,
    files: Sequence[Path],
    size: int,
    batch_size: int,
    skipped: dict[str, str],
    report: Callable[[int], None],
) -> tuple[list[Path], Floats]:
    """Those that can be read, and their features; the others go to `skipped`."""
    mean, std = (torch.tensor(v, device=encoder.device) for v in (encoder.mean, encoder.std))
    kept: list[Path] = []
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
            made = describe(encoder, normalize(batch, mean, std))
            finite, lost = finite_rows(torch.from_numpy(made), names)
            parts.append(made[finite])
            kept += [Path(names[i]) for i in finite]
            skipped |= dict(lost)
        report(min(len(files), first + batch_size))
    if not kept:
        raise DinoError(f"none of the {len(files)} photos beside {files[0]} can be read", "look at that file")
    return kept, np.concatenate(parts)

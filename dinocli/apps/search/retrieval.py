"""Retrieval: mean average precision in the protocol of the revisited Oxford and Paris sets."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from dinocli.core.errors import DinoError
from dinocli.core.tensors import Indices
from dinocli.data.decode.pixels import BadImage
from dinocli.data.sources.photos import read_photo
from dinocli.data.views.augment import normalize
from dinocli.evals.units import Floats, unit
from dinocli.features.encoder import Encoder, finite_rows

Level = Literal["easy", "medium", "hard"]
LEVELS: tuple[Level, ...] = ("easy", "medium", "hard")
KS = (1, 5, 10)
_SCALES = (1.0, 2**-0.5, 0.5)  # as in the original's --multiscale
_EXPECTED = "expected a file with imlist, qimlist and gnd, such as gnd_roxford5k.pkl or the same as JSON"


@dataclass(frozen=True)
class GroundTruth:
    """Ground truth of a retrieval set.

    Attributes:
        images: Names of the database's images, without suffix.
        queries: Names of the query images.
        easy: Image numbers per query that show the same object and are easily found.
        hard: Image numbers per query that show the same object and are hard to find.
        junk: Image numbers per query that count neither as correct nor as wrong.
    """

    images: list[str]
    queries: list[str]
    easy: list[Indices]
    hard: list[Indices]
    junk: list[Indices]

    def at(self, level: Level, query: int) -> tuple[Indices, Indices]:
        """Return the correct images of a query at a level, and the images to remove from its ranking."""
        easy, hard, junk = self.easy[query], self.hard[query], self.junk[query]
        none = np.empty(0, np.int64)
        correct = {"easy": (easy, none), "medium": (easy, hard), "hard": (none, hard)}[level]
        ignored = {"easy": (junk, hard), "medium": (junk, none), "hard": (junk, easy)}[level]
        return np.concatenate(correct), np.concatenate(ignored)


@dataclass(frozen=True)
class RetrievalScore:
    """Retrieval score of one level, in percent.

    Attributes:
        level: Difficulty.
        mean_ap: Mean over queries of the average precision; None without queries.
        precisions: Mean precision among the first 1, 5 and 10; None without queries.
        queries: Number of queries with correct images.
    """

    level: Level
    mean_ap: float | None
    precisions: list[float] | None
    queries: int


def read_ground_truth(path: Path) -> GroundTruth:
    """Read `gnd_roxford5k.pkl`, `gnd_rparis6k.pkl`, or the same as JSON.

    A pickle is read without executing its code: only lists, dictionaries, texts, numbers and arrays are allowed.

    Raises:
        DinoError: If there is no such file, or it has another format.
    """
    try:
        with path.open("rb") as file:
            data = (
                json.load(file) if path.suffix.lower() == ".json" else _PlainUnpickler(file, encoding="latin1").load()
            )
        images, queries = ([str(name) for name in data[key]] for key in ("imlist", "qimlist"))
        rows = {
            key: [_parse_rows(each.get(key, ()), len(images)) for each in data["gnd"]]
            for key in ("easy", "hard", "junk")
        }
        if len(data["gnd"]) != len(queries) or not queries or not images:
            raise ValueError(f"it has {len(queries)} queries, but ground truth for {len(data['gnd'])}")
    except FileNotFoundError:
        raise DinoError(f"{path} does not exist; {_EXPECTED}", "check the path") from None
    # The reader of a corrupt pickle may raise nearly any exception.
    except Exception as error:
        raise DinoError(
            f"{path} is invalid: {error}; {_EXPECTED}", "use the file that comes with the data set"
        ) from error
    return GroundTruth(images, queries, rows["easy"], rows["hard"], rows["junk"])


def _parse_rows(numbers: Any, count: int) -> Indices:
    rows = np.asarray(numbers, dtype=np.float64).ravel().astype(np.int64)  # via float64, the type of an empty list
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise ValueError(f"it refers to an image beyond the {count} of imlist")
    return rows


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that allows only numpy arrays, numbers and bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}[name]
        # Old pickle protocols write bytes, and empty bytes, in these two ways.
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if (module, name) == ("__builtin__", "bytes"):
            return lambda: b""
        raise pickle.UnpicklingError(f"it contains more than plain numbers: {module}.{name}")


def average_precision(positions: NDArray[np.integer[Any]], wanted: int) -> float:
    """Compute the area under the precision-recall curve by trapezoids.

    Args:
        positions: Ranks of the correct images that were found, ascending, from 0. [P]
        wanted: Number of correct images.

    Source: filipradenovic/revisitop evaluate.py; facebookresearch/dino@7c446df utils.py, eval_copy_detection.py.
    """
    found = np.arange(len(positions))
    before = np.where(positions == 0, 1.0, found / np.maximum(positions, 1))
    after = (found + 1) / (positions + 1)
    return float((before + after).sum() / (2 * wanted))


def scores(cosines: Floats, truth: GroundTruth) -> list[RetrievalScore]:
    """Compute mean average precision and precisions for each level.

    Args:
        cosines: Cosines of queries and images; NaN for unreadable ones. Unreadable images are not ranked, and queries
            without any finite cosine are skipped. [Q, S]
        truth: Ground truth of the set.

    Source: filipradenovic/revisitop; facebookresearch/dino@7c446df eval_image_retrieval.py.
    """
    ranks = np.argsort(-cosines, axis=1, kind="stable")
    results = []
    for level in LEVELS:
        values = []
        for query, ranked in enumerate(ranks):
            correct, ignored = truth.at(level, query)
            readable = ranked[np.isfinite(cosines[query, ranked])]
            if len(correct) and len(readable):
                values.append(_score_query(readable, correct, ignored))
        if values:
            means = 100 * np.mean(values, axis=0)
            results.append(RetrievalScore(level, float(means[0]), means[1:].tolist(), len(values)))
        else:
            results.append(RetrievalScore(level, None, None, 0))
    return results


def _score_query(ranked: Indices, correct: Indices, ignored: Indices) -> list[float]:
    judged = ranked[~np.isin(ranked, np.setdiff1d(ignored, correct))]  # remove junk from the ranking
    positions = np.flatnonzero(np.isin(judged, correct))
    # k is at most the rank of the last correct image, if all correct images are in the ranking.
    last_rank = int(positions[-1]) + 1 if len(positions) == len(correct) else max(KS)
    ranks = [min(k, last_rank) for k in KS]
    return [average_precision(positions, len(correct)), *(float((positions < k).sum() / k) for k in ranks)]


def features_of_files(
    encoder: Encoder,
    files: Sequence[Path],
    *,
    size: int,
    multiscale: bool = False,
    report: Callable[[int], None] = lambda images: None,
) -> tuple[Floats, dict[str, str]]:
    """Return unit class tokens of photos in their own aspect ratio, one photo at a time, as in the original.

    Args:
        encoder: Encoder of three channels.
        files: Photo files.
        size: Longest side in pixels; smaller photos keep their size.
        multiscale: Sum the features at three sizes.
        report: Callback after each photo, with the number done.

    Returns:
        Features [S, D], with NaN for unreadable photos; path and reason of each unreadable photo.
    """
    rows: list[Floats | None] = []
    skipped: dict[str, str] = {}
    for done, file in enumerate(files, 1):
        feature = _encode_photo(encoder, file, size, multiscale)
        if isinstance(feature, BadImage):
            skipped[str(file)] = feature.reason
        rows.append(None if isinstance(feature, BadImage) else feature)
        report(done)
    width = next((len(row) for row in rows if row is not None), 0)
    if not width:
        path, reason = next(iter(skipped.items()))
        raise DinoError(
            f"none of the {len(files)} photos can be read; {path}: {reason}", "name their folder with --data"
        )
    return np.stack([np.full(width, np.nan, np.float32) if row is None else row for row in rows]), skipped


def _encode_photo(encoder: Encoder, file: Path, size: int, multiscale: bool) -> Floats | BadImage:
    pixels = read_photo(file, encoder.images)
    if isinstance(pixels, BadImage):
        return pixels
    photo = Image.fromarray(pixels)
    photo.thumbnail((size, size), Image.Resampling.LANCZOS)
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].to(encoder.device).float() / 255  # [1, 3, h, w]
    mean, std = (torch.tensor(v, device=encoder.device) for v in (encoder.mean, encoder.std))
    image = normalize(image, mean, std)
    tokens = []
    for scale in _SCALES[: 3 if multiscale else 1]:
        scaled = F.interpolate(image, scale_factor=scale, mode="bilinear") if scale < 1 else image
        patch = encoder.backbone.patch_size
        height, width = (side // patch * patch for side in scaled.shape[-2:])
        if not height or not width:
            return BadImage(f"too small: {photo.width}x{photo.height} pixels, below a patch of {patch}")
        tokens.append(encoder.features(scaled[..., :height, :width]).float())
    total = torch.stack(tokens).sum(0).cpu()  # [1, D]
    for _, reason in finite_rows(total, [str(file)])[1]:
        return BadImage(reason)
    return unit(total.numpy())[0]


def retrieval(
    encoder: Encoder,
    truth: GroundTruth,
    folder: Path,
    *,
    size: int,
    multiscale: bool = False,
    report: Callable[[int], None] = lambda images: None,
) -> tuple[list[RetrievalScore], dict[str, str]]:
    """Encode a set's images and queries, rank, and score.

    Unreadable images are never found, and unreadable queries are skipped. Queries are full photos, as in DINO's script;
    figures published elsewhere use queries cropped to their `bbx`.

    Args:
        encoder: Encoder of three channels.
        truth: Ground truth of the set.
        folder: Images of the benchmark, by the names in its ground truth.
        size: Longest side in pixels.
        multiscale: Sum the features at three sizes.
        report: Callback after each photo, with the number done.

    Returns:
        Scores, and path and reason of each unreadable image.

    Raises:
        DinoError: If no photo can be read.
    """
    names = [*truth.images, *truth.queries]
    files = [
        folder / (name if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png") else f"{name}.jpg") for name in names
    ]
    values, skipped = features_of_files(encoder, files, size=size, multiscale=multiscale, report=report)
    images, queries = values[: len(truth.images)], values[len(truth.images) :]
    with np.errstate(invalid="ignore"):  # rows of unreadable photos are NaN
        cosines = queries @ images.T
    return scores(cosines, truth), skipped

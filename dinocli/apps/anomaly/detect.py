"""Detection: distances of patches to a memory bank, and scores of photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dinocli.apps.anomaly.bank import Bank, BankSettings, select
from dinocli.core.errors import DinoError
from dinocli.core.tensors import Indices
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.regular import why_unread
from dinocli.evals.nearest import nearest
from dinocli.evals.units import Floats, unit
from dinocli.features.encoder import Encoder, NotFinite
from dinocli.features.store import Provenance

CANDIDATES = 100_000  # patches of normal photos to select from; limits memory and time
SHARE, LARGEST = 0.1, 10_000  # default size of a bank: share of the candidates, and largest number
_COMPARED = 200  # normal photos whose own scores are computed


@dataclass(frozen=True)
class Scored:
    """Photo compared with a bank.

    Attributes:
        image: Path of the photo.
        score: Mean distance (1 - cosine) of its most distant patches.
        percentile: Percent of normal photos with a lower score.
        distances: Distance of each patch to its nearest patch of the bank. [rows, columns]
    """

    image: str
    score: float
    percentile: float
    distances: Floats


@dataclass(frozen=True)
class Found:
    """Photos compared with a bank, in the order of their source; `skipped` has the reason of each other photo."""

    photos: list[Scored]
    skipped: dict[str, str]


def build(
    encoder: Encoder,
    normal: Images,
    settings: BankSettings,
    *,
    count: int | None = None,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Bank, dict[str, str]]:
    """Build a bank from normal photos.

    Args:
        encoder: Frozen network whose patch features are stored.
        normal: Photos without defects.
        settings: Settings of features and scores.
        count: Number of patches in the bank. If None, a tenth of those of the photos, at most `LARGEST`.
        seed: Seed of the sampled patches and of the coreset's start.
        report: Callback with the name of the current part, the number done, and the total.

    Returns:
        The bank, and the reason of each photo that cannot be read.

    Raises:
        DinoError: If fewer than two photos can be read.

    Source: Roth et al., arXiv 2106.08265 (PatchCore); cosines as in Damm et al., arXiv 2405.14529.
    """
    rng, skipped = np.random.default_rng(seed), dict[str, str]()
    most = max(1, CANDIDATES // len(normal))  # patches per photo
    parts: list[Floats] = []
    rows: list[int] = []  # of the photos in `normal`
    for row in range(len(normal)):
        patches = _patches_of(encoder, normal, row, settings)
        if isinstance(patches, str):
            skipped[normal.names[row]] = patches
        else:
            flat = patches.reshape(-1, patches.shape[-1])
            parts.append(flat if len(flat) <= most else flat[rng.choice(len(flat), most, replace=False)])
            rows.append(row)
        report("encode normal photos", row + 1, len(normal))
    if len(rows) < 2:
        why = next((f"; {name}: {reason}" for name, reason in skipped.items()), "")
        raise DinoError(
            f"{normal.where} has {len(rows)} readable photos; expected at least two normal ones{why}",
            "name a folder of normal photos",
        )
    candidates = np.concatenate(parts)
    owners = np.repeat(rows, [len(part) for part in parts])
    wanted = min(len(candidates), count or min(LARGEST, round(SHARE * len(candidates)) or 1))
    kept = select(
        candidates, wanted, device=encoder.device, seed=seed, report=lambda done: report("select patches", done, wanted)
    )
    patches, owners = candidates[kept], owners[kept]
    scores, distances = [], []
    compared = np.linspace(0, len(rows) - 1, min(len(rows), _COMPARED)).round().astype(int)
    for done, row in enumerate((rows[i] for i in compared), 1):
        own = _patches_of(encoder, normal, row, settings)
        others = np.flatnonzero(owners != row)
        if not isinstance(own, str) and len(others):
            distances.append(_distances(own, patches, others))
            scores.append(_score(distances[-1], settings.area))
        report("score normal photos", done, len(compared))
    if not scores:
        raise DinoError(
            f"a bank of {wanted} patches holds those of one photo only; expected patches of several",
            f"use --coreset {max(100, 10 * wanted)}",
        )
    provenance = Provenance(
        encoder.source, encoder.fingerprint, "patches", len(settings.layers), settings.short_side, normal.where,
        run=encoder.run, step=encoder.step,
    )  # fmt: skip
    usual = float(np.median(np.concatenate([one.ravel() for one in distances])))
    return Bank(patches, np.array(scores, np.float32), usual, settings, provenance), skipped


def detect(encoder: Encoder, bank: Bank, photos: Images, report: Callable[[int], None] = lambda done: None) -> Found:
    """Compare photos with a bank.

    Args:
        encoder: Encoder that made the bank.
        bank: Patches of normal photos.
        photos: Photos of any size.
        report: Callback with the number of photos done.

    Raises:
        DinoError: If no photo can be read.
    """
    found, skipped = list[Scored](), dict[str, str]()
    for row, name in enumerate(photos.names):
        patches = _patches_of(encoder, photos, row, bank.settings)
        if isinstance(patches, str):
            skipped[name] = patches
        else:
            distances = _distances(patches, bank.patches)
            score = _score(distances, bank.settings.area)
            found.append(Scored(name, score, bank.percentile(score), distances))
        report(row + 1)
    if not found:
        name, reason = next(iter(skipped.items()))
        raise DinoError(f"none of the photos can be read; {name}: {reason}", "name photos such as a .jpg")
    return Found(found, skipped)


def enlarged(distances: Floats, height: int, width: int) -> Floats:
    """Enlarge a map by linear interpolation. [rows, columns] -> [height, width]"""
    return np.asarray(Image.fromarray(distances).resize((width, height), Image.Resampling.BILINEAR))


def read_pixels(photos: Images, row: int, encoder: Encoder) -> Pixels | BadImage:
    """Read a photo of a source, or return the reason why it cannot be read. [H, W, C]"""
    try:
        return decode(photos.read(row, encoder.images), encoder.images)
    except OSError as error:
        return BadImage(why_unread(error))


def _patches_of(encoder: Encoder, photos: Images, row: int, settings: BankSettings) -> Floats | str:
    """Return the patch features of a photo, of length 1, or the reason why there are none. [rows, columns, D]"""
    pixels = read_pixels(photos, row, encoder)
    if isinstance(pixels, BadImage):
        return pixels.reason
    try:
        found = encoder.patches(encoder.photo(pixels, settings.short_side), settings.layers)[0].cpu().numpy()
    except NotFinite as error:
        return error.reason
    return unit(found.reshape(-1, found.shape[-1])).reshape(found.shape)


def _distances(patches: Floats, bank: Floats, among: Indices | None = None) -> Floats:
    cosines, _ = nearest(bank, patches.reshape(-1, patches.shape[-1]), 1, among=among)
    return (1 - cosines[:, 0]).reshape(patches.shape[:2])


def _score(distances: Floats, area: float) -> float:
    flat = np.sort(distances.ravel())
    return float(flat[-max(1, round(area * flat.size)) :].mean())

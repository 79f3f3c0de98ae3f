"""Features of photos, made with the weights and settings of stored features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import Source
from dinocli.features.encoder import Encoder, finite_rows
from dinocli.features.store import Provenance


@dataclass(frozen=True)
class Encoded:
    """Features of photos.

    Attributes:
        names: Names of the readable photos. [Q]
        values: Features of the readable photos. [Q, D]
        skipped: Path and reason of each unreadable photo.
    """

    names: list[str]
    values: NDArray[np.float32]
    skipped: dict[str, str]


def same_encoder(
    encoder: Encoder,
    provenance: Provenance,
    whose: str = "the features were",
    hint: str = "use --checkpoint with the one that made them, or extract again",
) -> None:
    """Check that an encoder has the weights that made the features.

    Args:
        encoder: Encoder to check.
        provenance: Provenance of the features.
        whose: Start of the error message, before "made by".
        hint: Hint of the error: how to get the weights that made the features.

    Raises:
        DinoError: If it has other weights.
    """
    if encoder.fingerprint != provenance.fingerprint:
        raise DinoError(
            f"{whose} made by {provenance.source} ({provenance.fingerprint}); {encoder.source} has other weights "
            f"({encoder.fingerprint})",
            hint,
        )


def encode(
    encoder: Encoder,
    source: Source,
    provenance: Provenance,
    *,
    batch_size: int = 64,
    workers: int = 0,
    report: Callable[[int], None] = lambda images: None,
) -> Encoded:
    """Encode photos with the settings of stored features.

    Args:
        encoder: Encoder that made the stored features; see `same_encoder`.
        source: Photos to encode.
        provenance: Settings of the stored features.
        batch_size: Images encoded at once.
        workers: Number of decoding processes.
        report: Callback after each batch, with the number of photos done.

    Raises:
        DinoError: If no photo can be read.
    """
    names: list[str] = []
    values: list[NDArray[np.float32]] = []
    skipped: dict[str, str] = {}
    for batch in encoder.batches(source, size=provenance.size, batch_size=batch_size, workers=workers):
        if batch.names:
            tokens = encoder.features(batch.images, provenance.tokens, provenance.blocks)  # type: ignore[arg-type]
            features = tokens.float().cpu()
            finite, not_finite = finite_rows(features, batch.names)
            values.append(features[finite].numpy())
            names += [batch.names[i] for i in finite]
            skipped |= dict(not_finite)
        skipped |= dict(batch.bad)
        report(len(names) + len(skipped))
    if not names:
        path, reason = next(iter(skipped.items()))
        raise DinoError(f"none of the photos can be read; {path}: {reason}", "name a photo such as a .jpg")
    return Encoded(names, np.concatenate(values), skipped)

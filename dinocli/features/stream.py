"""Features of many images as a torch data set, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.utils.data import IterableDataset

from dinocli.data.sources.open import Source
from dinocli.features.inputs import unreadable

if TYPE_CHECKING:
    from dinocli.features.encoder import Encoder, TokenChoice


class EncodedBatch(NamedTuple):
    """Features of a batch.

    Attributes:
        features: Features as of `Encoder.features`, on the encoder's device. [B, ...]
        names: Names of the images, relative to their source. [B]
        labels: Class index of each image, -1 if unlabelled. [B]
    """

    features: Tensor
    names: list[str]
    labels: list[int]


class EncodedImages(IterableDataset[EncodedBatch]):
    """Features of a source's images, computed on the way; only one batch is in memory.

    Args:
        encoder: Encoder.
        source: Images.
        tokens: Kind of tokens.
        blocks: Number of last blocks whose tokens are used.
        size: Side of the images, in pixels.
        batch_size: Images per batch.
        workers: Number of decoding processes.
        skip_bad: If True, skip images that cannot be read; else they are an error.

    Attributes:
        source: Images; `source.classes` names the classes.
        bad: Name and reason of each image skipped so far.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: Source,
        *,
        tokens: TokenChoice,
        blocks: int,
        size: int,
        batch_size: int,
        workers: int,
        skip_bad: bool,
    ) -> None:
        self.source, self.bad = source, dict[str, str]()
        self._encoder, self._tokens, self._blocks = encoder, tokens, blocks
        self._size, self._batch_size, self._workers, self._skip_bad = size, batch_size, workers, skip_bad

    def __iter__(self) -> Iterator[EncodedBatch]:
        """Yield the batches in the source's order.

        Raises:
            DinoError: If an image cannot be read and `skip_bad` is False.
        """
        batches = self._encoder.batches(
            self.source, size=self._size, batch_size=self._batch_size, workers=self._workers
        )
        for batch in batches:
            for name, reason in batch.bad:
                if not self._skip_bad:
                    raise unreadable(name, reason)
                self.bad[name] = reason
            if batch.names:
                features = self._encoder.features(batch.images, self._tokens, self._blocks)
                yield EncodedBatch(features, batch.names, batch.labels)

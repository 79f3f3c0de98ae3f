"""Order of the images of an epoch: each once, or a share of each epoch from each source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

# No image has this number, so the order shares no random numbers with the views of an image.
_ORDER = 2**63 - 1


def epoch_order(
    images: int,
    mixture: Sequence[tuple[range, float]],
    seed: int,
    epoch: int,
    blocks: tuple[NDArray[np.int64], int] | None = None,
) -> tuple[Rows, Rows]:
    """Return the rows of an epoch in order, and the number of times that each was drawn before.

    Without a mixture, each image occurs once. With one, each source has its share of `images` draws, within one image
    in any part of the epoch. Each image of a source is drawn once before any is drawn again, across epochs.

    Args:
        images: Number of images in all sources, and of draws in an epoch.
        mixture: Rows and share of each source; the shares sum to 1.
        seed: Seed of the order.
        epoch: Index of the epoch.
        blocks: Ends of runs of rows that are read together, and number of runs to shuffle together: then runs come in
            random order, and so do the rows of so many consecutive runs. Runs of one row come at any place between
            them. A run is of one source. If None, all rows are shuffled.
    """
    ends, together = blocks or (np.arange(1, images + 1), 1)
    if not mixture:
        return _shuffle(ends, together, np.random.default_rng((seed, epoch, _ORDER))), np.full(images, epoch, np.int64)
    drawn, passes, keys = list[Rows](), list[Rows](), list[NDArray[np.float64]]()
    counts = _apportion(images, [share for _, share in mixture])
    for source, ((rows, _), count) in enumerate(zip(mixture, counts, strict=True)):
        first = epoch * count
        before = np.arange(first, first + count) // len(rows)
        inside = ends[(ends > rows.start) & (ends <= rows.stop)] - rows.start
        shuffled = [
            _shuffle(inside, together, np.random.default_rng((seed, number, _ORDER - 1 - source)))
            for number in range(first // len(rows), -(-(first + count) // len(rows)))
        ]
        begin = first % len(rows)
        drawn.append(rows.start + np.concatenate([*shuffled, np.empty(0, np.int64)])[begin : begin + count])
        passes.append(before)
        # One draw in each of `count` equal parts of the epoch keeps the shares in every part of it.
        jitter = np.random.default_rng((seed, epoch, _ORDER - 1 - source, 1)).random(count)
        keys.append((np.arange(count) + jitter) / max(1, count))
    order = np.argsort(np.concatenate(keys), kind="stable")
    return np.concatenate(drawn)[order], np.concatenate(passes)[order]


def _shuffle(ends: NDArray[np.int64], together: int, generator: np.random.Generator) -> Rows:
    starts = np.append(0, ends[:-1])
    alone = ends - starts == 1
    runs = [np.arange(*run) for run in generator.permutation(np.stack([starts, ends], 1)[~alone]).tolist()]
    windows = [np.concatenate(runs[at : at + together]) for at in range(0, len(runs), together)]
    grouped = [generator.permutation(window) for window in windows]
    single = generator.permutation(starts[alone])
    if not grouped:
        return single
    # Rows of a source without runs are spread evenly over the epoch, and do not cut the runs' order.
    found = np.empty(ends[-1], np.int64)
    places = generator.permutation(len(found)) < len(single)
    found[places], found[~places] = single, np.concatenate(grouped)
    return found


def _apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers that sum to `total` in proportion to the shares, by the largest remainders."""
    exact = np.array(shares) * total
    counts = np.floor(exact).astype(np.int64)
    for source in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[source] += 1
    return counts.tolist()

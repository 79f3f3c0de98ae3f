from __future__ import annotations

import numpy as np
import pytest
import torch
from test_linear import CPU, clusters

from dinocli.core.errors import DinoError
from dinocli.evals.folds import cross_validate
from dinocli.features.store import subset


def test_every_image_is_tested_once_and_each_fold_has_a_share_of_every_class() -> None:
    data = clusters(200)
    data = subset(data, np.arange(200))
    data.paths[:] = [str(i) for i in range(200)]
    done: list[tuple[int, int]] = []
    result, predictions = cross_validate(data, 4, epochs=5, device=CPU, report=lambda d, of: done.append((d, of)))
    assert sorted(map(int, predictions.names)) == list(range(200))
    assert [fold.test_images for fold in result.folds] == [52, 52, 48, 48], "of 50 images per class, 12 or 13"
    assert predictions.truth.tolist() == [int(name) % 4 for name in predictions.names]
    tops = [fold.top1 for fold in result.folds]
    assert result.top1 == pytest.approx(np.mean(tops))
    assert result.spread == pytest.approx(np.std(tops, ddof=1))
    assert result.interval == predictions.interval
    assert result.interval.low < predictions.percent(1) < result.interval.high
    assert done[-1][0] == done[-1][1]
    assert [d for d, _ in done] == sorted(d for d, _ in done)


def test_the_same_seed_gives_the_same_folds() -> None:
    (one, _), (again, _), (other, _) = (
        cross_validate(clusters(120), 3, epochs=2, seed=seed, device=torch.device("cpu")) for seed in (0, 0, 1)
    )
    assert one == again
    assert one != other


def test_more_folds_than_images_of_a_class_are_an_error() -> None:
    few = subset(clusters(200), np.array([*range(0, 200, 4), *range(1, 200, 4), 2, 6, 10]))
    with pytest.raises(DinoError, match="--folds 5 is larger than the 3 images of the smallest class, c") as error:
        cross_validate(few, 5, device=CPU)
    assert error.value.hint == "use --folds 3 or fewer"
    alone = subset(few, np.arange(101))
    with pytest.raises(DinoError, match="the only image of the smallest class, c"):
        cross_validate(alone, 5, device=CPU)

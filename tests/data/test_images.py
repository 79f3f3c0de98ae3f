from __future__ import annotations

import pytest

from dinocli.core.errors import DinoError
from dinocli.data.images import ImagesConfig, megabytes_over


def test_a_window_is_a_range() -> None:
    with pytest.raises(DinoError, match="the smaller first"):
        ImagesConfig.parse({"window": [9, 3]}, "preset x")


@pytest.mark.parametrize("window", [[[0, 1], [2, 3]], [[0, 1], [2, 3], [5, 4]], [[0, 1, 2]], 7])
def test_invalid_windows_are_an_error(window: object) -> None:
    with pytest.raises(DinoError, match=r"images?\.window|window"):
        ImagesConfig.parse({"window": window}, "preset x")
    assert ImagesConfig.parse({"window": [[0, 1], [2, 3]], "channels": 2}, "x").windows.tolist() == [[0, 1], [2, 3]]


def test_overrides_change_only_the_given_values() -> None:
    assert ImagesConfig().changed(["images.max_aspect=7"]) == ImagesConfig(max_aspect=7)
    with pytest.raises(DinoError, match=r"--set views\.locals=2 has no effect here; expected images\.KEY=VALUE"):
        ImagesConfig().changed(["views.locals=2"])


@pytest.mark.parametrize(
    ("size", "limit", "words"),
    [
        (21_474_836_480, 500, "21475 megabytes, over 500"),
        (2_600_000, 2, "2.6 megabytes, over 2"),
        (1_000_001, 1, "1.000001 megabytes, over 1"),
        (10_421, 0.01, "0.0104 megabytes, over 0.01"),
        (6_402, 0.005, "0.0064 megabytes, over 0.005"),
    ],
)
def test_a_size_over_its_limit_is_shown_larger_than_the_limit(size: int, limit: float, words: str) -> None:
    assert megabytes_over(size, limit) == words

from __future__ import annotations

import pytest

from dinocli.core.errors import DinoError
from dinocli.data.images import ImagesConfig, megabytes_over
from dinocli.method.preset import load_preset


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


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        (
            ["images.pair_within=2"],
            "images.pair_within is not valid: without images.every, videos are not read; it is 2",
            "--set images.every=2",
        ),
        (
            ["images.every=3", "images.pair_within=2.5"],
            "images.pair_within is not valid: images.every=3 reads no two frames within 2.5 seconds; it is 2.5",
            "--set images.pair_within=3",
        ),
        (
            ["images.every=0.1", "images.pair_within=0"],
            "images.pair_within should be greater than 0; it is 0",
            "--set images.pair_within=VALUE with a valid value",
        ),
        (
            ["images.every=x", "images.pair_within=2"],
            "images.every should be a valid number",
            "--set images.every=VALUE",
        ),
    ],
)
def test_a_distance_within_which_no_frames_are_read_is_refused(given: list[str], message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        load_preset("tiny-dino", given)
    assert message in error.value.message
    assert error.value.hint.startswith(hint)


def test_only_training_reads_pairs() -> None:
    pairs = ["images.every=2", "images.pair_within=2"]
    images = ImagesConfig().changed(pairs, for_training=True)
    assert (images.every, images.pair_within) == (2, 2)
    assert images.unpaired == ImagesConfig(every=2)
    with pytest.raises(DinoError, match=r"images\.pair_within=2 has no effect here") as error:
        ImagesConfig().changed(pairs)
    assert error.value.hint == "remove it"
    with pytest.raises(DinoError, match="there is no second global view") as error:
        load_preset("tiny-dino", [*pairs, "views.global_2=none"])
    assert error.value.hint == "--set images.pair_within=none"

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from dinocli.data.views.crops import (
    NUMBERS,
    JitterConfig,
    LowResolutionConfig,
    MixedSizesConfig,
    SizeDraw,
    ViewConfig,
    ViewsConfig,
    crop_boxes,
    crop_tries,
    cut,
    cut_into,
    draws,
    resize_and_center,
    resize_for,
    shrink,
    uniforms,
)

JITTER = JitterConfig(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
VIEW = ViewConfig(size=32, scale=(0.25, 1.0), flip=0.5, jitter=JITTER, gray=0.2, blur=0.5, solarize=0.2)


def largest_gap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the two-sample Kolmogorov-Smirnov statistic."""
    everything = np.sort(np.concatenate([a, b]))
    return float(
        np.abs(
            np.searchsorted(np.sort(a), everything, "right") / len(a)
            - np.searchsorted(np.sort(b), everything, "right") / len(b)
        ).max()
    )


def boxes_of(n: int, height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    [tries] = crop_tries(np.random.default_rng(0).random((1, n, NUMBERS)), np.tile(scale, (n, 1)))
    return np.array(crop_boxes(tries, height, width))


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 500), (500, 180)])
@pytest.mark.parametrize("scale", [(0.25, 1.0), (0.05, 0.25)])
def test_boxes_have_the_distribution_of_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    n = 4000
    ours = boxes_of(n, height, width, scale).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)], dtype=float)
    # 1.95 is the critical value at a significance of 0.001.
    limit = 1.95 * math.sqrt(2 / n)
    for of in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert largest_gap(of(ours), of(theirs)) < limit


@pytest.mark.parametrize(("height", "width"), [(10, 2000), (2000, 10), (1, 1), (3, 700)])
def test_a_very_long_image_gives_boxes_inside_it(height: int, width: int) -> None:
    boxes = boxes_of(500, height, width, (0.9, 1.0))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_probabilities_and_strengths_follow_the_preset() -> None:
    n = 20_000
    drawn = draws(np.random.default_rng(0).random((n, 1, NUMBERS)), [VIEW])
    for values, p in ((drawn.flip, 0.5), (drawn.gray, 0.2), (drawn.solarize, 0.2), (drawn.radius > 0, 0.5)):
        assert values.float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    jittered = (drawn.factors[0, :, 0] != 1).numpy()
    assert jittered.mean() == pytest.approx(0.8, abs=0.012)
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = drawn.factors[0, jittered, column].double().numpy()
        assert (values.min() >= low - 1e-6, values.max() <= high + 1e-6) == (True, True)
        assert largest_gap(values, np.linspace(low, high, 20_000)) < 0.02
    radius = drawn.radius[drawn.radius > 0].double().numpy()
    assert largest_gap(radius, np.linspace(0.1, 2.0, 20_000)) < 0.025
    orders, counts = np.unique(drawn.order[0].numpy(), axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 49.7, (
        "chi-squared with 23 degrees of freedom, at a significance of 0.001"
    )


def test_disabled_augmentations_are_never_drawn() -> None:
    drawn = draws(np.random.default_rng(0).random((50, 1, NUMBERS)), [ViewConfig(size=32, scale=(0.5, 1.0))])
    assert not drawn.flip.any()
    assert not drawn.gray.any()
    assert not drawn.solarize.any()
    assert drawn.radius.eq(0).all()
    assert drawn.factors[0].unique(dim=0).tolist() == [[1.0, 1.0, 1.0, 0.0]]


def test_the_draws_of_a_view_depend_only_on_seed_epoch_and_index() -> None:
    first = uniforms(1, 2, 3, 4)[0]
    assert first.shape == (4, NUMBERS)
    np.testing.assert_array_equal(first, uniforms(1, 2, 3, 4)[0])
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert not np.array_equal(first, uniforms(*other, 4)[0])


# Each of two passes rounds to 8 bits, by up to half a level. Negative weights of bicubic's second pass amplify the first
# error to 0.63, and weights of 16 bits add little: 1.11 at most over 240 crops, at every capability of the CPU.
LEVELS = 2.0


def weights(before: int, after: int, resample: str) -> np.ndarray:
    """An antialiased resize of one axis in float64: a triangle, or Keys' cubic with a = -0.5, as wide as the reduction.

    Source: Pillow's documentation of its filters, and its Resample.c up to version 12.
    """
    scale = before / after
    stretch, support = max(scale, 1.0), {"bilinear": 1.0, "bicubic": 2.0}[resample]
    table = np.zeros((after, before))
    for i in range(after):
        center = (i + 0.5) * scale
        first = max(0, int(center - support * stretch + 0.5))
        last = min(before, int(center + support * stretch + 0.5))
        x = np.abs((np.arange(first, last) + 0.5 - center) / stretch)
        if resample == "bilinear":
            w = np.maximum(0, 1 - x)
        else:
            a = -0.5
            near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, a * (((x - 5) * x + 8) * x - 4)
            w = np.where(x < 1, near, np.where(x < 2, far, 0))
        table[i, first:last] = w / w.sum()
    return table


def resized(pixels: np.ndarray, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """Resize in float64 as a reference: columns first, clipped to [0, 255] after each pass, as in 8 bits."""
    height, width = pixels.shape[:2]
    wide = np.clip(np.einsum("xw,hwc->hxc", weights(width, size[1], resample), pixels.astype(np.float64)), 0, 255)
    return np.clip(np.einsum("yh,hxc->yxc", weights(height, size[0], resample), wide), 0, 255)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", ["smooth", "noise", "edges"])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((10, 20, 60, 90), (32, 32)),
        ((0, 0, 120, 150), (96, 96)),
        ((5, 5, 20, 20), (64, 64)),
        ((3, 7, 100, 21), (48, 48)),
    ],
)
def test_a_crop_is_an_antialiased_resize(box: tuple[int, ...], size: tuple[int, int], kind: str, resample: str) -> None:
    random = np.random.default_rng(0)
    if kind == "smooth":
        pixels = np.uint8(resized(random.random((12, 15, 3)) * 255, (120, 150)))
    elif kind == "noise":
        pixels = random.integers(0, 256, (120, 150, 3), dtype=np.uint8)
    else:
        pixels = np.kron(random.integers(0, 2, (15, 19, 3)) * 255, np.ones((8, 8, 1)))[:120, :150].astype(np.uint8)
    top, left, height, width = box
    theirs = resized(pixels[top : top + height, left : left + width], size, resample)
    difference = np.abs(cut(pixels, box, size, resample).permute(1, 2, 0).numpy() - theirs)
    assert difference.max() <= LEVELS
    assert difference.mean() < 0.4, "rounding alone is off by a quarter on average, or by a third in two passes"


@pytest.mark.parametrize(("height", "width"), [(100, 140), (140, 100), (57, 57), (300, 301)])
def test_the_evaluation_view_agrees_with_torchvision(height: int, width: int) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    pixels = np.uint8(resized(np.random.default_rng(0).random((9, 9, 3)) * 255, (height, width)))
    # On tensors, because results of Pillow depend on its version.
    view = Compose([Resize(64, InterpolationMode.BICUBIC, antialias=True), CenterCrop(56)])
    theirs = view(torch.from_numpy(pixels).permute(2, 0, 1).double()).clamp(0, 255).numpy()
    assert np.abs(resize_and_center(pixels, 64, 56).numpy() - theirs).max() <= LEVELS


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 100_000), (100_000, 1), (3, 4000)])
def test_a_very_long_image_is_cut_before_it_is_resized(height: int, width: int) -> None:
    assert resize_and_center(np.zeros((height, width, 3), dtype=np.uint8), 256, 224).shape == (3, 224, 224)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_each_channel_is_cut_independently(channels: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 60, channels), dtype=np.uint8)
    pixels = np.ascontiguousarray(np.repeat(np.repeat(noise, 3, 0), 3, 1))
    box, size = (7, 9, 90, 110), (32, 32)
    slab = torch.empty(2, 32, 32, channels, dtype=torch.uint8)
    cut_into(slab.permute(0, 3, 1, 2)[1:], pixels, box)
    assert torch.equal(slab[1].permute(2, 0, 1), cut(pixels, box, size))
    region = pixels[7:97, 9:119]
    for channel in range(channels):
        theirs = resized(region[..., channel : channel + 1], size)[..., 0]
        assert np.abs(slab[1, ..., channel].numpy() - theirs).max() <= LEVELS
    assert shrink(pixels, 40).shape == (40, 48, channels)
    assert resize_and_center(pixels, 40, 32).shape == (channels, 32, 32)


def test_low_resolution_changes_only_sizes() -> None:
    local = VIEW.model_copy(update={"size": 16, "scale": (0.1, 0.25)})
    views = ViewsConfig(mean=(0.5,) * 3, std=(0.5,) * 3, global_1=VIEW, global_2=VIEW, local=local, locals=3)
    assert views.phases(7) == [(0, views)]
    low = views.model_copy(update={"low_resolution": LowResolutionConfig(epochs=2, global_size=24, local_size=8)})
    (first, small), (then, full) = low.phases(7)
    assert (first, then, full) == (0, 14, views)
    assert [view.size for view in small.all] == [24, 24, 8, 8, 8]
    back = {name: getattr(small, name).model_copy(update={"size": size}) for name, size in
            (("global_1", 32), ("global_2", 32), ("local", 16))}  # fmt: skip
    assert small.model_copy(update=back) == views
    kept = views.model_copy(update={"low_resolution": LowResolutionConfig(epochs=2, global_size=24)})
    assert [view.size for view in kept.phases(7)[0][1].all] == [24, 24, 16, 16, 16], "unset sizes are unchanged"
    without = kept.model_copy(update={"local": None, "global_2": None})
    assert [view.size for view in without.phases(7)[0][1].all] == [24]


def test_mixed_sizes_change_only_sizes_and_are_drawn_by_their_shares_from_seed_and_step() -> None:
    local = VIEW.model_copy(update={"size": 16})
    views = ViewsConfig(mean=(0.5,) * 3, std=(0.5,) * 3, global_1=VIEW, global_2=VIEW, local=local, locals=2)
    sizes = (
        MixedSizesConfig(global_size=32, share=1.5),
        MixedSizesConfig(global_size=48, local_size=24, share=1.5),
        MixedSizesConfig(global_size=64, local_size=24, share=2.0),
    )
    mixes = views.model_copy(update={"mixed": sizes}).mixes
    assert [share for share, _ in mixes] == [0.3, 0.3, 0.4]
    assert [[v.size for v in those.all] for _, those in mixes] == [[32, 32, 16, 16], [48, 48, 24, 24], [64, 64, 24, 24]]
    assert mixes[0][1] == views
    draw = SizeDraw(7, (0.3, 0.3, 0.4))
    drawn = [draw(step) for step in range(2000)]
    counts = [drawn.count(i) / 2000 for i in range(3)]
    assert counts == pytest.approx([0.3, 0.3, 0.4], abs=4 * 0.5 / 2000**0.5), "four standard deviations"
    assert drawn == [SizeDraw(7, (0.3, 0.3, 0.4))(step) for step in range(2000)]
    assert drawn != [SizeDraw(8, (0.3, 0.3, 0.4))(step) for step in range(2000)]


def test_the_evaluation_resizes_before_the_center_crop() -> None:
    assert [resize_for(size) for size in (224, 112, 48)] == [256, 128, 55]

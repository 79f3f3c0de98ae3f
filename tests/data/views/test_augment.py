from __future__ import annotations

import numpy as np
import pytest
import torch
from no_draws import nothing
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch._dynamo.utils import counters
from torchvision.transforms import functional as TF

from dinocli.data.views import augment as augment_module
from dinocli.data.views.augment import _blur, augment, blur_kernels
from dinocli.data.views.crops import NUMBERS, Draws, JitterConfig, ViewConfig, draws
from dinocli.method.preset import load_preset

ZERO, ONE = torch.zeros(3), torch.ones(3)
JITTER = JitterConfig(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
VIEW = ViewConfig(size=32, scale=(0.25, 1.0), flip=0.5, jitter=JITTER, gray=0.2, blur=0.5, solarize=0.2)


@pytest.fixture
def image() -> Image.Image:
    smooth = np.uint8(np.random.default_rng(0).random((8, 8, 3)) * 255)
    return Image.fromarray(smooth).resize((48, 48), Image.Resampling.BICUBIC)


def ours(image: Image.Image, **changed: Tensor) -> np.ndarray:
    crops = torch.from_numpy(np.asarray(image).copy())[None, None]
    views = augment(crops, Draws(**(nothing() | changed)), ZERO, ONE)
    return (views[0, 0].permute(1, 2, 0) * 255).numpy()


def yes() -> Tensor:
    return torch.ones(1, 1, dtype=torch.bool)


def test_without_operations_the_image_is_unchanged(image: Image.Image) -> None:
    np.testing.assert_allclose(ours(image), np.asarray(image), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("flip", ImageOps.mirror),
        ("gray", lambda im: im.convert("L").convert("RGB")),
        ("solarize", lambda im: ImageOps.solarize(im, 128)),
    ],
)
def test_single_operations_agree_with_pillow(image: Image.Image, name: str, theirs) -> None:
    assert np.abs(ours(image, **{name: yes()}) - np.asarray(theirs(image), dtype=float)).max() <= 1


@pytest.mark.parametrize(
    ("column", "factor", "theirs", "most", "mean"),
    [
        (0, 1.37, TF.adjust_brightness, 1, 0.6),
        (0, 0.61, TF.adjust_brightness, 1, 0.6),
        (1, 1.37, TF.adjust_contrast, 1.5, 0.7),
        (2, 0.82, TF.adjust_saturation, 1.5, 0.7),
        # Most of this is Pillow's own rounding: its hue has 256 steps.
        (3, 0.09, TF.adjust_hue, 15, 1.5),
        (3, -0.1, TF.adjust_hue, 15, 1.5),
    ],
)
def test_color_jitter_agrees_with_pillow(
    image: Image.Image, column: int, factor: float, theirs, most: float, mean: float
) -> None:
    factors = nothing()["factors"]
    factors[0, 0, column] = factor
    difference = np.abs(ours(image, factors=factors) - np.asarray(theirs(image, factor), dtype=float))
    assert difference.max() <= most
    assert difference.mean() <= mean


def test_hue_equals_torchvisions_without_rounding(image: Image.Image) -> None:
    factors = nothing()["factors"]
    factors[0, 0, 3] = 0.07
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    theirs = TF.adjust_hue(pixels, 0.07).permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(ours(image, factors=factors), theirs, atol=0.02)


def test_jitter_operations_follow_the_drawn_order(image: Image.Image) -> None:
    factors = torch.tensor([[[1.4, 0.6, 1.2, 0.1]]])
    order = torch.tensor([[[3, 1, 0, 2]]], dtype=torch.uint8)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    for adjust, factor in (
        (TF.adjust_hue, 0.1),
        (TF.adjust_contrast, 0.6),
        (TF.adjust_brightness, 1.4),
        (TF.adjust_saturation, 1.2),
    ):
        pixels = adjust(pixels, factor)
    np.testing.assert_allclose(
        ours(image, factors=factors, order=order), pixels.permute(1, 2, 0).numpy() * 255, atol=0.1
    )


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_blur_agrees_with_pillow(image: Image.Image, radius: float) -> None:
    theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=float)
    difference = np.abs(ours(image, radius=torch.full((1, 1), radius)) - theirs)
    assert difference.max() <= 3  # at the border too; Pillow rounds after each of its six passes
    assert difference.mean() < 0.7


def blurred(image: Tensor, radius: Tensor) -> Tensor:
    x = image.expand(len(radius), 3, -1, -1).clone()
    _blur(x, blur_kernels(radius, min(len(image), 32), radius.device))
    # The channels are rows of one matrix product, which may sum the last rows in another order.
    torch.testing.assert_close(x, x[:, :1].expand_as(x), rtol=0, atol=1e-6)
    return x[:, 0]


@pytest.mark.parametrize("size", [8, 31, 32, 33, 96, 100])
def test_blur_keeps_the_sum_and_has_the_radius_as_its_spread(size: int) -> None:
    radius = torch.linspace(0.1, 2, 10)
    # If all lines of an image are equal, the blur acts along them only. Lines with one point give a column of its matrix.
    points = torch.eye(size)
    down = torch.stack([blurred(points[:, [i]].expand(-1, size), radius)[:, :, 0] for i in range(size)], 2)
    matrices = torch.stack([blurred(points[[i]].expand(size, -1), radius)[:, 0] for i in range(size)], 2)
    torch.testing.assert_close(down, matrices)
    torch.testing.assert_close(matrices.sum(2), torch.ones(10, size))
    if size > 12:
        middle = matrices[:, size // 2]
        spread = (middle * (torch.arange(size) - size // 2) ** 2).sum(1).sqrt()
        torch.testing.assert_close(spread, radius, rtol=1e-3, atol=1e-3)
    step = torch.zeros(size)
    step[: size // 3] = 1
    for matrix, r in zip(matrices, radius.tolist(), strict=True):
        line = step
        whole = int(((4 * r * r + 1) ** 0.5 - 1) / 2)
        edge = (2 * whole + 1) * (whole * (whole + 1) - r * r) / (6 * (r * r / 3 - (whole + 1) ** 2))
        for _ in range(3):
            padded = torch.cat([line[:1].expand(3), line, line[-1:].expand(3)])
            weights = [1.0 if abs(d) <= whole else edge if abs(d) == whole + 1 else 0.0 for d in range(-3, 4)]
            line = sum(w * padded[3 + d : 3 + d + size] for w, d in zip(weights, range(-3, 4), strict=True)) / sum(
                weights
            )
        torch.testing.assert_close(matrix @ step, line, rtol=1e-4, atol=1e-5)


def test_each_image_of_a_batch_gets_its_own_parameters(image: Image.Image) -> None:
    crops = torch.from_numpy(np.asarray(image).copy()).expand(1, 3, -1, -1, -1)
    drawn = nothing(3)
    drawn["flip"][0, 1] = True
    drawn["radius"][0, 2] = 1.3
    drawn["factors"][0, 2, 3] = 0.05
    views = augment(crops, Draws(**drawn), ZERO, ONE)[0]
    alone = ours(image, radius=torch.full((1, 1), 1.3), factors=torch.tensor([[[1.0, 1.0, 1.0, 0.05]]]))
    torch.testing.assert_close(views[1], views[0].flip(-1))
    np.testing.assert_allclose((views[2].permute(1, 2, 0) * 255).numpy(), alone, atol=1e-2)


def test_normalization(image: Image.Image) -> None:
    crops = torch.full((1, 1, 4, 4, 3), 255, dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.25, 2.0])
    assert augment(crops, Draws(**nothing()), mean, std)[0, 0, :, 0, 0].tolist() == [1.0, 3.0, 0.5]


@pytest.mark.gpu
def test_a_gpu_makes_the_same_views() -> None:
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (1, 16, 32, 32, 3), dtype=torch.uint8, generator=generator)
    drawn = draws(np.random.default_rng(0).random((8, 2, NUMBERS)), [VIEW, VIEW])
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    on_gpu = augment(crops.cuda(), drawn, mean.cuda(), std.cuda())
    torch.testing.assert_close(on_gpu.cpu(), augment(crops, drawn, mean, std), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_making_views_on_a_gpu_does_not_block_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (1, 16, 32, 32, 3), dtype=torch.uint8, generator=generator).cuda()
    drawn = draws(np.random.default_rng(0).random((8, 2, NUMBERS)), [VIEW, VIEW])
    mean, std = torch.tensor([0.5, 0.4, 0.3]).cuda(), torch.tensor([0.2, 0.3, 0.4]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(crops, drawn, mean, std)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def some_colors(size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(0))
    x[0, 1], x[1], x[2, :2] = x[0, 0], 0.25, 1.0  # two channels that lead, gray, and a color at its end
    return x, torch.tensor([0.7, 1.3, 0.6, 1.4, 1.0, 0.9]), torch.tensor([0, 1, 2, 0, 1, 2])


def test_the_hue_shift_for_torch_compile_gives_the_same_values() -> None:
    x = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    x[0, 1], x[1], x[2, :2] = x[0, 0], 0.25, 1.0  # two channels that lead, gray, and a color at its end
    turn, turned = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, 0.0]), x.clone()
    augment_module._turn_hue(turned, turn)
    torch.testing.assert_close(
        torch.stack(augment_module._shift_hue(list(x.unbind(1)), turn[:, None, None]), 1), turned, rtol=0, atol=1e-6
    )


def some_views(size: int, channels: int, device: str = "cpu") -> tuple[Tensor, Draws, Tensor, Tensor]:
    """Return crops of two views, every kind of draw, and the numbers of the normalization."""
    generator = torch.Generator().manual_seed(1)
    crops = torch.randint(0, 256, (2, 12, size, size, channels), dtype=torch.uint8, generator=generator)
    drawn = draws(np.random.default_rng(0).random((12, 2, NUMBERS)), [VIEW, VIEW])
    if channels != 3:  # these have no colors
        drawn.factors[..., 2:] = torch.tensor([1.0, 0.0])
        drawn.gray[:] = False
    mean, std = torch.rand(channels, generator=generator), torch.rand(channels, generator=generator) + 0.5
    return crops.to(device), drawn, mean.to(device), std.to(device)


def count_graphs(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Compile anew, and count the graphs from here on."""
    torch._dynamo.reset()
    counters.clear()
    made = torch.compile(augment_module._make_views, backend=backend, fullgraph=True, dynamic=False)
    monkeypatch.setattr(augment_module, "_compile_once", lambda: made)


@pytest.mark.parametrize(("size", "channels"), [(48, 3), (24, 3), (32, 3), (40, 1), (33, 5)])
def test_the_graph_for_torch_compile_makes_the_same_views(
    monkeypatch: pytest.MonkeyPatch, size: int, channels: int
) -> None:
    monkeypatch.setattr(augment_module, "_compile_once", lambda: augment_module._make_views)
    views = some_views(size, channels)
    torch.testing.assert_close(augment(*views, compiled=True), augment(*views), rtol=0, atol=2e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_views_in_bfloat16_are_those_of_float32_rounded_once(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr(augment_module, "_compile_once", lambda: augment_module._make_views)
    views = some_views(24, 3)
    coarse, fine = (augment(*views, compiled=compiled, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert coarse.dtype == torch.bfloat16 and fine.dtype == torch.float32
    assert torch.equal(coarse, fine.bfloat16())


@pytest.mark.parametrize("preset", ["tiny", "tiny-dino", "tiny-dinov2", "tiny-simdino"])
def test_networks_see_the_same_numbers_in_views_of_bfloat16(preset: str) -> None:
    network = load_preset(preset).network()
    crops = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = (network.backbone(x).cls for x in (crops, crops.bfloat16()))
    assert torch.equal(one, other)


def test_large_batches_are_made_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(crops: Tensor, *rest: Tensor) -> Tensor:
        seen.append(len(crops))
        return augment_module._make_views(crops, *rest)

    views = some_views(24, 3)
    monkeypatch.setattr(augment_module, "_AT_ONCE", 10 * 24 * 24 * 3)
    monkeypatch.setattr(augment_module, "_compile_once", lambda: record)
    torch.testing.assert_close(augment(*views, compiled=True), augment(*views), rtol=0, atol=2e-6)
    assert seen == [8, 8, 8]


def test_the_views_are_one_graph_and_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count_graphs(monkeypatch, "eager")
    for _ in range(2):
        augment(*some_views(40, 3), compiled=True)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_views_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    count_graphs(monkeypatch, "inductor")
    views = some_views(48, 3)
    # The compiler may fuse a product and a sum, which rounds once instead of twice.
    torch.testing.assert_close(augment(*views, compiled=True), augment(*views), rtol=0, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_compiled_views_are_the_same_on_a_gpu_within_a_level() -> None:
    for size in (224, 96):
        views = some_views(size, 3, "cuda")
        one = 1 / 255 / views[3].min().item()
        torch.testing.assert_close(augment(*views, compiled=True), augment(*views), rtol=0, atol=one)


def test_augmentations_of_any_channels_treat_each_independently() -> None:
    torch.manual_seed(0)
    crops = torch.randint(0, 256, (1, 4, 40, 40, 13), dtype=torch.uint8)
    drawn = Draws(
        flip=torch.tensor([[True, False, True, False]]),
        factors=torch.tensor(
            [[[1.3, 0.7, 1.0, 0.0], [0.6, 1.0, 1.0, 0.0], [1.0, 1.4, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]]
        ),
        order=torch.tensor([[[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 2, 3], [0, 1, 2, 3]]], dtype=torch.uint8),
        gray=torch.zeros(1, 4, dtype=torch.bool),
        radius=torch.tensor([[0.0, 1.5, 0.3, 0.0]]),
        solarize=torch.tensor([[False, True, False, True]]),
    )
    mean, std = torch.rand(13), torch.rand(13) + 0.5
    every = augment(crops, drawn, mean, std)
    assert every.shape == (1, 4, 13, 40, 40)
    for c in range(13):
        alone = augment(crops[..., c : c + 1], drawn, mean[c : c + 1], std[c : c + 1])
        torch.testing.assert_close(every[:, :, c : c + 1], alone)
        # A channel repeated three times is gray, so color operations agree too.
        thrice = augment(crops[..., [c, c, c]], drawn, mean[[c, c, c]], std[[c, c, c]])
        torch.testing.assert_close(thrice[:, :, :1], alone)

"""Augmentation of whole batches on any device: color, blur and normalization.

All random numbers are drawn before (`crops.draws`). So the same draws give the same views on any device, and nothing
here waits for the device. Results differ from Pillow's for two reasons only: Pillow rounds to 8 bits after each
operation, and its hue has 256 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dinocli.data.views.crops import Draws

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_CACHED = 2**18  # numbers at once on a CPU, so that an image stays in the cache between operations
_AT_ONCE = 2**26  # numbers at once on a GPU, so that intermediate results take a GB at most


def augment(crops: Tensor, draws: Draws, mean: Tensor, std: Tensor, *, compiled: bool = False) -> Tensor:
    """Make views of crops.

    Args:
        crops: Crops with the channels last. [V, B, H, H, C], uint8
        draws: Random draws of each view, on the host. [V, B, ...]
        mean: Channel means of the data. [C]
        std: Channel standard deviations of the data. [C]
        compiled: True to compile hue jitter with torch.compile, which takes some seconds once. The views are the same.

    Returns:
        Normalized views. [V, B, C, H, H], float32
    """
    views, images = crops.shape[:2]
    crops, steps = crops.flatten(0, 1), _steps(draws)
    kernels = blur_kernels(draws.radius.flatten(), min(crops.shape[2], _SHORT), crops.device)
    # A GPU is fastest with few large operations, a CPU with all operations on one image before the next.
    step = max(1, (_AT_ONCE if crops.is_cuda else _CACHED) // crops[0].numel())
    out = torch.empty(len(crops), crops.shape[3], *crops.shape[1:3], device=crops.device)
    for i in range(0, len(crops), step):
        part = slice(i, i + step)
        _augment(out[part], crops[part], _Steps._make(s[..., part] for s in steps), kernels[part], compiled)
        normalize(out[part], mean, std)
    return out.unflatten(0, (views, images))


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean of each channel and divide by its standard deviation, in place. [..., C, H, W]"""
    return x.sub_(mean[:, None, None]).div_(std[:, None, None])


class _Steps(NamedTuple):
    """Operations on N images, decided on the host before the first one runs.

    Attributes:
        flip: Images to mirror. [N], bool, like `gray`, `blur` and `solarize`
        operation: Brightness, contrast and saturation in order: first those before the hue, then those after it. [6, N]
        factor: Factor of each operation. [6, N]
        blends: True for operations that change the image. [6, N]
        turn: Hue shift, as a fraction of the circle. [N]
        turns: True for hue shifts that change the image. [N]
    """

    flip: Tensor
    operation: Tensor
    factor: Tensor
    blends: Tensor
    turn: Tensor
    turns: Tensor
    gray: Tensor
    blur: Tensor
    solarize: Tensor


def _steps(draws: Draws) -> _Steps:
    operation = draws.order.flatten(0, 1).long()  # [N, 4]
    factor = draws.factors.flatten(0, 1).gather(1, operation)
    hue = operation == _HUE
    # The hue shift takes most of the launches. So all images shift it at once, between the operations before and after.
    earlier = hue.flip(1).cumsum(1).flip(1).bool() & ~hue  # [N, 4]
    blends = factor != 1
    before, after = slice(0, 3), slice(1, 4)
    rounds = (
        torch.cat([operation[:, before], operation[:, after]], 1),
        torch.cat([factor[:, before], factor[:, after]], 1),
        torch.cat([(blends & earlier)[:, before], (blends & ~earlier & ~hue)[:, after]], 1),
    )
    flip, gray, radius, solarize = (d.flatten() for d in (draws.flip, draws.gray, draws.radius, draws.solarize))
    operation, factor, blends = (each.T.contiguous() for each in rounds)
    turn = draws.factors.flatten(0, 1)[:, _HUE].contiguous()
    return _Steps(flip, operation, factor, blends, turn, turn != 0, gray, radius > 0, solarize)


def _augment(x: Tensor, crops: Tensor, steps: _Steps, kernels: Tensor, compiled: bool) -> None:
    """Make views [S, C, H, H] in [0, 1] from crops [S, H, H, C]."""
    turn_hue = _turn_hue_compiled if compiled else _turn_hue
    if steps.flip.any():  # mirror bytes, a quarter of the size of floats
        mirrored = steps.flip.nonzero()[:, 0].to(crops.device, non_blocking=True)
        crops = crops.index_copy(0, mirrored, crops.index_select(0, mirrored).flip(2))
    x.copy_(crops.permute(0, 3, 1, 2)).mul_(1 / 255)
    rounds = list(zip(steps.blends, steps.factor, steps.operation, strict=True))
    for blends, factor, operation in rounds[:3]:
        _on(x, blends, _blend, factor, operation)
    _on(x, steps.turns, turn_hue, steps.turn)
    for blends, factor, operation in rounds[3:]:
        _on(x, blends, _blend, factor, operation)
    _on(x, steps.gray, lambda part: part.copy_(_gray(part).expand_as(part)))
    _on(x, steps.blur, _blur, kernels)
    _on(x, steps.solarize, lambda part: part.addcmul_((part >= 128 / 255).to(part.dtype), 1 - 2 * part))


def _on(x: Tensor, which: Tensor, change: Callable[..., object], *parameters: Tensor) -> None:
    """Change selected images in place. The selection is on the host, so that nothing waits for the device.

    Args:
        x: Images. [S, C, H, H]
        which: Selection, on the host. [S], bool
        change: Function called with the selected images and their parameters.
        parameters: Parameters of all images. [S, ...] each
    """
    rows = which.nonzero()[:, 0]
    if len(rows) == len(x):
        change(x, *parameters)
    elif len(rows):
        there = rows.to(x.device, non_blocking=True)
        part = x.index_select(0, there)
        change(part, *(p.index_select(0, there if p.device == x.device else rows) for p in parameters))
        x.index_copy_(0, there, part)


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device, x.dtype, non_blocking=True)[:, None, None, None]


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (r * 0.299).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]  # [S, 1, H, W]


def _blend(x: Tensor, factor: Tensor, operation: Tensor) -> None:
    """Blend images: brightness with black, contrast with the mean gray, saturation with the gray image.

    One formula serves all three. Saturation, gray and hue need three channels.
    """
    there = set(operation.tolist())
    other, scale = 1 - factor, _column(factor, x)
    if there == {_BRIGHTNESS}:
        x.mul_(scale).clamp_(0, 1)
        return
    if x.shape[1] != 3:  # without colors there is no gray: contrast uses each channel's own mean
        mean = x.mean((2, 3), keepdim=True) * _column(other * (operation == _CONTRAST), x)
        x.mul_(scale).add_(mean).clamp_(0, 1)
        return
    gray = _gray(x)
    if _CONTRAST in there:
        mean = gray.mean((2, 3), keepdim=True) * _column(other * (operation == _CONTRAST), x)
    if there == {_CONTRAST}:
        x.mul_(scale).add_(mean).clamp_(0, 1)
        return
    gray.mul_(_column(other * (operation == _SATURATION), x))
    x.mul_(scale).add_(gray.add_(mean) if _CONTRAST in there else gray).clamp_(0, 1)


def _turn_hue(x: Tensor, turn: Tensor) -> None:
    """Shift the hue by fractions of the circle [S], through HSV."""
    r, g, b = x.unbind(1)
    value = x.amax(1)  # [S, H, W]
    chroma = value - x.amin(1)
    # 1 for the largest channel, 0 for others: on a CPU, selecting takes many times as long as multiplying.
    red = (r - value).sign_().add_(1)
    green = (g - value).sign_().add_(1).mul_(1 - red)
    blue = 1 - red - green
    slope = red * (g - b) + green * (b - r) + blue * (r - g)
    hue = slope.div_(chroma.clamp_min(1e-12)).add_(green, alpha=2).add_(blue, alpha=4)  # sixths of the circle
    hue.div_(6).add_(_column(turn, x)[:, 0])
    # HSV to RGB: a channel is value - chroma * clamp(min(k, 4 - k), 0, 1) at k = (n + hue) mod 6, n = 5, 3, 1.
    # It depends only on the distance on the circle to k = 2.
    # 3/6, 1/6, -1/6 are created on the device, because numbers from the host would make it wait.
    away = hue[:, None] + (torch.arange(3, -2, -2, device=x.device) / 6)[:, None, None]
    away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    torch.sub(value[:, None], away.mul_(chroma[:, None]), out=x)


# The same for torch.compile, which fuses it into one pass per image. There selecting is free, and in-place writes
# would only hinder. Blends gain nothing from compilation, because they take few passes already.


def _turn_hue_compiled(x: Tensor, turn: Tensor) -> None:
    x.copy_(_compile_once(_shift_hue)(x, _column(turn, x)[:, 0]))


def _shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Return images with shifted hue, as `_turn_hue` does. [S, 3, H, H] and [S, 1, 1] to [S, 3, H, H]"""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    red, green = r == value, g == value
    slope = torch.where(red, g - b, torch.where(green, b - r, r - g))
    hue = (slope / chroma.clamp_min(1e-12) + torch.where(red, 0.0, torch.where(green, 2.0, 4.0))) / 6 + turn
    away = [hue + n / 6 for n in (3, 1, -1)]
    return torch.stack([value - (2 - 6 * (a - a.round()).abs()).clamp(0, 1) * chroma for a in away], 1)


@cache
def _compile_once(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile an operation for any number of images of any size."""
    return torch.compile(operation, dynamic=True)


def _blur(x: Tensor, kernels: Tensor) -> None:
    """Blur in place, with Pillow's kernel and border handling.

    The blur matrices are nearly all zeros, so only blocks are multiplied. All blocks but those at the ends are equal.

    Args:
        x: Images. [S, C, H, H]
        kernels: Blur matrices of a short line. [S, short, short]
    """
    # Depthwise convolutions are slower. Two passes of 13 taps differ at the border, which Pillow repeats in each of its
    # three passes, and take 1.2 to 1.4 times as long at 224 pixels (0.8 to 1.1 at 96). Six passes of 5 taps agree to
    # 4e-7 and take 1.6 to 2.6 times as long. Measured on one and two CPU threads.
    short, size = kernels.shape[1], x.shape[2]
    if size == short:
        torch.matmul(kernels[:, None], x @ kernels[:, None].mT, out=x)
        return
    half, inner = short // 2, size - short
    blocks = next(n for n in range(max(1, inner // _BLOCK), 0, -1) if inner % n == 0)
    block = inner // blocks
    reach = block + 2 * _REACH
    band = x.new_zeros(len(x), block, reach)
    diagonal = band.as_strided((len(x), block, 2 * _REACH + 1), (block * reach, reach + 1, 1))
    diagonal.copy_(kernels[:, half : half + 1, half - _REACH : half + _REACH + 1])
    seen = slice(half - _REACH, size - half + _REACH)

    lines = x.flatten(1, 2)  # [S, C H, H]
    along = torch.empty_like(lines)
    along[..., :half] = lines[..., :short] @ kernels[:, :half].mT
    along[..., -half:] = lines[..., -short:] @ kernels[:, half:].mT
    windows = lines[..., seen].unfold(2, reach, block).transpose(1, 2)  # [S, blocks, C H, reach]
    along[..., half:-half].unflatten(2, (blocks, block)).copy_((windows @ band[:, None].mT).transpose(1, 2))

    for channel, out in zip(along.unflatten(1, (-1, size)).unbind(1), x.unbind(1), strict=True):
        out[:, :half] = kernels[:, :half] @ channel[:, :short]
        out[:, -half:] = kernels[:, half:] @ channel[:, -short:]
        windows = channel[:, seen].unfold(1, reach, block).mT  # [S, blocks, reach, H]
        out[:, half:-half] = (band[:, None] @ windows).flatten(1, 2)


def blur_kernels(radius: Tensor, short: int, device: torch.device) -> Tensor:
    """Return the blur along a line of `short` pixels, as a matrix for each radius, on the device. [S, short, short]

    Away from the ends, each row equals the one above, shifted by a pixel. So a short line serves for any length.

    Pillow's Gaussian is three passes of a box whose fractional width gives the radius. Each pass repeats the border.

    Args:
        radius: Radius in pixels, at most 2, on the host. [S]
        short: Length of the line in pixels.
        device: Device of the blurred images.

    Source: Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011.
    """
    # Numbers per radius and per pixel are computed on the host, which takes no launches.
    variance = radius**2 / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()  # full pixels on each side of the middle
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    width = 2 * (whole + edge) + 1
    far = torch.arange(-2, short + 2)  # two pixels beyond each end: a box reaches no farther
    distance = (torch.arange(short)[:, None] - far[None]).abs().to(device, non_blocking=True)
    of_radius = torch.stack([whole, whole + 1, 1 / width, edge / width])[..., None, None]
    inside, last, full, part = of_radius.to(device, non_blocking=True)  # [S, 1, 1] each
    box = torch.where(distance <= inside, full, torch.where(distance == last, part, 0.0))
    nearest = far.clamp(0, short - 1).to(device, non_blocking=True)
    box = torch.zeros(len(radius), short, short, device=device).index_add_(2, nearest, box)
    return box @ box @ box


_REACH = 6  # pixels: three passes of a box that reaches two
_SHORT = 32  # pixels, long enough that the ends do not affect the middle of the line
_BLOCK = 32  # pixels at least; the fastest of the sizes tried

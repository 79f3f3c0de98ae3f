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

from dinocli.core.copies import send
from dinocli.data.views.crops import Draws

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_CACHED = 2**18  # numbers at once on a CPU, so that an image stays in the cache between operations
_AT_ONCE = 2**26  # numbers at once on a GPU, so that intermediate results take a GB at most


def augment(
    crops: Tensor,
    draws: Draws,
    mean: Tensor,
    std: Tensor,
    *,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Make views of crops.

    Args:
        crops: Crops with the channels last. [V, B, H, H, C], uint8
        draws: Random draws of each view, on the host. [V, B, ...]
        mean: Channel means of the data. [C]
        std: Channel standard deviations of the data. [C]
        compiled: True to compile all operations with torch.compile, once for each shape. The views are the same, up to
            a level on a GPU, which blurs in float16.
        dtype: Type of the views; all operations are in float32. A network that casts its input to this type sees the
            same numbers, with half the memory traffic.

    Returns:
        Normalized views. [V, B, C, H, H]
    """
    views, images = crops.shape[:2]
    if compiled:
        return _augment_compiled(crops.flatten(0, 1), draws, mean, std, dtype).unflatten(0, (views, images))
    crops, steps = crops.flatten(0, 1), _steps(draws)
    kernels = blur_kernels(draws.radius.flatten(), min(crops.shape[2], _SHORT), crops.device)
    # A GPU is fastest with few large operations, a CPU with all operations on one image before the next.
    step = max(1, (_AT_ONCE if crops.is_cuda else _CACHED) // crops[0].numel())
    out = torch.empty(len(crops), crops.shape[3], *crops.shape[1:3], dtype=dtype, device=crops.device)
    for i in range(0, len(crops), step):
        part = slice(i, i + step)
        made = out[part] if dtype == torch.float32 else torch.empty_like(out[part], dtype=torch.float32)
        _augment(made, crops[part], _Steps._make(s[..., part] for s in steps), kernels[part])
        normalize(made, mean, std)
        if made.dtype != dtype:
            out[part] = made
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


def _augment(x: Tensor, crops: Tensor, steps: _Steps, kernels: Tensor) -> None:
    """Make views [S, C, H, H] in [0, 1] from crops [S, H, H, C]."""
    if steps.flip.any():  # mirror bytes, a quarter of the size of floats
        mirrored = steps.flip.nonzero()[:, 0].to(crops.device, non_blocking=True)
        crops = crops.index_copy(0, mirrored, crops.index_select(0, mirrored).flip(2))
    x.copy_(crops.permute(0, 3, 1, 2)).mul_(1 / 255)
    rounds = list(zip(steps.blends, steps.factor, steps.operation, strict=True))
    for blends, factor, operation in rounds[:3]:
        _on(x, blends, _blend, factor, operation)
    _on(x, steps.turns, _turn_hue, steps.turn)
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
    far = torch.arange(-2, short + 2)  # two pixels beyond each end: a box reaches no farther
    distance = send((torch.arange(short)[:, None] - far[None]).abs(), device)
    box = _box(send(_box_numbers(radius), device), distance)
    nearest = send(far.clamp(0, short - 1), device)
    box = torch.zeros(len(radius), short, short, device=device).index_add_(2, nearest, box)
    return box @ box @ box


def _box_numbers(radius: Tensor) -> Tensor:
    """Return the reach of each box, that of its ends, and the weights within both. [S] -> [4, S]"""
    variance = radius**2 / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()  # full pixels on each side of the middle
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    width = 2 * (whole + edge) + 1
    return torch.stack([whole, whole + 1, 1 / width, edge / width])


def _box(numbers: Tensor, distance: Tensor) -> Tensor:
    """Return the weights of boxes at some distances. [4, S] and [H, W] -> [S, H, W]"""
    inside, last, full, part = numbers[..., None, None].unbind()
    return torch.where(distance <= inside, full, torch.where(distance == last, part, 0.0))


_REACH = 6  # pixels: three passes of a box that reaches two
_SHORT = 32  # pixels, long enough that the ends do not affect the middle of the line
_BLOCK = 32  # pixels at least; the fastest of the sizes tried


# The same for torch.compile, in one graph for all images. There selecting is free, so every image takes every step,
# with numbers that change nothing if a step is skipped.


def _augment_compiled(crops: Tensor, draws: Draws, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Make views [N, C, H, H] of crops [N, H, H, C], in parts of equal size."""
    order = draws.order.flatten(0, 1).long()  # [N, 4]
    factor = draws.factors.flatten(0, 1).gather(1, order)
    other = torch.where(order == _HUE, 0.0, 1 - factor)
    rounds = (
        torch.where(order == _HUE, 1.0, factor),
        torch.where(order == _SATURATION, other, 0.0),
        torch.where(order == _CONTRAST, other, 0.0),
        torch.where(order == _HUE, factor, 0.0),
    )
    flip, gray, radius, solarize = (d.flatten() for d in (draws.flip, draws.gray, draws.radius, draws.solarize))
    flags = torch.stack([flip, gray, solarize, radius > 0]).float()
    numbers = torch.cat([*(each.T for each in rounds), flags, _box_numbers(radius)])  # [24, N], for a single copy
    parts = -(-crops.numel() // _AT_ONCE)
    there = send(numbers, crops.device).chunk(parts, 1)
    run = _compile_once()
    made = [run(part, each, mean, std, dtype) for part, each in zip(crops.chunk(parts), there, strict=True)]
    return torch.cat(made) if parts > 1 else made[0]


@cache
def _compile_once() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64  # one version per crop size and number of views; the default is eight
    return torch.compile(_make_views, fullgraph=True, dynamic=False)


def _make_views(crops: Tensor, numbers: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Make views [N, C, H, H] of crops [N, H, H, C] by the numbers of each image. [24, N]

    Channels are separate tensors, because only loops of one shape become one kernel.
    """
    *rounds, flags, box = numbers[..., None, None].unflatten(0, (6, 4)).unbind()
    flip, gray, solarize, blur = (flags > 0).unbind()  # [N, 1, 1] each
    mirrored = torch.where(flip[..., None], crops.flip(2), crops)
    x = [channel * (1 / 255) for channel in mirrored.unbind(3)]  # [N, H, H] each
    for scale, saturation, contrast, turn in zip(*rounds, strict=True):
        others = [_mix(x)] * 3 if len(x) == 3 else x
        mixed = [
            (c * scale + other.mean((1, 2), keepdim=True) * contrast + other * saturation).clamp(0, 1)
            for c, other in zip(x, others, strict=True)
        ]
        if len(x) == 3:
            mixed = [torch.where(turn != 0, *pair) for pair in zip(_shift_hue(x, turn), mixed, strict=True)]
        x = mixed
    if len(x) == 3:
        x = [torch.where(gray, _mix(x), c) for c in x]
    sharp = torch.stack(x, 1)  # [N, C, H, H]
    views = torch.where(blur[..., None], _blur_whole(sharp, box[..., 0, 0]), sharp)
    views = torch.where(solarize[..., None] & (views >= 128 / 255), 1 - views, views)
    return ((views - mean[:, None, None]) / std[:, None, None]).to(dtype).contiguous()


def _mix(colors: list[Tensor]) -> Tensor:
    """Return the gray of three channels."""
    r, g, b = colors
    return r * 0.299 + g * 0.587 + b * 0.114


def _shift_hue(colors: list[Tensor], turn: Tensor) -> list[Tensor]:
    """Return three channels [N, H, H] with shifted hue, as `_turn_hue` does. `turn` is [N, 1, 1]."""
    r, g, b = colors
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    red, green = r == value, g == value
    slope = torch.where(red, g - b, torch.where(green, b - r, r - g))
    hue = (slope / chroma.clamp_min(1e-12) + torch.where(red, 0.0, torch.where(green, 2.0, 4.0))) / 6 + turn
    away = [hue + n / 6 for n in (3, 1, -1)]
    return [value - (2 - 6 * (a - a.round()).abs()).clamp(0, 1) * chroma for a in away]


def _blur_whole(x: Tensor, box: Tensor) -> Tensor:
    """Blur images [N, C, H, H] by whole matrices: more arithmetic than `_blur`, in two products."""
    size = x.shape[2]
    short = min(size, _SHORT)
    place = torch.arange(size, device=x.device)
    far = torch.arange(-2, short + 2, device=x.device)
    one = _box(box, (place[:short, None] - far).abs())  # [N, short, short + 4]
    ends = one[..., :3].sum(-1, keepdim=True), one[..., -3:].sum(-1, keepdim=True)  # each pass repeats the border
    one = torch.cat([ends[0], one[..., 3:-3], ends[1]], -1)
    line = one @ one @ one
    # Rows of a short line, the middle one for all that are far from both ends.
    half = short // 2
    row = torch.where(place < half, place, (place - size + short).clamp_min(half))[:, None]
    column = row + place - place[:, None]
    matrix = torch.where((column >= 0) & (column < short), line[:, row, column.clamp(0, short - 1)], 0.0)
    dtype = torch.float16 if x.is_cuda else torch.float32
    matrix, lines = matrix.to(dtype), x.permute(0, 2, 1, 3).to(dtype).flatten(1, 2)  # [N, H C, W]
    along = (lines @ matrix.mT).unflatten(1, (size, -1)).flatten(2)  # [N, H, C W]
    return (matrix @ along).unflatten(2, (-1, size)).permute(0, 2, 1, 3).float()

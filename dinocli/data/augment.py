"""Batch side: color, blur and normalization of a whole batch at once, on whichever device it lies.

Every random number was drawn before (`crops.draws`), so the same draws give the same views on any device, and nothing
here waits for the device. Pillow rounds to 8 bits after each operation; this does not, which is the only difference at
equal draws beyond the hue, of which Pillow has 256 steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dinocli.data.crops import Draws

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_CACHED = 2**18  # numbers; of a CPU's cache, so that the operations on an image find it there


def augment(crops: Tensor, draws: Draws, mean: Tensor, std: Tensor) -> Tensor:
    """Make views of crops.

    Args:
        crops: uint8, with the channels last. [V, B, H, W, 3]
        draws: What happens to each, on the host. [V, B, ...]
        mean: Of the data's channels. [3]
        std: Of the data's channels. [3]

    Returns:
        Normalized. [V, B, 3, H, W], float32
    """
    views, images = crops.shape[:2]
    crops, draws = crops.flatten(0, 1), Draws(*(d.flatten(0, 1) for d in draws))
    # A GPU wants few large operations; a CPU wants all operations on an image before the next image.
    step = len(crops) if crops.is_cuda else max(1, _CACHED // crops[0].numel())
    out = torch.empty(len(crops), 3, *crops.shape[1:3], device=crops.device)
    for i in range(0, len(crops), step):
        part = slice(i, i + step)
        _augment(out[part], crops[part], Draws(*(d[part] for d in draws)))
    return normalize(out, mean, std).unflatten(0, (views, images))


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean of each channel and divide by its spread, in place. [..., C, H, W]"""
    return x.sub_(mean[:, None, None]).div_(std[:, None, None])


def _augment(x: Tensor, crops: Tensor, draws: Draws) -> None:
    """Make views [S, 3, H, W] in 0 to 1 of crops [S, H, W, 3]."""
    x.copy_(crops.permute(0, 3, 1, 2)).mul_(1 / 255)
    _on(x, draws.flip, lambda part: part.copy_(part.flip(-1)))
    for slot in range(4):
        operation = draws.order[:, slot].long()
        factor = draws.factors.gather(1, operation[:, None])[:, 0]
        turns, blends = (operation == _HUE) & (factor != 0), (operation != _HUE) & (factor != 1)
        _on(x, blends, _blend, factor, operation)
        _on(x, turns, _turn_hue, factor)
    _on(x, draws.gray, lambda part: part.copy_(_gray(part).expand_as(part)))
    _on(x, draws.radius > 0, _blur, draws.radius)
    _on(x, draws.solarize, lambda part: part.addcmul_((part >= 128 / 255).to(part.dtype), 1 - 2 * part))


def _on(x: Tensor, which: Tensor, change: Callable[..., object], *parameters: Tensor) -> None:
    """Change some images in place; what decides lies on the host, so that the device is not waited for.

    Args:
        x: [S, 3, H, W]
        which: [S], bool
        change: Called with those images and with their parameters.
        parameters: Of all images. [S] each
    """
    if which.all():
        change(x, *parameters)
    elif which.any():
        rows = which.nonzero()[:, 0]
        there = rows.to(x.device, non_blocking=True)
        part = x[there]
        change(part, *(p[rows] for p in parameters))
        x.index_copy_(0, there, part)


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device, x.dtype, non_blocking=True)[:, None, None, None]


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    return (r * 0.299).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]  # [S, 1, H, W]


def _blend(x: Tensor, factor: Tensor, operation: Tensor) -> None:
    """Blend each image with what its operation asks for: brightness with black, contrast with its mean gray, saturation
    with its gray self. One formula for three.
    """
    if (operation == _BRIGHTNESS).all():
        x.mul_(_column(factor, x)).clamp_(0, 1)
        return
    gray, other = _gray(x), 1 - factor
    mean = gray.mean((2, 3), keepdim=True) * _column(other * (operation == _CONTRAST), x)
    gray.mul_(_column(other * (operation == _SATURATION), x)).add_(mean)
    x.mul_(_column(factor, x)).add_(gray).clamp_(0, 1)


def _turn_hue(x: Tensor, turn: Tensor) -> None:
    """Turn the hue by fractions of the circle [S], through HSV."""
    r, g, b = x.unbind(1)
    value = x.amax(1)  # [S, H, W]
    chroma = value - x.amin(1)
    # Which channel leads, as 1 or 0: selecting takes a CPU many times as long as multiplying.
    red = (r - value).sign_().add_(1)
    green = (g - value).sign_().add_(1).mul_(1 - red)
    blue = 1 - red - green
    slope = red * (g - b) + green * (b - r) + blue * (r - g)
    hue = slope.div_(chroma.clamp_min(1e-12)).add_(green, alpha=2).add_(blue, alpha=4)  # sixths of the circle
    hue.div_(6).add_(_column(turn, x)[:, 0])
    # A channel of HSV back to RGB: value - chroma * clamp(min(k, 4 - k), 0, 1) at k = (n + hue) mod 6, n = 5, 3, 1;
    # which is what the distance on the circle from where k is 2 tells.
    away = hue[:, None] + torch.tensor([3 / 6, 1 / 6, -1 / 6], device=x.device)[:, None, None]
    away.sub_((away + 0.5).floor_()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    torch.sub(value[:, None], away.mul_(chroma[:, None]), out=x)


def _blur(x: Tensor, radius: Tensor) -> None:
    """Blur by radii [S] in pixels, at most 2, with Pillow's kernel and what it does at the border."""
    radius = radius.to(x.device, non_blocking=True)
    rows, columns = (_blur_matrices(radius, size) for size in x.shape[-2:])
    along = (x.flatten(1, 2) @ columns.mT).view_as(x)
    for channel in range(3):  # of all at once, each image's matrix would be copied three times
        x[:, channel] = rows @ along[:, channel]


def _blur_matrices(radius: Tensor, size: int) -> Tensor:
    """A blur along a line of `size` pixels, as a matrix for each radius. [S, size, size]

    Pillow's Gaussian is three passes of a box whose fractional width gives the radius; each repeats the border.

    Source: Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011.
    """
    variance = radius[:, None, None] ** 2 / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()  # full pixels on each side of the middle
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    # Only near an end does a row differ from its neighbours by more than its place: a short line tells them all.
    short = min(size, _SHORT)
    place = torch.arange(short, device=radius.device)
    far = torch.arange(-2, short + 2, device=radius.device)  # two pixels beyond each end: a box reaches no farther
    distance = (place[:, None] - far[None]).abs()
    box = torch.where(distance <= whole, 1.0, torch.where(distance == whole + 1, edge, 0.0)) / (2 * (whole + edge) + 1)
    box = torch.zeros(len(radius), short, short, device=radius.device).index_add_(2, far.clamp(0, short - 1), box)
    box = box @ box @ box
    if size <= _SHORT:
        return box
    half, width = _SHORT // 2, size + 2 * _REACH
    matrix = torch.zeros(len(radius), size, width, device=radius.device)
    band = matrix.as_strided((len(radius), size, 2 * _REACH + 1), (size * width, width + 1, 1))
    band.copy_(box[:, half : half + 1, half - _REACH : half + _REACH + 1])
    matrix = matrix[:, :, _REACH:-_REACH]
    matrix[:, :half, :_SHORT], matrix[:, -half:, -_SHORT:] = box[:, :half], box[:, half:]
    return matrix


_REACH = 6  # pixels: three times the two of a box
_SHORT = 32  # pixels, so long that the middle of the line knows of no end

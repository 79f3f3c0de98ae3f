"""Batch side: color, blur and normalization of a whole batch at once, on whichever device it lies.

Every random number was drawn before (`crops.draws`), so the same draws give the same views on any device, and nothing
here waits for the device. Pillow rounds to 8 bits after each operation; this does not, which is the only difference at
equal draws beyond the hue (Pillow's has 256 steps) and the blur's last pixels at the border.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinocli.data.crops import Draws

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_TAPS = 13


def augment(crops: Tensor, draws: Draws, mean: Tensor, std: Tensor) -> Tensor:
    """Make views of crops.

    Args:
        crops: uint8. [V, B, 3, H, W]
        draws: What happens to each, on the host. [V, B, ...]
        mean: Of the data's channels. [3]
        std: Of the data's channels. [3]

    Returns:
        Normalized. [V, B, 3, H, W], float32
    """
    shape, device = crops.shape, crops.device
    draws = Draws(*(d.flatten(0, 1) for d in draws))
    x = crops.flatten(0, 1).float() / 255  # [V*B, 3, H, W]
    x = torch.where(_column(draws.flip, device), x.flip(-1), x)
    for slot in range(4):
        x = _jitter(x, draws.factors, draws.order[:, slot].long())
    x = torch.where(_column(draws.gray, device), _gray(x), x)
    x = _blur(x, draws.radius)
    x = torch.where(_column(draws.solarize, device) & (x >= 128 / 255), 1 - x, x)
    return normalize(x, mean, std).view(shape)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean of each channel and divide by its spread. [..., C, H, W]"""
    return (x - mean[:, None, None]) / std[:, None, None]


def _column(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=True)[:, None, None, None]


def _gray(x: Tensor) -> Tensor:
    return (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]  # [S, 1, H, W]


def _jitter(x: Tensor, factors: Tensor, operation: Tensor) -> Tensor:
    """One of the four slots of the color jitter: each image has its own operation in it."""
    factor = factors.gather(1, operation[:, None])[:, 0]
    # Brightness blends with black, contrast with the mean gray, saturation with the gray image: one formula for three.
    blends = operation != _HUE
    gray = _gray(x)
    other = torch.where(_column(operation == _SATURATION, x.device), gray, gray.mean((2, 3), keepdim=True))
    other = other * _column(operation != _BRIGHTNESS, x.device)
    amount = _column(torch.where(blends, factor, 1.0), x.device)
    x = (amount * x + (1 - amount) * other).clamp(0, 1)
    turned = torch.nonzero(~blends & (factor != 0))[:, 0]
    if len(turned):
        where = turned.to(x.device, non_blocking=True)
        x = x.index_copy(0, where, _turn_hue(x[where], factor[turned].to(x.device, non_blocking=True)))
    return x


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of images [S, 3, H, W] by fractions of the circle [S], through HSV."""
    value, lead = x.max(1)  # [S, H, W]
    chroma = value - x.amin(1)
    r, g, b = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(lead == 0, (g - b) / safe, torch.where(lead == 1, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = sector + 6 * turn[:, None, None]
    # A channel of HSV back to RGB: value - chroma * clamp(min(k, 4 - k), 0, 1) at k = (n + hue) mod 6, n = 5, 3, 1.
    k = (hue[:, None] + torch.arange(5, 0, -2, device=x.device)[None, :, None, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x: Tensor, radius: Tensor) -> Tensor:
    blurred = torch.nonzero(radius)[:, 0]
    if not len(blurred):
        return x
    kernels = torch.from_numpy(pillow_blur_kernels(radius[blurred].numpy())).to(x.device, non_blocking=True)
    where = blurred.to(x.device, non_blocking=True)
    n, (channels, height, width) = len(blurred), x.shape[1:]
    weight = kernels.repeat_interleave(channels, 0)[:, None]  # [n*3, 1, taps]
    # Every image has a kernel of its own: images and channels become the groups of one depthwise convolution.
    y = x[where].view(1, n * channels, height, width)
    y = F.conv2d(F.pad(y, (_TAPS // 2, _TAPS // 2, 0, 0), mode="replicate"), weight[:, :, None], groups=n * channels)
    y = F.conv2d(F.pad(y, (0, 0, _TAPS // 2, _TAPS // 2), mode="replicate"), weight[..., None], groups=n * channels)
    return x.index_copy(0, where, y.view(n, channels, height, width))


def pillow_blur_kernels(radius: NDArray[np.float32]) -> NDArray[np.float32]:
    """Kernels of Pillow's GaussianBlur: three passes of a box whose fractional width gives the radius. [S, 13]

    Args:
        radius: Standard deviations in pixels, at most 2. [S]

    Source: Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011.
    """
    variance = radius.astype(np.float64)[:, None] ** 2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # full pixels on each side of the middle
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    distance = np.abs(np.arange(-2, 3))[None]
    box = np.where(distance <= whole, 1.0, np.where(distance == whole + 1, edge, 0.0)) / (2 * (whole + edge) + 1)
    return np.stack([np.convolve(np.convolve(b, b), b) for b in box]).astype(np.float32)

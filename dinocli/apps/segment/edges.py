"""Edges: refine a patch mask to the edges of its photo."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinocli.data.decode.pixels import Pixels
from dinocli.evals.attention import enlarge
from dinocli.evals.components import largest_component

Mask = NDArray[np.bool_]

_PIXELS = 4_000_000  # largest photo whose mask is computed at full size; other masks are enlarged by repetition
_CELL = 8  # pixels per patch when fitting colors; more cost more and change little
_EPS = 1e-3  # variance of a color in [0, 1] below which a window counts as flat


def refine(mask: Mask, pixels: Pixels) -> Mask:
    """Refine a patch mask to one component of pixels, whose outline follows color edges within about a patch.

    In each window of about two patches, the guided filter fits the mask as a linear function of color. A pixel is in
    the mask if the mean of the functions around it is above 0.5. The functions are fitted on a reduced photo and
    applied to the full one. Only the largest component remains.

    Args:
        mask: Mask of patches. [rows, columns]
        pixels: Pixels of the photo. [H, W, 3]

    Returns:
        Mask of pixels. [H, W]

    Source: He, Sun and Tang, Guided image filtering, ECCV 2010; He and Sun, Fast guided filter, arXiv 1505.00996.
    """
    height, width = pixels.shape[:2]
    if not mask.any():
        return np.zeros((height, width), dtype=bool)
    scale = min(1.0, (_PIXELS / (height * width)) ** 0.5)
    working_size = (max(1, round(height * scale)), max(1, round(width * scale)))
    photo = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
    patch_mask = torch.from_numpy(mask)[None, None].float()
    fit_size = (mask.shape[0] * _CELL, mask.shape[1] * _CELL)
    coefficients = _fit_lines(_resize(photo, fit_size), _resize(patch_mask, fit_size))  # [1, 4, h, w]
    coefficients = _resize(coefficients, working_size)
    fitted = (coefficients[:, :3] * _resize(photo, working_size)).sum(1) + coefficients[:, 3]
    return enlarge(largest_component((fitted[0] > 0.5).numpy()), height, width).astype(bool)


def _fit_lines(photo: Tensor, mask: Tensor) -> Tensor:
    """Return the mean linear function of the windows around each pixel: three slopes and an intercept. [1, 4, h, w]"""

    def mean(values: Tensor) -> Tensor:
        for size, pad in (((2 * _CELL + 1, 1), (_CELL, 0)), ((1, 2 * _CELL + 1), (0, _CELL))):
            values = F.avg_pool2d(values, size, 1, pad, count_include_pad=False)
        return values

    color, value = mean(photo), mean(mask)
    products = (photo[:, :, None] * photo[:, None]).flatten(1, 2)  # [1, 9, h, w]
    variance = mean(products) - (color[:, :, None] * color[:, None]).flatten(1, 2)
    variance = variance.permute(0, 2, 3, 1).unflatten(-1, (3, 3)) + _EPS * torch.eye(3)  # [1, h, w, 3, 3]
    covariance = mean(photo * mask) - color * value
    slopes = torch.linalg.solve(variance, covariance.permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2)
    return mean(torch.cat([slopes, value - (slopes * color).sum(1, keepdim=True)], dim=1))


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    if values.shape[-2:] == size:
        return values
    smaller = size[0] * size[1] < values.shape[-2] * values.shape[-1]
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False, antialias=smaller)

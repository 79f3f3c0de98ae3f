"""Feature losses: predictions of a student against the standardized features of a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dinocli.core.config import Config
from dinocli.models.adaptor import AdaptorConfig

_SMALLEST = 1e-4  # smallest standard deviation, as a share of the mean one: a constant feature must not become noise


class FeaturesLossConfig(Config):
    """Losses that compare features with those of frozen teachers, which need no heads. No other loss may be set.

    Attributes:
        class_cosine: Weight of the cosine distance of class tokens.
        patch_cosine: Weight of the cosine distance of patches.
        patch_smooth_l1: Weight of the smooth L1 distance of patches.
        adaptor: Network that predicts a teacher's tokens from the student's; one for class tokens, one for patches.
        statistics: Number of images over which each teacher's features are standardized, before the first step.
        teacher_size: Side of the views that the teachers see, in pixels, or one for each teacher. If None, the size of
            the student's views, rounded up to whole patches of the teacher.

    Source: AM-RADIO (arXiv 2312.06709), section 3.3, for the distances; PHI-S (arXiv 2410.01680) for standardization.
    """

    class_cosine: float = Field(ge=0)
    patch_cosine: float = Field(ge=0)
    patch_smooth_l1: float = Field(ge=0)
    adaptor: AdaptorConfig
    statistics: int = Field(ge=2)
    teacher_size: int | list[int] | None = None

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the distances that are computed, by name."""
        names = ("class_cosine", "patch_cosine", "patch_smooth_l1")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean of 1 - cosine over all tokens, in at least float32. [..., D] and [..., D] to []"""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return 1 - F.cosine_similarity(predicted.to(dtype), target.to(dtype), dim=-1, eps=1e-8).mean()


def smooth_l1_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean of the Huber loss with threshold 1 over all numbers, in at least float32. [..., D] to []"""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return F.smooth_l1_loss(predicted.to(dtype), target.to(dtype))


def match_grid(patches: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Interpolate a map of patches to another grid over the same view: bilinear, antialiased if the grid shrinks.

    Args:
        patches: Patches, row by row. [B, N, D]
        grid: Rows and columns of the patches.
        to: Rows and columns of the result.

    Returns:
        [B, rows * columns, D]
    """
    if grid == to:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
    # Antialiasing changes nothing in a direction that grows.
    maps = F.interpolate(maps.float() if maps.dtype != torch.float64 else maps, to, mode="bilinear", antialias=True)
    return maps.flatten(2).transpose(1, 2)


class Standardizer(nn.Module):
    """Mean and standard deviation of each feature of a teacher, apart for class tokens and patches.

    The buffers belong to the state of a run, so a resumed run standardizes with the same numbers.
    """

    class_mean: Tensor
    class_std: Tensor
    patch_mean: Tensor
    patch_std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for kind in ("class", "patch"):
            self.register_buffer(f"{kind}_mean", torch.zeros(width))
            self.register_buffer(f"{kind}_std", torch.ones(width))

    def forward(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] and [..., N, D]
        """Return standardized class tokens and patches."""
        cls, patches = (values.to(self.class_mean.dtype) for values in (cls, patches))
        return (cls - self.class_mean) / self.class_std, (patches - self.patch_mean) / self.patch_std

    @torch.no_grad()
    def fit(self, cls: Moments, patches: Moments) -> None:
        """Set the statistics to those of a teacher's class tokens and patches."""
        for kind, moments in (("class", cls), ("patch", patches)):
            std = moments.std
            getattr(self, f"{kind}_mean").copy_(moments.mean)
            getattr(self, f"{kind}_std").copy_(std.clamp_min(max(_SMALLEST * float(std.mean()), 1e-12)))


class Moments:
    """Running mean and variance of each feature, in float64.

    Source: Chan, Golub and LeVeque, Updating Formulae for Computing Sample Variances, 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows. [S, D]"""
        values = rows.detach().to("cpu", torch.float64)
        count = self.count + len(values)
        mean = values.mean(0)
        gap = mean - self.mean
        self._squares = (
            self._squares + (values - mean).square().sum(0) + gap.square() * self.count * len(values) / count
        )
        self.mean = self.mean + gap * len(values) / count
        self.count = count

    @property
    def std(self) -> Tensor:
        """Standard deviation of the rows so far, of the population. [D]"""
        return (self._squares / self.count).sqrt()

"""Convolutional stem: two convolutions that replace a transformer's patch embedding."""

from __future__ import annotations

from torch import Tensor, nn

from dinocli.core.errors import DinoError


class ConvStem(nn.Sequential):
    """Embedding of half patches to half the width, BatchNorm and ReLU; then a 3x3 convolution with stride 2, BatchNorm.

    The second convolution sees the neighbours of a patch. A small transformer then learns much faster: attention
    need not relate neighbouring pixels first.

    Args:
        channels: Channels of an image.
        patch: Side of a patch in pixels, an even number.
        width: Number of output channels: the width of the transformer.

    Attributes:
        in_channels: Channels of an image.

    Raises:
        DinoError: If the side of a patch is odd.

    Source: the idea of arXiv 2106.14881; the shape is this project's, chosen by measurement (docs/results.md).
    """

    def __init__(self, channels: int, patch: int, width: int) -> None:
        if patch % 2:
            raise DinoError(
                f"backbone.stem is conv and the patch size {patch}; expected an even number",
                "--set backbone.options.patch_size=16, or --set backbone.stem=patch",
            )
        halves = nn.Conv2d(channels, width // 2, patch // 2, stride=patch // 2, bias=False)
        joins = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False)
        for conv in (halves, joins):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(halves, nn.BatchNorm2d(width // 2), nn.ReLU(), joins, nn.BatchNorm2d(width))
        self.in_channels, self._patch = channels, patch

    def forward(self, images: Tensor) -> Tensor:
        """Return the patch embeddings; pixels beyond whole patches are dropped. [B, C, H, W] -> [B, D, h, w]"""
        height, width = (side // self._patch * self._patch for side in images.shape[-2:])
        embedded: Tensor = super().forward(images[..., :height, :width])
        return embedded

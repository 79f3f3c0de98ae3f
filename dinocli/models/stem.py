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

    def use_steps(self, steps: int) -> None:
        """Embed at each patch, or for two steps at each half patch too, with the same weights."""
        self[3].stride = (2 // steps, 2 // steps)  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        """Return the patch embeddings; pixels beyond whole patches are dropped. [B, C, H, W] -> [B, D, h, w]

        With two steps, embeddings lie at all patches and between them: [B, D, 2h-1, 2w-1].
        """
        height, width = (side // self._patch * self._patch for side in images.shape[-2:])
        embedded: Tensor = super().forward(images[..., :height, :width])
        # The last embedding of two steps would be of half a patch beyond the last whole one.
        return embedded[..., :-1, :-1] if self[3].stride == (1, 1) else embedded

from __future__ import annotations

import pytest
import torch

from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig, adapt, create_timm
from dinocli.models.backbone import MaskedPatches


def test_a_convolutional_network_does_not_support_masks() -> None:
    backbone = BackboneConfig(name="resnet18").build(drop_path=False)
    with pytest.raises(DinoError, match="no patches to mask") as error:
        backbone(torch.zeros(1, 3, 32, 32), MaskedPatches(torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 512)))
    assert error.value.hint == "--set views.mask=none"


def test_a_convolutional_network_returns_its_map_and_the_average_of_it() -> None:
    backbone = BackboneConfig(name="resnet18").build(drop_path=False).eval()
    tokens = backbone(torch.randn(2, 3, 64, 96))
    assert (tokens.grid, backbone.patch_size, backbone.width) == ((2, 3), 32, 512)
    torch.testing.assert_close(tokens.cls, tokens.patches.mean(1))
    with pytest.raises(DinoError, match="vision transformer"):
        backbone.attention(torch.zeros(1, 3, 64, 64))


def test_a_convolutional_network_has_only_one_layer_and_no_facets() -> None:
    network = adapt(create_timm("resnet18"), "antialias").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert network.patches(images).shape == (1, 2, 3, 512)
        for layers, facet in (([-1], "key"), ([1], "token")):
            with pytest.raises(DinoError, match="gives only its output"):
                network.patches(images, layers, facet)  # type: ignore[arg-type]

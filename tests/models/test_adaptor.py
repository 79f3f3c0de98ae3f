from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinocli.models.adaptor import LinearAdaptorConfig, MLPAdaptorConfig


def test_an_adaptor_is_a_linear_layer_or_layers_with_norm_and_gelu_between() -> None:
    x = torch.randn(2, 5, 8)
    linear = LinearAdaptorConfig(kind="linear").build(8, 3)
    torch.testing.assert_close(linear(x), F.linear(x, linear[0].weight, linear[0].bias))
    mlp = MLPAdaptorConfig(kind="mlp", hidden=16, layers=3).build(8, 3)
    layers = [module for module in mlp if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(8, 16), (16, 16), (16, 3)]
    out = layers[0](x)
    for layer in layers[1:]:
        out = layer(F.gelu(F.layer_norm(out, (16,))))
    torch.testing.assert_close(mlp(x), out)


@pytest.mark.parametrize("layers", [0, 1])
def test_an_mlp_has_at_least_two_layers(layers: int) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        MLPAdaptorConfig(kind="mlp", hidden=16, layers=layers)

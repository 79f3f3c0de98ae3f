from __future__ import annotations

import pytest
import timm

from dinocli.core.errors import DinoError
from dinocli.models.catalog import find_names, inspect_network


def test_a_pattern_may_be_a_part_of_a_name_or_have_wildcards() -> None:
    assert set(find_names("dinov3_qkvb")) == {name for name in timm.list_models() if "dinov3_qkvb" in name}
    assert set(find_names("resnet1?")) == {name for name in timm.list_models("resnet1*") if len(name) == 8}
    assert find_names("timm:resnet18.a1_in1k") == find_names("resnet18")
    with pytest.raises(DinoError, match="no model that matches 'zzz'"):
        find_names("zzz")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_parameters_are_those_of_the_built_network(name: str) -> None:
    entry, model = inspect_network(name), timm.create_model(name, num_classes=0)
    assert entry.parameters == sum(value.numel() for value in model.parameters())
    assert entry.width == model.num_features
    assert entry.released == tuple(full.split(".")[1] for full in timm.list_pretrained(f"{name}.*"))
    assert entry.reason == ""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from random_weights import fill, largest_difference
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.weights.load import load_encoder


def network(patch: int) -> torch.nn.Module:
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    model = timm.create_model(f"xcit_small_12_p{patch}_224", num_classes=0, **shape)
    fill(model)
    return model.eval()


def released(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return timm's weights under the keys of facebookresearch/xcit, which joins queries, keys and values."""
    weights = {key.replace("pos_embed.", "pos_embeder."): value for key, value in model.state_dict().items()}
    for key in [key for key in weights if key.startswith("cls_attn_blocks.") and ".attn.q." in key]:
        parts = [weights.pop(key.replace(".q.", f".{letter}.")) for letter in "qkv"]
        weights[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return weights


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("full", [False, True])
def test_a_file_gives_the_features_of_timm(full: bool, patch: int, size: tuple[int, int], tmp_path: Path) -> None:
    model = network(patch)
    weights = released(model)
    prefixed = {f"module.backbone.{key}": value for key, value in weights.items()}
    head = {"module.head.mlp.0.weight": torch.ones(4, 64)}
    torch.save({"student": {}, "teacher": prefixed | head} if full else weights, tmp_path / "dino_xcit.pth")
    encoder = load_encoder(str(tmp_path / "dino_xcit.pth"), torch.device("cpu"))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = model.forward_features(images), encoder.backbone(images)
    assert ours.grid == (size[0] // patch, size[1] // patch)
    assert largest_difference(ours.cls, theirs[:, 0]) < 1e-5
    assert largest_difference(ours.patches, theirs[:, 1:]) < 1e-5
    assert encoder.size == 224


def test_missing_and_extra_keys_are_errors_that_name_them(tmp_path: Path) -> None:
    weights = released(network(16))
    torch.save({k: v for k, v in weights.items() if k != "blocks.1.local_mp.bn.running_var"}, tmp_path / "a.pth")
    with pytest.raises(DinoError, match=r"blocks\.1\.local_mp\.bn\.running_var is missing"):
        load_encoder(str(tmp_path / "a.pth"), torch.device("cpu"))
    torch.save(weights | {"blocks.0.extra": torch.ones(1)}, tmp_path / "b.pth")
    with pytest.raises(DinoError, match=r"blocks\.0\.extra is unknown"):
        load_encoder(str(tmp_path / "b.pth"), torch.device("cpu"))

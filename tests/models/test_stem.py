from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import assert_same_features, write_run

from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset
from dinocli.models.architecture import BackboneConfig
from dinocli.models.stem import ConvStem
from dinocli.weights.export import export
from dinocli.weights.load import load_encoder

SMALL = BackboneConfig(
    name="vit_tiny_patch16_224",
    options={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    positions="dino",
    stem="conv",
)


@pytest.mark.parametrize("patch", [2, 8, 14, 16])
def test_each_patch_has_an_embedding_that_depends_on_its_neighbours(patch: int) -> None:
    torch.manual_seed(0)
    stem = ConvStem(3, patch, 32).eval()
    images = torch.randn(1, 3, 5 * patch, 4 * patch)
    embedded = stem(images)
    assert embedded.shape == (1, 32, 5, 4)
    changed = images.clone()
    changed[..., 2 * patch : 3 * patch, patch : 2 * patch] += 1
    where = (stem(changed) != embedded).any(1)[0]
    assert where[2, 1], "the patch itself"
    assert where.sum() == 4, "and those right, below, and right below, whose convolution reaches it"


@pytest.mark.parametrize("patch", [1, 7])
def test_an_odd_patch_is_an_error(patch: int) -> None:
    with pytest.raises(DinoError, match=f"the patch size {patch}; expected an even number"):
        ConvStem(3, patch, 32)


def test_pixels_beyond_whole_patches_have_no_effect() -> None:
    stem = ConvStem(3, 8, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    larger = torch.cat([images, torch.randn(2, 3, 32, 5)], 3)
    with torch.no_grad():
        assert_same_features(stem(larger), stem(images))


def test_crops_of_two_sizes_together_equal_each_alone() -> None:
    torch.manual_seed(0)
    backbone = SMALL.build(drop_path=False).eval()
    crops = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    joint, _ = backbone.encode(crops, None, with_patches=False)
    expected = torch.cat([backbone.class_tokens(group)[0] for group in crops])
    assert_same_features(joint, expected)


def test_networks_without_a_patch_embedding_refuse_it() -> None:
    with pytest.raises(DinoError, match="resnet18 has no patch embedding to replace"):
        BackboneConfig(name="resnet18", stem="conv").build(drop_path=False)


def test_a_trained_network_loads_with_its_stem_and_exports_as_a_graph_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "backbone.stem=conv")
    encoder = load_encoder(str(run), torch.device("cpu"))
    assert isinstance(encoder.backbone.model.patch_embed.proj, ConvStem)
    assert load_preset("tiny-dino", ["backbone.stem=conv"]).backbone == encoder_config(run)
    done = export(str(run), "torch-export", tmp_path / "net.pt2")
    assert done.difference < 1e-4
    for to, name in (("timm", "folder"), ("official", "net.pth")):
        with pytest.raises(DinoError, match="have no convolutional stem"):
            export(str(run), to, tmp_path / name)
        assert not (tmp_path / name).exists()


def encoder_config(run: Path) -> BackboneConfig:
    from dinocli.weights.checkpoint import read_weights

    config = read_weights(run).architecture
    assert config is not None
    return config


def test_two_steps_embed_half_patches_between_the_same_patches() -> None:
    torch.manual_seed(0)
    stem = ConvStem(3, 8, 32).eval()
    images = torch.randn(1, 3, 5 * 8, 4 * 8 + 3)
    whole = stem(images)
    stem.use_steps(2)
    finer = stem(images)
    assert finer.shape == (1, 32, 9, 7)
    torch.testing.assert_close(finer[..., ::2, ::2], whole)
    # Right of the border, a half patch later is the same patch of the image without its first half patch.
    stem.use_steps(1)
    torch.testing.assert_close(finer[..., ::2, 3::2], stem(images[..., 4:])[..., :, 1:3])

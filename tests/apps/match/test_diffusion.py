from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocli.apps.match.diffusion import STEP, load_diffusion
from dinocli.core.errors import DinoError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny Stable Diffusion 1 model with random weights."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 12, 16),
        norm_num_groups=4,
        layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")
    diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 5}
    config = transformers.CLIPTextConfig(vocab_size=6, max_position_embeddings=7, **sizes, **ends)
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    words = ["a", "a</w>", "b", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer/vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 7, "pad_token": "<|endoftext|>"})
    )
    return folder


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_layers_are_the_inputs_of_the_last_layer_of_each_decoder_block(model: Path) -> None:
    diffusion = load_diffusion(str(model), CPU)
    taken: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    for block in diffusion.unet.up_blocks[:-1]:
        # Its input is the layer, concatenated with the encoder's skip connection.
        block.resnets[-1].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0][0].permute(1, 2, 0)))
    diffusion.unet.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    layers = diffusion.layers(photo(40, 60), 48)
    # 48 x 32 pixels give 24 x 16 latents; the decoder's coarsest block has a quarter of each side.
    assert [tuple(layer.shape) for layer in layers] == [(4, 6, 16), (8, 12, 12)]
    for layer, whole in zip(layers, taken, strict=True):
        torch.testing.assert_close(layer, whole[..., : layer.shape[2]])
    again = diffusion.layers(photo(40, 60), 48)
    for layer, same in zip(layers, again, strict=True):
        torch.testing.assert_close(layer, same, rtol=0, atol=0)
    assert given[0].shape == (1, 4, 16, 24)


def test_the_noise_level_is_that_of_the_noise_step(model: Path) -> None:
    diffusion = load_diffusion(str(model), CPU)
    given: list[torch.Tensor] = []
    diffusion.unet.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pixels = photo(16, 16)  # 8 x 8 latents, the size of the noise
    diffusion.layers(pixels, 16)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = diffusion.vae.encode(image).latent_dist.mean * diffusion.vae.config.scaling_factor
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(42))
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[STEP]
    torch.testing.assert_close(given[0], kept.sqrt() * latents + (1 - kept).sqrt() * noise, rtol=1e-4, atol=1e-5)


def test_a_caption_changes_the_features(model: Path) -> None:
    plain, told = (load_diffusion(str(model), CPU, caption).layers(photo(32, 32), 32) for caption in ("", "a b"))
    assert not torch.allclose(plain[1], told[1])


def test_a_folder_without_a_suitable_model_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DinoError, match=r"no Stable Diffusion model at .*its unet"):
        load_diffusion(str(tmp_path), CPU)
    other = tmp_path / "other" / "unet"
    other.mkdir(parents=True)
    for file in (model / "unet").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    with pytest.raises(DinoError, match="is of another kind"):  # an inpainting model
        load_diffusion(str(other.parent), CPU)


def test_without_diffusers_the_hint_is_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DinoError) as error:
        load_diffusion("x", CPU)
    assert error.value.hint == "pip install 'dinocli[sd]'"

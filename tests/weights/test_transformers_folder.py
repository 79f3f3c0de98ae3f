from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_weights import fill, largest_difference
from safetensors.torch import load_file, save_file

from dinocli.core.errors import DinoError
from dinocli.weights.load import load_encoder

CPU = torch.device("cpu")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 70}
Make = Callable[[], Any]


def dinov2(**options: Any) -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL | {"patch_size": 14} | options))


def with_registers(**options: Any) -> Any:
    config = transformers.Dinov2WithRegistersConfig(**SMALL | {"patch_size": 14, "num_register_tokens": 3} | options)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3(**options: Any) -> Any:
    config = transformers.DINOv3ViTConfig(**SMALL | {"intermediate_size": 128, "num_register_tokens": 4} | options)
    return transformers.DINOv3ViTModel(config)


def convnext() -> Any:
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    return transformers.DINOv3ConvNextModel(config)


MODELS: dict[str, Make] = {
    "dinov2": dinov2,
    "dinov2 with SwiGLU": lambda: dinov2(use_swiglu_ffn=True),
    "dinov2 with registers": with_registers,
    "dinov2 with registers and SwiGLU": lambda: with_registers(use_swiglu_ffn=True),
    "dinov3": dinov3,
    "dinov3 with SwiGLU": lambda: dinov3(use_gated_mlp=True, hidden_act="silu"),
    "dinov3 without biases": lambda: dinov3(query_bias=False, value_bias=False),
    "dinov3 with heads of 32 channels": lambda: dinov3(num_attention_heads=2),
    "dinov3 without registers": lambda: dinov3(num_register_tokens=0),
    "dinov3 ConvNeXt": convnext,
}


def saved(model: Any, folder: Path, **preprocessing: Any) -> Path:
    fill(model)
    model.save_pretrained(folder)
    stored = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143], "size": {"height": 70}}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored | preprocessing))
    return folder


@pytest.mark.parametrize("size", [(70, 70), (98, 112)])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_features_of_transformers(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    patch = 14 if "dinov2" in name else 32 if "ConvNeXt" in name else 16
    height, width = (side // patch * patch for side in size)
    model = MODELS[name]().eval()
    encoder = load_encoder(str(saved(model, tmp_path)), CPU)
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(images).last_hidden_state if "ConvNeXt" not in name else None
        pooled = model(images).pooler_output
        ours = encoder.backbone(images)
    if theirs is None:
        assert largest_difference(ours.cls, pooled) < 1e-5
        return
    prefix = 1 + ours.registers.shape[1]
    assert prefix + ours.patches.shape[1] == theirs.shape[1]
    assert largest_difference(ours.cls, theirs[:, 0]) < 1e-5
    assert largest_difference(ours.registers, theirs[:, 1:prefix]) < 1e-5
    assert largest_difference(ours.patches, theirs[:, prefix:]) < 1e-5


def test_mean_std_and_size_are_those_of_the_folder(tmp_path: Path) -> None:
    encoder = load_encoder(str(saved(dinov3(), tmp_path, size={"height": 96, "width": 96})), CPU)
    assert (encoder.size, encoder.mean, encoder.std) == (96, (0.43, 0.411, 0.296), (0.213, 0.156, 0.143))
    assert encoder.notes == ()


def test_the_crop_is_the_size_if_the_folder_crops(tmp_path: Path) -> None:
    folder = saved(dinov2(), tmp_path, size={"shortest_edge": 84}, do_center_crop=True, crop_size={"height": 70})
    assert load_encoder(str(folder), CPU).size == 70


def test_missing_preprocessing_is_noted(tmp_path: Path) -> None:
    (saved(dinov3(), tmp_path) / "preprocessor_config.json").unlink()
    (note,) = load_encoder(str(tmp_path), CPU).notes
    assert "no preprocessor_config.json" in note


def test_a_file_in_the_folder_stands_for_the_folder(tmp_path: Path) -> None:
    folder = saved(dinov3(), tmp_path)
    named = load_encoder(str(folder / "model.safetensors"), CPU)
    assert named.fingerprint == load_encoder(str(folder), CPU).fingerprint


def test_weights_in_several_files_are_joined(tmp_path: Path) -> None:
    whole = load_encoder(str(saved(dinov2(), tmp_path / "whole")), CPU)
    model = dinov2()
    fill(model)
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert load_encoder(str(tmp_path / "parts"), CPU).fingerprint == whole.fingerprint


def test_a_classifier_is_dropped(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**SMALL, patch_size=14, num_labels=5)
    model = transformers.Dinov2ForImageClassification(config).eval()
    images = torch.randn(1, 3, 70, 70)
    encoder = load_encoder(str(saved(model, tmp_path)), CPU)
    with torch.no_grad():
        assert largest_difference(encoder.backbone(images).cls, model.dinov2(images).last_hidden_state[:, 0]) < 1e-5


@pytest.mark.parametrize("make", [dinov2, dinov3])
def test_every_missing_key_is_an_error_that_names_it(make: Make, tmp_path: Path) -> None:
    path = saved(make(), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if key in ("embeddings.mask_token", "embeddings.register_tokens"):
            continue
        save_file({k: v for k, v in tensors.items() if k != key}, path)
        with pytest.raises(DinoError) as error:
            load_encoder(str(tmp_path), CPU)
        message = error.value.message
        part = next((p for p in ("query", "key", "value", "q_proj", "k_proj", "v_proj") if p in key), None)
        if part:
            assert f"{key.split('.')[-1]} of the {dict(q='query', k='key', v='value')[part[0]]}" in message, key
        else:
            assert " is missing" in message or "is not a network" in message or "DINOv3 file without" in message, key


def test_an_extra_key_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = saved(dinov2(), tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"encoder.layer.0.adapter.weight": torch.zeros(2)}, path)
    with pytest.raises(DinoError, match=r"adapter\.weight is unknown"):
        load_encoder(str(tmp_path), CPU)


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_norm_eps", 1e-12), ("rope_theta", 10000.0), ("hidden_act", "silu"), ("use_gated_mlp", True)],
)
def test_a_setting_that_timms_network_lacks_is_refused(key: str, value: float, tmp_path: Path) -> None:
    path = saved(dinov3(), tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(
        DinoError, match="config.json has" if key == "use_gated_mlp" else f"config.json has {key}={value!r}"
    ):
        load_encoder(str(tmp_path), CPU)


def test_a_folder_without_its_weights_says_which_file_is_missing(tmp_path: Path) -> None:
    (saved(dinov2(), tmp_path) / "model.safetensors").unlink()
    with pytest.raises(DinoError, match=r"no model\.safetensors"):
        load_encoder(str(tmp_path), CPU)


def test_a_corrupt_preprocessor_is_refused(tmp_path: Path) -> None:
    (saved(dinov2(), tmp_path) / "preprocessor_config.json").write_text("[")
    with pytest.raises(DinoError, match=r"preprocessor_config.json is corrupt"):
        load_encoder(str(tmp_path), CPU)

"""Loading returns the network that was written, with its image size, mean and std."""

from __future__ import annotations

import copy
import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import assert_same_features

from dinocli.core.errors import DinoError
from dinocli.core.tensors import fingerprint
from dinocli.method.preset import load_preset
from dinocli.models.architecture import BackboneConfig
from dinocli.models.transformer import ViTBackbone
from dinocli.weights import load as loading
from dinocli.weights.checkpoint import Weights, read_weights, write_checkpoint
from dinocli.weights.load import (
    announcement,
    fitted_to,
    initial_weights,
    load_encoder,
    official_architecture,
    untrained_encoder,
)

CPU = torch.device("cpu")


def test_a_checkpoint_stores_its_shape_size_mean_and_std(tmp_path: Path) -> None:
    preset = load_preset("tiny-dino", ["views.mean=[0.1, 0.2, 0.3]"])
    network = preset.network().eval()
    write_checkpoint(tmp_path / "ckpt.safetensors", network.weights(), preset, 0)
    encoder = load_encoder(str(tmp_path), CPU)
    assert (encoder.size, encoder.mean) == (preset.views.global_1.size, (0.1, 0.2, 0.3))
    images = torch.randn(2, 3, encoder.size, encoder.size)
    torch.testing.assert_close(encoder.features(images), network.backbone(images).cls)
    assert encoder.fingerprint == fingerprint(network.backbone.model.state_dict())
    twin = untrained_encoder(read_weights(tmp_path), CPU)
    assert twin.fingerprint != encoder.fingerprint
    assert twin.features(images).shape == encoder.features(images).shape
    named = load_encoder(f"untrained:{tmp_path / 'ckpt.safetensors'}", CPU)
    assert (named.fingerprint, named.mean) == (twin.fingerprint, (0.1, 0.2, 0.3)), "the same weights each time"
    assert load_encoder("untrained:tiny-dino", CPU).fingerprint == twin.fingerprint


def test_untrained_weights_of_an_unknown_name_are_an_error() -> None:
    for name in ("tny", "timm:vit_small_patch16_224"):
        with pytest.raises(DinoError, match=f"untrained:{name} names no preset, run or checkpoint") as error:
            load_encoder(f"untrained:{name}", CPU)
        assert error.value.hint.startswith("use untrained:")
    with pytest.raises(DinoError, match="the architecture of untrained:tiny is known"):
        load_encoder("untrained:tiny", CPU, overrides=["backbone.options.num_heads=6"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch8_224", {}),
        ("vit_tiny_patch16_224", {"img_size": 96, "patch_size": 8}),
        ("resnet50", {}),
    ],
)
def test_official_networks_are_identified_by_their_weights(tmp_path: Path, name: str, options: dict) -> None:
    model = timm.create_model(name, num_classes=0, **options).eval()
    torch.save(
        {"teacher": {f"module.backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "official.pth"
    )
    encoder = load_encoder(str(tmp_path / "official.pth"), CPU)
    images = torch.randn(1, 3, *[options.get("img_size", 64 if name == "resnet50" else 224)] * 2)
    expected = model(images)
    torch.testing.assert_close(encoder.features(images), expected, rtol=1e-4, atol=1e-5)


def test_unknown_weights_are_an_error_and_never_random(tmp_path: Path) -> None:
    with pytest.raises(DinoError, match="is not a network of DINO"):
        official_architecture({"conv.weight": torch.zeros(1)}, "x.pth")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    weights = model.state_dict()
    del weights["blocks.3.norm1.bias"]
    torch.save(weights, tmp_path / "torn.pth")
    with pytest.raises(DinoError, match=r"blocks\.3\.norm1\.bias is missing"):
        load_encoder(str(tmp_path / "torn.pth"), CPU)


@pytest.fixture
def local_timm(tmp_path: Path) -> str:
    """A model folder in timm's hub format, because a test cannot download released weights."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": {"img_size": 32, "depth": 2},
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.4, 0.4, 0.4],
            "num_classes": 0,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"timm:local-dir:{tmp_path}"


def test_timms_released_weights(local_timm: str) -> None:
    encoder = load_encoder(local_timm, CPU)
    assert (encoder.size, encoder.mean, encoder.std) == (32, (0.5, 0.5, 0.5), (0.4, 0.4, 0.4))
    assert encoder.features(torch.randn(2, 3, 32, 32)).shape == (2, 192)
    weights = initial_weights(local_timm)
    assert fingerprint(weights.backbone) == encoder.fingerprint
    assert weights.heads == {}


def test_a_failed_download_is_an_error_and_never_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network here")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DinoError, match=r"could not download the pretrained weights .* no network here"):
        load_encoder("timm:vit_tiny_patch16_224", CPU)


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (
            {"architectures": ["ViTModel"], "model_type": "vit"},
            "names no architecture of timm",
            "dino export --to timm",
        ),
        ({"model_type": "dinov2"}, "is a transformers folder", "use "),
        ({"architecture": "resnet18"}, "cannot be loaded", "dino export --to timm"),
    ],
)
def test_a_local_folder_that_timm_cannot_load_is_no_failed_download(
    config: dict[str, object], message: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DinoError, match=message) as error:
        load_encoder(f"timm:local-dir:{tmp_path}", CPU)
    assert hint in error.value.hint


def test_non_finite_timm_weights_are_refused(local_timm: str, tmp_path: Path) -> None:
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    weights["cls_token"][0, 0, 0] = torch.inf
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(DinoError, match="cannot be used: cls_token holds 1 of 192 values") as error:
        load_encoder(local_timm, CPU)
    assert error.value.hint == "use other weights", "timm models have no earlier state"


@pytest.mark.parametrize("fails", [False, True])
def test_the_hubs_log_is_silent_only_during_a_download(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    log, create, levels = logging.getLogger("huggingface_hub"), timm.create_model, []

    def download(name: str, **options: object) -> torch.nn.Module:
        levels.append(log.level)
        if fails:
            raise ConnectionError("no network here")
        return create(name, **options | {"pretrained": False, "depth": 1})

    monkeypatch.setattr(timm, "create_model", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(log, "level", logging.WARNING)
    with pytest.raises(DinoError) if fails else nullcontext():
        load_encoder("timm:vit_tiny_patch16_224", CPU)
    assert (levels, log.level) == ([logging.CRITICAL], logging.WARNING)


def block(*args: object, **kwargs: object) -> None:
    threading.Event().wait(60)


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError("no route to the host")


@pytest.mark.parametrize("hub", [block, refuse])
def test_an_unreachable_hub_is_reported_early(monkeypatch: pytest.MonkeyPatch, hub: Callable[..., None]) -> None:
    """The hub's own client retries for a minute or more; so does this fake."""
    monkeypatch.setattr(timm, "create_model", block)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub)
    assert loading._PATIENCE <= 12, "at most 20 s together with the import of torch"
    monkeypatch.setattr(loading, "_PATIENCE", 0.2)
    began = time.monotonic()
    with pytest.raises(DinoError, match=r"huggingface\.co does not answer") as error:
        load_encoder("timm:vit_tiny_patch16_224", CPU)
    assert time.monotonic() - began < 10
    assert "timm:local-dir:FOLDER" in error.value.hint


class Answer(Exception):
    response = "404"


@pytest.mark.parametrize("way", ["answers", "says no such file", "is not there, and files are cached"])
def test_a_slow_download_is_waited_for(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    create = timm.create_model

    def slow(name: str, **options: object) -> torch.nn.Module:
        time.sleep(0.8)
        return create(name, **options | {"pretrained": False, "depth": 1})

    def hub(*args: object, **kwargs: object) -> None:
        if way != "answers":
            raise Answer if way == "says no such file" else OSError

    monkeypatch.setattr(timm, "create_model", slow)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: "x" if "cached" in way else None)
    monkeypatch.setattr(loading, "_PATIENCE", 0.2)
    assert load_encoder("timm:vit_tiny_patch16_224", CPU).size == 224
    assert announcement("timm:vit_tiny_patch16_224").endswith("cached" if "cached" in way else "from huggingface.co")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("", "timm: must be followed by a model name", "timm:vit_small_patch16_224.dino"),
        ("vit_tinny_patch16_224", "no model 'vit_tinny_patch16_224'", "timm:vit_tiny_patch16_224 or timm:"),
        ("resnet5O", "no model 'resnet5O'", "timm:resnet50"),
        ("dinov2_vits14_reg", "no model", "timm:vit_small_patch14_reg4_dinov2.lvd142m"),
        ("facebook/dinov2-base", "no model", "timm:vit_base_patch14_dinov2.lvd142m"),
        ("dino_vitb8", "no model", "timm:vit_base_patch8_224.dino"),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "no model", "timm:vit_small_patch16_dinov3.lvd1689m"),
        ("vit_small_patch16_224.dinoo", "no weights 'dinoo' of vit_small_patch16_224", "timm:vit_small_patch16_224.dino "),
        ("vit_base_patch16_plus_240", "no pretrained weights of vit_base_patch16_plus_240", "timm:vit_base_patch16"),
        ("local-dir:nowhere", "nowhere is not a folder", "dino export --to timm"),
        ("local-dir:.", "has no config.json", "dino export --to timm"),
    ],
)  # fmt: skip
def test_an_unknown_timm_name_gets_the_nearest_without_a_request(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str, hint: str
) -> None:
    monkeypatch.setattr(timm, "create_model", block)
    with pytest.raises(DinoError) as error:
        load_encoder(f"timm:{name}", CPU)
    assert message in error.value.message
    assert hint in error.value.hint.replace("?", " ")


@pytest.mark.parametrize(
    ("name", "positions"), [("vit_small_patch16_224.dino", "dino"), ("vit_small_patch16_224.augreg_in21k", "antialias")]
)
def test_dino_weights_of_timm_resample_positions_as_the_original(
    monkeypatch: pytest.MonkeyPatch, name: str, positions: str
) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options | {"pretrained": False}))
    encoder = load_encoder(f"timm:{name}", CPU)
    assert encoder.backbone.positions == positions
    images = torch.randn(1, 3, 64, 96)
    (expected,) = ViTBackbone(encoder.backbone.model, positions).class_tokens(images)
    assert_same_features(encoder.features(images), expected)


def test_dinov3s_weights_in_timm_are_read_as_timm_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    create, made = timm.create_model, []

    def random(name: str, **options: object) -> torch.nn.Module:
        made.append(create(name, **options | {"pretrained": False, "depth": 2}))
        return copy.deepcopy(made[-1])

    monkeypatch.setattr(timm, "create_model", random)
    encoder = load_encoder("timm:vit_small_patch16_dinov3.lvd1689m", CPU)
    assert (encoder.size, encoder.mean) == (256, (0.485, 0.456, 0.406))
    images = torch.randn(1, 3, 64, 96)
    (timms,) = made
    expected = timms.eval().forward_features(images)
    torch.testing.assert_close(encoder.features(images), expected[:, 0])
    torch.testing.assert_close(encoder.features(images, "patches"), expected[:, 5:])
    assert encoder.attention(images).shape == (1, 6, 4, 6)
    assert encoder.fingerprint == fingerprint(timms.state_dict()), "no weight was initialized again"


def test_an_exported_timm_folder_stores_how_positions_are_resampled(local_timm: str, tmp_path: Path) -> None:
    assert load_encoder(local_timm, CPU).backbone.positions == "antialias"
    config = json.loads((tmp_path / "config.json").read_text())
    for tag, positions in (("dino", "dino"), ("augreg", "antialias"), (None, "antialias")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"tag": tag}}))
        assert load_encoder(local_timm, CPU).backbone.positions == positions


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_three_channel_weights_are_adapted_to_other_channels(name: str, channels: int) -> None:
    options = {"img_size": 32, "depth": 1} if name.startswith("vit") else {}
    torch.manual_seed(0)
    three = BackboneConfig(name=name, options=options).build(drop_path=False).eval()
    other = BackboneConfig(name=name, options=options | {"in_chans": channels}).build(drop_path=False).eval()
    weights = Weights(dict(three.model.state_dict()), {}, None)
    fitted = fitted_to(weights, other)
    other.model.load_state_dict(fitted.backbone)
    gray = torch.randn(2, 1, 32, 32).expand(-1, 3, -1, -1)
    # For equal channels, summing the three filters into one channel gives the same output. Other numbers of channels
    # repeat the filters, scaled by 3 / channels: exact for multiples of three, else nearly.
    if channels == 1:
        torch.testing.assert_close(other(gray[:, :1]).cls, three(gray).cls, rtol=1e-4, atol=1e-5)
    first = next(key for key, value in weights.backbone.items() if value.ndim == 4)
    ours, theirs = fitted.backbone[first], weights.backbone[first]
    assert ours.shape[1] == channels
    for channel in range(channels) if channels > 1 else ():
        torch.testing.assert_close(ours[:, channel], theirs[:, channel % 3] * 3 / channels)
    assert fitted_to(weights, three) is None
    assert fitted_to(fitted, three) is None, "only three-channel weights are adapted; loading refuses others"

"""Encoders of any source teach a student without heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import write_run
from safetensors.torch import save_file

from dinocli.core.errors import DinoError
from dinocli.method.preset import Preset, load_preset
from dinocli.weights.feature_teachers import FeatureTeachers
from dinocli.weights.frozen_teacher import FrozenTeacher
from dinocli.weights.load import load_encoder

SMALL = ["backbone.options={img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2}", "views.global_1.size=32"]


def student(*more: str) -> Preset:
    return load_preset("distill-features", [*SMALL, *more])


def write_timm(
    folder: Path, name: str = "vit_tiny_patch16_224", channels: int = 3, seed: int = 0, **options: object
) -> str:
    """A folder in timm's format with random weights, as a hub would hold it."""
    torch.manual_seed(seed)
    options |= {} if channels == 3 else {"in_chans": channels}
    model = timm.create_model(name, num_classes=0, **options)
    size = options.get("img_size", 64)
    config = {"input_size": [channels, size, size], "mean": [0.4] * channels, "std": [0.2] * channels, "num_classes": 0}
    config |= {"first_conv": model.pretrained_cfg["first_conv"], "classifier": model.pretrained_cfg["classifier"]}
    folder.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    told = {"architecture": name, "num_classes": 0, "pretrained_cfg": config, "model_args": options}
    (folder / "config.json").write_text(json.dumps(told))
    return f"timm:local-dir:{folder}"


VIT = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}


def test_runs_timm_models_and_networks_without_class_token_teach(tmp_path: Path) -> None:
    sources = [str(write_run(tmp_path)), write_timm(tmp_path / "vit", **VIT), write_timm(tmp_path / "cnn", "resnet18")]
    teachers = FeatureTeachers.read(sources)
    assert teachers.source == ", ".join(sources)
    preset = student()
    # The student's 32 pixels are four patches of 8, need three of 14, and any size fits a CNN.
    assert teachers.sizes(preset) == [32, 42, 32]
    assert teachers.views(preset).global_1.size == 42 and preset.views.global_1.size == 32
    assert "views of 42" in teachers.describe(preset)
    method = teachers.method(preset)
    assert method.grids == [(4, 4), (3, 3), (1, 1)]
    for network, encoder in zip(method.networks[1:], teachers.encoders, strict=True):
        theirs = encoder.backbone.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in network.backbone.state_dict().items())
        assert not any(p is q for p, q in zip(network.parameters(), encoder.backbone.parameters(), strict=True))
    # The teacher sees what `dino extract` shows it: pixels in its own normalization.
    pixels = torch.rand(2, 3, 42, 42)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preset.views.mean, preset.views.std))
    theirs = teachers.encoders[1].features((pixels - 0.4) / 0.2)
    torch.testing.assert_close(method.teachers[1]((pixels - mean) / std).cls, theirs, rtol=1e-4, atol=1e-5)


def test_an_estimate_needs_no_weights(tmp_path: Path) -> None:
    teachers = FeatureTeachers.read([write_timm(tmp_path / "vit", **VIT)])
    with torch.device("meta"):
        method = teachers.method(student())
    assert {p.device.type for p in method.parameters()} == {"meta"}
    assert method.grids == [(3, 3)]
    assert next(teachers.encoders[0].backbone.parameters()).device.type == "cpu"


def test_the_fingerprint_names_all_teachers_in_order(tmp_path: Path) -> None:
    one, two = (write_timm(tmp_path / name, seed=seed, **VIT) for name, seed in (("a", 1), ("b", 2)))
    prints = [FeatureTeachers.read(sources).fingerprint for sources in ([one], [two], [one, two], [two, one])]
    assert prints[0] == load_encoder(one, torch.device("cpu")).fingerprint
    assert len(set(prints)) == 4 and {len(each) for each in prints} == {16}
    with pytest.raises(DinoError, match="has the weights of"):
        FeatureTeachers.read([one, one])


@pytest.mark.parametrize(
    ("size", "message", "hint"),
    [
        ("30", "teacher_size is 30; expected multiples of the teachers' patches, 14", "teacher_size='28'"),
        ("[28, 28]", "has 2 values for 1 teacher", "teacher_size='28'"),
        ("5000", "from 8 to 4096", "teacher_size='4998'"),
    ],
)
def test_a_size_that_the_teacher_cannot_see_is_an_error(tmp_path: Path, size: str, message: str, hint: str) -> None:
    teachers = FeatureTeachers.read([write_timm(tmp_path / "vit", **VIT)])
    with pytest.raises(DinoError, match=message) as error:
        teachers.sizes(student(f"losses.features.teacher_size={size}"))
    assert hint in error.value.hint
    assert teachers.sizes(student("losses.features.teacher_size=56")) == [56]
    assert teachers.sizes(student("losses.features.teacher_size=[70]")) == [70]


def test_an_unfit_teacher_is_an_error_before_training(tmp_path: Path) -> None:
    gray = FeatureTeachers.read([write_timm(tmp_path / "gray", channels=1, **VIT)])
    with pytest.raises(DinoError, match=r"takes 1 channel; images\.channels is 3") as error:
        gray.method(student())
    assert "use a teacher with 3, or --set images.channels=1" in error.value.hint
    small = FeatureTeachers.read([write_timm(tmp_path / "small", **VIT)])
    large = student("backbone.options={img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=2}")
    with pytest.raises(DinoError, match=r"has 0\.03 M parameters, the student 0\.21 M") as error:
        small.method(large)
    assert "use a larger --teacher" in error.value.hint
    # A small specialist may teach beside a large network.
    both = [*small.encoders, *FeatureTeachers.read([write_timm(tmp_path / "cnn", "resnet18")]).encoders]
    FeatureTeachers(tuple(both)).method(large)


def test_a_preset_with_heads_names_the_preset_that_needs_none(tmp_path: Path) -> None:
    source = write_timm(tmp_path / "vit", **VIT)
    run = tmp_path / "backbone.pth"
    torch.save(load_encoder(source, torch.device("cpu")).backbone.model.state_dict(), run)
    for teacher in (source, "timm:vit_small_patch14_dinov2.lvd142m", "dinov2_vits14", str(run)):
        with pytest.raises(DinoError) as error:
            FrozenTeacher.read(teacher)
        assert error.value.hint.startswith("--preset distill-features"), teacher
    with pytest.raises(DinoError) as error:
        FeatureTeachers.read([source]).sizes(load_preset("tiny-dino"))
    assert error.value.hint == "--preset distill-features"

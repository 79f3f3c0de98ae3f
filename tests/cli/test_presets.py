from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dinocli.cli import app


def test_backbones_lists_names_with_parameters_patch_and_released_weights() -> None:
    result = CliRunner().invoke(app, ["presets", "backbones", "vit_small_patch14_*dinov2"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert [line.split() for line in lines if line.startswith("vit_small_patch14_dinov2")] == [
        ["vit_small_patch14_dinov2", "22.1", "M", "14", "384", "class", "token", "masks"]
    ]
    assert "  timm:vit_small_patch14_dinov2.lvd142m" in lines
    assert "2 of 2 names work" in result.stderr
    assert max(map(len, lines)) <= 90


def test_without_a_pattern_names_are_listed_and_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise AssertionError(f"{name} was built")

    monkeypatch.setattr("dinocli.models.catalog.inspect_network", fail)
    result = CliRunner().invoke(app, ["presets", "backbones"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert len(lines) > 300 and {"resnet18", "vit_small_patch14_dinov2"} < set(lines)
    assert "dino presets backbones PATTERN" in result.stderr
    names = json.loads(CliRunner().invoke(app, ["presets", "backbones", "--json"]).stdout)
    assert [entry["name"] for entry in names] == lines


def test_a_network_that_does_not_work_has_a_reason() -> None:
    result = CliRunner().invoke(app, ["presets", "backbones", "crossvit_9_240", "--json"])
    (entry,) = json.loads(result.stdout)
    assert entry["name"] == "crossvit_9_240"
    assert entry["reason"] == "CrossVit returns a list; expected patch tokens or a map"
    assert "0 of 1 names work" in result.stderr


@pytest.mark.parametrize(
    ("name", "feature", "masks", "patch"),
    [
        ("swin_tiny_patch4_window7_224", "head", False, 32),
        ("xcit_small_12_p8_224", "token", False, 8),
        ("vit_tiny_patch16_dinov3_qkvb", "token", True, 16),
        ("resnet18", "head", False, 32),
    ],
)
def test_json_states_the_feature_of_each_network(name: str, feature: str, masks: bool, patch: int) -> None:
    result = CliRunner().invoke(app, ["presets", "backbones", name, "--json"])
    entry = json.loads(result.stdout)[0]
    assert (entry["feature"], entry["masks"], entry["patch_size"], entry["reason"]) == (feature, masks, patch, "")


def test_a_pattern_without_a_match_is_an_error() -> None:
    result = CliRunner().invoke(app, ["presets", "backbones", "resnet_50000"])
    assert result.exit_code != 0
    assert "no model that matches 'resnet_50000'" in str(result.exception)

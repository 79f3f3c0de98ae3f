from __future__ import annotations

import re
from dataclasses import replace

import pytest
from conftest import of_channels

from dinocli.apps.hub.card import Facts, Measured, card_of
from dinocli.evals.accuracy import Interval
from dinocli.evals.knn import KnnResult, Score
from dinocli.features.encoder import Encoder
from dinocli.method.preset import Preset, load_preset


def facts(encoder: Encoder, preset: Preset, **more: object) -> Facts:
    return Facts("birds", encoder, preset, "model(images)", ["timm needs img_size=N"], **more)


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.MULTILINE))


def test_the_card_describes_network_training_data_and_accuracy(encoder: Encoder) -> None:
    measured = Measured(
        KnnResult([Score(20, 38.571, Interval(37.0, 40.1), 38.5, 81.0)], 3925, 9469, 10, False, 0.07), "imagenette"
    )
    known = {"steps": 2000, "images": 9469, "init": "timm:vit", "watched": 41.27, "curves": "curves.png"}
    card = card_of(facts(encoder, load_preset("tiny-dino", ["training.epochs=40"]), measured=measured, **known))
    cells = rows(card)
    assert cells["network"].startswith("`vit_tiny_patch16_224`, img_size 48, patch_size 8")
    assert cells["network"].endswith(f"{sum(p.numel() for p in encoder.backbone.parameters()):,} parameters")
    assert cells["preset"] == "`tiny-dino`"
    assert cells["changed settings"] == "`training.epochs` 40 (was 8)"
    assert cells["data"] == "9,469 images, without their labels"
    assert cells["training"] == "2,000 steps of 48 images"
    assert cells["initial weights"] == "`timm:vit`"
    assert cells["k-NN accuracy"] == (
        "38.57 % (k = 20): 3,925 images of 10 classes of imagenette, classified by 9,469 training images"
    )
    assert cells["k-NN accuracy in training"] == "41.3 % at the end"
    assert "](curves.png)" in card
    assert "* timm needs img_size=N" in card
    assert '"epochs": 40' in card


def test_unknown_facts_are_omitted(encoder: Encoder) -> None:
    card = card_of(facts(encoder, load_preset("tiny-dino")))
    for key in (
        "changed settings",
        "data",
        "training",
        "initial weights",
        "k-NN accuracy",
        "k-NN accuracy in training",
    ):
        assert key not in rows(card)
    assert "## Training" not in card
    assert not any("None" in value for value in rows(card).values())


def test_the_front_matter_is_the_hubs_and_leaves_the_licence_to_the_user(encoder: Encoder) -> None:
    card = card_of(facts(encoder, load_preset("tiny-dinov2")))
    _, front, _ = card.split("---\n", 2)
    lines = front.splitlines()
    assert {"library_name: timm", "pipeline_tag: image-feature-extraction", "tags:", "- dino", "- ibot"} <= set(lines)
    assert [line for line in lines if "license" in line] == ["# license: set your own, such as `license: apache-2.0`"]
    assert "by DINO, iBOT and KoLeo with dinocli" in card


@pytest.mark.parametrize("channels", [1, 13])
def test_the_code_makes_images_with_the_models_channels(encoder: Encoder, channels: int) -> None:
    other = replace(encoder, mean=(0.5,) * channels, std=(0.5,) * channels)
    card = card_of(facts(other, load_preset("tiny-dino", of_channels(channels))))
    assert ('convert("L")' in card) == (channels == 1)
    assert ("torch.zeros(1, 13, 16, 16)" in card) == (channels == 13)


def test_names_from_others_are_escaped(encoder: Encoder) -> None:
    bad = "a\x1b[31m`|<img src=x>\n\n# \u202e[link](http://x)"
    preset = load_preset("tiny-dino", ["about.recipe=mine"])
    preset = preset.model_copy(update={"about": preset.about.model_copy(update={"recipe": bad})})
    measured = Measured(
        KnnResult([Score(20, 38.571, Interval(37.0, 40.1), 38.5, 81.0)], 3925, 9469, 10, False, 0.07), bad
    )
    card = card_of(facts(encoder, preset, measured=measured, init=bad, images=3))
    cells = rows(card)
    assert cells["initial weights"] == r"`a\x1b[31m'\|<img src=x>\n\n# \u202e[link](http://x)`"
    assert cells["preset"] == r"a\\x1b\[31m\`\|&lt;img src=x&gt;\\n\\n# \\u202e\[link\](http://x)"
    assert cells["preset"] in cells["k-NN accuracy"]
    assert all(sign.isprintable() or sign == "\n" for sign in card)

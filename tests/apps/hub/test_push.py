from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import RESNET18, ROTARY, assert_same_features, of_channels, random_images, write_images, write_run

import dinocli
from dinocli.apps.hub.push import CARD, push
from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.features.extract import extract
from dinocli.train.state import ImageFacts, State
from dinocli.weights import export as exporting
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.export import export
from dinocli.weights.load import load_encoder

CPU = torch.device("cpu")


def trained(folder: Path, *overrides: str, preset: str = "tiny-dino") -> Path:
    """Write a run with a checkpoint at step 3, whose log also has a fourth step."""
    source = write_run(folder, *overrides, preset=preset)
    lines = [{"step": step, "loss": 5.0 - step, "knn": 10.0 * step} for step in range(5)]
    (source / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = read_weights(source).preset
    facts = ImageFacts(where="/home/me/secret/photos", count=700, fingerprint="0")
    state = State(step=3, stop=9, preset=made, images=facts, init="/home/me/secret/old.pth", lanes=1)
    (source / "state" / "3").mkdir(parents=True)
    (source / "state" / "3" / "state.json").write_text(state.model_dump_json())
    return source


def code_of(card: str, where: str, photo: Path) -> list[str]:
    """Return the code blocks of a card, with the folder and a photo filled in."""
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return [re.sub(r"hf-hub:USER/[\w-]+", f"local-dir:{where}", b).replace("photo.jpg", str(photo)) for b in blocks]


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny-dino", []),
        ("tiny-dino", ROTARY),
        ("resnet50", [RESNET18]),
        ("tiny-dino", of_channels(1)),
        ("tiny-dino", of_channels(5)),
    ],
    ids=["vit", "rotary", "resnet", "grey", "channels"],
)
def test_the_code_of_the_card_gives_the_features(tmp_path: Path, preset: str, changes: list[str]) -> None:
    source, out = trained(tmp_path, *changes, preset=preset), tmp_path / "birds"
    photo = write_images(tmp_path / "photos", 1, size=55) / "0000.png"
    assert push(str(source), out).difference < 1e-5
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md", "curves.png"}
    encoder = load_encoder(str(source), CPU)
    by_timm, ours = code_of((out / CARD).read_text(), str(out), photo)
    names: dict[str, Any] = {}
    exec(by_timm, names)
    with torch.no_grad():
        torch.testing.assert_close(names["features"], encoder.features(names["images"]), rtol=1e-4, atol=1e-5)
    if encoder.channels in (1, 3):
        exec(ours, names)
        # Both crop 55 pixels to 48 without resizing; the rest is numerical precision.
        assert torch.nn.functional.cosine_similarity(names["features"], encoder(photo)).item() > 0.999
        torch.testing.assert_close(names["images"][0], pixels_of(photo, encoder), rtol=0, atol=0.02)


def pixels_of(photo: Path, encoder: dinocli.features.encoder.Encoder) -> torch.Tensor:
    (batch,) = encoder.batches(image_folder(photo.parent), size=encoder.size, batch_size=1, workers=0)
    return batch.images[0]


def test_the_card_describes_the_run_and_reveals_no_local_paths(tmp_path: Path) -> None:
    source = trained(tmp_path)
    done = push(str(source / "ckpt.safetensors"), tmp_path / "out")
    card = (done.path / CARD).read_text()
    assert "# out\n" in card
    assert "| data | 700 images" in card
    assert "| training | 3 steps of 48 images |" in card
    assert "| k-NN accuracy in training | 30.0 % at the end" in card, (
        "the value at the step of the weights, not a later one"
    )
    assert "| initial weights | `old.pth` |" in card
    assert "secret" not in card and str(tmp_path) not in card
    assert done.measured is None


def test_a_saved_state_can_be_pushed_and_a_lone_checkpoint_has_no_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = trained(tmp_path)
    shutil.copy(source / "ckpt.safetensors", source / "state" / "3")
    assert push(str(source / "state" / "3")).path == Path("run-hub")
    assert "700 images" in Path("run-hub", CARD).read_text()
    shutil.copy(source / "ckpt.safetensors", tmp_path / "my birds.safetensors")
    alone = push("my birds.safetensors")
    assert (alone.path, alone.name) == (Path("my-birds-hub"), "my-birds")
    assert not (alone.path / "curves.png").exists()
    assert "curves" not in (alone.path / CARD).read_text()


def test_given_features_are_measured_if_they_are_of_these_weights(tmp_path: Path, images: Path) -> None:
    source, other = trained(tmp_path), trained(tmp_path / "other", "training.seed=1", "backbone.options.depth=2")
    for which in (source, other):
        encoder = load_encoder(str(which), CPU)
        write_images(images / "a", 15, seed=2), write_images(images / "b", 15, seed=3)
        extract(encoder, image_folder(images), which / "features" / "all.safetensors", data=str(images))
    done = push(str(source), tmp_path / "out", source / "features")
    assert done.measured.knn.queries == 30
    line = f"{done.measured.knn.scores[0].top1:.2f} % (k = 20): 30 images of 2 classes of images, each classified by all others"
    assert line in (done.path / CARD).read_text()
    with pytest.raises(DinoError, match="holds features of other weights"):
        push(str(source), tmp_path / "again", other / "features")
    assert not (tmp_path / "again").exists()


def test_an_earlier_push_is_replaced_but_not_the_users_edits(tmp_path: Path) -> None:
    source, out = trained(tmp_path), tmp_path / "out"
    push(str(source), out)
    push(str(source), out)
    card = (out / CARD).read_text()
    (out / CARD).write_text(card.replace("# license: set your own, such as `license: apache-2.0`", "license: mit"))
    with pytest.raises(DinoError, match="was edited, and would be overwritten"):
        push(str(source), out)
    assert "license: mit" in (out / CARD).read_text()
    (out / CARD).write_text("my own words")
    with pytest.raises(DinoError, match="was edited"):
        push(str(source), out)
    (out / CARD).unlink()
    push(str(source), out)
    assert (out / CARD).read_text() == card
    (out / "notes.txt").touch()
    with pytest.raises(DinoError, match=r"holds notes\.txt"):
        push(str(source), out)
    with pytest.raises(DinoError, match=r"holds README\.md"):
        (out / "notes.txt").unlink()
        (out / "curves.png").unlink()
        export(str(source), "timm", out)


def test_a_push_replaces_an_export(tmp_path: Path) -> None:
    source, out = trained(tmp_path), tmp_path / "out"
    export(str(source), "timm", out)
    push(str(source), out)
    assert (out / CARD).is_file()


def test_a_model_with_other_features_in_timm_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, create = trained(tmp_path), timm.create_model

    def shifted(*args: object, **options: object) -> torch.nn.Module:
        model = create(*args, **options)
        model.norm.bias.data += 0.1
        return model

    monkeypatch.setattr(
        exporting.timm, "create_model", lambda *a, **o: shifted(*a, **o) if o.get("pretrained") else create(*a, **o)
    )
    with pytest.raises(DinoError, match="features with a relative difference"):
        push(str(source), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("source", "says"), [("timm:resnet18", "is already a timm model"), ("weights.pth", "does not store its training")]
)
def test_a_source_without_training_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(dict(read_weights(write_run(tmp_path)).backbone), tmp_path / "weights.pth")
    with pytest.raises(DinoError, match=says):
        push(source)


def test_a_model_from_the_hub_handles_other_sizes_as_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source, out = trained(tmp_path), tmp_path / "out"
    push(str(source), out)
    # A local folder replaces the hub.
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, filename, **_: str(out / filename))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(out / filename))
    encoder, again = load_encoder(str(source), CPU), load_encoder("timm:hf-hub:USER/out", CPU)
    assert again.fingerprint == encoder.fingerprint
    for size in (48, 24, 72):
        assert_same_features(again.features(random_images(size)), encoder.features(random_images(size)))
    assert replace(again, source=encoder.source).images == encoder.images

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import plain
import pytest
import timm
import torch
import torchvision

from dinocli.encoder import Encoder, load_encoder
from dinocli.errors import DinoError
from dinocli.exporting import ENDINGS, Format, export
from dinocli.preset import Preset, load_preset
from dinocli.weights import write_checkpoint

CPU = torch.device("cpu")
SMALL = ["heads.dino.prototypes=16", "heads.dino.hidden=24", "heads.dino.bottleneck=8", "views.global_1.size=48"]


def run(folder: Path, *overrides: str, preset: str = "tiny") -> Path:
    """A run folder with random weights, every one of them away from where it starts."""
    torch.manual_seed(0)
    made = load_preset(preset, [*SMALL, *overrides])
    network = made.network()
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    write_checkpoint(folder / "run" / "ckpt.safetensors", network, made, 3)
    return folder / "run"


def images(size: int = 48, count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def written(folder: Path, source: Path, to: Format, **options: object) -> tuple[Path, Encoder]:
    out = folder / f"out{ENDINGS[to]}"
    done = export(str(source), to, out, **options)
    assert done.path == out
    assert done.difference < 1e-5
    return out, load_encoder(str(source), CPU)


@pytest.mark.parametrize("size", [48, 24])
def test_the_original_reads_its_own_keys(tmp_path: Path, size: int) -> None:
    path, encoder = written(tmp_path, run(tmp_path), "official")
    outputs, _ = plain.vit(torch.load(path, weights_only=True), images(size), heads=6)
    torch.testing.assert_close(outputs[-1][:, 0], encoder.features(images(size)), rtol=1e-5, atol=1e-5)


def test_a_full_checkpoint_of_the_original_has_the_head_too(tmp_path: Path) -> None:
    source = run(tmp_path, "heads.dino.batch_norm=false")
    path, encoder = written(tmp_path, source, "official", heads=True)
    teacher = torch.load(path, weights_only=True)["teacher"]
    assert {key.split(".")[0] for key in teacher} == {"backbone", "head"}
    cls = encoder.features(images())
    head = {key.removeprefix("head."): value for key, value in teacher.items() if key.startswith("head.")}
    logits = plain.head(head, cls, layers=3, batch_norm=False)
    ours = load_preset("tiny", [*SMALL, "heads.dino.batch_norm=false"]).heads["dino"].build(96)
    ours.load_state_dict(head)
    torch.testing.assert_close(logits, ours(cls), rtol=1e-4, atol=1e-5)


def test_torchvision_reads_a_convolutional_network(tmp_path: Path) -> None:
    source = run(tmp_path, preset="resnet50")
    path, encoder = written(tmp_path, source, "official")
    network = torchvision.models.resnet50()
    network.fc = torch.nn.Identity()
    network.load_state_dict(torch.load(path, weights_only=True))
    torch.testing.assert_close(network.eval()(images()), encoder.features(images()))


def test_what_went_out_to_the_original_comes_in_again(tmp_path: Path) -> None:
    released = ["backbone.options={img_size=48, patch_size=8}", "backbone.name=vit_tiny_patch16_224"]
    path, encoder = written(tmp_path, run(tmp_path, *released), "official")
    again = load_encoder(str(path), CPU)
    assert again.fingerprint == encoder.fingerprint
    assert torch.equal(again.features(images()), encoder.features(images()))


@pytest.mark.parametrize("preset", ["tiny", "resnet50"])
def test_timm_builds_it_from_the_folder(tmp_path: Path, preset: str) -> None:
    path, encoder = written(tmp_path, run(tmp_path, preset=preset), "timm")
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    torch.testing.assert_close(model(images()), encoder.features(images()))
    config = timm.data.resolve_model_data_config(model)
    numbers = [tuple(config[key]) for key in ("input_size", "mean", "std")]
    assert numbers == [(3, 48, 48), encoder.mean, encoder.std]
    again = load_encoder(f"timm:local-dir:{path}", CPU)
    assert (again.fingerprint, again.size) == (encoder.fingerprint, 48)


@pytest.mark.parametrize(("tokens", "size"), [("cls", None), ("patches", 24), ("cls+avg", None)])
def test_onnxruntime_computes_it(tmp_path: Path, tokens: str, size: int | None) -> None:
    path, encoder = written(tmp_path, run(tmp_path), "onnx", tokens=tokens, size=size)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 5):
        batch = images(size or 48, count)
        (features,) = session.run(["features"], {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), encoder.features(batch, tokens), rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert (json.loads(about["mean"]), json.loads(about["size"])) == (list(encoder.mean), size or 48)
    assert session.get_inputs()[0].shape == ["batch", 3, size or 48, size or 48]


@pytest.mark.parametrize("preset", ["tiny", "resnet50"])
def test_torch_export_computes_it(tmp_path: Path, preset: str) -> None:
    path, encoder = written(tmp_path, run(tmp_path, preset=preset), "torch-export")
    extra = {"dinocli.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    for count in (1, 5):
        torch.testing.assert_close(module(images(count=count)), encoder.features(images(count=count)))
    assert json.loads(extra["dinocli.json"])["fingerprint"] == encoder.fingerprint


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("reg_tokens=2", "has no such network.*pos_embed should be"),
        ('act_layer="relu"', "features that differ"),
        ("init_values=0.1", "has no such network.*ls1"),
    ],
)
def test_what_the_original_does_not_have_is_refused_and_nothing_is_left(
    tmp_path: Path, option: str, message: str
) -> None:
    options = f"backbone.options={{img_size=48, patch_size=8, embed_dim=96, depth=2, num_heads=6, {option}}}"
    source = run(tmp_path, options, "backbone.positions=antialias")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DinoError, match=message):
        export(str(source), "official", tmp_path / "out.pth")
    assert set(tmp_path.rglob("*")) == before
    assert written(tmp_path, source, "timm")


def test_a_head_that_is_not_there(tmp_path: Path) -> None:
    released = ["backbone.options={img_size=48, patch_size=8}", "backbone.name=vit_tiny_patch16_224"]
    path, _ = written(tmp_path, run(tmp_path, *released), "official")
    with pytest.raises(DinoError, match="the heads are: none"):
        export(str(path), "official", tmp_path / "again.pth", heads=True)
    assert not (tmp_path / "again.pth").exists()


def test_a_place_that_should_not_be_written_is_not(tmp_path: Path) -> None:
    source = run(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DinoError, match=r"holds thesis\.tex"):
        export(str(source), "timm", tmp_path / "mine")
    with pytest.raises(DinoError, match=r"ends in \.pth was wanted"):
        export(str(source), "official", source / "ckpt.safetensors")
    with pytest.raises(DinoError, match="timm's own"):
        export("timm:vit_tiny_patch16_224", "timm", tmp_path / "x")


def test_a_folder_is_replaced_by_a_later_export(tmp_path: Path) -> None:
    path, first = written(tmp_path, run(tmp_path), "timm")
    preset: Preset = load_preset("tiny", SMALL)
    write_checkpoint(tmp_path / "run" / "ckpt.safetensors", preset.network(), preset, 9)
    _, second = written(tmp_path, tmp_path / "run", "timm")
    assert first.fingerprint != second.fingerprint == load_encoder(f"timm:local-dir:{path}", CPU).fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]

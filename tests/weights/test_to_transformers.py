from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RESNET18, ROTARY, of_channels, random_images, write_run
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.features.inputs import given_images
from dinocli.weights.export import export
from dinocli.weights.load import load_encoder

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
_OPTIONS = "backbone.options={img_size=48, patch_size=8, embed_dim=96, depth=2, num_heads=6"
DINOV2 = [f"{_OPTIONS}, init_values=0.5}}", "backbone.positions=bicubic"]
CROP = "AutoImageProcessor crops 48 of 55 pixels one pixel beside dino extract"
NETWORKS = {
    "ViT": ("ViTModel", [f"{_OPTIONS}}}"]),
    "DINOv2": ("Dinov2Model", DINOV2),
    "DINOv2 with registers": (
        "Dinov2WithRegistersModel",
        ["backbone.name=vit_small_patch14_reg4_dinov2", DINOV2[0], "backbone.positions=antialias"],
    ),
    "DINOv2 with SwiGLU": (
        "Dinov2Model",
        ["backbone.name=vit_giant_patch14_dinov2", f"{_OPTIONS}, init_values=0.5, mlp_ratio=5.33334}}", DINOV2[1]],
    ),
    "registers with positions": (
        "Dinov2WithRegistersModel",
        [f"{_OPTIONS}, reg_tokens=2}}", "backbone.positions=antialias"],
    ),
    "DINOv3": ("DINOv3ViTModel", ROTARY),
    "DINOv3 with SwiGLU and biases": (
        "DINOv3ViTModel",
        ["backbone.name=vit_small_plus_patch16_dinov3_qkvb", *ROTARY[1:]],
    ),
    "DINOv3 without registers and LayerScale": (
        "DINOv3ViTModel",
        [ROTARY[0], f"{_OPTIONS}, num_reg_tokens=0}}", *ROTARY[2:]],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_transformers_computes_the_same_features(tmp_path: Path, name: str) -> None:
    expected, changes = NETWORKS[name]
    source, out = write_run(tmp_path, *changes), tmp_path / "out"
    done, encoder = export(str(source), "transformers", out), load_encoder(str(source), CPU)
    assert done.difference < 1e-5
    model = eval(done.load, {"transformers": transformers}).eval()
    assert type(model).__name__ == expected == json.loads((out / "config.json").read_text())["architectures"][0]
    sizes = (48,) if expected == "ViTModel" else (48, 24, 64)
    for size in sizes:
        output = model(pixel_values=random_images(size))
        torch.testing.assert_close(
            output.last_hidden_state[:, 0], encoder.features(random_images(size)), rtol=1e-4, atol=1e-5
        )
    if expected != "ViTModel":
        assert done.notes == [CROP]
        torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, 0])
        again = load_encoder(str(out), CPU)
        assert (again.size, again.mean, again.channels) == (encoder.size, encoder.mean, 3)
        torch.testing.assert_close(
            again.features(random_images()), encoder.features(random_images()), rtol=1e-4, atol=1e-5
        )


def test_notes_name_what_differs_in_use(tmp_path: Path) -> None:
    source = write_run(tmp_path)
    pooler, sizes, crop = export(str(source), "transformers", tmp_path / "out").notes
    assert pooler.startswith("the features are last_hidden_state[:, 0]")
    assert sizes == (
        "at sizes other than 48 pixels transformers needs interpolate_pos_encoding=True and resamples positions "
        "differently: features differ"
    )
    assert crop == CROP
    encoder = load_encoder(str(source), CPU)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    theirs = model(pixel_values=random_images(24), interpolate_pos_encoding=True).last_hidden_state[:, 0]
    assert not torch.allclose(theirs, encoder.features(random_images(24)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("size", "rows"), [(56, 0), (48, 1)], ids=["even", "odd"])
def test_the_processor_prepares_photos_as_extract_does(tmp_path: Path, size: int, rows: int) -> None:
    """A crop of 48 from 55 rows leaves a margin of 3.5, which the two libraries round differently."""
    views = (f"views.{crop}.size={size}" for crop in ("global_1", "global_2"))
    source = write_run(tmp_path, "views.mean=[0.1, 0.2, 0.3]", *views, DINOV2[0].replace("48", str(size)))
    export(str(source), "transformers", tmp_path / "out")
    waves = np.sin(np.arange(90)[:, None] / 9) * np.cos(np.arange(120)[None] / 11)
    photo = Image.fromarray(np.stack([(waves * scale + 128).astype(np.uint8) for scale in (120, 60, 90)], -1))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(photo, return_tensors="pt")["pixel_values"]
    encoder = load_encoder(str(source), CPU)
    (batch,) = encoder.batches(given_images(photo), size=size, batch_size=1, workers=0)
    assert theirs.shape == batch.images.shape == (1, 3, size, size)
    # Rounding to bytes after the resize: one step of 255, over a standard deviation of 0.22.
    difference = theirs[:, :, rows:] - batch.images[:, :, : size - rows]
    assert difference.abs().max() < 2 / 255 / 0.22


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["backbone.stem=conv"], "no convolutional stem"),
        ([f"{DINOV2[0][:-1]}, mlp_ratio=2.5}}"], r"an MLP of 240 channels in a network of 96"),
        ([f"{_OPTIONS}, qk_norm=true}}"], r"ViTModel does not fit .*k_norm"),
    ],
    ids=["stem", "ratio", "unknown weights"],
)
def test_networks_that_transformers_lacks_are_refused(tmp_path: Path, changes: list[str], what: str) -> None:
    with pytest.raises(DinoError, match=what) as error:
        export(str(write_run(tmp_path, *changes)), "transformers", tmp_path / "out")
    assert error.value.hint.startswith(("--to timm", "export the same checkpoint with --to onnx"))
    assert not (tmp_path / "out").exists()


def test_a_convolutional_network_is_loaded_from_the_folder_for_timm(tmp_path: Path) -> None:
    source = write_run(tmp_path, RESNET18, preset="resnet50")
    with pytest.raises(DinoError, match="other than plain vision transformers") as error:
        export(str(source), "transformers", tmp_path / "out")
    assert error.value.hint == "--to timm: transformers loads that folder too, as TimmWrapperModel"
    export(str(source), "timm", tmp_path / "timm")
    model = transformers.AutoModel.from_pretrained(tmp_path / "timm").eval()
    assert type(model).__name__ == "TimmWrapperModel"
    torch.testing.assert_close(
        model(pixel_values=random_images()).pooler_output, load_encoder(str(source), CPU).features(random_images())
    )


def test_images_of_other_channels_are_exported(tmp_path: Path) -> None:
    source = write_run(tmp_path, *of_channels(5), *DINOV2)
    export(str(source), "transformers", tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert model.config.num_channels == 5


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    source = write_run(tmp_path)
    for _ in range(2):
        export(str(source), "transformers", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(DinoError, match=r"holds notes\.txt; expected a new folder"):
        export(str(source), "transformers", tmp_path / "out")


def test_a_missing_package_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DinoError, match="needs the package transformers") as error:
        export(str(write_run(tmp_path)), "transformers", tmp_path / "out")
    assert error.value.hint == "pip install 'dinocli[transformers]'"

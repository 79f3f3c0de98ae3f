from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from safetensors.numpy import save_file

from dinocli.core.errors import DinoError
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.identify import NAMES, Kind, foreign, kind_of, refuse_missing_weights


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "img" / "deep", 1, size=8)
    write_images(tmp_path / "photos", 1, size=8)
    (tmp_path / "photos" / "ckpt.safetensors").symlink_to("../run/ckpt.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").touch()
    (tmp_path / "run").mkdir()
    save_file({"x": np.zeros(1)}, tmp_path / "run" / "ckpt.safetensors")
    (tmp_path / "run" / "preset.json").write_text("{}")
    (tmp_path / "feats").mkdir()
    save_file({"x": np.zeros(1)}, tmp_path / "feats" / "val.safetensors", {"dinocli": "features"})
    (tmp_path / "large" / "train").mkdir(parents=True)
    (tmp_path / "large" / "train" / "index.json").write_text(json.dumps({"dinocli": "features", "images": {}}))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "config.json").write_text('{"model_type": "dinov3_vit"}')
    save_file({"x": np.zeros(1)}, tmp_path / "meta" / "model.safetensors")
    save_file({"x": np.zeros(1)}, tmp_path / "hub" / "model.safetensors")
    for name in ("x.pth", "a.zip", "a.mp4", "a.JPG", "net.onnx", "list.csv", "a.tar", "a.NPY", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("img", "images"), ("photos", "images"), (".", "images"), ("empty", "folder"), ("shards", "source"), ("run", "run"),
        ("run/ckpt.safetensors", "weights"), ("x.pth", "weights"), ("feats", "features"), ("feats/val.safetensors", "features"),
        ("large", "features"), ("hub", "model"), ("meta", "weights"), ("a.zip", "archive"), ("a.mp4", "video"), ("a.JPG", "image"), ("a.NPY", "image"),
        ("net.onnx", "graph"), ("list.csv", "source"), ("a.tar", "source"), ("notes.md", "file"), ("nowhere", "missing"),
        ("*.png", "pattern"), ("s3://bucket/x", "address"), ("timm:resnet50", "timm"), ("torchvision:CIFAR10", "source"),
        ("pipe:cat x", "source"), ("x-{00..09}.tar", "source"),
    ],
)  # fmt: skip
def test_a_path_is_identified_by_name_and_content(here: Path, place: str, kind: Kind) -> None:
    assert kind_of(place) == kind
    assert NAMES[kind]


def torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/code/__torch__.py", "x")
        archive.writestr("net/data.pkl", "x")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")


def lightning(path: Path) -> None:
    state = {"net.encoder.cls_token": torch.zeros(1, 1, 8), "net.encoder.pos_embed": torch.zeros(1, 5, 8)}
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, path)


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("net.onnx", b"x", "net.onnx is a graph or weights of another framework (.onnx); expected a checkpoint", "the .pth or"),
        ("model.h5", b"x", "is a graph or weights of another framework (.h5)", "the .pth or"),
        ("photo.jpg", b"x", "photo.jpg is an image; expected a checkpoint", "ckpt.safetensors"),
        ("scan.npy", b"x", "scan.npy is an image; expected a checkpoint", "ckpt.safetensors"),
        ("all.pth", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer", "git lfs pull"),
        ("all.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer", "git lfs pull"),
        ("dino.pth", b"<!DOCTYPE html><html>", "dino.pth is a web page", "download the file again"),
        ("dino.pth", b"", "dino.pth is empty", "copy or download it again"),
        ("net.pt", torchscript, "net.pt is a TorchScript graph", "the .pth or"),
        ("net.pth", zipped, "net.pth is an archive", "unpack it"),
        ("last.ckpt", lightning, "last.ckpt stores its weights under 'net.encoder.', as training frameworks do",
         "in Python: torch.save({k.removeprefix('net.encoder.'): v"),
        ("net.pth", b"garbage", "net.pth cannot be read as weights", "state_dict()"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_checkpoint_is_identified(
    tmp_path: Path, name: str, content: object, message: str, hint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(DinoError) as error:
        read_weights(path)
    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("place", "message", "hint"),
    [
        ("img", "img is a folder of images without ckpt.safetensors", "dino pretrain"),
        ("feats", "feats is a folder of features without ckpt.safetensors", "dino knn --features feats"),
        ("feats/val.safetensors", "is a file of features; expected a checkpoint", "dino knn --features feats"),
        ("hub", "hub is a transformers folder of model_type 'clip'", "timm:vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vits14", "it is the name of released weights", "timm:vit_small_patch14_dinov2.lvd142m"),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", "the name of released weights", "timm:vit_base_patch16_dinov3.lvd1689m"),
        ("vit_small_patch16_224.dino", "the name of released weights", "timm:vit_small_patch16_224.dino"),
        ("run/ckpt.safetensor", "checkpoint run/ckpt.safetensor does not exist", "did you mean run/ckpt.safetensors?"),
        ("nowhere.pth", "checkpoint nowhere.pth does not exist", "timm:NAME"),
    ],
)  # fmt: skip
def test_a_path_without_a_checkpoint_gets_a_fitting_hint(here: Path, place: str, message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        read_weights(Path(place))
    assert message in error.value.message
    assert hint in error.value.hint


def test_another_model_of_transformers_is_not_taken_for_one_of_timm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ViTModel"], "model_type": "vit"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DinoError, match="a transformers folder of model_type 'vit'") as error:
        read_weights(tmp_path)
    assert "local-dir" not in error.value.hint
    assert "dinov3_vit" in error.value.hint


def test_a_checkpoint_is_not_foreign(here: Path) -> None:
    torch.save({"x": torch.zeros(1)}, here / "plain.pth")
    assert foreign(here / "plain.pth") is None


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("nowhere.pth", "name a run folder"),
        ("run/chkpt.safetensors", "did you mean run/ckpt.safetensors?"),
        ("dinov2_vits14.pth", "timm:vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_a_missing_file_of_weights_is_an_error(here: Path, place: str, hint: str) -> None:
    with pytest.raises(DinoError, match=f"checkpoint {place} does not exist") as error:
        refuse_missing_weights(place)
    assert error.value.hint.startswith(hint)


@pytest.mark.parametrize("place", ["run", "run/ckpt.safetensors", "timm:resnet18.a1_in1k", "dinov2_vits14", "nowhere"])
def test_existing_files_and_possible_names_pass(here: Path, place: str) -> None:
    refuse_missing_weights(place)

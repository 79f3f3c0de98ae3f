from __future__ import annotations

import errno
import itertools
import json
import resource
from functools import partial
from pathlib import Path

import onnxruntime
import plain
import pytest
import timm
import torch
import torchvision
from conftest import (
    RESNET18,
    ROTARY,
    SMALL_HEADS,
    assert_same_features,
    of_channels,
    random_images,
    write_images,
    write_run,
)
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import open_source
from dinocli.data.sources.outputs import marked
from dinocli.features.encoder import Encoder
from dinocli.method.preset import Preset, load_preset
from dinocli.models.head import Head
from dinocli.models.network import Network
from dinocli.weights import export as exporting
from dinocli.weights import official
from dinocli.weights.checkpoint import Which, read_weights, write_checkpoint
from dinocli.weights.export import ENDINGS, Format, export
from dinocli.weights.load import load_encoder

CPU = torch.device("cpu")


def written(folder: Path, source: Path, to: Format, **options: object) -> tuple[Path, Encoder]:
    out = folder / f"out{ENDINGS[to]}"
    done = export(str(source), to, out, **options)
    assert done.path == out
    assert done.difference < 1e-5
    return out, load_encoder(str(source), CPU)


def full_checkpoint(folder: Path) -> tuple[Path, dict[str, Network]]:
    """Write a checkpoint of the original with two ViT-Ti at 48 pixels; return its path and the networks."""
    released = ["backbone.options={img_size=48, patch_size=8}", "backbone.name=vit_tiny_patch16_224"]
    made, networks = load_preset("tiny-dino", [*SMALL_HEADS, *released]), {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        networks[name] = made.network().eval()
        for tensor in networks[name].state_dict().values():
            if tensor.is_floating_point():  # includes BatchNorm statistics
                tensor.add_((torch.rand_like(tensor) - 0.5) * 0.1)
    content = {
        name: {"module." + key.replace("heads.dino.", "head."): value for key, value in network.weights().items()}
        for name, network in networks.items()
    }
    torch.save(content, folder / "checkpoint.pth")
    return folder / "checkpoint.pth", networks


class MultiCropWrapper(torch.nn.Module):
    """The original's wrapper of a network and its head; its attributes' names are the keys' prefixes."""

    def __init__(self, backbone: torch.nn.Module, head: torch.nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head


class DINOHead(torch.nn.Module):
    """The original's head, written from its published description."""

    def __init__(
        self, in_dim: int, out_dim: int, *, use_bn: bool, nlayers: int, hidden_dim: int, bottleneck_dim: int
    ) -> None:
        super().__init__()
        sides = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[torch.nn.Module] = []
        for before, after in itertools.pairwise(sides):
            layers += [torch.nn.Linear(before, after)]
            layers += ([torch.nn.BatchNorm1d(after)] if use_bn else []) + [torch.nn.GELU()]
        self.mlp = torch.nn.Sequential(*layers[: -2 if use_bn else -1])
        self.last_layer = torch.nn.utils.weight_norm(torch.nn.Linear(bottleneck_dim, out_dim, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_layer(torch.nn.functional.normalize(self.mlp(x), dim=-1))


def vision_transformer(*, img_size: list[int], qkv_bias: bool, norm_layer: object, **shape: int) -> torch.nn.Module:
    assert qkv_bias
    return timm.models.VisionTransformer(img_size=img_size[0], num_classes=0, norm_layer=norm_layer, **shape)


@pytest.mark.parametrize("size", [48, 24])
def test_the_original_reads_its_own_keys(tmp_path: Path, size: int) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path), "official")
    outputs, _ = plain.vit(torch.load(path, weights_only=True), random_images(size), heads=6)
    torch.testing.assert_close(outputs[-1][:, 0], encoder.features(random_images(size)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_norm", ["true", "false"])
def test_an_exported_head_loads_by_the_printed_lines(tmp_path: Path, batch_norm: str) -> None:
    source = write_run(tmp_path, f"heads.dino.batch_norm={batch_norm}")
    done = export(str(source), "official", tmp_path / "it's.pth", heads=True)
    names = {
        "nn": torch.nn, "torch": torch, "partial": partial, "VisionTransformer": vision_transformer,
        "MultiCropWrapper": MultiCropWrapper, "DINOHead": DINOHead,
    }  # fmt: skip
    for line in done.notes:
        exec(line, names)
    assert str(eval(done.load, names)) == "<All keys matched successfully>"
    encoder, weights = load_encoder(str(source), CPU), read_weights(source)
    torch.testing.assert_close(names["network"].eval()(random_images()), encoder.features(random_images()))
    own = weights.preset.heads["dino"].build(96)
    own.load_state_dict(weights.heads["dino"])
    features = torch.randn(7, 96)
    torch.testing.assert_close(names["head"].eval()(features), own.eval()(features))


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_the_requested_network_of_two_is_exported(tmp_path: Path, which: Which, heads: bool) -> None:
    source, networks = full_checkpoint(tmp_path)
    out = tmp_path / "out.pth"
    export(str(source), "official", out, which=which, heads=heads)
    stored = torch.load(out, weights_only=True)
    if heads:
        assert list(stored) == [which]
        head = {key.removeprefix("head."): value for key, value in stored[which].items() if key.startswith("head.")}
        own = networks[which].heads["dino"].state_dict()
        assert head.keys() == own.keys()
        assert all(torch.equal(value, own[key]) for key, value in head.items())
        assert all(torch.equal(v, own[k]) for k, v in read_weights(out, which).heads["dino"].items())
    with torch.no_grad():
        expected = networks[which].backbone(random_images()).cls
    again = load_encoder(str(out), CPU, which)
    torch.testing.assert_close(again.features(random_images()), expected, rtol=1e-5, atol=1e-5)


def test_a_head_with_other_outputs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_run(tmp_path)
    forward = Head.forward
    monkeypatch.setattr(Head, "forward", lambda self, x: forward(self, x) + self.last_layer.weight_g.mean())
    kept = official.original_head

    def unpatched(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
        head = kept(weights)
        head.forward = partial(forward, head)
        return head

    monkeypatch.setattr(exporting, "original_head", unpatched)
    with pytest.raises(DinoError, match="returns logits with a relative difference"):
        export(str(source), "official", tmp_path / "out.pth", heads=True)
    assert not (tmp_path / "out.pth").exists()


def test_torchvision_reads_a_convolutional_network(tmp_path: Path) -> None:
    source = write_run(tmp_path, preset="resnet50")
    path, encoder = written(tmp_path, source, "official")
    names = {"torch": torch, "torchvision": torchvision}
    done = export(str(source), "official", path)
    exec(f"{done.notes[0]}; {done.load}", names)
    torch.testing.assert_close(names["network"].eval()(random_images()), encoder.features(random_images()))


def test_a_named_shape_of_the_original_needs_no_note(tmp_path: Path) -> None:
    released = ["backbone.options={}", "backbone.name=vit_tiny_patch16_224"]
    assert export(str(write_run(tmp_path, *released)), "official", tmp_path / "out.pth").notes == []
    source = write_run(tmp_path, *released, "backbone.positions=antialias")
    (note,) = export(str(source), "official", tmp_path / "out.pth").notes
    assert note.startswith(
        "at sizes other than 224 pixels features differ: the original resamples positions differently"
    )


def test_an_official_export_is_read_back(tmp_path: Path) -> None:
    released = ["backbone.options={img_size=48, patch_size=8}", "backbone.name=vit_tiny_patch16_224"]
    path, encoder = written(tmp_path, write_run(tmp_path, *released), "official")
    again = load_encoder(str(path), CPU)
    assert again.fingerprint == encoder.fingerprint
    assert_same_features(again.features(random_images()), encoder.features(random_images()))
    assert again.backbone.positions == "dino"


@pytest.mark.parametrize("heads", [False, True])
def test_an_official_export_of_a_custom_shape_is_read_back(tmp_path: Path, heads: bool) -> None:
    """The file stores the 6 heads of `tiny`, which no tensor's shape shows, and a mean unlike ImageNet's."""
    source = write_run(tmp_path, "views.mean=[0.1, 0.2, 0.3]", "images.window=[0, 4095]")
    path, encoder = written(tmp_path, source, "official", heads=heads)
    again = load_encoder(str(path), CPU)
    # The two networks sum in another order.
    torch.testing.assert_close(again.features(random_images()), encoder.features(random_images()), rtol=1e-5, atol=1e-5)
    assert (again.fingerprint, again.size, again.mean) == (encoder.fingerprint, encoder.size, encoder.mean)
    assert (again.images, again.step) == (encoder.images, 3)
    second = tmp_path / "second.pth"
    export(str(path), "official", second)
    assert load_encoder(str(second), CPU).fingerprint == encoder.fingerprint
    with pytest.raises(DinoError, match="is only for official files"):
        load_encoder(str(path), CPU, overrides=["backbone.options.num_heads=3"])


def test_an_export_of_an_official_file_uses_the_given_number_of_heads(tmp_path: Path) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path), "official")
    torch.save(dict(torch.load(path, weights_only=True)), tmp_path / "old.pth")
    with pytest.raises(DinoError, match="does not store its number of attention heads") as error:
        export(str(tmp_path / "old.pth"), "official", tmp_path / "again.pth")
    assert (
        error.value.hint
        == "--set backbone.options.num_heads=N with the number it was trained with (6 for preset tiny-dino)"
    )
    export(str(tmp_path / "old.pth"), "official", tmp_path / "again.pth", overrides=["backbone.options.num_heads=6"])
    again = load_encoder(str(tmp_path / "again.pth"), CPU)
    torch.testing.assert_close(again.features(random_images()), encoder.features(random_images()), rtol=1e-5, atol=1e-5)


def test_official_weights_are_read_as_the_original_reads_them_at_every_size(tmp_path: Path) -> None:
    source, networks = full_checkpoint(tmp_path)
    weights = networks["teacher"].backbone.model.state_dict()
    for size in (48, 24, 72):
        outputs, attention = plain.vit(weights, random_images(size), heads=3)
        encoder = load_encoder(str(source), CPU)
        torch.testing.assert_close(encoder.features(random_images(size)), outputs[-1][:, 0], rtol=1e-4, atol=1e-5)
        ours = encoder.attention(random_images(size)).flatten(2)
        torch.testing.assert_close(ours, attention[:, :, 0, 1:], rtol=1e-4, atol=1e-5)


RESNET = ["backbone.positions=none", "backbone.class_token_std=none"]


@pytest.mark.parametrize(("preset", "changes"), [("tiny-dino", []), ("resnet50", [RESNET18])], ids=["vit", "resnet"])
def test_timm_builds_a_network_from_the_folder(tmp_path: Path, preset: str, changes: list[str]) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path, *changes, preset=preset), "timm")
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    torch.testing.assert_close(model(random_images()), encoder.features(random_images()))
    config = timm.data.resolve_model_data_config(model)
    numbers = [tuple(config[key]) for key in ("input_size", "mean", "std")]
    assert numbers == [(3, 48, 48), encoder.mean, encoder.std]
    again = load_encoder(f"timm:local-dir:{path}", CPU)
    assert (again.fingerprint, again.size) == (encoder.fingerprint, 48)


def test_a_rotary_network_is_exported_to_timm_for_any_size(tmp_path: Path) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path, *ROTARY), "timm")
    (note,) = export(str(tmp_path / "run"), "timm", path).notes
    assert note.endswith("for the same features use model.forward_features(images)[:, 0]")
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    for size in (48, 24, 64):
        torch.testing.assert_close(
            model.forward_features(random_images(size))[:, 0], encoder.features(random_images(size))
        )
    again = load_encoder(f"timm:local-dir:{path}", CPU)
    assert (again.fingerprint, again.size) == (encoder.fingerprint, 48)
    assert_same_features(again.features(random_images(24)), encoder.features(random_images(24)))


@pytest.mark.parametrize(("tokens", "size"), [("cls", None), ("patches", 24)])
def test_onnxruntime_computes_a_rotary_network(tmp_path: Path, tokens: str, size: int | None) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path, *ROTARY), "onnx", tokens=tokens, size=size)
    batch = random_images(size or 48)
    (features,) = onnxruntime.InferenceSession(path).run(["features"], {"images": batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), encoder.features(batch, tokens), rtol=1e-4, atol=1e-5)


def test_a_rotary_network_is_not_one_of_the_originals(tmp_path: Path) -> None:
    with pytest.raises(DinoError, match=r"learned positions.*vit_small_patch16_dinov3 is neither") as error:
        export(str(write_run(tmp_path, *ROTARY)), "official", tmp_path / "out.pth")
    assert error.value.hint == "--to timm"
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(("tokens", "size"), [("cls", None), ("patches", 24), ("cls+avg", None)])
def test_onnxruntime_computes_the_same_features(tmp_path: Path, tokens: str, size: int | None) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path), "onnx", tokens=tokens, size=size)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 5):
        batch = random_images(size or 48, count)
        (features,) = session.run(["features"], {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), encoder.features(batch, tokens), rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert (json.loads(about["mean"]), json.loads(about["size"])) == (list(encoder.mean), size or 48)
    assert session.get_inputs()[0].shape == ["batch", 3, size or 48, size or 48]


def test_the_images_of_a_reduced_graph_are_without_outputs_of_this_tool(tmp_path: Path) -> None:
    source = write_run(tmp_path, "images.pages=all")
    write_images(tmp_path / "images", 3)
    frames = [Image.open(path) for path in sorted((tmp_path / "images").iterdir())]
    frames[0].save(tmp_path / "images" / "stack.tif", save_all=True, append_images=frames[1:])
    with marked(tmp_path / "images" / "attention", "attn-map"):
        write_images(tmp_path / "images" / "attention", 4)
    images = open_source(str(tmp_path / "images"))
    done = export(str(source), "onnx", tmp_path / "out.onnx", precision="float16", images=images)
    assert done.reduced and done.reduced.images == 3, "half of three images and of the three pages of a TIFF"
    assert any("attention" in note and "written by dino" in note for note in done.notes)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("tiny-dino", []), ("tiny-dino", ROTARY), ("resnet50", [RESNET18])],
    ids=["vit", "rotary", "resnet"],
)
def test_torch_export_computes_the_same_features(tmp_path: Path, preset: str, changes: list[str]) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path, *changes, preset=preset), "torch-export")
    extra = {"dinocli.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    for count in (1, 5):
        torch.testing.assert_close(module(random_images(count=count)), encoder.features(random_images(count=count)))
    assert json.loads(extra["dinocli.json"])["fingerprint"] == encoder.fingerprint


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("reg_tokens=2", "has no such network.*pos_embed is .*; expected"),
        ('act_layer="relu"', "features with a relative difference"),
        ("init_values=0.1", "has no such network.*ls1"),
    ],
)
def test_unsupported_exports_are_refused_and_write_nothing(tmp_path: Path, option: str, message: str) -> None:
    options = f"backbone.options={{img_size=48, patch_size=8, embed_dim=96, depth=2, num_heads=6, {option}}}"
    source = write_run(tmp_path, options, "backbone.positions=antialias")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DinoError, match=message):
        export(str(source), "official", tmp_path / "out.pth")
    assert set(tmp_path.rglob("*")) == before
    assert written(tmp_path, source, "timm")


def test_a_missing_head_is_an_error(tmp_path: Path) -> None:
    released = ["backbone.options={img_size=48, patch_size=8}", "backbone.name=vit_tiny_patch16_224"]
    path, _ = written(tmp_path, write_run(tmp_path, *released), "official")
    with pytest.raises(DinoError, match="the checkpoint's heads are: none"):
        export(str(path), "official", tmp_path / "again.pth", heads=True)
    assert not (tmp_path / "again.pth").exists()


def test_an_export_overwrites_no_foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_run(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").write_text("thesis")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"architecture": "resnet18"}')
    (tmp_path / "theirs" / "model.safetensors").touch()
    (tmp_path / "link").symlink_to("theirs")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def found() -> dict[Path, tuple[int, ...]]:
        # Without the access time: an export reads a file before it refuses it.
        seen = ((path, path.lstat()) for path in tmp_path.rglob("*"))
        return {path: (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in seen}

    before = found()
    for name, message in {
        "mine": r"holds thesis\.tex",
        "file": "is a file",
        "link": "is a symbolic link",
        "theirs": "holds a model that this tool did not export",
        "empty": "is the current folder",
        "empty/../mine": r"holds thesis\.tex",
        "run": "which would be overwritten",
    }.items():
        with pytest.raises(DinoError, match=message):
            export(str(source), "timm", tmp_path / name)
    with pytest.raises(DinoError, match="is the current folder"):
        export(str(source), "timm", Path())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DinoError, match="which would be overwritten") as error:
        export(str(source), "timm", Path())
    assert error.value.hint == f"--out {tmp_path.name}-timm"
    with pytest.raises(DinoError, match=r"does not end in \.pth"):
        export(str(source), "official", source / "ckpt.safetensors")
    with pytest.raises(DinoError, match="is already a timm model"):
        export("timm:vit_tiny_patch16_224", "timm", tmp_path / "x")
    with pytest.raises(FileNotFoundError) as missing:
        export(str(source), "official", Path("/proc/x.pth"))
    assert missing.value.filename == "/proc/x.pth"
    assert found() == before


def test_an_export_never_overwrites_its_source(tmp_path: Path) -> None:
    source, _ = full_checkpoint(tmp_path)
    (tmp_path / "link.pth").symlink_to(source)
    (tmp_path / "same.pth").hardlink_to(source)
    before = source.read_bytes()
    for taken, out in itertools.product((source, tmp_path / "link.pth"), ("checkpoint.pth", "link.pth", "same.pth")):
        with pytest.raises(DinoError, match="which would be overwritten") as error:
            export(str(taken), "official", tmp_path / out)
        assert error.value.hint.endswith("-official.pth")
    folder = tmp_path / "folder"
    export(str(source), "timm", folder)
    with pytest.raises(DinoError, match="which would be overwritten"):
        export(str(folder / "model.safetensors"), "timm", folder)
    assert source.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("to", list(ENDINGS))
def test_a_full_disk_is_an_error_that_names_the_place(tmp_path: Path, to: Format) -> None:
    source = write_run(tmp_path)
    # A limit on the file size makes writing fail as on a full disk.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            export(str(source), to, tmp_path / "a" / f"out{ENDINGS[to]}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "a" / f"out{ENDINGS[to]}"))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("positions", "differ"), [("dino", True), ("antialias", False)])
def test_the_note_on_timm_at_another_size_is_true(tmp_path: Path, positions: str, differ: bool) -> None:
    source = write_run(tmp_path, f"backbone.positions={positions}")
    done = export(str(source), "timm", tmp_path / "out")
    (note,) = done.notes
    assert "needs dynamic_img_size=True (or img_size=N) and resamples positions with antialias" in note
    assert (": features differ" in note) == differ
    encoder = load_encoder(str(source), CPU)
    for option in ({"dynamic_img_size": True}, {"img_size": 24}):
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, **option).eval()
        theirs, ours = model(random_images(24)), encoder.features(random_images(24))
        assert torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3) != differ
    again = load_encoder(f"timm:local-dir:{tmp_path / 'out'}", CPU)
    assert again.backbone.positions == positions
    assert_same_features(again.features(random_images(24)), encoder.features(random_images(24)))


@pytest.mark.parametrize("name", ["efficientvit_b0", "mobilenetv3_small_050"])
def test_a_backbone_with_extra_layers_is_exported_to_timm_with_a_note(tmp_path: Path, name: str) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path, f'backbone={{name="{name}"}}', preset="resnet50"), "timm")
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    (note,) = export(str(tmp_path / "run"), "timm", path).notes
    assert note.endswith("for the same features use model.forward_features(images).mean((2, 3))")
    torch.testing.assert_close(model.forward_features(random_images()).mean((2, 3)), encoder.features(random_images()))
    assert model(random_images()).shape != (5, encoder.backbone.width) or not torch.allclose(
        model(random_images()), encoder.features(random_images()), rtol=1e-2
    )


@pytest.mark.parametrize("name", ["convnext_atto", "xcit_nano_12_p16_224"])
def test_a_backbone_with_its_own_feature_is_exported_to_timm_as_it_is(tmp_path: Path, name: str) -> None:
    path, encoder = written(tmp_path, write_run(tmp_path, f'backbone={{name="{name}"}}', preset="resnet50"), "timm")
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    assert export(str(tmp_path / "run"), "timm", path).notes == []
    torch.testing.assert_close(model(random_images()), encoder.features(random_images()))


def test_a_folder_is_replaced_by_a_later_export(tmp_path: Path) -> None:
    path, first = written(tmp_path, write_run(tmp_path), "timm")
    preset: Preset = load_preset("tiny-dino", SMALL_HEADS)
    write_checkpoint(tmp_path / "run" / "ckpt.safetensors", preset.network().weights(), preset, 9)
    _, second = written(tmp_path, tmp_path / "run", "timm")
    assert first.fingerprint != second.fingerprint == load_encoder(f"timm:local-dir:{path}", CPU).fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.slow
# Tracing a graph is slow and does not depend on the number of channels, so one number suffices for graphs.
@pytest.mark.parametrize(("to", "channels"), [*((to, 13) for to in ENDINGS), *((to, 1) for to in ("official", "timm"))])
def test_networks_of_any_channels_are_exported(tmp_path: Path, to: Format, channels: int) -> None:
    source = write_run(tmp_path, *of_channels(channels))
    path, encoder = written(tmp_path, source, to)
    if to == "timm":
        again = load_encoder(f"timm:local-dir:{path}", CPU)
        assert (again.fingerprint, again.mean, again.images.channels) == (encoder.fingerprint, encoder.mean, channels)
    if to == "official":
        (note,) = export(str(source), to, tmp_path / "x.pth").notes
        assert f"in_chans={channels}," in note


def test_torchvision_supports_only_three_channels(tmp_path: Path) -> None:
    source = write_run(tmp_path, *of_channels(4, 'backbone.name="resnet50"', "backbone.options={}", *RESNET))
    with pytest.raises(DinoError, match=r"conv1\.weight is 64x4x7x7; expected 64x3x7x7"):
        export(str(source), "official", tmp_path / "x.pth")

"""Official DINOv2 files: identified by their keys, with the same features as a plain definition and as timm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.load import load_encoder, start_from
from dinocli.weights.official import HEADS, official_architecture, under_timms_keys

CPU = torch.device("cpu")
Weights = dict[str, Tensor]


def shapes(width: int, depth: int, *, registers: int, gated: int = 0, side: int = 37) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a released file, under its own keys; `gated` is the inner width of SwiGLU, if used."""
    mlp = {"fc1": (4 * width, width), "fc2": (width, 4 * width)}
    if gated:
        mlp = {"w12": (2 * gated, width), "w3": (width, gated)}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)} | {f"mlp.{k}": v for k, v in mlp.items()}
    found = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side**2, width), "mask_token": (1, width)}
    if registers:
        found["register_tokens"] = (1, registers, width)
    found |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            found |= {f"blocks.{i}.{norm}.{key}": (width,) for key in ("weight", "bias")}
        found |= {f"blocks.{i}.{scale}.gamma": (width,) for scale in ("ls1", "ls2")}
        found |= {f"blocks.{i}.{layer}.weight": shape for layer, shape in layers.items()}
        found |= {f"blocks.{i}.{layer}.bias": shape[:1] for layer, shape in layers.items()}
    return found | {"norm.weight": (width,), "norm.bias": (width,)}


def random_file(*args: int, **how: int) -> Weights:
    """Return random weights, scaled so that every part affects the features; sums of two are exact in float32."""
    torch.manual_seed(0)
    found = {}
    for key, shape in shapes(*args, **how).items():
        spread = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        around = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        found[key] = (around + spread * torch.randn(shape)).mul(2**12).round().div(2**12)
    return found


def defined(w: Weights, images: Tensor, heads: int) -> Tensor:
    """Compute DINOv2's tokens after the final norm, straight from the keys of its file. [B, 1+R+N, D]"""

    def linear(key: str, x: Tensor) -> Tensor:
        return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    def norm(key: str, x: Tensor) -> Tensor:
        away = x - x.mean(-1, keepdim=True)
        return away / (away.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]

    patches = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    rows, columns = patches.shape[-2:]
    side = math.isqrt(w["pos_embed"].shape[1])
    table = w["pos_embed"][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if (rows, columns) != (side, side):
        # Without registers as in DINO; with registers to the exact size, with antialiasing.
        how = {"size": (rows, columns), "antialias": True}
        if "register_tokens" not in w:
            how = {"scale_factor": ((rows + 0.1) / side, (columns + 0.1) / side)}
        table = F.interpolate(table, mode="bicubic", **how)
    x = (patches + table).flatten(2).transpose(1, 2)
    first = [w["cls_token"] + w["pos_embed"][:, :1], *([w["register_tokens"]] if "register_tokens" in w else [])]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], 1)
    for i in range(len({key.split(".")[1] for key in w if key.startswith("blocks.")})):
        b = f"blocks.{i}"
        q, k, v = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x)).unflatten(-1, (3, heads, -1)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v).flatten(2)
        x = x + w[f"{b}.ls1.gamma"] * linear(f"{b}.attn.proj", mixed)
        y = norm(f"{b}.norm2", x)
        if f"{b}.mlp.w12.weight" in w:
            gate, value = linear(f"{b}.mlp.w12", y).chunk(2, -1)
            y = linear(f"{b}.mlp.w3", gate * gate.sigmoid() * value)
        else:
            y = linear(f"{b}.mlp.fc1", y)
            y = linear(f"{b}.mlp.fc2", y * 0.5 * (1 + torch.erf(y / 2**0.5)))
        x = x + w[f"{b}.ls2.gamma"] * y
    return norm("norm", x)


def features(path: Path, images: Tensor, size: int = 518) -> tuple[Tensor, Tensor]:
    """Return an encoder's class tokens and patch tokens in float64. [B, D] and [B, N, D]"""
    encoder = load_encoder(str(path), CPU)
    assert (encoder.size, encoder.mean, encoder.std) == (size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    encoder.backbone.double()
    return encoder.features(images), encoder.features(images, "patches")


def doubled(weights: Weights) -> Weights:
    return {key: value.double() for key, value in weights.items()}


FILES = {
    "ViT-S/14": ((384, 12), {"registers": 0}, 6),
    "with registers": ((384, 2), {"registers": 4}, 6),
    "SwiGLU": ((384, 2), {"registers": 0, "gated": 1024}, 6),
    "SwiGLU, registers": ((768, 1), {"registers": 2, "gated": 2048}, 12),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [(70, 70), (56, 98)], ids=["square", "wide"])
def test_features_equal_the_plain_definition(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    args, how, heads = FILES[name]
    weights = random_file(*args, **how)
    torch.save(weights, tmp_path / "released.pth")
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    cls, patches = features(tmp_path / "released.pth", images)
    expected = defined(doubled(weights), images, heads)
    torch.testing.assert_close(cls, expected[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patches, expected[:, 1 + how["registers"] :], rtol=1e-10, atol=1e-10)
    assert expected.std(1).mean() > 0.3, "tokens differ; equal ones would agree trivially"


@pytest.mark.parametrize(
    ("name", "model", "registers"),
    [("S/14", "vit_small_patch14_dinov2", 0), ("reg", "vit_small_patch14_reg4_dinov2", 4)],
)
def test_features_equal_timms_model_with_the_same_file(name: str, model: str, registers: int, tmp_path: Path) -> None:
    """At the original's 518 pixels. At other sizes timm resamples positions differently without registers."""
    weights = random_file(384, 1, registers=registers)
    torch.save(weights, tmp_path / "released.pth")
    theirs = timm.create_model(model, num_classes=0, depth=1).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(weights), theirs))
    theirs.double()
    images = torch.randn(1, 3, 518, 518, dtype=torch.float64)
    cls, patches = features(tmp_path / "released.pth", images)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    torch.testing.assert_close(cls, expected[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patches, expected[:, 1 + registers :], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(
    ("width", "depth", "gated", "timms"),
    [(384, 12, 0, "small"), (768, 12, 0, "base"), (1024, 24, 0, "large"), (1536, 40, 4096, "giant")],
)
def test_the_four_sizes_are_identified_by_their_shapes(
    width: int, depth: int, gated: int, timms: str, registers: int
) -> None:
    with torch.device("meta"):
        found = shapes(width, depth, registers=registers, gated=gated)
        released = {key: torch.empty(shape) for key, shape in found.items() if key != "mask_token"}
        config = official_architecture(under_timms_keys(released), "x.pth")
        model = config.build(drop_path=False).model
        reg = f"reg{registers}_" if registers else ""
        timms_own = timm.create_model(f"vit_{timms}_patch14_{reg}dinov2", num_classes=0)
    own = {key: value.shape for key, value in model.state_dict().items()}
    assert own == {key: value.shape for key, value in timms_own.state_dict().items()}
    assert own == {key: value.shape for key, value in under_timms_keys(released).items()}
    assert {block.attn.num_heads for block in model.blocks} == {timms_own.blocks[0].attn.num_heads}
    assert type(model.blocks[0].mlp) is type(timms_own.blocks[0].mlp)
    assert config.positions == ("antialias" if registers else "dino")


def plain_vit(path: Path, **shape: object) -> torch.nn.Module:
    """Return a plain vision transformer of any shape with random weights, and save it in the original's layout."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(num_classes=0, **shape).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, path)
    return model


SHAPES = {
    "width 128": {"embed_dim": 128, "depth": 3, "num_heads": 2},
    "depth 5 of ViT-S": {"embed_dim": 384, "depth": 5, "num_heads": 6},
    "narrow MLP": {"embed_dim": 64, "depth": 2, "num_heads": 1, "mlp_ratio": 1.3},
    "LayerScale": {"embed_dim": 128, "depth": 2, "num_heads": 2, "init_values": 0.5},
    "registers": {"embed_dim": 128, "depth": 2, "num_heads": 2, "init_values": 0.5, "reg_tokens": 3, "no_embed_class": True},
    "registers without LayerScale": {"embed_dim": 128, "depth": 2, "num_heads": 2, "reg_tokens": 1, "no_embed_class": True},
    "no bias of qkv": {"embed_dim": 64, "depth": 1, "num_heads": 1, "qkv_bias": False},
    "odd heads": {"embed_dim": 96, "depth": 2, "num_heads": 6},
    "other heads than by width": {"embed_dim": 128, "depth": 2, "num_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_vision_transformer_of_any_shape_is_read(name: str, tmp_path: Path) -> None:
    """The shape follows from the tensors; the number of heads is the width divided by 64, or as given."""
    shape = {"patch_size": 8, "img_size": 32, **SHAPES[name]}
    model = plain_vit(tmp_path / "own.pth", **shape)
    told = [f"{HEADS}{shape['num_heads']}".removeprefix("--set ")] if "heads" in name else []
    encoder = load_encoder(str(tmp_path / "own.pth"), CPU, overrides=told)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(images)[:, 0]
    # timm sums attention in another order.
    torch.testing.assert_close(encoder.features(images), expected, rtol=1e-5, atol=1e-5)
    assert encoder.size == 32
    assumed = not told and shape["embed_dim"] != 384
    assert [f"assuming {shape['num_heads']}, its width divided by 64" in note for note in encoder.notes] == [
        True
    ] * assumed


def test_a_given_number_of_heads_changes_the_fingerprint(tmp_path: Path) -> None:
    plain_vit(tmp_path / "own.pth", patch_size=8, img_size=32, embed_dim=128, depth=1, num_heads=2)
    prints = {
        load_encoder(str(tmp_path / "own.pth"), CPU, overrides=[f"backbone.options.num_heads={n}"]).fingerprint
        for n in (4, 8)
    }
    assert len(prints) == 2, "features of the two must not be compared"


@pytest.mark.parametrize(
    ("width", "overrides", "message", "hint"),
    [
        (
            96,
            [],
            "number of attention heads, and its width 96 is not a multiple of 64",
            "--set backbone.options.num_heads=N",
        ),
        (1280, [], "its width 1280 fits 20 heads, as in the originals, or 16", "--set backbone.options.num_heads=N"),
        (96, ["backbone.options.num_heads=5"], "num_heads=5 does not divide the 96 channels", "one of 1, 2, 3, 4, 6"),
        (96, ["backbone.options.num_heads=x"], "num_heads=x does not divide", "one of 1, 2, 3, 4, 6"),
        (128, ["backbone.option.num_heads=2"], "there is no key option", "options"),
    ],
)
def test_an_unknown_number_of_heads_must_be_given(width: int, overrides: list[str], message: str, hint: str) -> None:
    with torch.device("meta"):
        found = {k: torch.empty(s) for k, s in shapes(width, 2, registers=0).items() if k != "mask_token"}
    with pytest.raises(DinoError, match=message) as error:
        official_architecture(found, "x.pth", overrides)
    assert hint in error.value.hint


def test_non_square_positions_and_unknown_layers_are_refused() -> None:
    with torch.device("meta"):
        found = {k: torch.empty(s) for k, s in shapes(384, 1, registers=0).items() if k != "mask_token"}
        wide = found | {"pos_embed": torch.empty(1, 1 + 14 * 7, 384)}
        other = {key: value for key, value in found.items() if "attn" not in key}
    with pytest.raises(DinoError, match="98 positions and patches of 14x14; only square"):
        official_architecture(wide, "x.pth")
    with pytest.raises(DinoError, match="is not a network of DINO"):
        official_architecture(other, "x.pth")


def test_missing_mean_and_std_are_not_guessed(tmp_path: Path) -> None:
    plain_vit(tmp_path / "own.pth", patch_size=8, img_size=32, embed_dim=64, depth=1, num_heads=1, in_chans=5)
    with pytest.raises(DinoError, match="takes 5 channels and does not store their mean and std"):
        load_encoder(str(tmp_path / "own.pth"), CPU)


def test_a_single_file_of_transformers_is_refused_with_its_folder_as_hint() -> None:
    theirs = {"embeddings.cls_token": torch.zeros(1, 1, 384), "embeddings.patch_embeddings.weight": torch.zeros(1)}
    with pytest.raises(DinoError, match=r"x\.pth has transformers' keys") as error:
        official_architecture(theirs, "x.pth")
    assert error.value.hint == "name the folder instead of a file in it"


def in_chunks(weights: Weights, depth: int, each: int) -> Weights:
    """Rename blocks as a training with chunks does: the chunk's number, then the block's number among all blocks."""
    found = {}
    for key, value in weights.items():
        if key.startswith("blocks."):
            number = int(key.split(".")[1])
            assert number < depth
            key = f"blocks.{number // each}.{key.removeprefix('blocks.')}"
        found[key] = value
    return found


SMALL = [
    "backbone.name=vit_small_patch14_dinov2", "backbone.options={img_size=518, depth=2}", "backbone.positions=dino",
]  # fmt: skip
HEAD = "{prototypes=16, hidden=24, bottleneck=8, layers=3, norm_last_layer=false}"


def head_file(prototypes: int) -> Weights:
    layers = {"mlp.0": (24, 384), "mlp.2": (24, 24), "mlp.4": (8, 24)}
    found = {f"{name}.weight": torch.randn(shape) for name, shape in layers.items()}
    found |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in layers.items()}
    return found | {"last_layer.weight_g": torch.ones(prototypes, 1), "last_layer.weight_v": torch.randn(prototypes, 8)}


def of_training(ibot: int | None) -> tuple[Weights, Weights]:
    """Return a teacher under the keys of a training checkpoint, and its backbone under released keys."""
    backbone = random_file(384, 2, registers=0)
    teacher = {f"backbone.{k}": v for k, v in in_chunks(backbone, 2, 1).items()}
    teacher |= {f"dino_head.{k}": v for k, v in head_file(16).items()}
    if ibot:
        teacher |= {f"ibot_head.{k}": v for k, v in head_file(ibot).items()}
    return teacher, backbone


@pytest.mark.parametrize("gated", [0, 1024], ids=["MLP", "SwiGLU"])
@pytest.mark.parametrize("size", [(224, 224), (70, 112)], ids=["square", "wide"])
def test_a_franca_file_gives_the_features_of_the_plain_definition(
    size: tuple[int, int], gated: int, tmp_path: Path
) -> None:
    """Franca releases the teacher of its training: blocks in four chunks, positions of 224 pixels, nested heads."""
    weights = random_file(384, 4, registers=0, gated=gated, side=16)
    teacher = {f"backbone.{k}": v for k, v in in_chunks(weights, 4, 1).items()}
    teacher |= {f"dino_head.{k}": torch.ones(2) for k in ("matryoshka_projections.0.bias", "mlps.0.0.bias")}
    torch.save({"teacher": teacher}, tmp_path / "franca_vitb14_In21K.pth")
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    cls, patches = features(tmp_path / "franca_vitb14_In21K.pth", images, size=224)
    expected = defined(doubled(weights), images, heads=6)
    torch.testing.assert_close(cls, expected[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patches, expected[:, 1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["teacher checkpoint", "whole method"])
def test_a_training_checkpoint_is_read_with_its_heads(form: str, tmp_path: Path) -> None:
    teacher, backbone = of_training(ibot=32)
    content = {"teacher": teacher}
    if form == "whole method":
        student = {f"student.{k}": v + 1 for k, v in teacher.items()}
        content = {"model": {f"teacher.{k}": v for k, v in teacher.items()} | student, "iteration": 3}
    torch.save(content, tmp_path / "teacher_checkpoint.pth")
    weights = read_weights(tmp_path / "teacher_checkpoint.pth")
    mask_token = backbone.pop("mask_token")
    assert weights.backbone.keys() == backbone.keys()
    assert all(torch.equal(weights.backbone[key], value) for key, value in backbone.items())
    assert torch.equal(weights.mask_token, mask_token)
    for name in ("dino", "ibot"):
        assert all(torch.equal(v, teacher[f"{name}_head.{k}"]) for k, v in weights.heads[name].items())
    if form == "whole method":
        other = read_weights(tmp_path / "teacher_checkpoint.pth", "student")
        assert torch.equal(other.backbone["norm.bias"], backbone["norm.bias"] + 1)


def test_a_file_of_one_network_is_not_taken_for_the_other(tmp_path: Path) -> None:
    teacher, _ = of_training(ibot=None)
    torch.save({f"student.{k}": v for k, v in teacher.items()}, tmp_path / "student.pth")
    with pytest.raises(DinoError, match="holds a student and no teacher") as error:
        read_weights(tmp_path / "student.pth")
    assert error.value.hint == "--network student"


@pytest.mark.parametrize(
    ("heads", "ibot", "fresh"),
    [
        (f"{{dino={HEAD}, ibot={HEAD}}}", 16, []),
        (f"{{dino={HEAD}, ibot={HEAD}}}", 32, ["ibot"]),
        (f"{{dino={HEAD}, ibot={HEAD}}}", None, ["ibot"]),
        (f"{{shared={HEAD}}}", None, []),
    ],
)
def test_training_starts_from_a_training_checkpoint_with_the_heads_that_fit(
    heads: str, ibot: int | None, fresh: list[str], tmp_path: Path
) -> None:
    teacher, backbone = of_training(ibot)
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    names = ["shared", "shared"] if "shared" in heads else ["dino", "ibot"]
    read = [f"losses.{loss}.head={head}" for loss, head in zip(("dino", "ibot"), names, strict=True)]
    preset = load_preset("tiny-dinov2", [*SMALL, f"heads={heads}", *read])
    method = preset.method()
    assert start_from(method, str(tmp_path / "teacher_checkpoint.pth")) == fresh
    for network in (method.student, method.teacher):
        assert torch.equal(network.backbone.model.state_dict()["blocks.1.ls2.gamma"], backbone["blocks.1.ls2.gamma"])
        assert torch.equal(network.mask_token, backbone["mask_token"])
        for loss, name in zip(("dino", "ibot"), names, strict=True):
            theirs = teacher.get(f"{loss if name != 'shared' else 'dino'}_head.last_layer.weight_v", torch.empty(0))
            assert torch.equal(network.heads[name].last_layer.weight_v, theirs) == (name not in fresh)

"""Export of a backbone to another library, verified by loading the result with that library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor

from dinocli.core.atomic import atomic, atomic_folder, write_text
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT
from dinocli.core.tensors import write_tensors
from dinocli.core.version import __version__
from dinocli.data.sources.open import Source, within
from dinocli.data.views.crops import resize_for
from dinocli.features.encoder import Encoder, TokenChoice, whole_patches
from dinocli.models.architecture import BackboneConfig
from dinocli.models.backbone import Backbone
from dinocli.models.generic import Feature, GenericBackbone
from dinocli.models.head import Head, HeadConfig
from dinocli.models.network import load_strictly
from dinocli.models.positions import Positions
from dinocli.models.transformer import ViTBackbone
from dinocli.weights.checkpoint import Weights, Which, carrying, metadata_of, read_weights
from dinocli.weights.graphs import GraphShape, Loaded, save_through_memory, write_onnx, write_torch_export
from dinocli.weights.identify import config_of
from dinocli.weights.load import architecture_of, encoder_of
from dinocli.weights.official import OFFICIAL, original_head, original_network
from dinocli.weights.reduced_onnx import OnnxPrecision, Reduced, reduce_onnx
from dinocli.weights.shipped import place_of
from dinocli.weights.to_transformers import TRANSFORMERS_FILES, write_transformers

Format = Literal["official", "timm", "transformers", "onnx", "torch-export"]
ENDINGS: dict[Format, str] = {
    "official": ".pth", "timm": "", "transformers": "", "onnx": ".onnx", "torch-export": ".pt2",
}  # fmt: skip
TIMM_FILES = {"config.json", "model.safetensors"}
# timm's tags of weights whose positions the originals resample in these ways; see `load._positions_of`.
_TAGS: dict[Positions, str] = {"dino": "dino", "bicubic": "mae"}
_TOLERANCE = 1e-4  # relative; other libraries sum in another order


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        path: Written file, or folder for timm and transformers.
        difference: Relative difference between the other library's features and this tool's, on random images.
        notes: Notes for the user: code that builds the network, and differences in use.
        load: Python code that loads the export.
        reduced: Measurements of a graph in float16 or int8, else None.
    """

    path: Path
    difference: float
    notes: list[str]
    load: str
    reduced: Reduced | None = None


def export(
    source: str,
    to: Format,
    out: Path,
    *,
    which: Which = "teacher",
    heads: bool = False,
    tokens: TokenChoice = "cls",
    size: int | None = None,
    any_size: bool = False,
    precision: OnnxPrecision = "float32",
    images: Source | None = None,
    overrides: Sequence[str] = (),
) -> Exported:
    """Write a backbone for another library, load it again with that library, and compare the features.

    Args:
        source: Run folder, checkpoint, official `.pth`, or transformers folder.
        to: Format. `official`: keys of the backbones released by facebookresearch/dino. `timm`: a folder for
            `create_model("local-dir:...")` or the hub. `transformers`: a folder for `AutoModel`. `onnx` and
            `torch-export`: a graph to features from normalized images [B, C, size, size], with B free.
        out: Output path. An existing file is replaced; a folder is replaced only if an earlier export wrote it.
        which: Network to export if the file holds both.
        heads: Include the head (`official` only). Backbone and head are then stored under the key `which`, as in a
            full checkpoint.
        tokens: Features that a graph returns; see `Encoder.features`.
        size: Side of a graph's input images, in pixels. If None, the training size.
        any_size: Export a graph whose images may have any height and width in whole patches.
        precision: Precision of an ONNX graph; see `reduce_onnx`.
        images: Images for the measurements of a reduced precision, and for the calibration of int8. If None, int8 is
            dynamic, and the measurements use noise.
        overrides: `backbone.key=value` for an official file, as for `--set`.

    Raises:
        DinoError: If the source cannot be read or would be overwritten, the other library lacks this network, or its
            features differ. No file is then written.
        OSError: If the disk is full or the path is not writable.
    """
    if source.startswith("timm:"):
        raise DinoError(f"{source} is already a timm model; expected a checkpoint", "name a run folder or a .pth")
    if out.suffix != ENDINGS[to] and ENDINGS[to]:
        raise DinoError(f"{out} does not end in {ENDINGS[to]}, as --to {to} needs", f"--out {out.stem}{ENDINGS[to]}")
    weights = read_weights(Path(source), which)
    _keep_the_source(place_of(Path(source)), to, out)
    encoder = encoder_of(weights, source, torch.device("cpu"), overrides)
    architecture = architecture_of(weights, source, overrides)
    if to == "official" and architecture.stem == "conv":
        raise _no_conv_stem("the original's networks")
    metadata = metadata_of(weights, architecture)
    native = _native_size(encoder)
    if to == "timm":
        folder_is_free(out, TIMM_FILES)
        with atomic_folder(out) as folder:
            written = write_timm(encoder, architecture, folder)
        load = f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"
        return Exported(out, written.difference, [*encoder.notes, *written.notes], load)
    if to == "transformers":
        if architecture.stem == "conv":
            raise _no_conv_stem("transformers' networks")
        folder_is_free(out, TRANSFORMERS_FILES)
        with atomic_folder(out) as folder:
            made = write_transformers(encoder, folder)
            difference = _compare(encoder, made.loaded, "cls", native)
        load = f"transformers.AutoModel.from_pretrained({str(out)!r})"
        return Exported(out, difference, [*encoder.notes, *made.notes], load)
    notes, reduced = list(encoder.notes), None
    shape = GraphShape(whole_patches(encoder, size) or encoder.size, any_size)
    with atomic(out) as draft:
        if to == "official":
            head = _head_of(weights, encoder.backbone.width) if heads else None
            loaded, head_difference = _to_official(encoder, architecture, head, which, metadata, draft)
            difference = max(_compare(encoder, loaded, "cls", native), head_difference)
            notes += _notes_on_the_original(encoder, architecture, head, native)
            wrapped, key = ("MultiCropWrapper(network, head)", f"[{which!r}]") if heads else ("network", "")
            load = f"{wrapped}.load_state_dict(torch.load({str(out)!r}){key})"
        elif to == "onnx":
            difference = _compare_graph(encoder, write_onnx(encoder, tokens, shape, draft), tokens, shape)
            if precision != "float32":
                if images is not None:
                    images = within(images, encoder.images)
                    notes += images.notes
                reduced = reduce_onnx(draft, precision, encoder, tokens, shape, images)
            load = f"onnxruntime.InferenceSession({str(out)!r}).run(['features'], {{'images': images}})"
        else:
            difference = _compare_graph(encoder, write_torch_export(encoder, tokens, shape, draft), tokens, shape)
            load = f"torch.export.load({str(out)!r}).module()(images)"
    return Exported(out, difference, notes, load, reduced)


def _no_conv_stem(whose: str) -> DinoError:
    hint = "export the same checkpoint with --to onnx or --to torch-export"
    return DinoError(f"{whose} have no convolutional stem (backbone.stem)", hint)


def _keep_the_source(source: Path, to: Format, out: Path) -> None:
    file = source / CHECKPOINT if (source / CHECKPOINT).is_file() else source
    if out.exists() and (out.samefile(file) or out.resolve() in file.resolve().parents):
        other = f"--out {out.resolve().stem}-{to}{ENDINGS[to]}"
        raise DinoError(f"{out} is or contains the source of the export, which would be overwritten", other)


def folder_is_free(out: Path, ours: set[str]) -> None:
    """Check that a path is free, or holds only an earlier export of this tool.

    Args:
        out: Path of the model folder.
        ours: Names of the files that may be replaced.

    Raises:
        DinoError: If the path holds anything else.
    """
    what = ""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        what = "is a symbolic link" if out.is_symlink() else "is a file"
    elif out.is_dir():
        names = {path.name for path in out.iterdir()}
        if names - ours:
            what = f"holds {min(names - ours)}"
        elif names and "dinocli" not in config_of(out):
            what = "holds a model that this tool did not export"
        elif out.samefile(Path()):
            what = "is the current folder"
    if what:
        raise DinoError(f"{out} {what}; expected a new folder", "choose another name")


def _native_size(encoder: Encoder) -> int:
    """Return the image side at which positions need no resampling; without positions, the training size."""
    return encoder.backbone.native_size if isinstance(encoder.backbone, ViTBackbone) else encoder.size


def _compare(encoder: Encoder, loaded: Loaded, tokens: TokenChoice, height: int, width: int | None = None) -> float:
    """Return the relative difference of the features, and refuse one beyond rounding errors."""
    # Graphs are traced with another batch size than 3, so this also checks that the batch size is free.
    shape = (3, encoder.channels, height, width or height)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return _difference(encoder.features(images, tokens), loaded(images), "features")


def _compare_graph(encoder: Encoder, loaded: Loaded, tokens: TokenChoice, shape: GraphShape) -> float:
    """Return the largest difference over the sizes that the graph takes, among them images that are not square."""
    step = encoder.backbone.patch_size
    sides = [(shape.size, shape.size)]
    if shape.free:
        sides += [(shape.size + step, shape.size), (shape.size, shape.size + 3 * step), (2 * step, 2 * step)]
    return max(_compare(encoder, loaded, tokens, *both) for both in sides)


def _difference(ours: Tensor, theirs: Tensor, what: str) -> float:
    hint = "that library does not support a part of this network: use another --to"
    if ours.shape != theirs.shape:
        shapes = f"of shape {list(theirs.shape)}; expected {list(ours.shape)}"
        raise DinoError(f"the other library returns {what} {shapes}", hint)
    ours, theirs = ours.double(), theirs.double()  # squares do not overflow in float64
    difference = ((ours - theirs).norm() / ours.norm()).item()
    if not difference < _TOLERANCE:
        raise DinoError(f"the other library returns {what} with a relative difference of {difference:.2g}", hint)
    return difference


def _head_of(weights: Weights, width: int) -> Head:
    if set(weights.heads) != {"dino"}:
        names = ", ".join(weights.heads) or "none"
        raise DinoError(
            f"the checkpoint's heads are: {names}; expected only dino, as in the original", "remove --projection-head"
        )
    config = weights.preset.heads["dino"] if weights.preset else HeadConfig.of(weights.heads["dino"])[0]
    head = config.build(width).eval()
    load_strictly(head, weights.heads["dino"], "the head")
    return head


def _to_official(
    encoder: Encoder,
    architecture: BackboneConfig,
    head: Head | None,
    which: Which,
    metadata: dict[str, str],
    draft: Path,
) -> tuple[Loaded, float]:
    """Write an official file; return the original's network loaded from it, and the difference of its head."""
    original, forward = original_network(encoder.backbone, architecture.name)
    state = {key: value.contiguous() for key, value in encoder.backbone.model.state_dict().items()}
    if head is None:
        save_through_memory(lambda file: torch.save(carrying(state, metadata), file), draft)
        original.load_state_dict(torch.load(draft, weights_only=True))
        return forward, 0.0
    heads = {f"head.{key}": value for key, value in head.state_dict().items()}
    both = carrying({f"backbone.{k}": v for k, v in state.items()} | heads, metadata)
    save_through_memory(lambda file: torch.save({which: both}, file), draft)
    read = torch.load(draft, weights_only=True)[which]
    theirs = {k.removeprefix("head."): v for k, v in read.items() if k.startswith("head.")}
    original.load_state_dict({k.removeprefix("backbone."): v for k, v in read.items() if k.startswith("backbone.")})
    features = torch.randn(5, encoder.backbone.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return forward, _difference(head(features), original_head(theirs)(features), "logits")


def _notes_on_the_original(encoder: Encoder, architecture: BackboneConfig, head: Head | None, native: int) -> list[str]:
    """Return code for a network that the original's defaults do not build, and notes on differences in use."""
    backbone, notes = encoder.backbone, []
    if not isinstance(backbone, ViTBackbone):
        notes.append(f"network = torchvision.models.{architecture.name}(); network.fc = torch.nn.Identity()")
    else:
        shape = backbone.shape
        if (
            native != 224
            or encoder.channels != 3
            or OFFICIAL.get(backbone.width) != (shape["depth"], shape["num_heads"])
        ):
            arguments = ", ".join(f"{key}={value}" for key, value in shape.items())
            rest = "qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)"
            notes.append(f"network = VisionTransformer(img_size=[{native}], {arguments}, {rest})")
        if backbone.positions != "dino":
            notes.append(
                f"at sizes other than {native} pixels features differ: the original resamples positions differently"
            )
    if head is not None:
        config, width = HeadConfig.of(head.state_dict())
        sizes = f"nlayers={config.layers}, hidden_dim={config.hidden}, bottleneck_dim={config.bottleneck}"
        notes.append(f"head = DINOHead({width}, {config.prototypes}, use_bn={config.batch_norm}, {sizes})")
    return notes


@dataclass(frozen=True)
class WrittenTimm:
    """Result of `write_timm`.

    Attributes:
        difference: Relative difference between timm's features and this tool's, on random images.
        call: Python expression that computes the same features from `model` and `images`.
        notes: Notes for the user on differences in use.
    """

    difference: float
    call: str
    notes: list[str]


def write_timm(encoder: Encoder, architecture: BackboneConfig, folder: Path) -> WrittenTimm:
    """Write config and weights into a folder in timm's hub format, and load them again with timm.

    Raises:
        DinoError: If the network that timm loads returns other features.
        OSError: If the disk is full or the folder is not writable.
    """
    if architecture.stem == "conv":
        raise _no_conv_stem("timm's networks")
    native = _native_size(encoder)
    model = _to_timm(encoder, architecture, native, folder)
    difference = _compare(encoder, _timm_features(model, encoder), "cls", native)
    call = _call_of_timm(encoder, model, native)
    return WrittenTimm(difference, call, _notes_on_timm(encoder, model, native, call))


def _to_timm(encoder: Encoder, architecture: BackboneConfig, size: int, folder: Path) -> Any:
    backbone = encoder.backbone
    about = {
        "input_size": [encoder.channels, size, size],
        "mean": encoder.mean,
        "std": encoder.std,
        "interpolation": "bicubic",
        "crop_pct": size / resize_for(size),
        "num_classes": 0,
        # From the tag `load_encoder` knows how to resample positions.
        "tag": _TAGS.get(backbone.positions) if isinstance(backbone, ViTBackbone) else None,
    }
    config = {
        "architecture": architecture.name,
        "num_classes": 0,
        "num_features": backbone.width,
        "model_args": architecture.options,
        "pretrained_cfg": about,
        # Later exports may replace a folder with this key. timm ignores it.
        "dinocli": __version__,
    }
    write_text(folder / "config.json", json.dumps(config, indent=2))
    state = {key: value.numpy() for key, value in backbone.model.state_dict().items()}
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _timm_features(model: Any, encoder: Encoder) -> Loaded:
    how = _feature_of_timm(encoder.backbone)
    if how == "head":
        loaded: Loaded = model
        return loaded
    if how == "token":
        return lambda images: model.forward_features(images)[:, 0]
    return lambda images: model.forward_features(images).mean((2, 3))


def _feature_of_timm(backbone: Backbone) -> Feature:
    """Return where timm's network has this backbone's class token."""
    return backbone.feature if isinstance(backbone, GenericBackbone) else "token"


def _call_of_timm(encoder: Encoder, model: Any, native: int) -> str:
    try:
        _compare(encoder, model, "cls", native)
    except DinoError:
        end = "[:, 0]" if _feature_of_timm(encoder.backbone) == "token" else ".mean((2, 3))"
        return f"model.forward_features(images){end}"
    return "model(images)"


def _notes_on_timm(encoder: Encoder, model: Any, native: int, call: str) -> list[str]:
    backbone, notes = encoder.backbone, []
    if call != "model(images)":
        notes.append(f"model(images) also applies timm's final layers; for the same features use {call}")
    if isinstance(backbone, ViTBackbone) and model.pos_embed is not None:
        differ = ": features differ" if backbone.positions == "dino" else ""
        how = "needs dynamic_img_size=True (or img_size=N) and resamples positions with antialias"
        notes.append(f"at sizes other than {native} pixels timm {how}{differ}")
    return notes

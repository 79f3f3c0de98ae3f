"""Exporting: a backbone in the form that another library loads, and loaded again by it before it is said to be done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from torch import Tensor, nn

import dinocli
from dinocli.atomic import atomic, atomic_folder, write_tensors, write_text
from dinocli.encoder import Encoder, TokenChoice, architecture_of, encoder_of, features_of
from dinocli.errors import DinoError
from dinocli.models.backbone import BackboneConfig, ViTBackbone
from dinocli.models.network import load_strictly
from dinocli.weights import Weights, Which, read_weights

Format = Literal["official", "timm", "onnx", "torch-export"]
ENDINGS: dict[Format, str] = {"official": ".pth", "timm": "", "onnx": ".onnx", "torch-export": ".pt2"}
_TIMM_FILES = {"config.json", "model.safetensors"}
_TOLERANCE = 1e-4  # relative; other libraries add up in another order
_ONE_ONNX_FILE = 2**31  # bytes, a bound of the format

Loaded = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: A file, or for timm a folder.
        difference: Of the features that the other library made from those of this tool, relative, on random images.
        notes: What differs in use.
        load: What to type in Python.
    """

    path: Path
    difference: float
    notes: list[str]
    load: str


def export(
    source: str,
    to: Format,
    out: Path,
    *,
    which: Which = "teacher",
    heads: bool = False,
    tokens: TokenChoice = "cls",
    size: int | None = None,
) -> Exported:
    """Write a backbone for another library, load it again with that library, and compare the features.

    Args:
        source: A run folder, a checkpoint, or an official `.pth`.
        to: `official`, for facebookresearch/dino: the keys of its released backbones. `timm`: a folder for
            `create_model("local-dir:...")` or the hub. `onnx` and `torch-export`: a graph from normalized images
            [B, C, size, size], B free, to features.
        out: Where to.
        which: Of a file that holds both networks.
        heads: For `official` alone: with the head, as in the original's full checkpoints.
        tokens: For the graphs: which features they give, as `Encoder.features` describes.
        size: For the graphs: side of the images in pixels; that of the training if absent.

    Raises:
        DinoError: The source cannot be read, the other library has no such network, or what it loads gives other
            features; then nothing is left.
    """
    if source.startswith("timm:"):
        raise DinoError(f"a checkpoint was wanted; {source} is timm's own", "a run folder, ckpt.safetensors or .pth")
    if out.suffix != ENDINGS[to] and to != "timm":
        raise DinoError(f"a file that ends in {ENDINGS[to]} was wanted; it is {out}", f"--out {out.stem}{ENDINGS[to]}")
    weights = read_weights(Path(source), which)
    encoder = encoder_of(weights, source, torch.device("cpu"))
    architecture = architecture_of(weights, source)
    side = size or encoder.size
    if to == "timm":
        taken = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if taken - _TIMM_FILES:
            raise DinoError(f"a new folder was wanted; {out} holds {min(taken - _TIMM_FILES)}", "another --out")
        with atomic_folder(out) as folder:
            difference = _compare(encoder, _to_timm(encoder, architecture, folder), "cls", _native_size(encoder))
        return Exported(
            out, difference, _notes(encoder, "timm"), f"timm.create_model('local-dir:{out}', pretrained=True)"
        )
    with atomic(out) as draft:
        if to == "official":
            difference = _compare(
                encoder, _to_official(encoder, architecture, weights, heads, draft), "cls", _native_size(encoder)
            )
            load = f"network.load_state_dict(torch.load('{out}')" + ("['teacher'])" if heads else ")")
        elif to == "onnx":
            difference = _compare(encoder, _to_onnx(encoder, tokens, side, draft), tokens, side)
            load = f"onnxruntime.InferenceSession('{out}').run(['features'], {{'images': images}})"
        else:
            difference = _compare(encoder, _to_torch_export(encoder, tokens, side, draft), tokens, side)
            load = f"torch.export.load('{out}').module()(images)"
    return Exported(out, difference, _notes(encoder, to), load)


def _compare(encoder: Encoder, loaded: Loaded, tokens: TokenChoice, size: int) -> float:
    """Relative difference of the features, where none but rounding is allowed."""
    # Another number of images than the graph was made with, since that is what must stay free.
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = encoder.features(images, tokens), loaded(images)
    if ours.shape != theirs.shape:
        raise _other_features(f"of shape {list(theirs.shape)} and not {list(ours.shape)}")
    difference = ((ours - theirs).norm() / ours.norm()).item()
    if not difference < _TOLERANCE:
        raise _other_features(f"that differ by {difference:.2g} of their length")
    return difference


def _other_features(how: str) -> DinoError:
    return DinoError(
        f"what the other library loads gives features {how}",
        "this network has parts that it does not know: another --to",
    )


def _native_size(encoder: Encoder) -> int:
    """Side of the images at which a vision transformer's positions are taken as they are; for others any will do."""
    backbone = encoder.backbone
    return int(backbone.model.patch_embed.img_size[0]) if isinstance(backbone, ViTBackbone) else encoder.size


def _notes(encoder: Encoder, to: Format) -> list[str]:
    others = {"timm": "dino", "official": "antialias"}  # how this network places positions, and the other library not
    backbone = encoder.backbone
    if not isinstance(backbone, ViTBackbone) or others.get(to) != backbone.positions:
        return []
    side = _native_size(encoder)
    return [f"at other sizes than {side} pixels {to} places positions in its own way, and the features differ"]


def _to_official(encoder: Encoder, architecture: BackboneConfig, weights: Weights, heads: bool, draft: Path) -> Loaded:
    original, forward = _network_of_the_original(encoder, architecture)
    state = {key: value.contiguous() for key, value in encoder.backbone.model.state_dict().items()}
    content: dict[str, object] = dict(state)
    if heads:
        if set(weights.heads) != {"dino"}:
            names = ", ".join(weights.heads) or "none"
            raise DinoError(
                f"one head named dino was wanted, as the original has it; the heads are: {names}", "leave --heads out"
            )
        head = {f"head.{key}": value for key, value in weights.heads["dino"].items()}
        content = {"teacher": {f"backbone.{key}": value for key, value in state.items()} | head}
    torch.save(content, draft)
    read = torch.load(draft, weights_only=True)
    read = {k.removeprefix("backbone."): v for k, v in read["teacher"].items() if k[:5] != "head."} if heads else read
    original.load_state_dict(read)
    return forward


def _network_of_the_original(encoder: Encoder, architecture: BackboneConfig) -> tuple[nn.Module, Loaded]:
    """What the original builds: the plain vision transformer of this shape, or torchvision's network.

    Raises:
        DinoError: It builds none with these weights.
    """
    backbone = encoder.backbone
    if isinstance(backbone, ViTBackbone):
        model = backbone.model
        options: dict[str, bool | int | float | str] = {
            "img_size": _native_size(encoder),
            "patch_size": backbone.patch_size,
            "embed_dim": backbone.width,
            "depth": len(model.blocks),
            "num_heads": model.blocks[0].attn.num_heads,
        }
        plain = BackboneConfig(name="vit_small_patch16_224", options=options, positions="dino").build(drop_path=False)
        original, forward = plain.model.eval(), lambda images: plain(images).cls
    elif architecture.name in torchvision.models.list_models():
        original = forward = torchvision.models.get_model(architecture.name).eval()
        original.fc = nn.Identity()
    else:
        raise DinoError(
            f"the original builds vision transformers and torchvision's networks; {architecture.name} is neither",
            "--to timm",
        )
    try:
        load_strictly(original, backbone.model.state_dict(), architecture.name)
    except DinoError as misfit:
        raise DinoError(f"the original has no such network: {misfit.message}", "--to timm") from misfit
    return original, forward


def _to_timm(encoder: Encoder, architecture: BackboneConfig, folder: Path) -> Loaded:
    size = _native_size(encoder)
    about = {
        "input_size": [3, size, size],
        "mean": encoder.mean,
        "std": encoder.std,
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
        "num_classes": 0,
    }
    config = {
        "architecture": architecture.name,
        "num_classes": 0,
        "num_features": encoder.backbone.width,
        "model_args": architecture.options,
        "pretrained_cfg": about,
    }
    write_text(folder / "config.json", json.dumps(config, indent=2))
    state = {key: value.numpy() for key, value in encoder.backbone.model.state_dict().items()}
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if isinstance(encoder.backbone, ViTBackbone):
        return lambda images: model.forward_features(images)[:, 0]
    return model


class _Features(nn.Module):
    """Images to one tensor of features: what a graph is made of."""

    def __init__(self, encoder: Encoder, tokens: TokenChoice) -> None:
        super().__init__()
        self.backbone, self.tokens = encoder.backbone, tokens

    def forward(self, images: Tensor) -> Tensor:
        return features_of(self.backbone, images, self.tokens)


def _about(encoder: Encoder, tokens: TokenChoice, size: int) -> dict[str, str]:
    """What whoever uses a graph has to know."""
    numbers = {"size": size, "mean": encoder.mean, "std": encoder.std}
    return {
        "dinocli": dinocli.__version__,
        "fingerprint": encoder.fingerprint,
        "tokens": tokens,
        **{key: json.dumps(value) for key, value in numbers.items()},
    }


@contextmanager
def _graphs_can_fail() -> Iterator[None]:
    try:
        yield
    # What tracing meets in a network of anyone's has no type of its own.
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DinoError(f"torch cannot make a graph of this network: {said}", "--to timm") from error


def _to_torch_export(encoder: Encoder, tokens: TokenChoice, size: int, draft: Path) -> Loaded:
    images = torch.zeros(2, 3, size, size)
    with _graphs_can_fail():
        free = {"images": {0: torch.export.Dim("batch")}}
        program = torch.export.export(_Features(encoder, tokens).eval(), (images,), dynamic_shapes=free)
    about = {"dinocli.json": json.dumps(_about(encoder, tokens, size))}
    # A file and not its name: by a name the library insists on an ending that a draft does not have.
    with draft.open("wb") as file:
        torch.export.save(program, file, extra_files=about)
    with draft.open("rb") as file:
        return torch.export.load(file).module()


def _to_onnx(encoder: Encoder, tokens: TokenChoice, size: int, draft: Path) -> Loaded:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter writes with it
    except ImportError as error:
        raise DinoError(f"ONNX needs the package {error.name}", "pip install 'dinocli[onnx]'") from error
    if sum(value.nbytes for value in encoder.backbone.state_dict().values()) > _ONE_ONNX_FILE:
        raise DinoError("an ONNX file holds at most 2 GB; these weights are larger", "--to torch-export")
    with _graphs_can_fail():
        program: Any = torch.onnx.export(
            _Features(encoder, tokens).eval(),
            (torch.zeros(2, 3, size, size),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(_about(encoder, tokens, size))
    program.save(draft, external_data=False)
    session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

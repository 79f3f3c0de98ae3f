"""Identification of paths and names on the command line, without importing torch: images, features, weights."""

from __future__ import annotations

import os
import re
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dinocli.core.checksums import parse
from dinocli.core.errors import DinoError, nearest
from dinocli.core.runs import CHECKPOINT
from dinocli.core.tensors import read_metadata
from dinocli.data.sources.frames import is_video
from dinocli.data.sources.listing import ARRAY, KNOWN
from dinocli.data.sources.lists import LISTS
from dinocli.data.sources.open import TORCHVISION
from dinocli.data.sources.parquet import ARROW, PARQUET
from dinocli.data.sources.pixels import is_pixels
from dinocli.data.sources.shards import is_shards
from dinocli.features.store import INDEX
from dinocli.weights import shipped

Kind = Literal[
    "missing", "pattern", "address", "timm", "untrained", "run", "weights", "model", "features", "classifier", "bank",
    "graph", "archive", "video", "image", "images", "source", "folder", "file",
]  # fmt: skip
WEIGHTS: frozenset[Kind] = frozenset(["timm", "untrained", "run", "weights"])
UNTRAINED = "untrained:"
# `model_type` in the config.json of transformers' folders that this tool reads.
TRANSFORMERS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")
# Descriptions with an article, for messages such as "x is an image".
NAMES: dict[Kind, str] = {
    "missing": "a path that does not exist",
    "pattern": "a pattern that matches no file",
    "address": "an address",
    "timm": "a model of timm",
    "untrained": "an untrained network",
    "run": "a run folder",
    "weights": "a checkpoint",
    "model": "a model folder",
    "features": "a folder of features",
    "classifier": "a classifier",
    "bank": "a memory bank",
    "graph": "an exported graph",
    "archive": "an archive",
    "video": "a video",
    "image": "an image",
    "images": "a folder of images",
    "source": "a set of images",
    "folder": "a folder without images",
    "file": "a file of an unknown type",
}
_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_GRAPHS = (
    ".onnx",
    ".pt2",
    ".tflite",
    ".pb",
    ".h5",
    ".keras",
    ".hdf5",
    ".mlmodel",
    ".mlpackage",
    ".engine",
    ".gguf",
    ".npz",
)
_ARCHIVES = (".zip", ".rar", ".7z")
_ENTRIES = 20_000  # entries of a folder to search for an image


_RELEASED = re.compile(r"(?:facebook[/-])?dino(v2|v3|)[-_]?(?:vit[-_]?)?(small|base|large|giant|s|b|l|g)[-_]?(\d*)(.*)")
_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}


def timms_name(name: str) -> str:
    """Return timm's name for an original name such as dinov2_vits14 or facebook/dino-vits16, or an empty string."""
    found = _RELEASED.fullmatch(name.strip().lower())
    if not found:
        return ""
    version, size, patch, rest = found.groups()
    size = _SIZES.get(size, size)
    if version == "v3":
        return f"vit_{size}_patch16_dinov3.lvd1689m"
    if version == "v2":
        return f"vit_{size}_patch14_{'reg4_' if 'reg' in rest else ''}dinov2.lvd142m"
    return f"vit_{size}_patch{8 if patch == '8' else 16}_224.dino"


def missing_checkpoint(path: Path) -> DinoError:
    """Return the error for a checkpoint that does not exist; the hint names a similar file beside it."""
    if named := timms_name(path.as_posix()):
        return DinoError(f"checkpoint {path} does not exist; it is the name of released weights", f"timm:{named}")
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, beside, least=0.8)
    hint = "name a run folder, a ckpt.safetensors, an official .pth, timm:NAME, or dinocli:mini"
    return DinoError(f"checkpoint {path} does not exist", f"did you mean {path.with_name(close)}?" if close else hint)


def refuse_missing_weights(place: str) -> None:
    """Check that a checkpoint exists if its name ends as a file of weights; other names may be those of models.

    Raises:
        DinoError: If it does not exist.
    """
    path = Path(place.removeprefix(UNTRAINED))
    if path.suffix.lower() in _WEIGHTS and not place.startswith("timm:") and not os.path.lexists(path):
        raise missing_checkpoint(path)


def kind_of(place: str) -> Kind:
    """Return the kind of a path or name on the command line, by its name and, for folders and features, contents."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place):
        return "address"
    if place.startswith("timm:"):
        return "timm"
    if place.startswith(UNTRAINED):
        return "untrained"
    if place.startswith(shipped.PREFIX):
        return "weights"
    if place.startswith((TORCHVISION, "pipe:")):
        return "source"
    path = Path(place)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        if is_shards(place):
            return "source"
        return "pattern" if re.search(r"[*?]", place) else "missing"
    suffix = path.suffix.lower()
    if suffix in _WEIGHTS:
        kinds: dict[str, Kind] = {"features": "features", "classifier": "classifier", "bank": "bank"}
        return kinds.get(_declared_kind(path), "weights")
    if suffix in KNOWN or suffix == ARRAY:
        return "image"
    return _by_suffix(path, suffix)


def _by_suffix(path: Path, suffix: str) -> Kind:
    if suffix in _GRAPHS:
        return "graph"
    if suffix in _ARCHIVES:
        return "archive"
    if is_video(path):
        return "video"
    return "source" if suffix in (*LISTS, PARQUET, ARROW) or is_shards(str(path)) else "file"


def _folder(path: Path) -> Kind:
    if (path / CHECKPOINT).is_file() and ((path / "preset.json").is_file() or (path / "state").is_dir()):
        return "run"
    if any(is_features(part) for part in islice(path.glob("*.safetensors"), 3)) or any(
        is_features(index) for index in islice(path.glob(f"*/{INDEX}"), 3)
    ):
        return "features"
    if (path / "config.json").is_file() and (list(path.glob("*.safetensors")) or list(path.glob("*.bin"))):
        return "weights" if config_of(path).get("model_type") in TRANSFORMERS else "model"
    if is_pixels(str(path)) or is_shards(str(path)):
        return "source"
    found = (name for _, _, names in os.walk(path) for name in names)
    suffixes = (os.path.splitext(name)[1].lower() for name in islice(found, _ENTRIES))
    return "images" if any(suffix in KNOWN or suffix == ARRAY for suffix in suffixes) else "folder"


def config_of(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder, or {} if there is none."""
    try:
        config = parse((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def is_features(path: Path) -> bool:
    """Return True if a file's metadata identifies it as features, or as the index of a folder of features."""
    return _declared_kind(path) == "features"


def _declared_kind(path: Path) -> str:
    """Return the kind that a file's metadata declare, or an empty string."""
    try:
        said = parse(path.read_text(encoding="utf-8")) if path.name == INDEX else read_metadata(path)
    except (OSError, ValueError):
        return ""
    return str(said.get("dinocli", "")) if isinstance(said, dict) else ""


def foreign(path: Path) -> tuple[str, str] | None:
    """Return a description and a hint for a file that could not be read as weights; None if its kind is unknown."""
    kind = kind_of(str(path))
    if kind == "graph":
        return (
            f"a graph or weights of another framework ({path.suffix})",
            "use the .pth or ckpt.safetensors it was exported from",
        )
    if kind in ("image", "video", "archive"):
        return NAMES[kind], "name a run folder, a ckpt.safetensors, an official .pth, or timm:NAME"
    if kind == "features":
        return "a file of features", f"dino knn --features {path.parent}"
    if kind == "classifier":
        return "a classifier", f"dino classify IMAGES --with {path}"
    try:
        with path.open("rb") as file:
            head = file.read(512).lstrip()
        if head.startswith(b"version https://git-lfs"):
            return "a Git LFS pointer, not the file itself", "git lfs pull"
        if head[:1] == b"<":
            return "a web page", "download the file again: the URL returned a web page"
        if not head:
            return "empty", "copy or download it again"
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any("/code/" in name for name in names) or any(name.endswith("constants.pkl") for name in names):
                return "a TorchScript graph", "use the .pth or ckpt.safetensors it was exported from"
            if not any(name.endswith("data.pkl") for name in names):
                return "an archive", "unpack it, and name the .pth or .safetensors inside"
    except (OSError, zipfile.BadZipFile):
        return None
    return None

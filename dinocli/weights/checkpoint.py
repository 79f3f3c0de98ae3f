"""Weight files: this tool's checkpoints, and files of other tools with the same networks."""

from __future__ import annotations

import argparse
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from dinocli.core.checksums import parse
from dinocli.core.config import Config
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT
from dinocli.core.tensors import load_tensors, write_tensors
from dinocli.core.version import __version__
from dinocli.method.preset import Preset
from dinocli.models.architecture import BackboneConfig
from dinocli.weights.dinov3 import read_dinov3
from dinocli.weights.identify import (
    NAMES,
    TRANSFORMERS,
    config_of,
    foreign,
    is_features,
    kind_of,
    missing_checkpoint,
    timms_name,
)
from dinocli.weights.official import under_timms_keys
from dinocli.weights.released import Preprocessing, Released
from dinocli.weights.shipped import place_of
from dinocli.weights.transformers_folder import read_folder
from dinocli.weights.xcit import read_xcit

C = TypeVar("C", bound=Config)

Which = Literal["teacher", "student"]
# Heads in the originals' files: DINO has one; DINOv2 has one for class tokens and optionally one for iBOT. Franca's
# have other layers. A plain `head.` may also be a supervised classifier.
_HEAD = re.compile(r"(dino|ibot)_head\.|head\.(?=mlp\.|last_layer\.)")


@dataclass(frozen=True)
class Weights:
    """Contents of a weights file.

    Attributes:
        backbone: Backbone weights under timm's keys.
        heads: Weights of each head by name, under the original's keys. Empty if the file holds only a backbone.
        preset: Preset of the run, if this tool wrote the file.
        mask_token: Token that replaces masked patches, if the network was trained with one. [1, D]
        step: Number of training steps, if the file stores it.
        architecture: Architecture of the backbone, if the file stores it or its kind has only one.
        preprocessing: Images that the backbone expects, if the file stores them or its kind has only one.
        notes: Assumptions made in reading, for the user to check.
    """

    backbone: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    preset: Preset | None
    mask_token: Tensor | None = None
    step: int | None = None
    architecture: BackboneConfig | None = None
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = ()


def write_checkpoint(
    path: Path, weights: Mapping[str, Tensor], preset: Preset, step: int, more: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write the weights from `Network.weights` and their resolved preset to a single file.

    Args:
        path: Safetensors file to write.
        weights: Weights by name, as `Network.weights` returns them, on any device.
        preset: Resolved preset, stored in the metadata.
        step: Number of completed steps.
        more: Further metadata, by key.

    Raises:
        DinoError: If weights are not finite. An existing file at `path` is then kept.
    """
    refuse_not_finite(weights, f"step {step}")
    tensors = {k: v.detach().cpu().contiguous().numpy() for k, v in weights.items()}
    metadata = {"dinocli": __version__, "preset": preset.model_dump_json(), "step": str(step), **more}
    write_tensors(path, tensors, metadata)


def read_weights(path: Path, which: Which = "teacher") -> Weights:
    """Read a run folder, a checkpoint of this tool, an official file with any key prefix, or a transformers folder.

    Args:
        path: Run folder, folder with a transformers model, `.safetensors` file, `dinocli:NAME`, or `.pth` file, which
            is read without running code in it.
        which: Network to read if the file holds both. This tool's checkpoints hold only the teacher.

    Raises:
        DinoError: If the file does not exist, is corrupt, or holds another network or non-finite weights.
    """
    path = place_of(path)
    if path.is_dir() and (path / CHECKPOINT).is_file():
        path = path / CHECKPOINT
    folder = path.parent if path.name in ("model.safetensors", "model.safetensors.index.json") else path
    if released := read_folder(folder):
        refuse_not_finite(released.backbone, str(path), "use another checkpoint")
        return _from_released(released, {})
    if not path.is_file():
        raise _no_checkpoint(path)
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        tensors, metadata = _pick(_read_pickle(path), which, path)
    if "preset" in metadata and which == "student":
        raise DinoError(
            f"{path} holds only the teacher; --network student needs a file with the student", "remove --network"
        )
    # Only runs of this tool have a folder with states.
    refuse_not_finite(tensors, str(path), *([] if "preset" in metadata else ["use another checkpoint"]))
    preset = _parse_stored(Preset, "preset", metadata, path)
    step = int(metadata["step"]) if metadata.get("step", "").isdecimal() else None
    architecture = preset.backbone if preset else _parse_stored(BackboneConfig, "backbone", metadata, path)
    weights = _sort(tensors, preset, path)
    if architecture is None:
        return weights
    return replace(weights, step=step, architecture=architecture, preprocessing=_parse_preprocessing(metadata, path))


def _from_released(released: Released, heads: dict[str, dict[str, Tensor]]) -> Weights:
    return Weights(
        released.backbone,
        heads,
        None,
        released.mask_token,
        architecture=released.architecture,
        preprocessing=released.preprocessing,
        notes=released.notes,
    )


def carrying(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """Return a state dict with metadata in an attribute, like PyTorch's own `_metadata`.

    `torch.save` stores the attribute and `torch.load` restores it. `load_state_dict` ignores it, unlike an extra key.
    """
    found = OrderedDict(tensors)
    found.dinocli = metadata  # type: ignore[attr-defined]
    return found


def metadata_of(weights: Weights, architecture: BackboneConfig) -> dict[str, str]:
    """Return the metadata with which this tool loads an exported file as the same encoder."""
    if weights.preset is None:
        images = {} if weights.preprocessing is None else {"preprocessing": json.dumps(weights.preprocessing._asdict())}
        return {"dinocli": __version__, "backbone": architecture.model_dump_json(), **images}
    step = {} if weights.step is None else {"step": str(weights.step)}
    return {"dinocli": __version__, "preset": weights.preset.model_dump_json(), **step}


def _parse_stored(config: type[C], key: str, metadata: Mapping[str, str], path: Path) -> C | None:
    """Return the preset or backbone in the metadata of weights, or None if `key` is missing.

    Raises:
        DinoError: If it is corrupt, or from another version of this tool and not valid in this one.
    """
    if key not in metadata:
        return None
    try:
        stored = parse(metadata[key])
    except ValueError as error:
        raise DinoError(
            f"{path} is damaged: its {key} cannot be read; {error}", "copy it again, or use another checkpoint"
        ) from error
    try:
        return config.parse(stored, str(path))
    except DinoError as error:
        writer = metadata.get("dinocli", "")
        if writer in ("", __version__):
            raise
        raise DinoError(
            f"{error.message}; the file was written by dinocli {writer}, and this is {__version__}",
            f"pip install dinocli=={writer}",
        ) from error


def _parse_preprocessing(metadata: Mapping[str, str], path: Path) -> Preprocessing | None:
    """Return the preprocessing in the metadata of weights, or None if it is missing.

    Raises:
        DinoError: If it is corrupt.
    """
    if "preprocessing" not in metadata:
        return None
    try:
        stored = parse(metadata["preprocessing"])
        mean, std = (tuple(float(value) for value in stored[key]) for key in ("mean", "std"))
        return Preprocessing(int(stored["size"]), mean, std)
    except (ValueError, KeyError, TypeError) as error:
        raise DinoError(
            f"{path} is damaged: its preprocessing cannot be read; {error}", "copy it again, or use another checkpoint"
        ) from error


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor with infinite or NaN values and count them; return None if all values are finite."""
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if not bad:
        return None
    first = tensors[bad[0]]
    count = first.numel() - int(first.float().isfinite().sum())
    more = f" (and {len(bad) - 1} more tensor{'s' * (len(bad) > 2)})" if len(bad) > 1 else ""
    return f"{bad[0]} holds {count:,} of {first.numel():,} values that are not finite{more}"


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    # Networks compute in float32, where float64 values may overflow. Unlike isfinite, aminmax needs no large mask.
    low, high = (tensor.float() if tensor.dtype == torch.float64 else tensor).aminmax()
    return bool(low.isfinite() & high.isfinite())


def refuse_not_finite(
    tensors: Mapping[str, Tensor], source: str, hint: str = "use another checkpoint, or an earlier RUN/state/STEP"
) -> None:
    """Raise an error if weights are not finite.

    Args:
        tensors: Weights by name.
        source: Origin of the weights, for the error.
        hint: Hint of the error. The default is for weights of a run.

    Raises:
        DinoError: If a value is infinite or NaN. The error names the first tensor.
    """
    if found := not_finite(tensors):
        raise DinoError(f"{source} cannot be used: {found}", hint)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if is_features(path):
        raise DinoError(f"{path} is a file of features; expected a checkpoint", f"dino knn --features {path.parent}")
    try:
        return load_tensors(path)
    except ValueError as error:
        _refuse_foreign(path)
        raise DinoError(
            f"{path} is damaged or not a safetensors file: {error}", "copy it again, or use another checkpoint"
        ) from error


def _no_checkpoint(path: Path) -> DinoError:
    """Return the error for a path without a weights file; its hint depends on what the path holds."""
    kind, named = kind_of(str(path)), path.as_posix()
    if path.is_dir():
        hint = "name a checkpoint, or train one with `dino pretrain IMAGES --preset tiny`"
        if kind == "features":
            hint = f"dino knn --features {path}"
        elif kind == "model":
            config = config_of(path)
            hint = "timm:vit_small_patch14_dinov2.lvd142m, or another timm model"
            if "architecture" in config:
                hint = f"timm:local-dir:{path}"
            elif "model_type" in config:
                hint = f"{hint}; or a transformers folder of model_type {', '.join(TRANSFORMERS)}"
                other = f"a transformers folder of model_type {config['model_type']!r}"
                return DinoError(f"{path} is {other}, which cannot be read", hint)
        return DinoError(f"{path} is {NAMES[kind]} without {CHECKPOINT}; expected a run folder or a checkpoint", hint)
    import timm  # only here: it takes as long as torch

    if timm.is_model(named.partition(".")[0]) and not timms_name(path.as_posix()):
        return DinoError(f"checkpoint {path} does not exist; it is the name of released weights", f"timm:{named}")
    return missing_checkpoint(path)


def _refuse_foreign(path: Path) -> None:
    if found := foreign(path):
        raise DinoError(f"{path} is {found[0]}; expected a checkpoint", found[1])


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_plain_values()):
            return torch.load(path, map_location="cpu", weights_only=True)
    # On a corrupt file torch.load may raise any type: EOFError, KeyError, RuntimeError, UnpicklingError.
    except Exception as error:
        _refuse_foreign(path)
        raise DinoError(
            f"{path} cannot be read as weights: it is damaged, not a PyTorch file, or holds more than tensors",
            "save only tensors: torch.save(network.state_dict(), PATH)",
        ) from error


def _plain_values() -> list[Any]:
    """Return the safe types in a full checkpoint of the original besides tensors: arguments, paths, numpy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    # Read paths as pure paths: WindowsPath cannot be created on other systems. Python 3.13 moved the path classes to
    # another module.
    stand_ins = [(PurePosixPath, "PosixPath"), (PureWindowsPath, "WindowsPath")]
    stand_ins += [(path, path.__name__) for path in (PurePosixPath, PureWindowsPath)]
    paths = [(path, f"{module}.{name}") for path, name in stand_ins for module in ("pathlib", "pathlib._local")]
    return [argparse.Namespace, np.dtype, *kinds, *numbers, *paths]


def _pick(content: Any, which: Which, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a network's weights from the contents of a .pth file, and the metadata of this tool's exports."""
    if isinstance(content, dict) and which in content:
        content = content[which]
    else:
        if isinstance(content, dict) and which == "student" and "teacher" in content:
            raise DinoError(f"{path} holds no student", "remove --network")
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if isinstance(content, dict) and "student" in content:
            raise DinoError(f"{path} holds a student and no teacher", "--network student")
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise DinoError(f"{path} holds no weights", "name a ckpt.safetensors, an official .pth, or timm:NAME")
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    _refuse_wrapped(tensors, path)
    # DINOv2 saves both networks in one dict: `teacher.backbone.`, `teacher.dino_head.`, `student.backbone.`, ...
    for network in (which, "student", "teacher"):
        inside = {k.removeprefix(f"{network}."): v for k, v in tensors.items() if k.startswith(f"{network}.")}
        if inside and network != which:
            raise DinoError(f"{path} holds a {network} and no {which}", f"--network {network}")
        if inside:
            return inside, {}
    carried = getattr(content, "dinocli", None)
    metadata = carried if isinstance(carried, dict) and all(isinstance(v, str) for v in carried.values()) else {}
    return tensors, metadata


def _refuse_wrapped(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights whose keys have a prefix of a training framework, such as Lightning's `model.`.

    Raises:
        DinoError: If the class token or the last ResNet block has an unknown prefix.
    """
    inside = next((key for key in tensors if key.endswith((".cls_token", ".layer4.2.conv3.weight"))), "")
    prefix = inside.removesuffix("cls_token").removesuffix("layer4.2.conv3.weight")
    if re.fullmatch(r"((module|backbone|teacher|student)\.)*", prefix):
        return
    code = (
        f"torch.save({{k.removeprefix('{prefix}'): v for k, v in state.items() if k.startswith('{prefix}')}}, 'x.pth')"
    )
    raise DinoError(f"{path} stores its weights under {prefix!r}, as training frameworks do", f"in Python: {code}")


def _sort(tensors: Mapping[str, Tensor], preset: Preset | None, path: Path) -> Weights:
    backbone: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    mask_token = None
    if any(key.startswith("decoder_") for key in tensors):  # MAE's mask token belongs to its decoder
        tensors = {k: v for k, v in tensors.items() if not k.startswith("decoder_") and k != "mask_token"}
    for key, value in tensors.items():
        # DDP adds the prefix `module.`; the originals' wrappers add `backbone.`, and `head.` or `dino_head.`.
        key = key.removeprefix("module.")
        if key.startswith("heads."):
            _, name, rest = key.split(".", 2)
            heads.setdefault(name, {})[rest] = value
        elif key.removeprefix("backbone.") in ("mask_token", "masked_embed"):  # iBOT's name is the second
            mask_token = value.view(1, -1)
        elif head := _HEAD.match(key):
            heads.setdefault(head[1] or "dino", {})[key[head.end() :]] = value
        # Skip a supervised classifier (timm's `head`, torchvision's `fc`), which is not part of the backbone.
        elif not key.startswith(("head.", "fc.")):
            backbone[key.removeprefix("backbone.")] = value
    if not backbone:
        raise DinoError(f"{path} holds no backbone", "use a file saved from a complete network")
    if preset is None and (released := read_dinov3(backbone, str(path)) or read_xcit(backbone)):
        return replace(_from_released(released, heads), mask_token=mask_token)
    return Weights(under_timms_keys(backbone), heads, preset, mask_token)

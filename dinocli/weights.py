"""Weights on disk: the tool's own checkpoint, and files of others that hold the same networks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import dinocli
from dinocli.atomic import write_tensors
from dinocli.checksums import parse
from dinocli.errors import DinoError
from dinocli.official import under_timms_keys
from dinocli.preset import Preset
from dinocli.runs import CHECKPOINT

Which = Literal["teacher", "student"]
# What the originals call a head: DINO has one, DINOv2 one for the loss on class tokens and perhaps one for iBOT's.
_HEAD = re.compile(r"(?:(dino|ibot)_)?head\.(?=mlp\.|last_layer\.)")


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        backbone: Under timm's keys.
        heads: The weights of each head, by its name and the original's keys; a file of a backbone alone has none.
        preset: What the run was, if the file is the tool's own.
        mask_token: What stands in the place of hidden patches, if the network was trained with some. [1, D]
        step: How many steps it was trained, if the file tells.
    """

    backbone: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    preset: Preset | None
    mask_token: Tensor | None = None
    step: int | None = None


def write_checkpoint(path: Path, weights: Mapping[str, Tensor], preset: Preset, step: int) -> None:
    """Write what `Network.weights` gave with its resolved preset: the one file to hand on."""
    tensors = {k: v.detach().cpu().contiguous().numpy() for k, v in weights.items()}
    metadata = {"dinocli": dinocli.__version__, "preset": preset.model_dump_json(), "step": str(step)}
    write_tensors(path, tensors, metadata)


def read_weights(path: Path, which: Which = "teacher") -> Weights:
    """Read a run folder, a checkpoint of this tool, or an official file, whatever its keys begin with.

    Args:
        path: A run folder, a `.safetensors`, or a `.pth`, which is read without running what it may contain.
        which: Of a file that holds both networks. This tool's own checkpoint holds the teacher.

    Raises:
        DinoError: There is no such file, it is damaged, or it holds no such network.
    """
    if path.is_dir():
        if not (path / CHECKPOINT).is_file():
            raise DinoError(
                f"a run folder with {CHECKPOINT} was wanted; {path} has none",
                "name a checkpoint, or train one with `dino pretrain IMAGES --preset tiny`",
            )
        path = path / CHECKPOINT
    if not path.is_file():
        raise DinoError(
            f"a checkpoint was wanted; {path} does not exist",
            "name a run folder, a ckpt.safetensors, an official .pth, or timm:NAME",
        )
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        tensors = _pick(_read_pickle(path), which, path)
    if "preset" in metadata and which == "student":
        raise DinoError(f"{path} holds the teacher alone; the student was asked for", "leave --network out")
    preset = _preset(metadata, path)
    step = int(metadata["step"]) if metadata.get("step", "").isdecimal() else None
    return replace(_sort(tensors, preset, path), step=step)


def _preset(metadata: Mapping[str, str], path: Path) -> Preset | None:
    """Return the preset that is stored with weights, if there is one.

    Raises:
        DinoError: It is damaged, or of a later version.
    """
    if "preset" not in metadata:
        return None
    try:
        stored = parse(metadata["preset"])
    except ValueError as error:
        raise DinoError(
            f"{path} is damaged: its preset cannot be read; {error}", "copy it again, or take another checkpoint"
        ) from error
    try:
        return Preset.parse(stored, str(path))
    except DinoError as error:
        writer = metadata.get("dinocli", "")
        if writer in ("", dinocli.__version__):
            raise
        raise DinoError(
            f"{error.message}; the file was written by dinocli {writer}, and this is {dinocli.__version__}",
            f"pip install dinocli=={writer}",
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}
    except SafetensorError as error:
        raise DinoError(
            f"{path} is damaged or no safetensors file: {error}", "copy it again, or take another checkpoint"
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_plain_values()):
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file makes the reader raise nearly anything: EOFError, KeyError, RuntimeError, UnpicklingError.
    except Exception as error:
        raise DinoError(
            f"{path} cannot be read as weights: it is damaged, no PyTorch file, or holds more than numbers",
            "an official .pth or a .safetensors was wanted",
        ) from error


def _plain_values() -> list[Any]:
    """What a full checkpoint of the original holds beside tensors: its arguments, with paths, and numpy's numbers."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    # A path is read as one that opens nothing, since a path of Windows cannot be made elsewhere; Python 3.13 keeps
    # the classes in a module of another name.
    stand_ins = [(PurePosixPath, "PosixPath"), (PureWindowsPath, "WindowsPath")]
    stand_ins += [(path, path.__name__) for path in (PurePosixPath, PureWindowsPath)]
    paths = [(path, f"{module}.{name}") for path, name in stand_ins for module in ("pathlib", "pathlib._local")]
    return [argparse.Namespace, np.dtype, *kinds, *numbers, *paths]


def _pick(content: Any, which: Which, path: Path) -> dict[str, Tensor]:
    """The network's weights out of what a .pth held."""
    if isinstance(content, dict) and which in content:
        content = content[which]
    else:
        if isinstance(content, dict) and which == "student" and "teacher" in content:
            raise DinoError(f"{path} holds no student", "leave --network out")
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if isinstance(content, dict) and "student" in content:
            raise DinoError(f"{path} holds no teacher, but a student", "--network student")
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise DinoError(f"{path} holds no weights", "an official .pth or a .safetensors was wanted")
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    # A whole method of DINOv2's under one roof: `teacher.backbone.`, `teacher.dino_head.`, `student.backbone.`, ...
    for network in (which, "student", "teacher"):
        inside = {k.removeprefix(f"{network}."): v for k, v in tensors.items() if k.startswith(f"{network}.")}
        if inside and network != which:
            raise DinoError(f"{path} holds no {which}, but a {network}", f"--network {network}")
        if inside:
            return inside
    return tensors


def _sort(tensors: Mapping[str, Tensor], preset: Preset | None, path: Path) -> Weights:
    backbone: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    mask_token = None
    for key, value in tensors.items():
        # DDP writes `module.` before every key, the originals' wrappers `backbone.` and `head.`, or `dino_head.`.
        key = key.removeprefix("module.")
        if key.startswith("heads."):
            _, name, rest = key.split(".", 2)
            heads.setdefault(name, {})[rest] = value
        elif key.removeprefix("backbone.") == "mask_token":
            mask_token = value.view(1, -1)
        elif head := _HEAD.match(key):
            heads.setdefault(head[1] or "dino", {})[key[head.end() :]] = value
        # A supervised classifier on top (timm's `head`, torchvision's `fc`) is no part of a backbone.
        elif not key.startswith(("head.", "fc.")):
            backbone[key.removeprefix("backbone.")] = value
    if not backbone:
        raise DinoError(f"{path} holds no backbone", "take a file that was saved from a whole network")
    return Weights(under_timms_keys(backbone), heads, preset, mask_token)

"""Choice among torch's kernels of attention on a GPU, by one measurement for each device and number of tokens."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinocli.core.atomic import write_json
from dinocli.core.resources import cache_folder
from dinocli.models.backbone import Backbone
from dinocli.models.block import BranchBlock

# In the order of the versions of torch that prefer them; the last runs everywhere.
_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_ROUNDS, _CALLS = 5, 4


class Shape(NamedTuple):
    """Shape of queries, keys and values.

    Attributes:
        images: Number of images in a batch.
        heads: Number of heads.
        tokens: Tokens of an image.
        width: Width of a head.
    """

    images: int
    heads: int
    tokens: int
    width: int


def choose_kernels(
    backbones: Sequence[Backbone], crops: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> dict[int, str]:
    """Make the blocks of backbones try the fastest kernel of attention first, for each of their numbers of tokens.

    Kernels differ by rounding alone. Measurements are kept in the cache folder, so that later runs choose the same.

    Args:
        backbones: Backbones on the device. Those without blocks of this package stay unchanged.
        crops: Number and side in pixels of the crops that a step passes through a backbone at once.
        device: Device of the backbones.
        dtype: Precision of their products.

    Returns:
        Name of the first kernel for each number of tokens.
    """
    chosen: dict[int, str] = {}
    for backbone in backbones:
        attentions: list[Any] = [block.attn for block in backbone.blocks if isinstance(block, BranchBlock)]
        if not attentions:
            continue
        orders: dict[int, list[SDPBackend]] = {}
        for images, side in crops:
            rows, columns = backbone.grid(side) or (0, 0)
            tokens = rows * columns + backbone.model.num_prefix_tokens
            shape = Shape(images, attentions[0].num_heads, tokens, attentions[0].head_dim)
            first = _fastest(shape, device, dtype)
            orders[tokens] = [first, *(kernel for kernel in _KERNELS if kernel != first)]
            chosen[tokens] = first.name.removesuffix("_ATTENTION").lower()
        for attention in attentions:
            attention.kernels = orders
    return chosen


def _fastest(shape: Shape, device: torch.device, dtype: torch.dtype) -> SDPBackend:
    """Return the kernel that was the fastest when this device first had this shape."""
    place = cache_folder() / "attention.json"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = f"{name}, torch {torch.__version__}, {dtype}, " + " x ".join(map(str, shape))
    kept = _read(place)
    if known := SDPBackend.__members__.get(kept.get(key, "")):
        return known
    fastest = min(seconds := measure(shape, device, dtype), key=seconds.__getitem__)
    with contextlib.suppress(OSError):  # a read-only home folder
        write_json(place, _read(place) | {key: fastest.name}, indent=1)
    return fastest


def _read(place: Path) -> dict[str, str]:
    try:
        kept = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def measure(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[SDPBackend, float]:
    """Return the seconds of attention, forward and backward, with each kernel that runs here: the least of a few."""
    images, heads, tokens, width = shape
    joint = torch.randn(images, tokens, 3, heads, width, device=device, dtype=dtype, requires_grad=True)
    seconds: dict[SDPBackend, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns why a kernel does not run
        for kernel in _KERNELS:
            with contextlib.suppress(RuntimeError), sdpa_kernel(kernel):
                seconds[kernel] = min(_time(joint, device) for _ in range(1 + _ROUNDS))  # the first warms up
    return seconds


def _time(joint: Tensor, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(_CALLS):
        q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, joint, out.detach())
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

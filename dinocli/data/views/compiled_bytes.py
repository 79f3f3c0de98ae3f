"""Augmentation and normalization of crops in bytes by compiled C++: the results of `augment_bytes`, faster."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dinocli.core.atomic import atomic
from dinocli.core.resources import ROOT, cache_folder, read_words
from dinocli.data.views.augment_bytes import Changes


class CompiledByteAugmenter:
    """Augmentation of crops of one shape, with the library of `compile_library`. It makes the same bytes.

    Args:
        channels: Number of channels C.
        size: Side of the crops in pixels.
        library: Path of the library.
    """

    def __init__(self, channels: int, size: int, library: str) -> None:
        self._channels, self._size = channels, size
        self._work = torch.empty(channels * size * size, dtype=torch.uint8)
        self._augment = _function(library, "augment_bytes", "xxnnxx")

    def __call__(self, crop: Tensor, changes: Changes) -> None:
        """Replace a crop by its view, as `ByteAugmenter` does."""
        flip, jitter, gray, blur, solarize = changes
        numbers = [flip, gray, solarize, len(jitter)]
        for step in jitter:
            numbers += step
        ends = np.ascontiguousarray(blur.ends) if blur else np.empty((0, 0), np.float32)
        weights = blur.weights if blur else []
        sent = np.array([*numbers, len(weights), *weights, *ends.shape], np.int64)
        where = (crop.data_ptr(), self._work.data_ptr())
        self._augment(*where, self._channels, self._size, sent.ctypes.data, ends.ctypes.data)


def normalize_compiled(views: Tensor, mean: Tensor, std: Tensor, library: str) -> Tensor:
    """Return the same numbers as `normalize_bytes`, with the library of `compile_library`."""
    count, images, size, _, channels = views.shape
    views, middle, spread = views.contiguous(), 255 * mean, 255 * std
    out = torch.empty((count, images, channels, size, size))
    addresses = (views.data_ptr(), out.data_ptr(), middle.data_ptr(), spread.data_ptr())
    planes = count * images * channels
    _function(library, "normalize_bytes", "xxxxnnn")(*addresses, planes, channels, size * size)
    return out


def _function(library: str, name: str, arguments: str) -> Callable[..., None]:
    """Return a function of a library. Its arguments are addresses (x) and integers of 64 bits (n)."""
    found = getattr(ctypes.CDLL(library), name)
    found.argtypes, found.restype = [ctypes.c_void_p if one == "x" else ctypes.c_int64 for one in arguments], None
    return cast("Callable[..., None]", found)


def compile_library() -> str | None:
    """Compile the operations with torch's C++ compiler, once for a kind of processor; the library is cached.

    Returns:
        Path of the library. None if torch cannot compile here.
    """
    source = Path(__file__).with_suffix(".cpp").read_text()
    # The library has the instructions of this processor, and a home folder may serve several machines.
    made_for = hashlib.sha256(repr((source, torch.__version__, _processor())).encode()).hexdigest()[:24]
    kept = cache_folder() / "compiled" / f"{made_for}.so"
    try:
        if not kept.exists():
            if not shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")):
                return None  # found without the compiler's import, which takes a second
            # torch has no public way to its compiler that takes seconds and not minutes.
            from torch._inductor.codecache import CppCodeCache

            library = Path(CppCodeCache.load(source)._name).read_bytes()
            with atomic(kept) as draft:
                draft.write_bytes(library)
        ctypes.CDLL(str(kept))
        return str(kept)
    except Exception:  # a read-only cache, a torch whose private parts have moved: any error counts
        return None


def _processor(root: Path = ROOT) -> str:
    """Return the kind of this machine's processor, with the instructions that it has."""
    facts = re.findall(r"(?m)^(?:model name|flags|Features|CPU part)\s*:.*$", read_words(root / "proc/cpuinfo"))
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(facts))])

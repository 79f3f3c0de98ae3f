"""Kernel launches of a training step, per part, counted without a GPU.

    python benchmarks/launches.py [--presets vits16-vanilla dinov2-vitl16] [--batch-size 64] [--ways bfloat16 float32]

The step runs on tensors without data (torch's FakeTensor), the views on the meta device. A dispatch mode counts the
operators below autograd and autocast:

* An operator that computes or copies numbers counts as one launch. A few launch several kernels on a GPU, such as the
  backward pass of LayerNorm.
* Views, allocations and questions about metadata launch nothing.
* A foreach operator is one launch if all its lists agree in shape, stride, dtype and device, tensor by tensor: then
  CUDA fuses it. Otherwise it takes the slow route, a launch per tensor; so does any list of single numbers on the
  device.
* Attention counts as one launch, because a GPU takes the fused kernel.

Operators on the host's own small tensors (random draws, masks) do not count in the views and do in the step.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stopwatch import PARTS, Stopwatch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ways import WAYS, Way, trainer_of

from dinocli.core import foreach
from dinocli.data.loader.batch import Batch
from dinocli.data.views import augment as views_module
from dinocli.data.views.crops import Draws, draws, uniforms
from dinocli.data.views.masking import PatchMasks, deal
from dinocli.engine import trainer as trainer_module
from dinocli.method.preset import Preset, load_preset
from dinocli.models import block

# Operators without an alias in their schema that launch nothing all the same.
_FREE = {"_unsafe_view", "_local_scalar_dense", "lift_fresh", "promote_types", "is_same_size", "sym_size"}


class Launches(TorchDispatchMode):
    """Counter of the kernels that operators would launch, by the operator's name.

    Args:
        device: Type of the device whose operators count. If None, those of all devices.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten" and not _is_free(func, name) and self._is_here(args, result):
            self.counts[name] += 1 if not name.startswith("_foreach") or _is_fused(name, args) else len(args[0])
        return result

    def _is_here(self, args: Any, result: Any) -> bool:
        tensors = (leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor))
        return self.device is None or any(tensor.device.type == self.device for tensor in tensors)


def _is_free(func: Any, name: str) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or name in _FREE or "empty" in name


def _is_fused(name: str, args: Any) -> bool:
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    forms = [[(t.shape, t.stride(), t.device) for t in tensors] for tensors in lists]
    dtypes = [{t.dtype for t in tensors} for tensors in lists]
    # Only a copy may change the dtype, from the same one to the same one in all tensors.
    same_dtype = all(len(each) == 1 for each in dtypes) if name == "_foreach_copy_" else len(set().union(*dtypes)) == 1
    return same_dtype and all(form == forms[0] for form in forms)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Choose operators on this CPU as on a GPU: fused attention, views of a whole batch, copies of larger tensors."""
    with (
        mock.patch.object(foreach, "_SMALL_ON_CPU", foreach._SMALL),
        mock.patch.object(block, "_is_faster_unfused", lambda q, k: False),
        mock.patch.object(views_module, "_CACHED", views_module._AT_ONCE),
    ):
        yield


def count_views(preset: Preset) -> int:
    """Return the launches of a batch's views."""
    views = preset.views
    numbers = np.stack([uniforms(0, 0, i, len(views.all))[0] for i in range(preset.training.batch_size)])
    drawn = draws(numbers, views.all)
    mean, std = (torch.tensor(values, device="meta") for values in (views.mean, views.std))
    with as_on_a_gpu(), Launches("meta") as launches:
        for first, count, size in sizes(preset):
            part = slice(first, first + count)
            crops = torch.empty(count, len(numbers), size, size, views.channels, dtype=torch.uint8, device="meta")
            views_module.augment(crops, Draws(*(values[part] for values in drawn)), mean, std)
    return launches.counts.total()


def sizes(preset: Preset) -> list[tuple[int, int, int]]:
    """Return the first view, the number of views and their side, for each resolution."""
    views = preset.views
    groups = [(0, len(views.globals), views.global_1.size)]
    return groups + ([(len(views.globals), views.locals, views.local.size)] if views.local and views.locals else [])


def noise(preset: Preset, grid: tuple[int, int] | None) -> Batch:
    """Return a batch of noise, with masks and clean crops if the preset has any."""
    views, images = preset.views, preset.training.batch_size
    crops = [torch.randn(count, images, views.channels, size, size) for _, count, size in sizes(preset)]
    masks = None
    if views.mask and grid:
        patches = grid[0] * grid[1]
        counts = deal(views.mask, (len(views.globals), images), patches, seed=0, batch=0, rank=0)
        masks = PatchMasks.of(torch.arange(patches) < counts[..., None])
    clean = None
    if preset.clean_scale is not None:
        side = views.clean_size(preset.clean_scale)
        clean = torch.randn(len(views.globals), images, views.channels, side, side)
    return Batch(crops[0], crops[1] if len(crops) > 1 else None, torch.arange(images), masks, clean)


def count_step(preset: Preset, way: Way) -> dict[str, int]:
    """Return the launches of a step by its parts, in the middle of a run."""
    with torch.device("meta"):
        method = preset.method()
    # Masks need their values to be indexed, so they are drawn outside of the fake mode.
    batch = noise(preset, method.student.backbone.grid(preset.views.global_1.size))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    precision = torch.autocast("cpu", torch.bfloat16) if way.precision == "bfloat16" else None
    # `attach` replaces these two functions; the patches restore them.
    backward = mock.patch.object(torch.autograd, "backward", torch.autograd.backward)
    clip = mock.patch.object(trainer_module, "clip_gradients", trainer_module.clip_gradients)
    with fake, as_on_a_gpu(), backward, clip:
        trainer = trainer_of(preset, method.to_empty(device="cpu"), precision)
        trainer.step(batch)
        with Launches() as launches:
            watch = Stopwatch(torch.device("cpu"), lambda: float(launches.counts.total()))
            watch.attach(trainer)
            watch.begin()
            trainer.step(batch)
            spent = watch.end()
    return {part: int(count) for part, count in spent.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["vits16-vanilla", "dinov2-vitl16"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--ways", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # torch warns that meta tensors are not initialized
    parts = [part for part in PARTS if part != "waiting"]
    table = Table("step", "views", *parts, "total")
    for name in chosen.presets:
        preset = load_preset(name, [f"training.batch_size={chosen.batch_size}"])
        views = count_views(preset)
        for key in chosen.ways:
            counts = count_step(preset, WAYS[key])
            total = views + sum(counts.values())
            table.add_row(f"{name}, {key}", str(views), *(str(counts[part]) for part in parts), str(total))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

"""Measure what a training step on a GPU consists of: ceilings, the step, and its parts with their alternatives.

    python benchmarks/device_parts.py [PART ...] [--batch-size 128] [--photos DIR] [--tiny]

Each part prints one line of JSON per figure, and a part that fails does not stop the others. On a GPU, time is measured
by events on the device, so that the host's own time counts only if the device waits for it. `--tiny` tries the script.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from ways import WAYS, build, made_up

from dinocli.core.device import default_workers, pick_device
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import open_source
from dinocli.data.views.augment import augment
from dinocli.data.views.crops import NUMBERS, Draws, crop_boxes, crop_tries, draws
from dinocli.data.views.device_crops import Stored, cut_batch
from dinocli.engine.graph import GraphTrainer
from dinocli.engine.optim import clip_gradients, set_rates
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import Preset, load_preset

_TINY = (
    "backbone.options={img_size=32,patch_size=8,embed_dim=32,depth=2,num_heads=2}",
    "heads.dino.prototypes=256",
    "views.global_1.size=32",
    "views.global_2.size=32",
    "views.local.size=16",
)


class Measurement:
    """Settings of all parts, and a clock for their work."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device = pick_device(given.device)
        self.tiny, self.batch, self.photos = given.tiny, given.batch_size, given.photos
        changes = [*given.changes, *(_TINY if given.tiny else ()), f"training.batch_size={given.batch_size}"]
        self.preset: Preset = load_preset(given.preset, changes)
        self.on_gpu = self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object], times: int = 10) -> float:
        """Return the median over five rounds, each of some repetitions."""
        times = 1 if self.tiny else times
        for _ in range(3):
            work()
        self.wait()
        rounds = [self._round(work, times) for _ in range(5)]
        return statistics.median(rounds)

    def _round(self, work: Callable[[], object], times: int) -> float:
        if not self.on_gpu:
            began = time.process_time()
            for _ in range(times):
                work()
            return 1000 * (time.process_time() - began) / times
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            work()
        last.record()
        self.wait()
        return first.elapsed_time(last) / times

    def host_milliseconds(self, work: Callable[[], object]) -> float:
        """Return the host's time to launch some work on an idle device."""
        found = []
        for _ in range(5):
            self.wait()
            began = time.perf_counter()
            work()
            found.append(1000 * (time.perf_counter() - began))
        self.wait()
        return statistics.median(found)

    def kernels(self, work: Callable[[], object]) -> int | None:
        """Return the number of kernels and copies that some work launches, or None on a CPU."""
        if not self.on_gpu:
            return None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            work()
            self.wait()
        cuda = torch.autograd.DeviceType.CUDA
        return sum(e.device_type == cuda and not e.is_user_annotation for e in profiler.events())

    def trainer(self, way: str, kind: type[Trainer] = Trainer) -> Trainer:
        made = build(WAYS[way], self.preset, self.device, kind)
        assert isinstance(made, Trainer)
        return made


def ceiling(m: Measurement) -> None:
    """Measure the speed of a large matrix product, of memory, and of an empty launch."""
    side = 256 if m.tiny else 8192
    a, b = (torch.randn(side, side, device=m.device, dtype=torch.bfloat16) for _ in range(2))
    large = torch.empty(2**16 if m.tiny else 2**32, dtype=torch.uint8, device=m.device)
    other = torch.empty_like(large)
    product, copy = m.milliseconds(lambda: a @ b), m.milliseconds(lambda: other.copy_(large))
    launch = m.milliseconds(lambda: a[0, :1].add_(0), 200)
    tell("ceiling", tflops=2 * side**3 / product / 1e9, tb_s=2 * large.numel() / copy / 1e9, launch_us=1000 * launch)


def step(m: Measurement) -> None:
    """Measure a step: time until the third is done, throughput, the host's share, and memory."""
    for way in ("float32",) if m.tiny else ("bfloat16", "compiled"):
        trainer, batch = m.trainer(way), made_up(m.preset, m.device)
        began = time.perf_counter()
        for _ in range(3):
            trainer.step(batch)
        m.wait()
        start = time.perf_counter() - began
        each = m.milliseconds(lambda t=trainer, b=batch: t.step(b))
        host = m.host_milliseconds(lambda t=trainer, b=batch: t.step(b))
        memory = torch.cuda.max_memory_allocated() / 1e9 if m.on_gpu else 0.0
        tell(
            "step",
            way=way,
            batch=m.batch,
            first_three_s=start,
            ms=each,
            images_s=1000 * m.batch / each,
            host_ms=host,
            gb=memory,
        )


def graph(m: Measurement) -> None:
    """Compare plain steps with CUDA graphs, updated by torch and by Triton: times, and losses after twelve steps.

    All have the same draws, so their losses differ by rounding alone.
    """
    if not m.on_gpu:
        tell("graph", skipped="needs CUDA")
        return
    from dinocli.engine.fused import Mover  # needs Triton

    batch = made_up(m.preset, m.device)
    for way in ("bfloat16", "compiled"):
        expected: list[float] = []
        for name in ("plain", "graph", "graph and Triton"):
            torch.cuda.reset_peak_memory_stats()  # by which a trainer decides whether the memory holds graphs
            trainer = m.trainer(way, Trainer if name == "plain" else GraphTrainer)
            if isinstance(trainer, GraphTrainer):
                trainer.fused = trainer.fused if name == "graph and Triton" else None
                if trainer.fused:
                    trainer.method.average.mover = Mover()  # type: ignore[union-attr, operator]
            losses = [float(trainer.step(batch)["loss"]) for _ in range(12)]
            expected = expected or losses
            apart = max(abs(loss - wanted) / abs(wanted) for loss, wanted in zip(losses, expected, strict=True))
            each, host = (measure(lambda t=trainer: t.step(batch)) for measure in (m.milliseconds, m.host_milliseconds))
            graphs = len(trainer._graphs) if isinstance(trainer, GraphTrainer) else 0
            tell("graph", way=way, steps=name, batch=m.batch, graphs=graphs, ms=each, host_ms=host, losses_apart=apart)
            del trainer
            torch.cuda.empty_cache()


def update(m: Measurement) -> None:
    """Measure clipping, optimizer and moving average: torch's, and Triton's on a GPU with their largest difference."""
    trainer, batch = m.trainer("float32"), made_up(m.preset, m.device)  # gradients are float32 in any case
    trainer.step(batch)
    method, done = trainer.method, torch.ones((), dtype=torch.bool, device=m.device)
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    gradients = [torch.randn_like(p) for p in parameters]

    def restore() -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.clone()

    restore()
    clip = m.milliseconds(lambda: clip_gradients(trainer.optimizer, trainer.config.clip))
    adamw = m.milliseconds(trainer.optimizer.step)
    average = m.milliseconds(lambda: method.average.move_towards(method.student, 0.996, done))
    tell("update", by="torch", clip_ms=clip, optimizer_ms=adamw, average_ms=average)
    if not m.on_gpu:
        tell("update", skipped="Triton needs CUDA")
        return
    from dinocli.engine.fused import Mover

    other = m.trainer("float32", GraphTrainer)
    assert isinstance(other, GraphTrainer)
    if other.fused is None:
        tell("update", failed="Triton does not work")
        return
    fused = other.fused
    rates = [torch.tensor(rate, dtype=torch.float64, device=m.device) for rate in (1e-3, 0.04)]
    expected = copy.deepcopy(method)
    optimizer = trainer.config.build(expected.param_groups())
    set_rates(optimizer, 1e-3, 0.04)
    new = [p for group in optimizer.param_groups for p in group["params"]]
    mine = fused.parameters
    with torch.no_grad():
        for p, q in zip(mine, new, strict=True):
            p.copy_(q)
    for _ in range(3):
        for p, q, gradient in zip(mine, new, gradients, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        clip_gradients(optimizer, trainer.config.clip)
        optimizer.step()
        fused.clip()
        fused.step(*rates, done)
    apart = max(float((p - q).abs().max()) for p, q in zip(mine, new, strict=True))

    def by_triton() -> None:
        for p, gradient in zip(mine, gradients, strict=True):
            p.grad = gradient
        fused.clip()
        fused.step(*rates, done)

    both = m.milliseconds(by_triton)
    average_of: Any = other.method
    average_of.average.mover = Mover()
    average = m.milliseconds(lambda: average_of.average.move_towards(average_of.student, 0.996, done))
    tell("update", by="Triton", clip_and_optimizer_ms=both, average_ms=average, apart=apart)


def attention(m: Measurement) -> None:
    """Compare the kernels of attention, forward and backward, at the sizes of the crops."""
    # Crops of 224 and 96 pixels at patch size 16, and of 224 and 518 at patch size 14, with registers or without.
    for tokens, images in ((197, 2 * m.batch), (37, 8 * m.batch), (261, 2 * m.batch), (1370, m.batch // 4)):
        shape = (2 if m.tiny else images, tokens, 3, 6, 64)
        qkv = torch.randn(shape, device=m.device).to(torch.bfloat16).requires_grad_()
        row: dict[str, float | str] = {}
        for name in ("", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):

            def work(qkv: torch.Tensor = qkv) -> None:
                out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
                out.backward(out.detach())
                qkv.grad = None

            try:
                with sdpa_kernel(getattr(SDPBackend, name)) if name else contextlib.nullcontext():
                    row[name.lower() or "default"] = m.milliseconds(work)
            except RuntimeError as error:
                row[name.lower()] = type(error).__name__
        tell("attention", tokens=tokens, images=shape[0], **row)


def views(m: Measurement) -> None:
    """Measure the augmentation of a batch of crops."""
    config = m.preset.views
    drawn = draws(np.random.default_rng(0).random((m.batch, len(config.all), NUMBERS)), config.all)
    n, local = len(config.globals), config.local
    sizes = [(n, config.global_1.size, slice(0, n)), (len(config.all) - n, local.size if local else 0, slice(n, None))]
    crops = [torch.randint(0, 256, (v, m.batch, s, s, 3), dtype=torch.uint8, device=m.device) for v, s, _ in sizes if v]
    mean, std = (torch.tensor(values, device=m.device) for values in (config.mean, config.std))
    for compiled in (False,) if m.tiny else (False, True):

        def work(compiled: bool = compiled) -> None:
            for group, (_, _, part) in zip(crops, sizes, strict=False):
                augment(group, Draws(*(d[part] for d in drawn)), mean, std, compiled=compiled)

        each, host = m.milliseconds(work, 5), m.host_milliseconds(work)
        tell("views", compiled=compiled, batch=m.batch, ms=each, host_ms=host, kernels=m.kernels(work))


def copies(m: Measurement) -> None:
    """Measure copies to the device: from pinned memory, from other memory, and from an indexed array."""
    if not m.on_gpu:
        tell("copies", skipped="needs CUDA")
        return
    plain = torch.randint(0, 256, (256, 224, 224, 3), dtype=torch.uint8)
    pinned, rows, mb = plain.pin_memory(), list(range(256)), plain.numel() / 1e6
    ways = {
        "pinned": lambda: pinned.to(m.device, non_blocking=True),
        "plain": lambda: plain.to(m.device),
        "indexed": lambda: plain[rows].to(m.device),
    }
    tell("copies", **{f"{name}_gb_s": mb / m.milliseconds(work, 5) for name, work in ways.items()})


def jpeg(m: Measurement) -> None:
    """Compare the JPEG decoders of device and host, through torchvision."""
    from torchvision.io import decode_jpeg

    found = sorted(Path(m.photos).rglob("*")) if m.photos else []
    paths = [path for path in found if path.suffix.lower() in (".jpg", ".jpeg")][:256]
    if not paths:
        tell("jpeg", skipped="needs --photos with JPEG files")
        return
    data = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    began = time.process_time()
    for one in data[:64]:
        decode_jpeg(one)
    row = {"host_images_s": len(data[:64]) / (time.process_time() - began)}
    for count in (16, 64, 256) if m.on_gpu else ():
        some = (data * count)[:count]
        row[f"device_images_s_{count}"] = 1000 * count / m.milliseconds(lambda s=some: decode_jpeg(s, device="cuda"), 3)
    tell("jpeg", **row)


def crops(m: Measurement) -> None:
    """Measure the crops of a batch of decoded photos on the device, in the types of the products."""
    config, numbers = m.preset.views, np.random.default_rng(0).random((m.batch, len(m.preset.views.all), NUMBERS))
    tries = crop_tries(numbers, np.array([view.scale for view in config.all]))
    photo = torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8, device=m.device)
    stored = [Stored.of(photo, 1, torch.tensor(crop_boxes(one, 375, 500)), b) for b, one in enumerate(tries)]
    n, local, resamples = len(config.globals), config.local, [view.resample for view in config.all]
    sizes = [(n, config.global_1.size), (len(config.all) - n, local.size if local else 0)]
    groups = [torch.empty(v, m.batch, s, s, 3, dtype=torch.uint8, device=m.device) for v, s in sizes if v]
    for dtype in (torch.float32, torch.float16) if m.on_gpu else (torch.float32,):
        work = partial(cut_batch, groups, stored, resamples, dtype)
        host = m.host_milliseconds(work)
        each = m.milliseconds(work, 5)
        tell("crops", dtype=str(dtype), batch=m.batch, ms=each, host_ms=host, kernels=m.kernels(work))


def embedding(m: Measurement) -> None:
    """Compare the patch embedding as a convolution and as a matrix product, forward and backward."""
    size, width, patch = (32, 16, 16) if m.tiny else (224, 384, 16)
    x = torch.randn(2 * m.batch, 3, size, size, device=m.device)
    convolution = torch.nn.Conv2d(3, width, patch, patch).to(m.device)

    def product(x: torch.Tensor) -> torch.Tensor:
        rows = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(rows, convolution.weight.flatten(1), convolution.bias)

    def work(embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.autocast(m.device.type, torch.bfloat16):
            out = embed(x)
        out.float().mean().backward()
        convolution.zero_grad()

    ways: dict[str, Any] = {"convolution": convolution, "product": product}
    tell("embedding", **{f"{name}_ms": m.milliseconds(lambda e=embed: work(e)) for name, embed in ways.items()})


def loader(m: Measurement) -> None:
    """Measure the loader alone, with one worker and with the default number, decoding on the host and on the device."""
    if not m.photos:
        tell("loader", skipped="needs --photos")
        return
    size, seconds = min(m.batch, 64), 1 if m.tiny else 6
    for workers, on_device in itertools.product(sorted({1, default_workers(m.device)}), (False, True)):
        options = {"batch_size": size, "seed": 0, "images": m.preset.images, "workers": workers, "device": m.device}
        batches = TrainBatches(open_source(m.photos), m.preset.views, on_device=on_device, **options)
        each = iter(batches)
        for _ in range(6):
            next(each)
        m.wait()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(each)
            count += 1
        m.wait()
        speed, share = count * size / (time.perf_counter() - began), batches.share_on_device
        tell("loader", workers=workers, on_device=on_device, images_s=speed, decoded_on_device=share)
        batches.close()


PARTS = {
    f.__name__: f for f in (ceiling, step, graph, update, attention, views, copies, jpeg, crops, embedding, loader)
}


def tell(part: str, **figures: object) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"part": part} | rounded), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", default="vits16-vanilla")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--photos", help="folder of photos, for the parts that decode")
    parser.add_argument("--tiny", action="store_true", help="small networks and one repetition, to try the script")
    given = parser.parse_args()
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is not a part; expected {', '.join(PARTS)}")
    torch.set_num_threads(1)
    measurement, failed = Measurement(given), 0
    for part in given.parts or PARTS:
        try:
            PARTS[part](measurement)
        except Exception as error:
            failed += 1
            tell(part, failed=(str(error).splitlines() or [type(error).__name__])[0])
            traceback.print_exc()
        if measurement.on_gpu:
            torch.cuda.empty_cache()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

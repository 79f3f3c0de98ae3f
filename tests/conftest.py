"""What tests share: the numbers of the original, and small images."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinocli.core import distributed
from dinocli.features.encoder import Encoder
from dinocli.features.store import Provenance
from dinocli.features.writer import write_features
from dinocli.method.feature_distillation import Teacher
from dinocli.method.preset import AnyMethod, Preset, load_preset
from dinocli.models.architecture import BackboneConfig
from dinocli.weights.checkpoint import write_checkpoint

pytest_plugins = ["remote_servers"]  # fixtures of servers on this machine
FIXTURES = Path(__file__).parent / "fixtures"
# Beside a checkout of the house there may lie more of the original's numbers; a clone without them is held all the same.
SHARED = Path(__file__).parents[2] / "shared" / "fixtures"
# What floating point allows: absolute and relative, by the precision that something was computed in.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# The smallest network and views that learn anything, as overrides of `tiny`.
SMALL = [
    "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2}",
    "heads.dino.prototypes=16",
    "heads.dino.hidden=16",
    "heads.dino.bottleneck=8",
    "views.global_1.size=16",
    "views.global_2.size=16",
    "views.local.size=8",
    "training.batch_size=4",
    "training.steps_per_epoch=4",
]
# Small heads and 48-pixel views, for networks that other libraries load.
SMALL_HEADS = ["heads.dino.prototypes=16", "heads.dino.hidden=24", "heads.dino.bottleneck=8"]
SMALL_HEADS += ["views.global_1.size=48", "views.global_2.size=48"]
RESNET18 = 'backbone={name="resnet18"}'
ROTARY = [
    "backbone.name=vit_small_patch16_dinov3",
    "backbone.options={img_size=48, patch_size=8, embed_dim=96, depth=2, num_heads=6, init_values=0.5}",
    "backbone.positions=none",
    "backbone.rescale_positions=2",
]
GB = 10**9
PRECISIONS = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


class Original:
    """Numbers that facebookresearch/dino@7c446df produced: tensors by name, and how each was made."""

    def __init__(self, stem: str) -> None:
        folder = FIXTURES if (FIXTURES / f"{stem}.json").exists() else SHARED
        if not (folder / f"{stem}.json").exists():
            pytest.skip(f"{SHARED / stem}.json is not here")
        self.tensors = load_file(folder / f"{stem}.safetensors")
        self.made: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose name begins with the prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def assert_original(ours: torch.Tensor, theirs: torch.Tensor, what: str = "") -> None:
    """Equal to a number of the original, as far as the precision of ours allows."""
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(
        ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}" if what else m
    )


def assert_same_features(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal as float32 products of one network are, computed twice.

    Not bit for bit: a CPU's kernels may add up in another order where weights or batches lie at other addresses.
    """
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="session")
def original() -> Original:
    """The numbers that every clone has."""
    return Original("dino_fixtures_ci")


@pytest.fixture(scope="session")
def more() -> Original:
    """The larger set: weights after every step, a run in float32, one without clipping and kept norms."""
    return Original("dino_fixtures_micro")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow tests: one that starts last would keep a single process busy while the others have ended."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def tests_so_far() -> Iterator[int]:
    return itertools.count(1)


@pytest.fixture(autouse=True)
def little_to_collect(tests_so_far: Iterator[int]) -> None:
    """Hide what is alive from garbage collection, with which a run starts: torch and pytest hold a million objects.

    What has become garbage meanwhile is collected once in a while.
    """
    if next(tests_so_far) % 100 == 0:
        gc.unfreeze()
        gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    # Small tensors gain nothing from a second thread, and a busy machine loses much by it.
    torch.set_num_threads(1)


def build_method(preset: Preset, images: int) -> AnyMethod:
    """The method of a preset, with a teacher or labels of its own for `images` images if it needs them."""
    if preset.losses.features:
        backbone, side = preset.backbone.build(drop_path=False), preset.views.global_1.size
        grid = backbone.grid(side)
        assert grid is not None
        return preset.feature_method([Teacher(backbone, (0.5,) * 3, (0.3,) * 3, side, grid)])
    if preset.losses.labels:  # labels stay on the host
        return preset.label_method(torch.arange(images, device="cpu") % preset.losses.labels.classes)
    return preset.method(preset.network() if preset.teacher.frozen else None)


def write_images(folder: Path, count: int, size: int = 32, seed: int = 0) -> Path:
    """Noise images, `count` of them, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:04}.png")
    return folder


def write_film(path: Path, frames: int = 4, rate: int = 2) -> Path:
    """Write a video in which a bright square on noise moves from frame to frame."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(frames)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = rng.integers(0, 128, (48, 64, 3), dtype=np.uint8)
            pixels[8:24, 4 * number : 4 * number + 16] = 250
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return path


def of_channels(channels: int, *more: str) -> list[str]:
    """What makes of `tiny` a preset for images of so many channels, and more that is to be set."""
    numbers = [0.5] * channels
    colors = [f"views.{key}=0" for key in load_preset("tiny-dino").views.color_keys]
    return [f"images.channels={channels}", f"views.mean={numbers}", f"views.std={numbers}", *colors, *more]


def write_run(folder: Path, *overrides: str, preset: str = "tiny-dino") -> Path:
    """A run folder with random weights, every one of them away from where it starts."""
    torch.manual_seed(0)
    made = load_preset(preset, [*SMALL_HEADS, *overrides])
    network = made.network()
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    write_checkpoint(folder / "run" / "ckpt.safetensors", network.weights(), made, 3)
    return folder / "run"


def random_images(size: int = 48, count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def write_stored(
    folder: Path, data: str, parts: dict[str, list[str]], classes: tuple[str, ...] = (), **provenance: object
) -> Path:
    """Features of images by their paths, whose numbers are their rows."""
    row = 0
    for split, paths in parts.items():
        made = replace(Provenance("x", "0123", "cls", 1, 16, data), **provenance)
        with write_features(folder / f"{split}.safetensors", made, list(classes)) as writer:
            values = np.arange(row, row + len(paths), dtype=np.float32)[:, None].repeat(2, 1)
            writer.append(values, [i % 2 if classes else -1 for i in range(len(paths))], paths)
        row += len(paths)
    return folder


def together(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returns in each of so many processes that are one run, marked as torchrun marks them."""
    context = multiprocessing.get_context("fork")  # this process has paid for importing torch
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_member, args=(rank, count, port, pipes[rank][1], function, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        assert all(end.poll(120) for end, _ in pipes), "a process does not come back"
        found = [pickle.loads(end.recv_bytes()) for end, _ in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert not any(isinstance(value, str) and value.startswith("Traceback") for value in found), "\n".join(found)
    return found


def _member(rank: int, count: int, port: int, answer: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    marks = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= marks | {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)
    try:
        distributed.begin()
        # As bytes: of a tensor `send` sends a handle alone, which is gone if the process ends before it is taken up.
        answer.send_bytes(pickle.dumps(function(*args)))
        distributed.end()
    except BaseException:
        answer.send_bytes(pickle.dumps(traceback.format_exc()))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of twelve noise images in two class folders."""
    write_images(tmp_path / "images" / "a", 6, seed=0)
    write_images(tmp_path / "images" / "b", 6, seed=1)
    return tmp_path / "images"


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Checkpoint of a small network."""
    torch.manual_seed(0)
    options = "{img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}"
    preset = load_preset("tiny-dino", [f"backbone.options={options}", *SMALL[1:4]])
    write_checkpoint(tmp_path / "start.safetensors", preset.network().weights(), preset, 7)
    return tmp_path / "start.safetensors"


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Folder with `train` and `val`, whose two classes differ in color."""
    for part, count in (("train", 10), ("val", 6)):
        for i, name in enumerate("ab"):
            folder = write_images(tmp_path / "labelled" / part / name, count, seed=i)
            for path in folder.iterdir():
                pixels = np.asarray(Image.open(path).convert("RGB")) // 2 + np.array([120 * i, 0, 120 * (1 - i)])
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "labelled"


@pytest.fixture
def encoder() -> Encoder:
    """A small encoder with random weights: patch 8, width 16, three blocks of two heads."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", options=options, positions="dino")
    backbone = config.build(drop_path=False).eval()
    return Encoder(backbone, "x", "0123", 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def peak_of(action: Callable[[], object]) -> int:
    """Bytes of tensors on the CPU that an action takes at its peak, above those that are there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system of a machine with 64 GB, 50 of them free, and no control group."""
    write_file(
        tmp_path, "proc/meminfo", f"MemTotal: {64 * GB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {50 * GB // 1024} kB\n"
    )
    return tmp_path


def write_file(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)

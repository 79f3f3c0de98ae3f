"""Cost of a linear probe: the original's protocol, and dinocli's on stored features, with and without views.

    python benchmarks/probe.py DATA [--checkpoint CKPT] [--images 8] [--views 10] [--rounds 3] [--accuracy]

DATA holds class folders, or train/ and val/ with class folders. Without val/, a fifth of the images is used for
testing; without labels, labels are made up. Neither changes the time. The original encodes augmented training images,
and the test images, in each of 100 epochs, for one learning rate. dinocli encodes each image once (1+K times with K
views), trains heads at 13 learning rates on the features, and trains the best one again.

The full protocols take days. Measured is the processor time of a few images per kind of pass, and of a few epochs of
the heads, on as many features as there are images, but at least 1,024. Columns marked "scaled" extrapolate from that to
all images and epochs. Both protocols use the same float32 backbone and the class tokens of four blocks, in one process;
the original computes all tokens. They run in turn, round after round. Ratios are within rounds, the last one without
the test images.

A second table covers the heads alone: 13 learning rates together, and 13 single runs. With --accuracy, the checkpoint
extracts all of DATA, and a third table shows the accuracy of the two protocols.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision import transforms

from dinocli.core.device import default_workers
from dinocli.data.sources.listing import Names
from dinocli.data.sources.open import Images, splits
from dinocli.engine.schedules import Clock, Cosine
from dinocli.evals.linear import RATES, train_probe
from dinocli.evals.probes import Probes, trainer
from dinocli.features.encoder import Encoder
from dinocli.features.extract import extract
from dinocli.features.store import Features, Provenance, read_features
from dinocli.models.architecture import BackboneConfig
from dinocli.weights.load import load_encoder

EPOCHS, BLOCKS, BATCH = 100, 4, 256
CPU = torch.device("cpu")


class Original:
    """Reimplementation of the original's probe: PIL, the frozen backbone, one linear layer, SGD."""

    def __init__(self, encoder: Encoder, classes: int, blocks: int = BLOCKS) -> None:
        self.encoder, self.blocks = encoder, blocks
        self.layer = nn.Linear(blocks * encoder.backbone.width, classes)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), 0.001, momentum=0.9)
        end = [transforms.ToTensor(), transforms.Normalize(encoder.mean, encoder.std)]
        size = encoder.size
        self.random = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *end])
        bicubic = transforms.InterpolationMode.BICUBIC
        self.centered = transforms.Compose(
            [transforms.Resize(round(size * 256 / 224), bicubic), transforms.CenterCrop(size), *end]
        )

    def scores(self, source: Images, rows: range, view: Callable[[Image.Image], Tensor]) -> Tensor:
        images = torch.stack([view(Image.open(source.root / source.names[i]).convert("RGB")) for i in rows])
        with torch.no_grad():
            tokens = torch.cat([t.cls for t in self.encoder.backbone.last_tokens(images, self.blocks)], dim=1)
        return self.layer(tokens)

    def learn(self, source: Images) -> None:
        for start in range(0, len(source), 32):
            rows = range(start, min(start + 32, len(source)))
            truth = torch.from_numpy(source.labels[rows.start : rows.stop]).long()
            loss = nn.functional.cross_entropy(self.scores(source, rows, self.random), truth)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def test(self, source: Images) -> None:
        for start in range(0, len(source), 32):
            self.scores(source, range(start, min(start + 32, len(source))), self.centered).topk(5)


def seconds(work: Callable[[], object]) -> float:
    """Return the processor seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def some(source: Images, count: int) -> Images:
    rows = np.linspace(0, len(source) - 1, count).astype(int)
    return replace(source, names=Names.of([source.names[i] for i in rows]), labels=source.labels[rows])


def labelled(data: str, real: bool) -> tuple[Images, Images]:
    """Return training and test images; missing splits and labels are made up, unless `real` forbids it."""
    parts = {name: part for name, part in splits(data).items() if isinstance(part, Images)}
    train = parts.get("train") or next(iter(parts.values()))
    test = parts.get("val") or parts.get("test")
    if real and not (test and train.classes):
        raise SystemExit("--accuracy needs train/ and val/ with class folders")
    if not train.classes:
        train = replace(train, classes=[str(c) for c in range(10)], labels=np.arange(len(train), dtype=np.int32) % 10)
    return train, test or some(train, max(1, len(train) // 5))


def drawn(images: int, width: int, classes: int) -> Features:
    """Return random features, which take as long to train on as real ones."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((images, width), dtype=np.float32)
    labels = np.arange(images) % classes
    return Features(
        values, labels, [], [str(c) for c in range(classes)], {}, Provenance("drawn", "", "cls", 4, 224, "d")
    )


def work(encoder: Encoder, train: Images, test: Images, chosen: argparse.Namespace) -> Table:
    """Return the table of the protocols' costs."""
    few, classes, width = some(train, chosen.images), len(train.classes), BLOCKS * encoder.backbone.width
    original = Original(encoder, classes)
    learned, tested = drawn(max(len(train), 4 * BATCH), width, classes), drawn(len(test), width, classes)

    def ours(views: int) -> float:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "f.safetensors"
            return seconds(lambda: extract(encoder, few, path, data="", blocks=BLOCKS, batch_size=32, views=views))

    ways = {
        "learn": lambda: seconds(lambda: original.learn(few)) / len(few),
        "test": lambda: seconds(lambda: original.test(few)) / len(few),
        "plain": lambda: ours(0) / len(few),
        "views": lambda: ours(chosen.views) / len(few),
        "heads": lambda: seconds(lambda: train_probe(learned, tested, epochs=chosen.epochs, device=CPU)),
    }
    rounds = []
    for _ in range(chosen.rounds):
        took = {name: way() for name, way in ways.items()}
        heads = took["heads"] * EPOCHS / chosen.epochs
        took |= {
            "the original": EPOCHS * (len(train) * took["learn"] + len(test) * took["test"]),
            "stored": (len(train) + len(test)) * took["plain"] + heads,
            f"stored, {chosen.views} views": len(train) * took["views"] + len(test) * took["plain"] + heads,
        }
        took |= {
            "the original, learning": EPOCHS * len(train) * took["learn"],
            "stored, learning": len(train) * took["plain"] + heads,
            f"stored, {chosen.views} views, learning": len(train) * took["views"] + heads,
        }
        rounds.append(took)

    def median(name: str, scale: float = 1) -> str:
        return f"{scale * statistics.median(r[name] for r in rounds):.4g}"

    table = Table(
        "way", "rates", "passes over train, test", "ms a training image", "ms a test image",
        "heads, s (scaled)", "all, hours (scaled)", "times less", "without the test images",
        title=f"a probe on {len(train)} training and {len(test)} test images of {classes} classes, {EPOCHS} epochs; "
        f"measured on {len(few)} images and {chosen.epochs} epochs of the heads",
    )  # fmt: skip
    scaled = EPOCHS / chosen.epochs
    for name, rates, passes, columns in (
        ("the original", "1", f"{EPOCHS}, {EPOCHS}", (median("learn", 1e3), median("test", 1e3), "with the images")),
        ("stored", "13", "1, 1", (median("plain", 1e3), median("plain", 1e3), median("heads", scaled))),
        (f"stored, {chosen.views} views", "13", f"{1 + chosen.views}, 1",
         (median("views", 1e3), median("plain", 1e3), median("heads", scaled))),
    ):  # fmt: skip
        spreads = []
        for part in ("", ", learning"):
            ratios = sorted(r[f"the original{part}"] / r[f"{name}{part}"] for r in rounds)
            spreads.append(f"{statistics.median(ratios):.1f} [{ratios[0]:.1f} .. {ratios[-1]:.1f}]")
        table.add_row(name, rates, passes, *columns, median(name, 1 / 3600), *spreads)
    return table


def train_heads(x: Tensor, y: Tensor, classes: int, epochs: int, rates: tuple[float, ...]) -> None:
    rows = (rows for _ in range(epochs) for rows in torch.randperm(len(x)).split(BATCH) if len(rows) == BATCH)
    clock, schedule = Clock(len(x) // BATCH, epochs), Cosine(kind="cosine", start=1.0, end=0.0)
    probes = Probes(x.shape[1], classes, rates, seed=0)
    batches = ((x[some], y[some]) for some in rows)
    trainer(probes, schedule, clock, BATCH).fit(batches, clock.total, lambda clock, values: None)


def heads(images: int, width: int, chosen: argparse.Namespace) -> Table:
    """Return the table of the heads: 13 learning rates together, and one after another."""
    table = Table(
        "classes", "13 rates together, s", "13 single runs, s", "times less",
        title=f"the heads alone: {images} features of {width}, {chosen.epochs} epochs, batches of {BATCH}",
    )  # fmt: skip
    for classes in chosen.classes:
        data = drawn(images, width, classes)
        x, y = torch.from_numpy(np.asarray(data.values)), torch.from_numpy(data.labels)
        epochs = chosen.epochs
        rounds = [
            (
                seconds(partial(train_heads, x, y, classes, epochs, RATES)),
                sum(seconds(partial(train_heads, x, y, classes, epochs, (rate,))) for rate in RATES),
            )
            for _ in range(chosen.rounds)
        ]
        together, single = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        ratios = sorted(b / a for a, b in rounds)
        spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]"
        table.add_row(str(classes), f"{together:.2f}", f"{single:.2f}", spread)
    return table


def accuracy(encoder: Encoder, train: Images, test: Images, views: int) -> Table:
    """Return the table of the protocols' accuracy on all images."""
    table = Table("protocol", "learning rate", "top-1 %", "top-5 %", title=f"{encoder.source}, four blocks")
    with TemporaryDirectory() as folder:
        for count in (0, views):
            parts = [
                extract(
                    encoder, source, Path(folder) / f"{name}-{count}.safetensors", data="d", blocks=BLOCKS, views=k,
                    workers=default_workers(CPU),
                ).path
                for name, source, k in (("train", train, count), ("val", test, 0))
            ]  # fmt: skip
            found = train_probe(*(read_features(path) for path in parts), epochs=EPOCHS, device=CPU).result
            table.add_row(found.protocol, f"{found.lr:g}", f"{found.top1:.2f}", f"{found.top5:.2f}")
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--checkpoint", help="as for `dino extract`; by default an untrained ViT-S/16 at 224")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2, help="of the heads")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accuracy", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train, test = labelled(chosen.data, chosen.accuracy)
    if chosen.checkpoint:
        encoder = load_encoder(chosen.checkpoint, CPU)
    else:
        backbone = BackboneConfig(name="vit_small_patch16_224").build(drop_path=False).eval()
        encoder = Encoder(backbone, "untrained ViT-S/16", "", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    console = Console(width=150)
    console.print(work(encoder, train, test, chosen))
    console.print(heads(max(len(train), 4 * BATCH), BLOCKS * encoder.backbone.width, chosen))
    if chosen.accuracy:
        console.print(accuracy(encoder, train, test, chosen.views))


if __name__ == "__main__":
    main()

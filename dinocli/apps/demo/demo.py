"""Demo: images are drawn, DINO pretrains on them, and its features are compared with baselines."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from dinocli.apps.attention.sheets import draw as draw_attention
from dinocli.apps.demo.drawings import CLASSES, write_set
from dinocli.core.atomic import write_json
from dinocli.core.checksums import unseal
from dinocli.core.errors import DinoError
from dinocli.core.resources import cores
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage
from dinocli.data.loader.plain import plain_batches
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import image_folder
from dinocli.data.sources.outputs import is_fresh
from dinocli.evals.attention import attention_maps, default_size, overlap
from dinocli.evals.knn import knn
from dinocli.evals.linear import train_probe
from dinocli.features.encoder import Encoder
from dinocli.features.extract import extract
from dinocli.features.store import Features, Provenance, read_features
from dinocli.method.preset import load_preset
from dinocli.train.plan import Plan, start_clock
from dinocli.train.pretrain import pretrain
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.load import load_encoder, untrained_encoder

PRESET = "tiny-muon"
RECORD = "demo.json"  # settings and progress of the demo
TRAIN_IMAGES, VAL_IMAGES = 2000, 500
_K = 20
_KEEP = 0.6
_DRAWING = 8  # most processes that draw
_RAW_SIDE = 16  # pixels; at larger sizes, raw pixels classify worse


class Advance(Protocol):
    """Progress callback of a stage."""

    def __call__(self, done: int, note: str = "") -> None:
        """Report `done` of the stage's total, with an optional note."""


Stage = Callable[[str, int, str], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Row:
    """Scores of one kind of features.

    Attributes:
        features: Name of the features.
        knn: Top-1 accuracy of k-NN with 20 neighbours, in percent.
        linear: Top-1 accuracy of a linear probe, in percent.
        overlap: Mean Jaccard overlap of the best head's attention mask with the true mask. None for features without
            attention.
    """

    features: str
    knn: float
    linear: float
    overlap: float | None


@dataclass(frozen=True)
class DemoResult:
    """Measurements and files of the demo.

    Attributes:
        rows: Scores of the trained features, followed by the baselines.
        chance: Expected top-1 accuracy of a random guess, in percent.
        everything: Mean Jaccard overlap of a full mask with the true masks.
        pictures: Paths of the attention sheets, one per class.
        seconds: Wall time of this call.
    """

    rows: list[Row]
    chance: float
    everything: float
    pictures: list[Path]
    folder: Path
    seconds: float


def demo(
    folder: Path,
    *,
    device: torch.device,
    workers: int,
    stage: Stage,
    train_images: int = TRAIN_IMAGES,
    val_images: int = VAL_IMAGES,
    steps: int | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Draw images, pretrain `tiny-muon` on them without labels, extract and classify features, and draw attention maps.

    If the folder holds an unfinished demo with the same settings, resume it.

    Args:
        folder: Folder for images, run, features and pictures.
        device: Device for training and features.
        workers: Number of decoding processes.
        stage: Function that opens a progress display, given the name of a stage, its total and its unit.
        train_images: Number of training images.
        val_images: Number of validation images.
        steps: Stop training after this many steps. If None, train as long as the preset says.
        note: Callback that receives one-line messages for the user.

    Raises:
        DinoError: If the folder holds a finished demo, a demo with other settings, or other files.
        KeyboardInterrupt: If the user stopped training. The same call resumes it.
    """
    began = time.perf_counter()
    data, masks = folder / "data", folder / "masks"
    record = {"dinocli": "demo", "train_images": train_images, "val_images": val_images, "steps": steps}
    if not _begin(folder, record, note):
        processes = min(cores(), _DRAWING) if train_images >= TRAIN_IMAGES else 1  # starting them takes a second
        with stage("draw", 2, "sets of images") as advance:
            write_set(data / "train", train_images, seed=0, processes=processes)
            advance(1)
            write_set(data / "val", val_images, seed=1, masks=masks, processes=processes)
            advance(2)
        write_json(folder / RECORD, record | {"drawn": True, "done": False})
    # Training reads a plain folder of images; only the evaluation uses the labels.
    checkpoint = _train(data / "train", folder / "run", device, workers, stage, steps, note)
    trained = load_encoder(str(checkpoint), device)
    untrained = untrained_encoder(read_weights(checkpoint), device)
    parts = {part: image_folder(data / part) for part in ("train", "val")}
    val = parts["val"]
    rows = []
    for name, encoder in (("trained by DINO", trained), ("untrained twin", untrained)):
        splits = {
            part: _extract(
                encoder,
                source,
                folder / "features" / name.replace(" ", "-") / f"{part}.safetensors",
                workers,
                stage,
                f"extract {name}, {part}",
            )
            for part, source in parts.items()
        }
        overlap = _measure_overlap(encoder, parts["val"], masks, stage, f"attention, {name}")
        rows.append(_score_features(name, splits["train"], splits["val"], overlap, device, stage))
    raw = {part: _flatten_images(source, workers) for part, source in parts.items()}
    rows.append(_score_features("raw pixels", raw["train"], raw["val"], None, device, stage))
    pictures = [
        draw_attention([trained], path, folder / "attention" / path.parent.name, keep=_KEEP, size=None, raw=False)
        for path in (val.root / val.names[int(np.argmax(val.labels == c))] for c in range(len(CLASSES)))
    ]
    write_json(folder / RECORD, record | {"drawn": True, "done": True})
    everything = float(np.mean([_read_mask(masks, path).mean() for path in val.names]))
    return DemoResult(
        rows,
        100 / len(CLASSES),
        everything,
        [p.picture for p in pictures if not isinstance(p, str)],
        folder,
        time.perf_counter() - began,
    )


def _begin(folder: Path, record: dict[str, Any], note: Callable[[str], None]) -> bool:
    """Start or resume a demo. Return True if all its images are drawn.

    Raises:
        DinoError: If the folder holds a finished demo, a demo with other settings, or other files.
    """
    another = f"use --out {folder}-2, or remove {folder}"
    if is_fresh(folder):  # a demo that was killed at its start leaves at most a marker file
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, record | {"drawn": False, "done": False})
        return False
    try:
        before = unseal((folder / RECORD).read_bytes())
    except (OSError, ValueError) as error:
        raise DinoError(f"{folder} exists and holds no demo to resume", another) from error
    if before.get("done"):
        raise DinoError(f"the demo in {folder} is finished", another)
    if any(before.get(key) != value for key, value in record.items()):
        raise DinoError(f"the demo in {folder} was started with other settings", another)
    note(f"resuming the demo in {folder}")
    return before.get("drawn") is True


def _train(
    images: Path,
    out: Path,
    device: torch.device,
    workers: int,
    stage: Stage,
    steps: int | None,
    note: Callable[[str], None],
) -> Path:
    preset, source = load_preset(PRESET), image_folder(images)
    stop = steps or start_clock(preset, source.count).total
    plan = Plan(PRESET, preset, source, stop, out, device, workers, None, report=True)
    with stage("pretrain", stop, "steps") as advance:
        run = pretrain(plan, lambda progress: advance(progress.step, progress.note), note)
    if run.stopped:
        raise KeyboardInterrupt  # scores of half-trained features would mislead
    return run.checkpoint


def _extract(encoder: Encoder, source: Images, path: Path, workers: int, stage: Stage, name: str) -> Features:
    with stage(name, len(source), "images") as advance:
        done = extract(encoder, source, path, data="drawn", workers=workers, report=advance)
    return read_features(done.path)


def _flatten_images(source: Images, workers: int) -> Features:
    """Return the pixels of the images at 16x16 as features."""
    batches = plain_batches(
        source,
        size=_RAW_SIDE,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        batch_size=256,
        workers=workers,
        device=torch.device("cpu"),
    )
    values = np.concatenate([batch.images.flatten(1).numpy() for batch in batches])
    provenance = Provenance("raw pixels", "", "pixels", 0, _RAW_SIDE, "drawn")
    return Features(values, source.labels.astype(np.int64), list(source.names), source.classes, {}, provenance)


def _score_features(
    name: str, train: Features, val: Features, overlap: float | None, device: torch.device, stage: Stage
) -> Row:
    with stage(f"linear probe, {name}", 100, "%") as advance:
        probe = train_probe(train, val, device=device, report=lambda done, total: advance(100 * done // total))
    return Row(name, knn(train, val, [_K]).scores[0].top1, probe.result.top1, overlap)


def _measure_overlap(encoder: Encoder, source: Images, masks: Path, stage: Stage, name: str) -> float:
    """Compute the Jaccard overlap of the best head's mask with the true mask, averaged over the images."""
    scores = []
    with stage(name, len(source), "images") as advance:
        for i, path in enumerate(source.names, 1):
            pixels = decode(source.read(i - 1, encoder.images), encoder.images)
            if isinstance(pixels, BadImage):
                continue
            truth = _read_mask(masks, path)
            scores.append(overlap(attention_maps(encoder, pixels, default_size(encoder)), [truth], _KEEP).jaccard)
            advance(i)
    return float(np.mean(scores))


def _read_mask(masks: Path, path: str) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return np.asarray(Image.open(masks / Path(path).with_suffix(".png"))) > 127

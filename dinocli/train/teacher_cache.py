"""Teacher cache: the features of teachers for fixed views, computed once and read back by later runs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.core.atomic import atomic_folder, write_json
from dinocli.core.checksums import unseal
from dinocli.core.device import autocast
from dinocli.core.distributed import from_first, rank, size
from dinocli.core.errors import DinoError
from dinocli.core.resources import free_space
from dinocli.core.tensors import TensorStream, load_tensors, map_tensors, write_tensors
from dinocli.core.version import __version__
from dinocli.data.loader.batch import Batch
from dinocli.data.loader.train import TrainBatches
from dinocli.method.feature_distillation import FeatureDistillation, Target
from dinocli.train.plan import Plan
from dinocli.train.state import sample_of
from dinocli.weights.feature_teachers import FeatureTeachers

_AT_ONCE = 64  # images at most per batch of the statistics, so that they do not depend on the batch of the run
_NOTE_AFTER = 30.0  # seconds between two notes of a long write
_FACTS, _STATISTICS = "cache.json", "statistics.safetensors"
_CLASS, _PATCHES = "class", "patches"
_ROOM = 1.1  # class tokens lie on the disk twice while they are written, and other files need some room


@dataclass(frozen=True)
class CacheFacts:
    """Place and size of a teacher cache.

    Attributes:
        folder: Folder of the features that fit a plan, below `--cache-teacher`.
        stored: True if it holds them.
        bytes: Size of the features.
        others: Number of caches beside it, of other teachers, images or settings.
    """

    folder: Path
    stored: bool
    bytes: int
    others: int


def cache_facts(plan: Plan, method: FeatureDistillation) -> CacheFacts:
    """Return the place of a plan's features, named after a fingerprint of all that they depend on.

    These are the teachers, the images, the views with their seed, the standardization, and the precision.
    """
    assert plan.teacher_cache and isinstance(plan.teacher, FeatureTeachers)
    features, training = plan.preset.losses.features, plan.preset.training
    assert features is not None
    facts = {
        "teachers": [[e.fingerprint, e.mean, e.std] for e in plan.teacher.encoders],
        "sizes": plan.teacher.sizes(plan.preset),
        "images": [plan.source.fingerprint, plan.source.count, sample_of(plan.source)],
        "decoding": plan.preset.images.model_dump(mode="json"),
        "views": plan.preset.views.model_dump(mode="json"),
        "seed": training.seed,
        "statistics": features.statistics,
        "precision": training.precision,
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = plan.teacher_cache / name
    beside = [path for path in plan.teacher_cache.glob(f"*/{_FACTS}") if path.parent != folder]
    return CacheFacts(folder, (folder / _FACTS).is_file(), _count_bytes(plan, method), len(beside))


def _count_bytes(plan: Plan, method: FeatureDistillation) -> int:
    """Return the bytes of all features: float16, a class token and the patches of each view."""
    views = _count_places(plan) * len(plan.preset.views.globals)
    widths = [len(s.class_mean) for s in method.standardizers]  # type: ignore[arg-type]
    tokens = (width * (1 + rows * columns) for width, (rows, columns) in zip(widths, method.grids, strict=True))
    return 2 * views * sum(tokens)


def _count_places(plan: Plan) -> int:
    assert plan.source.count is not None and plan.preset.views.fixed is not None
    return plan.source.count * plan.preset.views.fixed


def check_space(plan: Plan) -> CacheFacts | None:
    """Check that the disk has room for the features of `--cache-teacher`, if it is set and they are not stored yet.

    Raises:
        DinoError: If it has not.
    """
    if plan.teacher_cache is None:
        return None
    with torch.device("meta"):
        method = plan.method()
    assert isinstance(method, FeatureDistillation)
    facts = cache_facts(plan, method)
    _, free = free_space(plan.teacher_cache)
    if not facts.stored and facts.bytes * _ROOM > free:
        fixed = plan.preset.views.fixed or 1
        fewer = f"--set views.fixed={fixed // 2}, " if fixed > 1 else ""
        raise DinoError(
            f"the teacher's features take {_format(facts.bytes)}; {plan.teacher_cache} has {_format(free)} free",
            f"{fewer}another --cache-teacher DIR, or none",
        )
    return facts


def describe(facts: CacheFacts) -> str:
    """Describe a cache in a line, before anything is written."""
    if facts.stored:
        return f"{_format(facts.bytes)} of teacher features in {facts.folder} replace the teacher"
    beside = f"; {facts.others} of other teachers, images or settings stay beside them" if facts.others else ""
    return f"the teacher's features of all fixed views take {_format(facts.bytes)} of disk, in {facts.folder}{beside}"


def prepare_teachers(
    plan: Plan,
    method: FeatureDistillation,
    note: Callable[[str], None],
    *,
    resumed: bool,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Set the statistics of the teachers' features, and let stored features replace the teachers if the plan has them.

    Args:
        plan: Settings of the run.
        method: Method on its device, before it is sharded.
        note: Callback that receives one-line messages for the user.
        resumed: True if a state with statistics will be restored.
        stop: Function that returns True if the user stops the run. Nothing is saved then, because no step is done.

    Raises:
        DinoError: If the disk has no room for the features, they are damaged, or several processes would write them.
        KeyboardInterrupt: If the user stops the run.
    """
    facts = check_space(plan)
    if facts is None:
        if not resumed:
            _fit(plan, method, note, stop)
        return
    if not from_first(facts.stored):
        if size() > 1:
            raise DinoError(
                f"{facts.folder} does not exist; a single process must write the teacher's features, not {size()}",
                "run the same command in one process with --steps 0 and another --out first",
            )
        _fit(plan, method, note, stop)
        began = time.perf_counter()
        _write(plan, method, facts.folder, note, stop)
        note(f"teacher: wrote {_format(facts.bytes)} of features in {time.perf_counter() - began:.0f} s")
    cache = TeacherCache.open(facts.folder, _count_places(plan), method)
    method.standardizers.load_state_dict(cache.statistics)
    method.stored = cache
    del method.teachers[:]  # frees their memory


def _fit(plan: Plan, method: FeatureDistillation, note: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """Set the statistics from the first images of the first epoch, the same ones for any batch size."""
    assert plan.preset.losses.features is not None
    count = plan.source.count or plan.preset.losses.features.statistics
    images = min(plan.preset.losses.features.statistics, count)
    at_once = min(_AT_ONCE, images)
    note(f"teacher: standardizing its features over {images // at_once * at_once} images")
    batches = _take(_load(plan, at_once), images // at_once, stop)
    method.fit_standardizers(batches, autocast(plan.device, plan.precision))
    # The first process decides, in case machines round differently.
    found = from_first({k: v.cpu() for k, v in method.standardizers.state_dict().items()} if rank() == 0 else None)
    method.standardizers.load_state_dict(found or {})


def _load(plan: Plan, at_once: int, *, in_order: bool = False) -> TrainBatches:
    return TrainBatches(
        plan.source,
        plan.loaded_views,
        batch_size=at_once,
        seed=plan.preset.training.seed,
        images=plan.preset.images,
        workers=plan.workers,
        device=plan.device,
        in_order=in_order,
    )


def _write(
    plan: Plan, method: FeatureDistillation, folder: Path, note: Callable[[str], None], stop: Callable[[], bool]
) -> None:
    """Write the features of all fixed views; the folder appears when it is complete."""
    count = _count_places(plan)
    at_once = min(plan.images_each, count)
    with atomic_folder(folder) as draft:
        statistics = {k: v.cpu().numpy() for k, v in method.standardizers.state_dict().items()}
        write_tensors(draft / _STATISTICS, statistics, {})
        streams = [
            TensorStream(draft / _name(i), [_PATCHES, _CLASS], {"dinocli": __version__})
            for i in range(len(method.teachers))
        ]
        try:
            left, noted = count, time.perf_counter()
            for batch in _take(_load(plan, at_once, in_order=True), -(-count // at_once), stop):
                with autocast(plan.device, plan.precision):
                    targets = method.targets(batch)
                for stream, target in zip(streams, targets, strict=True):
                    stream.append(_PATCHES, _to_rows(target.patches)[:left])
                    stream.append(_CLASS, _to_rows(target.cls)[:left])
                left -= at_once
                if left > 0 and time.perf_counter() - noted > _NOTE_AFTER:
                    noted = time.perf_counter()
                    note(f"teacher: wrote the features of {count - left} of {count} views")
            for stream in streams:
                stream.finish()
        finally:
            for stream in streams:
                stream.close()
        write_json(draft / _FACTS, {"places": count, "teachers": len(streams), "dinocli": __version__})


def _take(loader: TrainBatches, count: int, stop: Callable[[], bool]) -> Iterator[Batch]:
    with closing(loader):
        for batch in islice(loader, count):
            if stop():
                raise KeyboardInterrupt
            yield batch


def _to_rows(values: Tensor) -> NDArray[np.float16]:
    """Return views by image, in float16 without infinite values. [V, B, ...] to [B, V, ...]"""
    limit = torch.finfo(torch.float16).max
    rows: NDArray[np.float16] = values.transpose(0, 1).clamp(-limit, limit).half().cpu().numpy()
    return rows


def _name(teacher: int) -> str:
    return f"teacher-{teacher + 1}.safetensors"


@dataclass(frozen=True)
class TeacherCache:
    """Stored features of teachers, read from disk as they are needed.

    Attributes:
        features: Patches [P, V, N, D] and class tokens [P, V, D] of each teacher for all P places, float16.
        statistics: State of the standardizers that the features were made with.
        device: Device of the features that a call returns.
    """

    features: list[tuple[NDArray[Any], NDArray[Any]]]
    statistics: dict[str, Tensor]
    device: torch.device

    @classmethod
    def open(cls, folder: Path, places: int, method: FeatureDistillation) -> TeacherCache:
        """Open a cache, and check that it is complete.

        Raises:
            DinoError: If a file is missing or damaged.
        """
        device = next(method.parameters()).device
        try:
            facts = unseal((folder / _FACTS).read_bytes())
            files = [map_tensors(folder / _name(i))[0] for i in range(len(method.standardizers))]
            statistics = load_tensors(folder / _STATISTICS)[0]
            features = [(file[_PATCHES], file[_CLASS]) for file in files]
            if facts["places"] != places or any(len(v) != places for pair in features for v in pair):
                raise ValueError("it is not complete")
        except (OSError, ValueError, KeyError) as error:
            raise DinoError(
                f"the teacher features in {folder} are damaged: {error}",
                f"remove {folder}; the next run writes it anew",
            ) from error
        return cls(features, statistics, device)

    def __call__(self, places: Tensor) -> list[Target]:
        """Return the features of some places. [B] to [V, B, ...]"""
        rows = places.numpy()
        targets = []
        for patches, cls in self.features:
            loaded = (torch.from_numpy(np.ascontiguousarray(v[rows])) for v in (cls, patches))
            there = (values.to(self.device, non_blocking=True).float() for values in loaded)
            targets.append(Target(*(values.transpose(0, 1) for values in there)))
        return targets


def _format(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{max(0.1, amount / 1e6):.1f} MB"

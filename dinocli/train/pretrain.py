"""Pretraining: from a plan to a run folder."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dinocli.core.device import autocast, float32_products, keep_freed_memory
from dinocli.core.distributed import any_of, gathered, rank, size
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT, held
from dinocli.data.loader.batch import BadFiles, Shard
from dinocli.data.loader.train import TrainBatches
from dinocli.engine.graph import GraphTrainer
from dinocli.engine.parallel import parallel
from dinocli.engine.scaling import LossScale
from dinocli.engine.trainer import Trainer
from dinocli.method.distillation import SelfDistillation
from dinocli.method.feature_distillation import FeatureDistillation
from dinocli.method.preset import AnyMethod
from dinocli.models.trained import train_only
from dinocli.train.held_out import HeldOut
from dinocli.train.interrupts import collect_on_request, stop_signals
from dinocli.train.knn_monitor import KnnMonitor
from dinocli.train.logger import Logger, Progress
from dinocli.train.plan import Plan
from dinocli.train.resume import find_saved, refuse_taken, resumed_plan
from dinocli.train.session import Session
from dinocli.train.state import SavedState, saved_states
from dinocli.train.teacher_cache import check_space, prepare_teachers
from dinocli.weights.frozen_teacher import FrozenTeacher
from dinocli.weights.load import start_from


@dataclass(frozen=True)
class Run:
    """Result of a pretraining run.

    Attributes:
        folder: Run folder.
        checkpoint: Path of the exported checkpoint in the run folder.
        began: Step from which the run resumed, or 0 for a new run.
        step: Number of completed steps.
        stopped: True if the user stopped the run before its last step.
        loss: Last finite logged loss, if any.
        seconds: Wall time of this call.
        bad: Image files that could not be read.
        cached: Number of images in the pixel cache, or None without a cache.
        on_device: Share of this call's images that the device decoded, or None if it decodes none.
        fresh_heads: Names of heads that the initial weights lack or have in another shape, so they start at random.
        skipped: Number of steps skipped because of a non-finite loss or gradient.
    """

    folder: Path
    checkpoint: Path
    began: int
    step: int
    stopped: bool
    loss: float | None
    seconds: float
    bad: BadFiles
    cached: int | None
    on_device: float | None
    fresh_heads: list[str]
    skipped: int


def pretrain(plan: Plan, report: Callable[[Progress], None], note: Callable[[str], None] = lambda line: None) -> Run:
    """Train, and write a run folder with the checkpoint, the resolved preset, the metrics and states to resume from.

    If the folder holds an unfinished run of the same preset on the same images, resume from its newest valid state.
    Ctrl-C, SIGTERM or SIGUSR1 stop the run after the current step and save everything. A second Ctrl-C stops it at once
    without saving.

    Args:
        plan: Settings of the run.
        report: Callback that receives the progress at each logged step.
        note: Callback that receives one-line messages for the user.

    Raises:
        DinoError: If the folder is in use or cannot be resumed, the images cannot be read, the initial weights do not
            fit, the device runs out of memory, or training diverges or collapses.
    """
    began = time.perf_counter()
    if plan.device.type == "cpu":
        keep_freed_memory()
    with (
        held(plan.out) if rank() == 0 else nullcontext(),
        stop_signals(note) as stopping,
        collect_on_request() as tidy,
        float32_products(plan.precision),
    ):
        saved = find_saved(plan, note)
        if saved:
            plan = resumed_plan(plan, saved.state, note)
            if saved.state.step >= plan.stop:  # finished: nothing new to evaluate or draw
                plan = replace(plan, report=False, monitor=None, held_out=None)
        # Before the teachers' features are measured, which may take hours.
        monitor = _monitor(plan) if rank() == 0 else None
        trainer, method, fresh = _trainer(plan, saved, note, lambda: stopping.requested)
        logger = Logger(plan, trainer, method, report, note, monitor)
        session = Session(plan, trainer, method.average, logger, stopping, tidy, saved)
        batches = _batches(plan, trainer, method, note)
        with closing(logger):
            try:
                if not any_of(logger.stalled)[0]:  # an early end that an earlier call reached
                    session.train(batches)
                stopping.finish()
            finally:
                batches.close()
                if not stopping.at_once:
                    session.close(broken=sys.exception() is not None)
            logger.draw(last=True)
    return Run(
        folder=plan.out,
        checkpoint=plan.out / CHECKPOINT,
        began=saved.state.step if saved else 0,
        step=trainer.clock.step,
        stopped=trainer.clock.step < plan.stop and not any_of(logger.stalled)[0],
        loss=logger.loss,
        seconds=time.perf_counter() - began,
        bad=session.bad,
        cached=batches.cache.kept if batches.cache else None,
        on_device=batches.share_on_device,
        fresh_heads=fresh,
        skipped=int(trainer.skipped[0]),
    )


def _monitor(plan: Plan) -> KnnMonitor | HeldOut | None:
    if plan.held_out:
        return HeldOut(plan.held_out, plan.preset, plan.workers)
    return KnnMonitor(plan.monitor, plan.preset, plan.workers) if plan.monitor else None


def rehearse(plan: Plan, note: Callable[[str], None] = lambda line: None) -> None:
    """Check a plan's run folder, weights, teacher and monitor as a real run does, without writing anything.

    Args:
        plan: Settings of the run to check.
        note: Callback that receives one-line messages for the user.

    Raises:
        DinoError: If a real run would fail before its first step.
    """
    saved = None
    if plan.out.is_dir():
        with held(plan.out):
            states = [state for _, state in saved_states(plan.out)]
        saved = next((state for state in states if state), None)
        if saved:
            resumed_plan(plan, saved, note)
        else:
            refuse_taken(plan.out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that copying to meta tensors has no effect
        with torch.device("meta"):
            method = plan.method()
        if isinstance(plan.teacher, FrozenTeacher) and isinstance(method, SelfDistillation):
            plan.teacher.load(method.teacher)
        if plan.init and not saved:
            start_from(method, plan.init, note, weights=plan.initial)
        if plan.origin and not saved:
            plan.origin.load(method)
        train_only(method.student.backbone, plan.preset.backbone.learning.trained)
    check_space(plan)
    _monitor(plan)


def _trainer(
    plan: Plan, saved: SavedState | None, note: Callable[[str], None], stop: Callable[[], bool]
) -> tuple[Trainer, AnyMethod, list[str]]:
    """Return the trainer at its starting step, its method, and the names of heads that start at random."""
    preset, precisions = plan.preset, set(gathered(plan.precision))
    if len(precisions) > 1:  # their gradients would be of different scales
        raise DinoError(
            f"the devices of this run train in different precisions: {', '.join(sorted(precisions))}",
            "--set training.precision=float16, or float32",
        )
    torch.manual_seed(preset.training.seed)
    method = plan.method()
    for network in method.networks if plan.compiled else ():
        network.compile_blocks()
    if isinstance(plan.teacher, FrozenTeacher) and isinstance(method, SelfDistillation):
        plan.teacher.load(method.teacher)
    fresh = start_from(method, plan.init, note, weights=plan.initial) if plan.init and not saved else []
    if plan.origin and not saved:
        note(f"continuing {plan.origin.describe(preset)}")
        plan.origin.load(method)
    train_only(method.student.backbone, preset.backbone.learning.trained)
    method = method.to(plan.device)
    if isinstance(method, FeatureDistillation) and not (saved and saved.state.step >= plan.stop):
        prepare_teachers(plan, method, note, resumed=saved is not None, stop=stop)
    if plan.device.type == "cuda":
        _choose_kernels(plan, method, note)
    if plan.captures:
        torch.cuda.set_device(plan.device.index or 0)  # captures and Triton's kernels run on the current device
    make = partial(GraphTrainer, note=note) if plan.captures else Trainer
    trainer = make(
        method,
        preset.optimizer,
        replace(plan.clock, step=saved.state.step if saved else 0),
        batch_size=preset.training.batch_size,
        accumulate=plan.accumulate,
        precision=autocast(plan.device, plan.precision, cached=not plan.captures),
        seed=preset.training.seed,
        guarded=True,
        scale=LossScale(plan.device) if plan.precision == "float16" else None,
        parallel=parallel(plan.parallel),
    )
    if isinstance(trainer, GraphTrainer) and trainer.fused:
        from dinocli.engine.fused import Mover  # only here: it needs Triton

        method.average.mover = Mover()
    if saved:
        saved.restore(trainer)
    elif plan.origin:
        plan.origin.load_optimizer(trainer, preset)
    return trainer, method, fresh


def _choose_kernels(plan: Plan, method: AnyMethod, note: Callable[[str], None]) -> None:
    """Choose the kernels of attention for the sizes of a run's crops, and report them."""
    from dinocli.models.attention_kernels import choose_kernels  # it needs timm, which takes a second to import

    images, crops = plan.images_each // plan.accumulate, []
    for views in plan.loaded_views.variants:
        crops.append((images * len(views.globals), views.global_1.size))
        if views.local and views.locals:
            crops.append((images * views.locals, views.local.size))
    dtype = getattr(torch, "float32" if plan.precision == "tf32" else plan.precision)
    backbones = [network.backbone for network in method.networks]
    if chosen := choose_kernels(backbones, crops, plan.device, dtype):
        note("attention: " + ", ".join(f"{kernel} kernel for {tokens} tokens" for tokens, kernel in chosen.items()))


def _batches(plan: Plan, trainer: Trainer, method: AnyMethod, note: Callable[[str], None]) -> TrainBatches:
    # Only where all networks cast their input as the first thing: teachers of features resize it, in float32.
    coarse = plan.precision == "bfloat16" and isinstance(method, SelfDistillation)
    return TrainBatches(
        plan.source,
        plan.loaded_views,
        batch_size=plan.images_each,
        seed=plan.preset.training.seed,
        images=plan.preset.images,
        start=trainer.clock.step,
        steps_per_epoch=trainer.clock.steps_per_epoch,
        workers=plan.workers,
        device=plan.device,
        shard=Shard(rank(), size()),
        cache=plan.cache,
        compiled=plan.compiled,
        grid=method.student.backbone.grid,
        clean=plan.preset.clean_scale,
        on_device=plan.decode == "gpu",
        dtype=torch.bfloat16 if coarse else torch.float32,
        note=note,
    )

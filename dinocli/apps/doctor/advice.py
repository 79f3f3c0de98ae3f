"""Advice: recommended settings for images and machine, each with a reason, from plain rules."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dinocli.apps.doctor.inspection import Inspection, window_text
from dinocli.apps.doctor.machine import Machine
from dinocli.apps.doctor.measured import choose, describe
from dinocli.core.errors import DinoError
from dinocli.data.loader.cache import kept_side
from dinocli.data.loader.train import BAD_SHARE
from dinocli.engine.schedules import Cosine, LinearByEpoch, Warmup
from dinocli.method.preset import Preset, load_preset
from dinocli.train.cost import Estimate, to_fit

# Function from a preset, a number of steps, and True for activation checkpointing, to the estimate for the whole batch.
Cost = Callable[[Preset, int, bool], Estimate]

WEIGHTS = "timm:vit_small_patch16_224.dino"
_IMAGENET = 1_281_167
_FEW, _TOO_FEW = 50_000, 32  # images: fewer than these are few for training from scratch, and too few for any training
# Prototypes by minimum number of images. The paper's accuracy by K on ImageNet: 1,024 67.8, 4,096 69.3, 16,384 69.2,
# 65,536 69.7. 8,192 helped users with small sets (facebookresearch/dino, threads 246 and 279).
_PROTOTYPES = ((1_000_000, 65_536), (100_000, 16_384), (20_000, 8_192), (2_000, 4_096), (0, 1_024))
_STEPS = 100_000  # the paper's shortest run, 100 epochs of 1,024 on ImageNet, has 125,000
# Largest shift of the mean and ratio of the std still treated as ImageNet's: Imagenette at 128 pixels has 0.03 and 1.3,
# CIFAR-10 0.04 and 1.2.
_FAR_MEAN, _FAR_STD, _LEAST_STD = 0.1, 1.6, 1e-3
_SLOW_TEACHER = 20 * 2_000  # steps; a momentum of 0.9995 averages over 2,000 steps
_SHORT = {"--epochs": "training.epochs", "--batch-size": "training.batch_size"}


@dataclass(frozen=True)
class Advice:
    """Recommendation with its reason.

    Attributes:
        what: Short description.
        settings: Options (`--epochs`) or preset keys (`heads.dino.prototypes`) with their values as typed; flags have
            an empty value.
        reason: Reason and its source.
    """

    what: str
    settings: dict[str, str]
    reason: str

    @property
    def words(self) -> list[str]:
        """Command-line words of the settings."""
        typed = [
            [key, *([value] if value else [])] if key.startswith("--") else ["--set", f"{key}={value}"]
            for key, value in self.settings.items()
        ]
        return [word for pair in typed for word in pair]

    @property
    def overrides(self) -> list[str]:
        """Settings that change the preset, as `key=value`."""
        keyed = [(_SHORT.get(key, key), value) for key, value in self.settings.items()]
        return [f"{key}={value}" for key, value in keyed if not key.startswith("--")]


@dataclass(frozen=True)
class Advised:
    """Recommended command with notes.

    Attributes:
        settings: Recommendations in the order of the command.
        notes: Problems that no setting fixes, and the expected duration.
        command: Complete command, or None if training on these images is impossible.
    """

    settings: list[Advice]
    notes: list[str]
    command: str | None


def advise(
    machine: Machine, images: Inspection, cost: Cost, asked: Sequence[str] = (), minutes: float | None = None
) -> Advised:
    """Recommend settings for images on a machine.

    Args:
        machine: Hardware and software of the machine.
        images: Statistics of the images.
        cost: Function that estimates a preset's cost on this machine.
        asked: Overrides used for the inspection, as for `--set`: `images.key=value`.
        minutes: Processor minutes of one core to spend, on a CPU. If None, those of 2,000 steps of `tiny`.

    Raises:
        DinoError: If no measured run is as short as `minutes`, or the device is no CPU.
    """
    if minutes is not None and not machine.on_cpu:
        raise DinoError(
            f"--minutes {minutes:g} needs measured runs, and there are none on {machine.name}; expected a CPU",
            "--device cpu, or omit --minutes",
        )
    count, notes = images.count, _write_notes(images)
    if not images.read or (count is not None and count * images.read / images.drawn < _TOO_FEW):
        return Advised([], [*notes, _explain_too_few(images)], None)
    taken = _advise_for_cpu(images, minutes) if machine.on_cpu else _advise_for_accelerator(images)
    name = taken[0].settings["--preset"]
    taken[1:1] = [*_list_requested(asked), *_advise_window(images), *_advise_statistics(images, name, taken)]
    *others, length = taken
    taken += _advise_schedules(_load_changed(name, others), int(length.settings["--epochs"]), count)
    preset = _load_changed(name, taken)
    steps = _count_steps(preset, count)
    estimate = cost(preset, steps, False)
    fitting, unfit_notes = _fit_memory(
        machine, estimate, lambda again: cost(preset, steps, True) if again else estimate
    )
    taken += fitting + _advise_loading(machine, images, preset)
    command = ["dino", "pretrain", images.where, *(word for advice in taken for word in advice.words)]
    notes += [
        *unfit_notes,
        _describe_duration(machine, preset, steps, estimate.seconds),
        *_describe_expectations(machine, preset, count, steps),
    ]
    return Advised(taken, notes, shlex.join(command))


def _load_changed(name: str, taken: list[Advice]) -> Preset:
    return load_preset(name, [override for advice in taken for override in advice.overrides])


def _count_steps(preset: Preset, count: int | None) -> int:
    training = preset.training
    return training.epochs * (training.steps_per_epoch or (count or 0) // training.batch_size)


def _list_requested(overrides: Sequence[str]) -> list[Advice]:
    pairs = [override.partition("=")[::2] for override in overrides]
    return [Advice(key.strip(), {key.strip(): value.strip()}, "your own setting") for key, value in pairs]


def _advise_window(images: Inspection) -> list[Advice]:
    """Advise the measured window if images of more than 8 bits span a small part of their range."""
    if not images.window:
        return []
    low, high = (f"{end:g}" for end in images.window)
    why = f"without it, {images.narrow} of {images.drawn} images span less than a quarter of 8 bits; measured"
    return [Advice(f"{low} to {high} as black to white", {"images.window": window_text(images.window)}, why)]


def _advise_statistics(images: Inspection, name: str, taken: list[Advice]) -> list[Advice]:
    """Advise mean and std if they are far from the preset's, and no color jitter unless there are three channels."""
    views, channels = load_preset(name).views, len(images.mean)
    # Constant channels have a std of 0, which cannot divide; they get the preset's.
    usual = sum(views.std) / len(views.std)
    numbers = {"mean": images.mean, "std": [std if std >= _LEAST_STD else usual for std in images.std]}
    typed = {f"views.{key}": f"[{', '.join(f'{n:.4g}' for n in values)}]" for key, values in numbers.items()}
    if channels != 3:
        off = {f"views.{key}": "0" for key in views.color_keys}
        return [
            Advice("mean and std", typed, f"measured, for {channels} channel{'s' if channels > 1 else ''}"),
            Advice("no color jitter", off, "hue, saturation and gray need three channels"),
        ]
    shift = max(abs(ours - theirs) for ours, theirs in zip(images.mean, views.mean, strict=True))
    ratio = max(max(ours / theirs, theirs / ours) for ours, theirs in zip(numbers["std"], views.std, strict=True))
    # Pretrained weights need the mean and std they were trained with.
    if any("--init" in advice.settings for advice in taken) or (shift <= _FAR_MEAN and ratio <= _FAR_STD):
        return []
    return [Advice("mean and std", typed, "measured; far from ImageNet's")]


def _advise_for_cpu(images: Inspection, minutes: float | None) -> list[Advice]:
    """Advise one of the small presets, the only ones that a CPU trains within hours."""
    run = None if minutes is None else choose(images.count, minutes)
    name = run.preset if run else "tiny"
    why = "on a CPU ViT-S/16 does 0.7 images/s per core (our own measurement)"
    taken = [Advice(f"preset {name}", {"--preset": name}, why)]
    batch = load_preset(name).training.batch_size
    if images.count is not None and images.count < batch:
        why = f"there are only {images.count} images"
        taken.append(Advice(f"batch {_TOO_FEW}", {"--batch-size": str(_TOO_FEW)}, why))
    else:
        taken.append(Advice(f"batch {batch}", {"--batch-size": str(batch)}, "the preset's (our own measurement)"))
    epochs, why = 40, "2,000 steps; the gain of more is below (our own measurement)"
    if run:
        epochs, why = run.epochs, f"{run.minutes:g} of {minutes:g} core minutes, as measured on {run.data}"
    return [*taken, Advice(f"{epochs} epochs", {"--epochs": str(epochs)}, why)]


def _advise_for_accelerator(images: Inspection) -> list[Advice]:
    preset = load_preset("vits16-vanilla")
    count = images.count if images.count is not None else _IMAGENET
    why = "shortest of the published runs, and stable: teacher temperature 0.04, clipped gradients"
    taken = [Advice("preset vits16-vanilla", {"--preset": "vits16-vanilla"}, why)]
    taken += _advise_crops(images, preset.views.global_1.size)
    init = count < _FEW and not any("backbone.options.patch_size" in advice.settings for advice in taken)
    if init:
        why = f"{count} images are few for training from scratch (threads 43, 246); these weights are downloaded once"
        taken.append(Advice("released weights", {"--init": WEIGHTS}, why))
    prototypes = next(k for least, k in _PROTOTYPES if count >= least)
    if prototypes != preset.heads["dino"].prototypes:
        why = "fewer for fewer images (threads 246, 279); 1024 cost 1.9 of 69.7 (paper, K)"
        taken.append(Advice(f"{prototypes} prototypes", {"heads.dino.prototypes": str(prototypes)}, why))
    batch = preset.training.batch_size
    why = "the preset's; 1024 gains 0.3 of 59.6 (paper, table 9)"
    if count < 64 * batch:
        batch = max(_TOO_FEW, 1 << max(1, count // 64).bit_length() - 1)
        why = "for 64 steps an epoch; 128 instead of 1024 costs 2.0 of 59.9 (paper, table 9)"
    taken.append(Advice(f"batch {batch}", {"--batch-size": str(batch)}, why))
    return [*taken, _advise_length(images.count, batch, init=init)]


def _advise_crops(images: Inspection, usual: int) -> list[Advice]:
    """Advise views and patches for images smaller than the preset's."""
    side = int(images.short.median)
    if side >= 0.7 * usual:  # above this, crops are enlarged less than the preset's smallest crops of larger images
        return []
    patch = next((p for p in (16, 8, 4) if side // p >= 8), 2)
    size = max(8 * patch, side // patch * patch)
    views = {f"views.global_{i}.size": str(size) for i in (1, 2)}
    if side > 64:
        views["views.local.size"] = str(max(8, round(size * 96 / 224 / patch) * patch))
    taken = [
        Advice(f"crops of {size} pixels", views, f"half of the images have {side} or less; larger crops enlarge them")
    ]
    if patch < 16:
        grid = f"{size // patch}x{size // patch} tokens; patches of 16 give {size // 16}x{size // 16}"
        options = {"backbone.options.img_size": str(size), "backbone.options.patch_size": str(patch)}
        taken.append(Advice(f"patches of {patch}", options, f"{grid}; 8 for 16 gains 3.8 (paper, table 2)"))
    if side <= 64:
        views = {"views.locals": "0"} | {f"views.global_{i}.scale": "[0.14, 1.0]" for i in (1, 2)}
        why = "as lightly and solo-learn train CIFAR-10; the authors' scale without local crops (thread 122)"
        taken.append(Advice("no local crops", views, why))
        blur = {f"views.global_{i}.blur": "0" for i in (1, 2)}
        taken.append(Advice("no blur", blur, "as lightly and solo-learn train CIFAR-10"))
    return taken


def _advise_length(count: int | None, batch: int, *, init: bool) -> Advice:
    if count is None:
        settings = {"training.steps_per_epoch": str(_IMAGENET // batch), "--epochs": "100"}
        return Advice("100 epochs", settings, "of ImageNet's length; the number of images from a pipe is unknown")
    if count > _IMAGENET:
        epochs = max(1, math.ceil(100 * _IMAGENET / count))
        why = "as many images as in 100 epochs of ImageNet; three times as many gain 1.9 (paper)"
    elif init:
        epochs, why = 100, "the paper's shortest run; no publication gives a length for runs from released weights"
    else:
        epochs = min(800, max(100, math.ceil(_STEPS / (count // batch))))
        why = f"{epochs * (count // batch):,} steps; the paper's runs have 125,000 and more, and up to 800 epochs"
    return Advice(f"{epochs} epochs", {"--epochs": str(epochs)}, why)


def _advise_schedules(preset: Preset, epochs: int, count: int | None) -> list[Advice]:
    """Adapt warm-ups, frozen prototypes and momentum to the length and batch of the run.

    Args:
        preset: Preset with all other advice applied, except the length: its warm-ups may be longer than the run.
        epochs: Length of the run.
        count: Number of images.
    """
    taken, rate, batch = list[Advice](), preset.optimizer.lr, preset.training.batch_size
    if isinstance(rate, (Cosine, Warmup)) and rate.warmup_epochs > epochs / 10:
        settings = {"optimizer.lr.warmup_epochs": str(epochs // 10)}
        taken.append(Advice(f"warm-up of {epochs // 10}", settings, f"a tenth of {epochs} epochs, as in the preset"))
    for name, loss in preset.losses.with_targets().items():
        ramp = loss.targets.temperature
        if isinstance(ramp, LinearByEpoch) and ramp.epochs > 0.3 * epochs:
            settings = {f"losses.{name}.targets.temperature.epochs": str(epochs * 3 // 10)}
            taken.append(Advice(f"ramp of {epochs * 3 // 10}", settings, "three tenths of the run, as published"))
    for name, head in preset.heads.items():
        if head.freeze_last_layer_epochs >= epochs:
            settings = {f"heads.{name}.freeze_last_layer_epochs": "0"}
            taken.append(Advice("free prototypes", settings, f"frozen for {epochs} epochs, they would never train"))
    # A preset with its own step count is short, and its momentum was tuned for that.
    long = preset.training.steps_per_epoch is None and epochs * ((count or 0) // batch) >= _SLOW_TEACHER
    if long and batch <= 256:
        why = "higher for small batches (the author, thread 104; solo-learn)"
        taken.append(Advice("momentum 0.9995", {"teacher.momentum.start": "0.9995"}, why))
    return taken


def _fit_memory(
    machine: Machine, estimate: Estimate, cost: Callable[[bool], Estimate]
) -> tuple[list[Advice], list[str]]:
    """Advise how to fit the batch on the device, if needed, or note that it cannot fit."""
    if estimate.fits(machine.memory):
        return [], []
    has = f"{machine.device} has {machine.memory / 1e9:.0f}"
    fitting = to_fit(cost, machine.memory)
    if fitting is None:
        one = replace(estimate, at_once=1).memory
        return [], [f"a step of one image takes about {one / 1e9:.1f} GB, and {has}: these settings do not fit"]
    typed, _ = fitting
    names = {"--recompute": "activation checkpointing", "--accumulate": f"in {typed.get('--accumulate')} parts"}
    why = f"{estimate.at_once} at once take about {estimate.memory / 1e9:.0f} GB, {has}; the gradient is the same"
    return [Advice(", ".join(names[option] for option in typed), typed, why)], []


def _advise_loading(machine: Machine, images: Inspection, preset: Preset) -> list[Advice]:
    """Advise on the cache and on truncated images."""
    taken = []
    cache_bytes = _estimate_cache(images, preset)
    # The cache takes at most half of the memory.
    if images.kind == "files" and cache_bytes is not None and cache_bytes < machine.ram / 2:
        free = f"{cache_bytes / 1e9:.1f} GB decoded, {machine.ram / 1e9:.0f} GB free"
        taken.append(Advice("cache in RAM", {"--cache": "ram"}, f"{free}; {images.milliseconds:.1f} ms saved per file"))
    truncated = sum(reason.startswith("truncated") for reason in images.bad.values())
    if truncated and len(images.bad) > BAD_SHARE * images.drawn:
        why = f"{truncated} of {images.drawn} are truncated; a run stops if more than {BAD_SHARE:.0%} are bad"
        taken.append(Advice("truncated images too", {"images.truncated": "true"}, why))
    return taken


def _estimate_cache(images: Inspection, preset: Preset) -> float | None:
    """Estimate the bytes of all images in the cache; None if their number is unknown."""
    if images.count is None:
        return None
    shrunk = min(1.0, kept_side(preset.views.all) / max(1.0, images.short.median)) ** 2
    return images.count * images.megabytes * 1e6 * shrunk


def _write_notes(images: Inspection) -> list[str]:
    notes = []
    kinds = Counter(reason.split(":")[0] for reason in images.bad.values())
    unreadable = len(images.bad) - kinds["truncated"] - kinds["other channels"]
    if kinds["other channels"] > BAD_SHARE * images.drawn:
        example = next(reason for reason in images.bad.values() if reason.startswith("other channels"))
        notes.append(
            f"{kinds['other channels']} of {images.drawn} have {example}: set their number with --set images.channels=N"
        )
    if images.read and unreadable > BAD_SHARE * images.drawn:
        notes.append(
            f"{unreadable} of {images.drawn} cannot be read, and above {BAD_SHARE:.0%} a run stops: remove them, or "
            "name the others in a list of files"
        )
    if images.deep > images.read / 2 and max(images.mean) < 0.1:
        notes.append(
            "the deep images are nearly black: if their values fill only a part of the range, set it with "
            "--set images.window='[BLACK, WHITE]'"
        )
    if images.single > images.read / 2:
        notes.append(f"{images.single} of {images.read} images are a single color, from which nothing can be learned")
    if images.several:
        notes.append(f"{images.several} of {images.read} have several pages or frames; only the first is read")
    if images.near > images.read / 5:
        notes.append("many have nearly equal thumbnails of 8x8 pixels; for digits and printed pages this is normal")
    return notes


def _explain_too_few(images: Inspection) -> str:
    if not images.read:
        first = "".join(f"; {name}: {reason}" for name, reason in list(images.bad.items())[:1])
        return f"none of the {images.drawn} images checked can be read{first}"
    return (
        f"fewer than {_TOO_FEW} images can be read, too few to train on; extract features without training: "
        f"dino extract {WEIGHTS} {shlex.quote(images.where)}"
    )


def _describe_duration(machine: Machine, preset: Preset, steps: int, seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    long = f"{days:.1f} days" if days >= 2 else f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min"
    batch = preset.training.batch_size
    return f"{steps:,} steps of {batch} take about {long} on {machine.name} (an estimate of the compute alone)"


def _describe_expectations(machine: Machine, preset: Preset, count: int | None, steps: int) -> list[str]:
    """Return notes on the accuracy to expect, or on the loss and the length of a run on few images."""
    if machine.on_cpu:
        return [describe(count)]
    if count is None or count >= _FEW:
        return []
    head = preset.heads["dino"].outputs
    notes = [
        f"if the loss stays at {math.log(head):.2f}, which is ln {head}: "
        "--set losses.dino.targets.temperature.value=0.02 (thread 43)"
    ]
    if steps < _STEPS / 10:
        notes.append(
            f"{steps:,} steps are few; features of released weights without training: dino extract {WEIGHTS} DATA"
        )
    return notes

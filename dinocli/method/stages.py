"""Stages: recipes that continue a finished run, and hold only what they change of its preset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from dinocli.core.config import Config
from dinocli.core.errors import DinoError
from dinocli.engine.schedules import Clock
from dinocli.models.backbone import Backbone

if TYPE_CHECKING:
    from dinocli.method.preset import Preset


class StageSizes(Config):
    """Crop sizes of some steps, relative to those of the run.

    Attributes:
        global_scale: Factor on the side of the global crops.
        local_scale: Factor on the side of the local crops.
        share: Share of the steps with these sizes, relative to the shares of other sizes.
    """

    global_scale: float = Field(gt=0)
    local_scale: float = Field(1.0, gt=0)
    share: float = Field(gt=0)


class StageConfig(Config):
    """Table `[stage]` of a stage's file: what depends on the run that it continues.

    Attributes:
        lr: Learning rate as a share of the first run's highest one, to which all stages in a row refer. It is constant
            after the warm-up.
        warmup_epochs: Epochs of linear warm-up from 0.
        rescale_positions: `backbone.rescale_positions` for a backbone with rotary positions; others ignore it.
        sizes: Crop sizes that are drawn anew for each step. If empty, crops keep the run's sizes.
    """

    lr: float = Field(gt=0)
    warmup_epochs: int = Field(0, ge=0)
    rescale_positions: float = Field(1.0, ge=1)
    sizes: tuple[StageSizes, ...] = ()


def continued(
    data: dict[str, Any], run: Preset, peak_lr: float, what: str, clock: Clock | None = None
) -> dict[str, Any]:
    """Return the values of a preset that continues a run with a stage.

    The stage's own tables are merged over the run's preset. Schedules that it does not set stay at the run's last
    value, since a warm-up or decay has been done. Nothing is frozen at the start. A Gram loss and mixed sizes are not
    inherited. The seed is the run's plus one, so that the stage does not repeat the views of the run's first epochs.

    Args:
        data: Values of the stage's file, with a table `stage`.
        run: Preset of the run.
        peak_lr: Learning rate that the stage takes its share from.
        what: Name of the file for error lines.
        clock: Clock at the last step of the run. If None, the run completed its schedules.

    Raises:
        DinoError: If the table `stage` is not valid.
    """
    table = data.get("stage")
    stage = StageConfig.parse(table if isinstance(table, dict) else {}, f"[stage] of {what}")
    base = run.model_dump(mode="json")
    end = clock or Clock(1, run.training.epochs, run.training.epochs)
    for key, schedule in run.schedules.items():
        _set(base, key, {"kind": "constant", "value": schedule.at(end)})
    rate = {"kind": "warmup", "value": stage.lr * peak_lr, "warmup_epochs": stage.warmup_epochs}
    _set(base, "optimizer.lr", rate)
    for head in base["heads"].values():
        head["freeze_last_layer_epochs"] = 0
    base["backbone"]["learning"]["frozen_epochs"] = 0
    base["training"]["seed"] = (run.training.seed + 1) % 2**63
    base["views"] |= {"low_resolution": None, "mixed": []}
    base["losses"]["gram"] = None  # else the next stage would inherit its refreshes, which TOML cannot unset
    with torch.device("meta"):  # without values, which takes no time
        backbone = run.backbone.build(drop_path=False)
    from dinocli.models.transformer import RotaryBackbone  # only here: it imports timm

    if stage.rescale_positions != 1 and isinstance(backbone, RotaryBackbone):
        base["backbone"]["rescale_positions"] = stage.rescale_positions
    if stage.sizes:
        base["views"]["mixed"] = [_resolve(sizes, run, backbone) for sizes in stage.sizes]
    return _merge(base, {key: value for key, value in data.items() if key != "stage"})


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        data = data[table]
    data[last] = value


def _resolve(sizes: StageSizes, run: Preset, backbone: Backbone) -> dict[str, Any]:
    """Return a table of `views.mixed` in pixels, rounded to whole patches."""
    patch = backbone.patch_size if backbone.grid(run.views.global_1.size) else 1

    def whole(size: float) -> int:
        return max(1, round(size / patch)) * patch

    local = run.views.local if run.views.locals else None
    return {
        "global_size": whole(sizes.global_scale * run.views.global_1.size),
        "local_size": whole(sizes.local_scale * local.size) if local else None,
        "share": sizes.share,
    }


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge tables over tables; a table with a `kind`, such as a schedule, replaces the one below it."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and "kind" not in value:
            value = _merge(below, value)
        merged[key] = value
    return merged


def check_channels(channels: object, run: Preset) -> None:
    """Check that images have as many channels as those of the run to continue.

    Raises:
        DinoError: If they have another number.
    """
    before = run.images.channels
    if channels != before:
        raise DinoError(
            f"the run to continue (--from) takes images of {before} channel{'s' * (before > 1)}; images.channels is "
            f"{channels}",
            f"--set images.channels={before}, or --init instead of --from for other images",
        )


# Settings that a continued run must keep: its weights mean nothing to another network.
_SAME_BACKBONE = ("name", "options")
_FREE_OF_HEADS = {"freeze_last_layer_epochs", "norm_last_layer"}


def check_same_network(preset: Preset, run: Preset, source: str) -> None:
    """Check that a preset has the network and the channels of the run that it continues.

    Raises:
        DinoError: If they differ; the error names the first key.
    """
    check_channels(preset.images.channels, run)
    for key, was, now in _differences(run, preset):
        if was != now:
            raise DinoError(
                f"--from {source} has {key} = {was}; this preset sets {now}",
                "use --preset gram-refine, high-resolution or the run's own preset",
            )


def _differences(run: Preset, preset: Preset) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []

    def compare(path: str, was: Any, now: Any) -> None:
        if isinstance(was, dict) and isinstance(now, dict):
            for key in dict.fromkeys([*was, *now]):
                compare(f"{path}.{key}", was.get(key), now.get(key))
        else:
            found.append((path, was, now))

    for key in _SAME_BACKBONE:
        compare(f"backbone.{key}", getattr(run.backbone, key), getattr(preset.backbone, key))
    was, now = ({n: h.model_dump(exclude=_FREE_OF_HEADS) for n, h in p.heads.items()} for p in (run, preset))
    compare("heads", was, now)
    compare("views.mask", *("none" if p.views.mask is None else "set" for p in (run, preset)))
    return found


def refuse_alone(name: str) -> DinoError:
    """Return an error for a stage without a run to continue."""
    return DinoError(
        f"{name} is a stage, which continues a finished run; --from is not set",
        f"dino pretrain IMAGES --from RUN --preset {name}",
    )

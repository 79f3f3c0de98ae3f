"""Clock and schedules: every value that changes during a run, as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field
from torch import Tensor

from dinocli.core.config import Config


@dataclass(frozen=True)
class Clock:
    """Position in a run.

    Attributes:
        epochs: Length of the run, in epochs.
        step: Number of steps done, which is also the index of the next step.
    """

    steps_per_epoch: int
    epochs: int
    step: int = 0

    @property
    def epoch(self) -> int:
        """Index of the epoch of the next step."""
        return self.step // self.steps_per_epoch

    @property
    def total(self) -> int:
        """Number of steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def tick(self) -> Clock:
        """Return the clock one step later."""
        return replace(self, step=self.step + 1)

    def value(self, schedule: Schedule) -> float | Tensor:
        """Return the value of a schedule at this step: a number of the host; from some subclasses, one on the device.

        The operators of a step read schedules only through this function, so that a graph of them can be replayed.
        """
        return schedule.at(self)


class Misfit(NamedTuple):
    """Key of a schedule that does not fit the length of a run.

    Attributes:
        key: Key below the schedule's table.
        came: Its value, in epochs.
        most: Largest valid value, in epochs.
        fits: Value to suggest, in epochs.
    """

    key: str
    came: int
    most: int
    fits: int


class Constant(Config):
    """Schedule with the same value at every step."""

    kind: Literal["constant"]
    value: float

    @property
    def bounds(self) -> tuple[float, ...]:
        """The value, as a tuple like the bounds of other schedules."""
        return (self.value,)

    def misfit(self, epochs: int) -> Misfit | None:
        """Return the key that does not fit a run of `epochs` epochs; None if all fit."""
        return None

    def at(self, clock: Clock) -> float:
        """Return the value at a step."""
        return self.value

    def scaled(self, factor: float) -> Self:
        """Return the schedule with its value multiplied by `factor`."""
        return self.model_copy(update={"value": self.value * factor})


class Warmup(Config):
    """Schedule with the same value at every step after a linear warm-up from 0, which is like that of `Cosine`.

    Source: DINOv3 (arXiv 2508.10104), section 3.2, trains at a constant learning rate after a warm-up.
    """

    kind: Literal["warmup"]
    value: float
    warmup_epochs: int = Field(0, ge=0)

    @property
    def bounds(self) -> tuple[float, ...]:
        """The value after the warm-up, as a tuple like the bounds of other schedules."""
        return (self.value,)

    def misfit(self, epochs: int) -> Misfit | None:
        """Return the key that does not fit a run of `epochs` epochs; None if all fit."""
        return _check_warmup(self.warmup_epochs, epochs)

    def at(self, clock: Clock) -> float:
        """Return the value at a step."""
        warmup = self.warmup_epochs * clock.steps_per_epoch
        return self.value * clock.step / max(1, warmup - 1) if clock.step < warmup else self.value

    def scaled(self, factor: float) -> Self:
        """Return the schedule with its value multiplied by `factor`."""
        return self.model_copy(update={"value": self.value * factor})


class Cosine(Config):
    """Half a cosine from `start` to `end`, one value per step, after a linear warm-up from 0 to `start`.

    As in the original, the warm-up includes both ends: the value is 0 at step 0, and `start` both at the last step of
    the warm-up and at the next one. The cosine approaches `end` without reaching it.

    Source: facebookresearch/dino@7c446df utils.py, cosine_scheduler.
    """

    kind: Literal["cosine"]
    start: float
    end: float
    warmup_epochs: int = Field(0, ge=0)

    @property
    def bounds(self) -> tuple[float, ...]:
        """`start` and `end`, between which all values lie except those of the warm-up."""
        return (self.start, self.end)

    def misfit(self, epochs: int) -> Misfit | None:
        """Return the key that does not fit a run of `epochs` epochs; None if all fit."""
        return _check_warmup(self.warmup_epochs, epochs)

    def at(self, clock: Clock) -> float:
        """Return the value at a step."""
        warmup = self.warmup_epochs * clock.steps_per_epoch
        if clock.step < warmup:
            return self.start * clock.step / max(1, warmup - 1)
        progress = (clock.step - warmup) / max(1, clock.total - warmup)
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * progress))

    def scaled(self, factor: float) -> Self:
        """Return the schedule with `start` multiplied by `factor`; `end` is unchanged, as in the original."""
        return self.model_copy(update={"start": self.start * factor})


class LinearByEpoch(Config):
    """Straight line from `start` to `end` over the first `epochs` epochs, one value per epoch.

    The last of these epochs has the value `end`, and so have all later ones.

    Source: facebookresearch/dino@7c446df main_dino.py, DINOLoss.teacher_temp_schedule.
    """

    kind: Literal["linear_by_epoch"]
    start: float
    end: float
    epochs: int = Field(ge=0)

    @property
    def bounds(self) -> tuple[float, ...]:
        """`start` and `end`, between which all values lie."""
        return (self.start, self.end)

    def misfit(self, epochs: int) -> Misfit | None:
        """Return the key that does not fit a run of `epochs` epochs; None if all fit."""
        return Misfit("epochs", self.epochs, epochs, epochs * 3 // 10) if self.epochs > epochs else None

    def at(self, clock: Clock) -> float:
        """Return the value in the epoch of a step."""
        if clock.epoch >= self.epochs:
            return self.end
        return self.start + (self.end - self.start) * clock.epoch / max(1, self.epochs - 1)


class CosineByEpoch(Config):
    """Half a cosine from `start` to `end`, one value per epoch.

    Source: torch.optim.lr_scheduler.CosineAnnealingLR, as facebookresearch/dino@7c446df eval_linear.py steps it.
    """

    kind: Literal["cosine_by_epoch"]
    start: float
    end: float

    @property
    def bounds(self) -> tuple[float, ...]:
        """`start` and `end`, between which all values lie."""
        return (self.start, self.end)

    def misfit(self, epochs: int) -> Misfit | None:
        """Return the key that does not fit a run of `epochs` epochs; None if all fit."""
        return None

    def at(self, clock: Clock) -> float:
        """Return the value in the epoch of a step."""
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * clock.epoch / clock.epochs))

    def scaled(self, factor: float) -> Self:
        """Return the schedule with `start` multiplied by `factor`; `end` is unchanged, as in the original."""
        return self.model_copy(update={"start": self.start * factor})


def _check_warmup(warmup: int, epochs: int) -> Misfit | None:
    return Misfit("warmup_epochs", warmup, epochs - 1, epochs // 10) if warmup and warmup >= epochs else None


def _wrap_number(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {"kind": "constant", "value": value} if is_number else value


Rate = Annotated[Constant | Warmup | Cosine | CosineByEpoch, Field(discriminator="kind"), BeforeValidator(_wrap_number)]
Schedule = Annotated[
    Constant | Warmup | Cosine | LinearByEpoch | CosineByEpoch,
    Field(discriminator="kind"),
    BeforeValidator(_wrap_number),
]

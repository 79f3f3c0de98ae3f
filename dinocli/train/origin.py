"""Origin: the finished run, or the checkpoint, that another run continues as its next stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT
from dinocli.engine.checkpoint import restore_moments
from dinocli.engine.method import Method
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.distillation import SelfDistillation
from dinocli.method.preset import Preset
from dinocli.models.network import load_strictly
from dinocli.train.state import SavedState, StageFacts, read_state
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.load import start_from


@dataclass(frozen=True)
class Origin:
    """Run that another run continues: its student, average, heads and the state of its losses and optimizer.

    Attributes:
        source: Run folder, `state/STEP` in one, or a checkpoint, as the user named it.
        preset: Preset of the run.
        saved: State of the run. If None, there is only a checkpoint, whose average becomes the student too.
        stages: Stages up to and including the run, oldest first.
    """

    source: str
    preset: Preset
    saved: SavedState | None
    stages: tuple[StageFacts, ...]

    @classmethod
    def read(cls, source: str) -> Origin:
        """Read a run or a checkpoint without keeping its weights.

        Raises:
            DinoError: If there is none, this tool did not write it, or the run is unfinished.
        """
        if source.startswith("timm:"):
            raise DinoError(
                f"--from {source} is a released backbone without heads and recipe; expected a run",
                f"--init {source} with a complete preset",
            )
        path = Path(source)
        saved = read_state(path) if path.is_dir() else None
        if saved is not None:
            state = saved.state
            _refuse_headless(source, state.preset)
            if saved.folder != path and state.step < state.stop:
                raise DinoError(
                    f"--from {source} is unfinished: {state.step} of {state.stop} steps done",
                    f"finish it with its own command, or --from {saved.folder} to continue from there",
                )
            facts = StageFacts(
                source=source,
                recipe=state.preset.about.recipe,
                steps=state.step,
                batch_size=state.preset.training.batch_size,
                lr=max(state.preset.optimizer.lr.bounds),
                images=state.images.where,
                optimizer=True,
            )
            return cls(source, state.preset, saved, (*state.stages, facts))
        weights = read_weights(path)
        if weights.preset is None:
            raise DinoError(
                f"--from {source} was not written by this tool, so its heads and recipe are unknown",
                f"--init {source} with a complete preset, such as continue-dinov2",
            )
        preset = weights.preset
        _refuse_headless(source, preset)
        facts = StageFacts(
            source=source,
            recipe=preset.about.recipe,
            steps=weights.step or 0,
            batch_size=preset.training.batch_size,
            lr=max(preset.optimizer.lr.bounds),
            optimizer=False,
        )
        return cls(source, preset, None, (facts,))

    @property
    def clock(self) -> Clock | None:
        """Clock at the last step of the run, which `--steps` may have ended early; None if its epochs are unknown."""
        training, images = self.preset.training, self.saved.state.images.count if self.saved else None
        steps = training.steps_per_epoch or (images // training.batch_size if images else 0)
        return Clock(steps, training.epochs, min(self.stages[-1].steps, steps * training.epochs)) if steps else None

    @property
    def peak_lr(self) -> float:
        """Highest learning rate of the first stage that is known, before `lr_rule`: later stages have low ones."""
        return self.stages[0].lr

    def describe(self, preset: Preset) -> str:
        """Describe the start of a run with this preset in one line."""
        steps = f"{self.source} after {self.stages[-1].steps} steps"
        if self.saved is None:
            return f"{steps}, a checkpoint alone: the optimizer starts anew, and the student as a copy of the average"
        if not self._keeps_optimizer(preset):
            return f"{steps}; the optimizer starts anew, since {preset.optimizer.kind} replaces {self._kind}"
        return f"{steps}, with the state of its optimizer"

    def load(self, method: Method) -> None:
        """Load student, average and the state of the losses into a method.

        Raises:
            DinoError: If the networks do not fit, values are not finite, or the run has no heads to continue.
        """
        assert isinstance(method, SelfDistillation)  # `read` refuses runs of other methods
        if self.saved is None:
            if fresh := start_from(method, self.source):
                raise DinoError(
                    f"--from {self.source} has no head {fresh[0]} of this shape",
                    f"--init {self.source} to start it anew",
                )
            return
        tensors = _below(self._read(self.saved), "method/")
        # A run with a frozen teacher keeps its average beside it, under another name.
        average = _below(tensors, "spare.") or _below(tensors, "teacher.")
        load_strictly(method.student, _below(tensors, "student."), self.source)
        load_strictly(method.average, average, self.source)
        _load_common(method.losses, _below(tensors, "losses."))

    def load_optimizer(self, trainer: Trainer, preset: Preset) -> None:
        """Load the optimizer's moments and counts into a trainer, if the preset has the same kind of optimizer."""
        if self.saved is not None and self._keeps_optimizer(preset):
            restore_moments(trainer, self._read(self.saved))

    @property
    def _kind(self) -> str:
        return self.preset.optimizer.kind

    def _keeps_optimizer(self, preset: Preset) -> bool:
        return preset.optimizer.kind == self._kind

    def _read(self, saved: SavedState) -> dict[str, Tensor]:
        try:
            return saved.tensors()
        except KeyError as error:
            alone = saved.folder / CHECKPOINT
            raise DinoError(
                f"the state in {saved.folder} is damaged: {error}", f"--from {alone}, without its optimizer"
            ) from error


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _load_common(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors that a module has in the same shape: a stage may add or drop losses."""
    own = module.state_dict()
    fitting = {key: value for key, value in tensors.items() if key in own and own[key].shape == value.shape}
    module.load_state_dict(own | fitting)


def _refuse_headless(source: str, preset: Preset) -> None:
    """Refuse a run whose heads or LoRA a stage cannot continue.

    Raises:
        DinoError: If it is one.
    """
    if preset.losses.features:
        raise DinoError(
            f"--from {source} was trained with losses.features and has no heads, which a stage continues",
            f"--init {source} with another preset",
        )
    if preset.backbone.learning.trained.kind == "lora":
        raise DinoError(
            f"--from {source} was trained with LoRA, whose additions a stage does not continue",
            f"--init {source} with another preset, which starts from the merged weights",
        )

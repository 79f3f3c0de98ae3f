"""Weights of a run with the best accuracy on its monitor."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from dinocli.core.atomic import atomic
from dinocli.core.runs import CHECKPOINT
from dinocli.core.tensors import load_tensors, read_metadata
from dinocli.method.preset import Preset
from dinocli.models.network import Network
from dinocli.train.knn_monitor import Answers
from dinocli.weights.checkpoint import write_checkpoint

BEST = "best.safetensors"


class BestWeights:
    """File with the best weights so far, from which a resumed run continues.

    Args:
        run: Run folder, which holds `best.safetensors`.
        preset: Preset of the run, stored with the weights.
        monitor: Labelled set, as the user named it. Weights that another set chose are replaced.

    Attributes:
        accuracy: Accuracy of these weights on the monitor's images for selection, in percent.
        step: Step of these weights.
    """

    def __init__(self, run: Path, preset: Preset, monitor: str) -> None:
        self.path, self._preset, self._monitor = run / BEST, preset, monitor
        self.accuracy, self.step = -math.inf, 0
        with suppress(OSError, ValueError, KeyError):  # none yet, or corrupt: the next evaluation writes it anew
            stored = read_metadata(self.path)
            if stored["monitor"] == monitor:
                self.accuracy, self.step = float(stored["selection"]), int(stored["step"])

    def update(self, answers: Answers, network: Network, step: int) -> None:
        """Write a network's weights if its answers are better than all before."""
        accuracy = 100 * float(answers.selection.mean())
        if accuracy <= self.accuracy:
            return
        with atomic(self.path) as draft:
            chosen = {"selection": repr(accuracy), "monitor": self._monitor}
            write_checkpoint(draft, network.weights(), self._preset, step, chosen)
        self.accuracy, self.step = accuracy, step


def load_kept(network: Network, run: Path, *, best: bool) -> tuple[dict[str, Tensor], int]:
    """Load the weights that a finished run keeps, and return them with their step.

    Args:
        network: Network to load them into.
        run: Run folder, which holds `best.safetensors`.
        best: True for the best weights. A run that was finished without a monitor has only its last ones.
    """
    source = run / (BEST if best and (run / BEST).is_file() else CHECKPOINT)
    weights, metadata = load_tensors(source)
    network.load_weights(weights, str(source))
    return weights, int(metadata["step"])

"""Model folder with a card, written from a run; the hub's own client uploads it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from dinocli.apps.hub.card import Facts, Measured, card_of
from dinocli.core.atomic import atomic_folder, write_text
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT, CURVES, METRICS
from dinocli.evals.knn import knn
from dinocli.features.encoder import Encoder
from dinocli.features.store import compared, read_splits
from dinocli.train.state import FOLDER as STATES
from dinocli.train.state import State, saved_states
from dinocli.viz.history import Curve, read_history
from dinocli.viz.report import draw_curves
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.export import TIMM_FILES, folder_is_free, write_timm
from dinocli.weights.load import encoder_of

CARD = "README.md"
_FILES = TIMM_FILES | {CARD, CURVES}
_K = 20
_MARK = "<!-- dinocli wrote this; {} -->"


@dataclass(frozen=True)
class Pushed:
    """Result of `push`.

    Attributes:
        name: Model name in the card.
        difference: Relative difference between timm's and this tool's features of random images.
        measured: k-NN accuracy of the given features, or None.
    """

    path: Path
    name: str
    difference: float
    measured: Measured | None


def push(source: str, out: Path | None = None, features: Path | None = None, repository: str | None = None) -> Pushed:
    """Write a model folder for timm's hub loader, load it with timm, and compare the features.

    The card contains no paths of this machine and no photos.

    Args:
        source: Run folder, or checkpoint of this tool.
        out: Output folder, which names the model. If None, the run's name followed by `-hub`. The output of an earlier
            push is replaced unless its card was edited.
        features: Folder of labelled features of these weights, for the k-NN accuracy in the card.
        repository: `USER/NAME` of the hub, which the card then names. If None, the card says USER.

    Raises:
        DinoError: If the source cannot be read or is not this tool's. If the features are of other weights, the output
            path is occupied, or timm's features differ. No output remains in these cases.
        OSError: If the disk is full, or the path is not writable.
    """
    if source.startswith("timm:"):
        raise DinoError(f"{source} is already a timm model; expected a run", "name a run folder, such as runs/tiny-1")
    weights = read_weights(Path(source))
    if weights.preset is None:
        raise DinoError(
            f"{source} does not store its training; expected a run of this tool", f"dino export {source} --to timm"
        )
    run = _find_run(Path(source))
    owner, _, given = (repository or "USER/").partition("/")
    name = given or re.sub(r"[^\w.-]+", "-", out.name if out else run.name if run else Path(source).stem)
    out = out or Path(f"{name}-hub")
    _check_free(out)
    encoder = encoder_of(weights, source, torch.device("cpu"))
    measured = _measure(features, encoder, source) if features else None
    history = _cut_after(weights.step, read_history(run / METRICS)) if run else {}
    state = _read_state(run)
    with atomic_folder(out) as folder:
        written = write_timm(encoder, weights.preset.backbone, folder)
        if history:
            draw_curves(history, weights.preset.model_dump(mode="json"), folder / CURVES)
        facts = Facts(
            name=name,
            owner=owner,
            encoder=encoder,
            preset=weights.preset,
            call=written.call,
            notes=written.notes,
            steps=weights.step,
            images=state.images.count if state else None,
            init=_strip_folders(state.init) if state and state.init else None,
            watched=float(history["knn"].values[-1]) if "knn" in history else None,
            measured=measured,
            curves=CURVES if history else None,
        )
        text = card_of(facts)
        write_text(folder / CARD, f"{text}\n{_MARK.format(_hash(text))}\n")
    return Pushed(out, name, written.difference, measured)


def _find_run(source: Path) -> Path | None:
    """Return the run folder of a path to it or to one of its checkpoints, else None."""
    folder = (source / CHECKPOINT if source.is_dir() else source).resolve().parent
    folder = folder.parent.parent if folder.parent.name == STATES else folder
    return folder if (folder / METRICS).is_file() else None


def _cut_after(step: int | None, history: dict[str, Curve]) -> dict[str, Curve]:
    """Cut a history at a step: a killed run may have logged steps beyond its checkpoint."""
    if step is None:
        return history
    cut = {key: Curve(c.steps[c.steps <= step], c.values[c.steps <= step]) for key, c in history.items()}
    return {key: curve for key, curve in cut.items() if len(curve.steps)}


def _read_state(run: Path | None) -> State | None:
    return next((state for _, state in saved_states(run) if state), None) if run else None


def _measure(folder: Path, encoder: Encoder, source: str) -> Measured:
    train, test = compared(read_splits(folder))
    if train.provenance.fingerprint != encoder.fingerprint:
        raise DinoError(
            f"{folder} holds features of other weights ({train.provenance.source}); expected features of {source}",
            f"dino extract {source} DATA --out OTHER, then --features OTHER",
        )
    return Measured(knn(train, test, [_K]), _strip_folders(train.provenance.data))


def _strip_folders(place: str) -> str:
    """Return the public part of a location: the last part of a path, or all of `timm:NAME` or `torchvision:NAME`."""
    return place if re.match(r"\w{2,}:", place) else Path(place).resolve().name


def _check_free(out: Path) -> None:
    folder_is_free(out, _FILES)
    card = out / CARD
    if not card.is_file():
        return
    text, _, mark = card.read_text(encoding="utf-8", errors="replace").rstrip("\n").rpartition("\n")
    if mark != _MARK.format(_hash(text)):
        raise DinoError(f"{card} was edited, and would be overwritten", "choose another OUT, and copy the card there")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

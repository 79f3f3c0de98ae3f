"""Search for the checkpoint that made stored features."""

from __future__ import annotations

from pathlib import Path

from dinocli.core.runs import CHECKPOINT
from dinocli.features.store import Provenance
from dinocli.weights.identify import UNTRAINED
from dinocli.weights.shipped import PREFIX


def checkpoints_of(provenance: Provenance, beside: Path) -> list[str]:
    """Return the existing places of a checkpoint that may have made features, the most likely first.

    The place that the user named may be a link to the newest run, so the run's own checkpoint may be the right one.
    Relative places are searched below the current folder, then beside the file that refers to them. Only loading shows
    whether a checkpoint has the right weights.

    Args:
        provenance: Provenance of the features.
        beside: Folder of the file that stores the provenance.
    """
    if provenance.source.startswith(("timm:", UNTRAINED, PREFIX)):
        return [provenance.source]
    named = [provenance.run and str(Path(provenance.run) / CHECKPOINT), provenance.source]
    places = [base / name for base in (Path(), beside) for name in named if name]
    places.append(beside / CHECKPOINT)  # of a run folder that was moved with its classifier
    return list({path.resolve(): str(path) for path in reversed(places) if path.exists()}.values())[::-1]

"""`dino eval track`: J and F scores of tracked objects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli.layout import METHOD
from dinocli.cli.options import (
    Checkpoint,
    Device,
    FacetName,
    Json,
    Layer,
    NetworkName,
    NetworkOptions,
    Settings,
    Temperature,
)
from dinocli.cli.track import (
    FirstMask,
    Fps,
    FrameSide,
    FramesPlace,
    Neighbours,
    Previous,
    PropagationOptions,
    Radius,
    Tracks,
    track_frames,
)


def track(
    frames: FramesPlace,
    mask: FirstMask,
    truth: Annotated[
        Path,
        typer.Option(
            "--truth",
            metavar="MASKS",
            help="Folder of ground-truth masks, named like the frames.",
            rich_help_panel=METHOD,
        ),
    ],
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    short_side: FrameSide = 480,
    previous: Previous = 7,
    radius: Radius = 12,
    k: Neighbours = 5,
    temperature: Temperature = 0.1,
    layer: Layer = -1,
    facet: FacetName = "token",
    overrides: Settings = None,
    device: Device = "auto",
    out: Tracks = Path("track"),
    fps: Fps = None,
    json: Json = False,
) -> None:
    """Track objects through a video, as `dino track` does, and score the masks by J and F of the DAVIS benchmark.

    Examples:
        dino eval track ./frames --mask masks/00000.png --truth ./masks
        dino eval track ./frames --mask 0.png --truth ./masks --short-side 240
    """
    options = NetworkOptions(checkpoint, network, overrides, device)
    propagation = PropagationOptions(short_side, layer, facet, previous, radius, k, temperature)
    track_frames(frames, mask, options, propagation, out, fps, truth=truth, json=json)

"""`dino eval track`: J and F scores of tracked objects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli.layout import METHOD
from dinocli.cli.options import Checkpoint, Device, FacetName, Json, Layer, NetworkName, Settings, Temperature
from dinocli.cli.track import FirstMask, Fps, FrameSide, FramesPlace, Neighbours, Previous, Radius, Tracks, track_frames


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
    track_frames(
        frames, mask, truth, checkpoint, network, short_side, previous, radius, k, temperature, layer, facet, overrides,
        device, out, fps, json=json,
    )  # fmt: skip

"""Model card: README of a hub folder, which describes the model, its training and how to load it."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from dinocli.core.errors import visible
from dinocli.core.version import __version__
from dinocli.evals.knn import KnnResult
from dinocli.features.encoder import Encoder
from dinocli.method.preset import Preset
from dinocli.method.settings import changes, shipped_as
from dinocli.models.transformer import Transformer


@dataclass(frozen=True)
class Measured:
    """k-NN measurement of a model's features.

    Attributes:
        knn: k-NN accuracy.
        data: Name of the images.
    """

    knn: KnnResult
    data: str


@dataclass(frozen=True)
class Facts:
    """Contents of a card; None and empty values are omitted.

    Attributes:
        preset: Training settings.
        call: Code that computes features in timm from `model` and `images`.
        notes: Differences in use with timm.
        steps: Number of training steps.
        images: Number of training images.
        init: Initial weights.
        watched: Last k-NN accuracy on the images of `--monitor`, in percent.
        measured: k-NN measurement of the features.
        curves: File name of the plot of the curves.
        owner: User of the hub who owns the model.
    """

    name: str
    encoder: Encoder
    preset: Preset
    call: str
    notes: list[str]
    steps: int | None = None
    images: int | None = None
    init: str | None = None
    watched: float | None = None
    measured: Measured | None = None
    curves: str | None = None
    owner: str = "USER"


def card_of(facts: Facts) -> str:
    """Return the card: the hub's metadata, then Markdown. The user sets the licence."""
    parts = [
        f"# {_escape(facts.name)}",
        f"Image features from timm's {_format_code(facts.preset.backbone.name)}, pretrained without labels by "
        f"{_join_losses(list(facts.preset.losses.present()))} with dinocli {__version__}.",
        _format_table(_list_rows(facts)),
        _write_loading(facts),
        f"## Training\n\n![Logged values over the training steps]({facts.curves})" if facts.curves else "",
        "<details><summary>All settings</summary>\n\n```json\n"
        f"{_escape_lines(facts.preset.model_dump_json(indent=2, exclude_none=True))}\n```\n\n</details>",
    ]
    return "\n\n".join([_write_front_matter(facts), *filter(None, parts)]) + "\n"


def _write_front_matter(facts: Facts) -> str:
    tags = "".join(f"- {tag}\n" for tag in ("timm", "dinocli", "self-supervised", *facts.preset.losses.present()))
    licence = "# license: set your own, such as `license: apache-2.0`"
    return f"---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\ntags:\n{tags}{licence}\n---"


def _list_rows(facts: Facts) -> dict[str, str]:
    encoder, training = facts.encoder, facts.preset.training
    options = ", ".join(f"{_escape(key)} {_escape(value)}" for key, value in facts.preset.backbone.options.items())
    count = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    which = "the class token" if isinstance(encoder.backbone, Transformer) else "the mean over all positions"
    stored = facts.preset.model_dump(mode="json")
    name, shipped = shipped_as(stored)
    changed = changes(stored, shipped) if name else {}
    pairs = ((key, _escape(now or "none"), _escape(then or "none")) for key, (now, then) in changed.items())
    changed_settings = ", ".join(f"{_format_code(key)} {now} (was {then})" for key, now, then in pairs)
    rows = {
        "network": ", ".join(filter(None, [_format_code(facts.preset.backbone.name), options]))
        + f": {_format_count(count)} parameters",
        "input": f"{encoder.size} x {encoder.size} pixels, mean {_format_numbers(encoder.mean)}, "
        f"std {_format_numbers(encoder.std)}",
        "features": f"{encoder.backbone.width} numbers, {which}",
        "preset": _format_code(name) if name else _escape(facts.preset.about.recipe),
        "changed settings": changed_settings,
        "initial weights": _format_code(facts.init) if facts.init else "",
        "data": f"{facts.images:,} images, without their labels" if facts.images else "",
        "training": f"{facts.steps:,} steps of {training.batch_size:,} images" if facts.steps is not None else "",
        "k-NN accuracy": _describe(facts.measured) if facts.measured else "",
        "k-NN accuracy in training": f"{facts.watched:.1f} % at the end" if facts.watched is not None else "",
        "fingerprint": f"`{encoder.fingerprint}`",
    }
    return {key: value for key, value in rows.items() if value}


def _describe(measured: Measured) -> str:
    result = measured.knn
    (score,) = result.scores
    voters = (
        "each classified by all others"
        if result.leave_one_out
        else f"classified by {result.neighbours:,} training images"
    )
    images = f"{result.queries:,} images of {result.classes} classes of {_escape(measured.data)}"
    return f"{score.top1:.2f} % (k = {score.k}): {images}, {voters}"


def _write_loading(facts: Facts) -> str:
    """Return the code that loads the model with timm and this tool; it runs after USER is replaced."""
    encoder, where = facts.encoder, f"hf-hub:{facts.owner}/{facts.name}"
    shape = f"1, {encoder.channels}, {encoder.size}, {encoder.size}"
    mode = {1: "L", 3: "RGB"}.get(encoder.channels)
    read = f'images = transform(Image.open("photo.jpg").convert("{mode}"))[None]  # [{shape}]'
    code = [
        "import timm",
        "import torch",
        *(["from PIL import Image", ""] if mode else [""]),
        f'model = timm.create_model("{where}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))" if mode else "",
        read if mode else f"images = torch.zeros({shape})  # (values in 0..1 - mean) / std",
        "with torch.no_grad():",
        f"    features = {facts.call}  # [1, {encoder.backbone.width}]",
    ]
    own = ["import dinocli", "", f'features = dinocli.load("timm:{where}")("photo.jpg")']
    ours = f"With dinocli, or `dino extract timm:{where} DATA`:"
    text = ["## Loading", "With timm:", _format_block(code), ours, _format_block(own)]
    notes = [f"* {note}" for note in (*facts.notes, f"`local-dir:FOLDER` instead of `{where}` loads a local copy")]
    return "\n\n".join([*text, "\n".join(notes)])


def _format_block(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _escape(text: object) -> str:
    """Escape text for Markdown, so that it contains no control characters, tags or links."""
    return re.sub(r"([\\`*\[\]])", r"\\\1", html.escape(visible(str(text)), quote=False))


def _format_code(text: str) -> str:
    """Format text as inline code; backticks become quotes, because they would end it."""
    return f"`{visible(text).replace('`', chr(39))}`"


def _escape_lines(text: str) -> str:
    """Escape control characters in lines of code."""
    return "\n".join(map(visible, text.split("\n")))


def _format_table(rows: dict[str, str]) -> str:
    lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _format_numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _format_count(number: int) -> str:
    return f"{number / 1e6:.3g} million" if number >= 1e6 else f"{number:,}"


_LOSSES = {
    "dino": "DINO",
    "ibot": "iBOT",
    "simdino": "SimDINO",
    "simdino_patches": "SimDINO on masked patches",
    "koleo": "KoLeo",
    "sigreg": "SIGReg",
    "gram": "Gram anchoring",
    "features": "distillation of features",
}


def _join_losses(losses: list[str]) -> str:
    names = [_LOSSES.get(loss, loss) for loss in losses]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

"""Draw the pictures of docs/how-it-works.md with the package's own losses, crops and masks.

    python benchmarks/how_it_works.py [OUT]

OUT defaults to docs/images. The script takes about ten seconds on a CPU, without downloads or a checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

from dinocli.apps.demo.drawings import draw
from dinocli.data.views.crops import crop_boxes, crop_tries, cut, uniforms
from dinocli.data.views.masking import blocks
from dinocli.engine.schedules import Clock, Constant, Cosine
from dinocli.method.losses.koleo import koleo_loss
from dinocli.method.losses.targets import Centering, CenteringConfig, SinkhornKnopp, SinkhornKnoppConfig
from dinocli.method.preset import load_preset

SUNFLOWER, FISH, ZEBRA = 7, 21, 9  # numbers of drawn images
COLORS = ("#1f6fb4", "#c8651b", "#3a8f3a", "#8757b5", "#a33c55", "#6b6b6b")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5}
CLOCK = Clock(steps_per_epoch=1, epochs=1)


def main(out: Path) -> None:
    """Draw all pictures."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with plt.rc_context(STYLE):
        for name, figure in (
            ("dino", dino()),
            ("sharpening", sharpening()),
            ("centering", centering()),
            ("sinkhorn", sinkhorn()),
            ("koleo", koleo()),
            ("masking", masking()),
            ("ema", ema()),
            ("collapse", collapse()),
        ):
            figure.savefig(out / f"how-{name}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def temperature(value: float) -> Constant:
    """Return a constant temperature."""
    return Constant(kind="constant", value=value)


def picture(axes: plt.Axes, pixels: np.ndarray, title: str = "") -> None:
    """Show an image without ticks or frame."""
    axes.imshow(pixels)
    axes.set_title(title)
    axes.set_axis_off()


def dino() -> plt.Figure:
    """Draw the crops of one image, and the pairs that the loss compares."""
    views = load_preset("tiny").views
    image = draw(SUNFLOWER, size=192).image
    numbers, _ = uniforms(seed=3, epoch=0, index=0, views=len(views.all))
    boxes = crop_boxes(crop_tries(numbers[None], np.array([v.scale for v in views.all]))[0], *image.shape[:2])
    names = ["global 1", "global 2", *(f"local {i}" for i in range(1, views.locals + 1))]
    figure = plt.figure(figsize=(9.2, 3.3), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.15, 1.25))
    axes = left.subplots()
    picture(axes, image, "one image, six crops")
    for box, color in zip(boxes, COLORS, strict=True):
        top, begin, height, width = box
        axes.add_patch(Rectangle((begin, top), width, height, fill=False, edgecolor=color, linewidth=2))
    cells = middle.subplots(2, 3)
    for axes, box, view, name, color in zip(cells.flat, boxes, views.all, names, COLORS, strict=True):
        picture(axes, cut(image, box, (view.size, view.size)).permute(1, 2, 0).numpy())
        axes.set_title(name, color=color)
    axes = right.subplots()
    compared = np.array([[float(v != g) for g in range(2)] for v in range(len(names))])
    axes.imshow(compared, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for v in range(len(names)):
        for g in range(2):
            axes.text(g, v, "cross-entropy" if v != g else "skipped", ha="center", va="center", fontsize=8)
    axes.set_xticks([0, 1], names[:2])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("teacher's targets")
    axes.set_ylabel("student's predictions")
    axes.set_title("the loss: mean over 10 pairs")
    return figure


def sharpening() -> plt.Figure:
    """Draw the same logits at three temperatures."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(4)) * 0.12
    figure, cells = plt.subplots(1, 3, figsize=(9.2, 2.5), sharey=True, layout="constrained")
    words = {0.02: "very sharp", 0.04: "the teacher's", 0.1: "the student's: soft"}
    for axes, (value, word) in zip(cells, words.items(), strict=True):
        rule = Centering(CenteringConfig(kind="centering", momentum=1.0, temperature=temperature(value)), len(logits))
        shares = rule(logits[None], CLOCK)[0]
        nats = -(shares * shares.log()).sum()
        axes.bar(range(len(shares)), shares, color=COLORS[0])
        axes.set_title(f"temperature {value} ({word})\nentropy {nats:.2f} of {np.log(len(shares)):.2f} nats")
        axes.set_xlabel("prototype")
        axes.set_xticks(range(0, len(shares), 5))
    cells[0].set_ylabel("probability")
    return figure


def biased(images: int = 24, prototypes: int = 12) -> torch.Tensor:
    """Return the logits of a batch in which all images prefer the same few prototypes."""
    generator = torch.Generator().manual_seed(1)
    shared = 0.18 * torch.randn(prototypes, generator=generator)
    return shared + 0.07 * torch.randn(images, prototypes, generator=generator)


def heatmap(axes: plt.Axes, targets: torch.Tensor, title: str) -> None:
    """Show the targets of a batch, images by prototypes."""
    axes.imshow(targets, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_title(title)
    axes.set_xlabel("prototype")
    axes.set_xticks([])
    axes.set_yticks([])


def usage(axes: plt.Axes, targets: torch.Tensor) -> None:
    """Show the share of each prototype, aligned with the heatmap's columns."""
    axes.bar(range(targets.shape[1]), targets.mean(0), color=COLORS[1], width=0.85)
    axes.axhline(1 / targets.shape[1], color="#444444", linewidth=0.8, linestyle="--")
    axes.set_xlim(-0.5, targets.shape[1] - 0.5)
    axes.set_ylim(0, 1)
    axes.set_xticks([])


def targets_figure(columns: dict[str, torch.Tensor], bottom: str) -> plt.Figure:
    """Draw heatmaps of targets, each with the shares of its prototypes below."""
    figure, cells = plt.subplots(
        2, len(columns), figsize=(9.2, 3.6), height_ratios=(2.2, 1), sharey="row", layout="constrained"
    )
    for i, (title, targets) in enumerate(columns.items()):
        heatmap(cells[0, i], targets, title)
        usage(cells[1, i], targets)
    cells[0, 0].set_ylabel("image of the batch")
    cells[1, 0].set_ylabel(bottom)
    return figure


def centering() -> plt.Figure:
    """Draw targets with the center at zero, and after it has followed the mean of the logits."""
    logits = biased()
    columns = {}
    rule = Centering(CenteringConfig(kind="centering", momentum=0.9, temperature=temperature(0.04)), logits.shape[1])
    done = 0
    for steps in (0, 5, 50):
        while done < steps:
            rule(logits, CLOCK)
            rule.update()
            done += 1
        columns[f"center after {steps} steps"] = rule(logits, CLOCK)
    return targets_figure(columns, "share of targets")


def sinkhorn() -> plt.Figure:
    """Draw targets after rounds of Sinkhorn-Knopp."""
    logits = biased()
    columns = {"softmax alone": (logits / 0.04).softmax(-1)}
    for rounds in (1, 3):
        config = SinkhornKnoppConfig(kind="sinkhorn_knopp", iterations=rounds, temperature=temperature(0.04))
        columns[f"Sinkhorn-Knopp, {rounds} round{'s' if rounds > 1 else ''}"] = SinkhornKnopp(config)(logits, CLOCK)
    return targets_figure(columns, "share of targets")


def koleo() -> plt.Figure:
    """Draw points on a circle that the KoLeo loss moves apart."""
    generator = torch.Generator().manual_seed(5)
    angles = torch.cat([c + 0.22 * torch.randn(9, generator=generator) for c in (0.4, 0.9, 3.9)])
    points = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    figure, cells = plt.subplots(1, 3, figsize=(9.2, 3.5), layout="constrained")
    done = 0
    for axes, steps in zip(cells, (0, 5, 60), strict=True):
        while done < steps:
            koleo_loss(points).backward()
            with torch.no_grad():
                points -= 0.05 * points.grad
                points /= points.norm(dim=1, keepdim=True)
                points.grad = None
            done += 1
        x = points.detach()
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
        circle = np.linspace(0, 2 * np.pi, 200)
        axes.plot(np.cos(circle), np.sin(circle), color="#c9c9c9", linewidth=0.8)
        for point, other in zip(x, x[nearest], strict=True):
            axes.annotate("", point * 1.02, other * 1.02, arrowprops={"arrowstyle": "-", "color": COLORS[1], "lw": 1.5})
        axes.scatter(x[:, 0], x[:, 1], s=16, color=COLORS[0], zorder=3)
        axes.set_title(f"after {steps} steps: loss {koleo_loss(x).item():.2f}")
        axes.set_aspect("equal")
        axes.set_axis_off()
    return figure


def masking() -> plt.Figure:
    """Draw global crops with iBOT's masks."""
    config = load_preset("ibot-vits16").views.mask
    grid, patch = (14, 14), 16
    figure, cells = plt.subplots(2, 4, figsize=(9.2, 4.5), layout="constrained")
    for i, (index, ratio) in enumerate(((SUNFLOWER, 0.1), (FISH, 0.23), (ZEBRA, 0.37), (8, 0.5))):
        image = draw(index, size=grid[0] * patch).image
        masked = blocks(config, grid, round(ratio * grid[0] * grid[1]), np.random.default_rng(20 + i))
        masked_pixels = np.kron(masked, np.ones((patch, patch), bool))[..., None]
        picture(cells[0, i], image, "the teacher sees all patches" if i == 0 else "")
        input_of_student = np.where(masked_pixels, 128, image).astype(np.uint8)
        picture(
            cells[1, i], input_of_student, f"{'the student: ' if i == 0 else ''}{masked.sum() / masked.size:.0%} masked"
        )
    return figure


def ema() -> plt.Figure:
    """Draw a noisy student weight with its moving averages, and the momentum schedule."""
    steps = np.arange(400)
    generator = np.random.default_rng(2)
    student = 1 - np.exp(-steps / 120) + 0.12 * generator.standard_normal(len(steps))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 2.8), width_ratios=(1.6, 1), layout="constrained")
    left.plot(steps, student, color="#b9b9b9", linewidth=0.8, label="student")
    for momentum, color in ((0.9, COLORS[1]), (0.98, COLORS[0]), (0.996, COLORS[2])):
        average = np.empty_like(student)
        average[0] = student[0]
        for i in steps[1:]:
            average[i] = momentum * average[i - 1] + (1 - momentum) * student[i]
        left.plot(steps, average, color=color, label=f"teacher, momentum {momentum}")
    left.set_xlabel("step")
    left.set_ylabel("one weight")
    left.legend(frameon=False, fontsize=8)
    schedule = load_preset("vits16").teacher.momentum
    assert isinstance(schedule, Cosine)
    epochs = 800
    right.plot(range(epochs), [schedule.at(Clock(1, epochs, i)) for i in range(epochs)], color=COLORS[3])
    right.set_xlabel("epoch of vits16")
    right.set_title("momentum over the run")
    return figure


# Means over the last measured steps (docs/results.md): entropy and information as fractions of ln K; label position.
RUNS = {
    "healthy (tiny)": (0.300, 0.332, 0.32, 0.332, "left"),
    "healthy (no BatchNorm)": (0.447, 0.251, 0.467, 0.251, "left"),
    "no centering, no BatchNorm: one-sided": (0.003, 0.010, 0.02, 0.055, "left"),
    "no sharpening: uniform": (0.995, 0.005, 0.98, 0.085, "right"),
    "no sharpening, no BatchNorm: uniform": (0.983, 0.013, 0.98, 0.055, "right"),
}


def collapse() -> plt.Figure:
    """Draw healthy and collapsed runs by entropy and information of their targets."""
    figure, axes = plt.subplots(figsize=(7.4, 3.4), layout="constrained")
    axes.axhspan(0, 0.02, color="#f3d9d5")
    axes.text(0.5, 0.0235, "collapse is reported below 0.02", fontsize=8, ha="center", color=COLORS[4])
    for name, (entropy, information, x, y, side) in RUNS.items():
        axes.scatter(entropy, information, color=COLORS[0] if "healthy" in name else COLORS[4], zorder=3)
        axes.text(x, y, name, ha=side, va="center")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0, 0.4)
    axes.set_xlabel("entropy of the targets / ln K")
    axes.set_ylabel("information / ln K")
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images")

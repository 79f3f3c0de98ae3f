"""Images for a network that may be given away: public-domain clip art in front of drawn backgrounds.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb clip
    python benchmarks/clip_scenes.py clip scenes [--images 12000] [--seed 0]

Debian's package openclipart-png (0.18) holds the drawings, which their authors gave to the public domain. Stars,
playing cards, flags and flat icons are left out: thousands of them are nearly equal. A background is noise whose
spectrum falls like that of photos, or leaves (many overlapping ellipses of such noise); one to four drawings stand
before it, and one uneven light falls on all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import track

_SIDE = 128  # of a scene, in pixels
_LARGEST = 4_000_000  # pixels of a drawing that is still read
_LEFT_OUT = ("stars", "cards", "flags", "flat-theme", "aiga-symbols", "led", "jigsaw", "map_symbols", "arrows")

Pixels = NDArray[np.float64]  # [_SIDE, _SIDE, 3] in 0..255


def noise(draws: np.random.Generator) -> Pixels:
    """Return noise with a power-law spectrum around a random color; its channels move mostly together, as in photos."""
    frequencies = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None])
    frequencies[0, 0] = np.inf
    amplitude = frequencies ** -draws.uniform(0.6, 1.8)
    planes = []
    for _ in range(2):
        phase = np.exp(2j * np.pi * draws.random(amplitude.shape))
        plane = np.fft.irfft2(amplitude * phase, (_SIDE, _SIDE))
        planes.append(plane / plane.std())
    light, tint = planes
    color = draws.uniform(50, 205) + draws.normal(0, 25, 3)
    shift = draws.normal(0, 1, 3)
    return np.clip(color + draws.uniform(5, 45) * light[..., None] + 12 * shift * tint[..., None], 0, 255)


def background(draws: np.random.Generator) -> Image.Image:
    """Return noise, or leaves of noise."""
    scene = _image(noise(draws))
    if draws.random() < 0.6:
        textures = [_image(noise(draws)) for _ in range(4)]
        for _ in range(draws.integers(5, 60)):
            width, height = draws.pareto(1.5, 2) * 8 + 6
            x, y = draws.uniform(0, _SIDE, 2)
            mask = Image.new("L", scene.size)
            ImageDraw.Draw(mask).ellipse((x - width, y - height, x + width, y + height), fill=255)
            mask = mask.rotate(draws.uniform(0, 180), center=(x, y))
            scene.paste(_tinted(textures[draws.integers(4)], draws), mask=mask)
    return scene


def scene(drawings: list[Image.Image], draws: np.random.Generator) -> Image.Image:
    """Return one scene. The drawings are RGBA."""
    result = background(draws)
    for _ in range(draws.choice([1, 2, 3, 4], p=[0.5, 0.25, 0.15, 0.1])):
        drawing = drawings[draws.integers(len(drawings))]
        side = draws.uniform(0.4, 0.95) * _SIDE
        scale = side / max(drawing.size)
        drawing = drawing.resize([max(1, round(scale * length)) for length in drawing.size])
        drawing = drawing.rotate(draws.normal(0, 12), resample=Image.Resampling.BICUBIC, expand=True)
        if draws.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        place = [int(draws.uniform(-0.15, 1.15) * _SIDE - length / 2) for length in drawing.size]
        if draws.random() < 0.5:  # near the middle, as in most photos
            place = [int(draws.normal(0.5, 0.12) * _SIDE - length / 2) for length in drawing.size]
        result.paste(_tinted(drawing.convert("RGB"), draws), tuple(place), drawing.getchannel("A"))
    lit = np.asarray(result, dtype=np.float64)
    x, y = np.meshgrid(np.linspace(-1, 1, _SIDE), np.linspace(-1, 1, _SIDE))
    fall, turn = draws.uniform(0, 0.35), draws.uniform(0, 2 * np.pi)
    lit = lit * (1 + fall * (x * np.cos(turn) + y * np.sin(turn)))[..., None] + draws.normal(0, 2, lit.shape)
    return _image(lit).filter(ImageFilter.GaussianBlur(draws.uniform(0, 0.8)))


def _tinted(image: Image.Image, draws: np.random.Generator) -> Image.Image:
    """Return the image with other gains of its channels and with softer contrast."""
    pixels = np.asarray(image, dtype=np.float64)
    gains, offset = draws.normal(1, 0.12, 3) * draws.uniform(0.6, 1), draws.uniform(0, 50)
    return _image(pixels * gains + offset)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def main(args: list[str]) -> None:
    """Write the scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, help="Unpacked package.")
    parser.add_argument("out", type=Path, help="Folder for the scenes.")
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    files = [f for f in sorted(options.clip.rglob("*.png")) if not set(f.parts) & set(_LEFT_OUT)]
    if not files:
        sys.exit(f"no clip art in {options.clip}; see --help for where to get it")
    drawings = []
    for file in track(files, "read"):
        try:
            drawing = Image.open(file)
        except Image.DecompressionBombError:
            continue
        if drawing.width * drawing.height > _LARGEST:
            continue
        drawing = drawing.convert("RGBA")
        drawing.thumbnail((2 * _SIDE, 2 * _SIDE))
        if drawing.getbbox() and np.asarray(drawing.getchannel("A")).mean() > 8:  # not next to nothing
            drawings.append(drawing)
    print(f"{len(drawings)} drawings")
    options.out.mkdir(parents=True)
    for i in track(range(options.images), "draw"):
        draws = np.random.default_rng((options.seed, i))
        scene(drawings, draws).save(options.out / f"{i:05d}.jpg", quality=90)


if __name__ == "__main__":
    main(sys.argv[1:])

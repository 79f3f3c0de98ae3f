"""Small labelled image set with exact object masks, drawn with numpy: the data of `dino demo`, without a download.

Like real objects, the ten kinds differ in palette, texture and form together. If they differed in form only and colors
were random, DINO would learn color, the easiest feature that crops of an image share. Pairs of kinds share a palette
(orange, goldfish) or a texture (ladybird, mushroom). The background is independent of the kind.

A kind is a function that yields layers, back to front. A layer has a form, two inks and a pattern that mixes them. A
form is a field over the picture: -1 in the middle, 0 on the edge, positive outside. A pattern is a field in [0, 1].
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.core.signals import held_back

Field = NDArray[Any]  # float32 [n, n], one value per pixel of the supersampled picture
Ink = NDArray[Any]  # float32 [3], RGB in [0, 1]

INKS = {
    "black": 0x1D1A20, "white": 0xF4F0E6, "cream": 0xE9D9B0, "grey": 0x8F9096, "slate": 0x4B5563, "red": 0xC92A2A,
    "orange": 0xF08A1D, "gold": 0xF5C02C, "brick": 0xA5513A, "brown": 0x7A4A28, "bark": 0x4A3020, "sand": 0xD8B57C,
    "lime": 0x9BBF45, "green": 0x4C8C3B, "pine": 0x1F5A3C, "teal": 0x2F8F86, "sky": 0x8CC4E8, "blue": 0x3B74B8,
    "navy": 0x1F3460, "violet": 0x8657B8, "pink": 0xE58BA8, "coral": 0xEE7458,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- patterns


def soft(x: Field, width: float = 0.15) -> Field:
    """Return a step from 0 to 1 around x = 0, `width` wide."""
    step: Field = np.clip(x / width + 0.5, 0, 1)
    return step


def stripes(x: Field, thick: float = 0.0) -> Field:
    """Return soft stripes, one per unit of x. `thick` in [-1, 1] widens them."""
    return soft(np.sin(x * math.tau) + thick, 0.5)


@lru_cache(maxsize=256)
def hats(cells: int, n: int) -> Field:
    """Return weights [n, cells + 1] that interpolate cells + 1 knots smoothly over n pixels."""
    at = np.linspace(0, cells, n, dtype=np.float32)[:, None] - np.arange(cells + 1, dtype=np.float32)
    near = np.clip(1 - np.abs(at), 0, 1)
    weights: Field = near * near * (3 - 2 * near)
    return weights


def noise(n: int, rng: np.random.Generator, tall: int, wide: int) -> Field:
    """Return value noise with `tall` by `wide` cells over the picture, computed by two small matrix products."""
    return hats(tall, n) @ rng.random((tall + 1, wide + 1), dtype=np.float32) @ hats(wide, n).T


def lattice(x: Field, y: Field, rng: np.random.Generator) -> tuple[Field, Field, Field]:
    """Return staggered unit cells: x and y inside the cell, in [-0.5, 0.5], and a random tone in [0, 1] per cell.

    Bricks, planks, pebbles, scales, spots and seeds are all made of these cells in different coordinates.
    """
    row = np.floor(y)
    x = x + 0.5 * (row % 2)
    col = np.floor(x)
    tones = rng.random((16, 16), dtype=np.float32)
    return x - col - 0.5, y - row - 0.5, tones[row.astype(np.int32) & 15, col.astype(np.int32) & 15]


def spots(x: Field, y: Field, rng: np.random.Generator, radius: float) -> Field:
    """Return round spots, one per lattice cell, with varied radii of at most `radius` cells."""
    inx, iny, tone = lattice(x, y, rng)
    return soft(radius * (0.65 + 0.35 * tone) - np.hypot(inx, iny), 0.1)


def bricks(x: Field, y: Field, rng: np.random.Generator, joint: float = 0.06) -> Field:
    """Return blocks of varied tone, twice as long as tall. `joint` is the width of dark joints in block heights."""
    inx, iny, tone = lattice(x / 2, y, rng)
    return soft(np.minimum(1 - 2 * np.abs(inx), 0.5 - np.abs(iny)) - joint, 0.1) * (0.55 + 0.45 * tone)


def pebbles(x: Field, y: Field, rng: np.random.Generator) -> Field:
    """Return rounded stones of varied tone, dark between them."""
    inx, iny, tone = lattice(x, y, rng)
    return soft(0.46 - np.hypot(inx, iny), 0.25) * (0.45 + 0.55 * tone)


# --------------------------------------------------------------------------------------------------------------- scenes


def ink(rng: np.random.Generator, *names: str) -> Ink:
    """Draw one of the named inks at random, with a small random shift of brightness and hue."""
    code = INKS[names[rng.integers(len(names))]]
    rgb = np.array([code >> 16, code >> 8 & 255, code & 255], np.float32) / 255
    return np.clip(rgb * rng.uniform(0.85, 1.15) + rng.normal(0, 0.03, 3), 0, 1).astype(np.float32)


SCENES: tuple[tuple[Callable[..., Field], str], ...] = (  # pattern over x and y, and the pairs of inks to choose from
    # sky and clouds, grass, rippled sand, water
    (lambda x, y, fog, rng: 0.35 * y + 0.8 * soft(fog(5, 3) + 0.5 * fog(12, 8) - 0.95, 0.6),
     "sky-white blue-white coral-cream slate-grey pink-gold"),
    (lambda x, y, fog, rng: 0.6 * fog(9, 56) + 0.4 * fog(5, 5), "pine-green green-lime brown-sand orange-gold"),
    (lambda x, y, fog, rng: 0.15 + 0.25 * np.sin(50 * y + 9 * fog(3, 3)) + 0.5 * fog(90, 90),
     "sand-cream brick-orange grey-white brown-sand"),
    (lambda x, y, fog, rng: 0.6 * fog(30, 5) + 0.5 * fog(60, 14) - 0.05, "navy-blue blue-sky pine-teal teal-sky"),
    # planks, pebbles, a painted backdrop, foliage
    (lambda x, y, fog, rng: bricks(x * 2, y * 6, rng) * (0.8 + 0.3 * fog(70, 4)),
     "bark-brown brown-sand slate-grey brick-coral"),
    (lambda x, y, fog, rng: pebbles(8 * x + 2 * fog(7, 7), 8 * y + 2 * fog(7, 7), rng),
     "slate-grey bark-brick brown-cream black-slate"),
    (lambda x, y, fog, rng: fog(2, 2), "violet-pink gold-cream teal-lime red-orange white-cream"),
    (lambda x, y, fog, rng: 0.5 * fog(6, 6) + 0.5 * soft(fog(16, 16) - 0.5, 0.4),
     "pine-green green-lime brick-gold black-pine"),
)  # fmt: skip

# Fraction of light grey in scenes. A vivid scene is the easiest feature that crops share: in a few hundred steps, DINO
# would learn it instead of the object. Random positions and rotations keep the accuracy of raw pixels low.
HAZE = 0.75


def scene(n: int, rng: np.random.Generator) -> Field:
    """Draw a background [n, n, 3], independent of the object on it."""
    x, y = np.meshgrid(*[np.linspace(0, 1, n, dtype=np.float32)] * 2)
    tilt, zoom = rng.uniform(-0.3, 0.3), rng.uniform(0.8, 1.4)
    pattern, pairs = SCENES[rng.integers(len(SCENES))]
    low, high = (ink(rng, name) for name in rng.choice(pairs.split()).split("-"))
    t = pattern(zoom * (x + tilt * y), zoom * (y - tilt * x), partial(noise, n, rng), rng)
    t = t + rng.uniform(-0.3, 0.3) * (x - 0.5) + rng.uniform(-0.3, 0.3) * (y - 0.5)
    picture: Field = HAZE * 0.78 + (1 - HAZE) * (low + np.clip(t, 0, 1)[..., None] * (high - low))
    return picture


# ---------------------------------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class Layer:
    """Part of an object, darker towards the form's edge. A pattern of 0 gives the ink `low`, 1 gives `high`."""

    form: Field
    low: Ink
    high: Ink
    pattern: Field | float = 0.0


@dataclass(frozen=True)
class Pen:
    """Drawing tool in the object's own frame: u points right, v points down, and the object spans about [-1, 1]."""

    u: Field
    v: Field
    rng: np.random.Generator

    def ink(self, *names: str) -> Ink:
        return ink(self.rng, *names)

    def vary(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high)

    def ellipse(self, u: float, v: float, wide: float, tall: float, turn: float = 0.0) -> Field:
        """Return an ellipse around (u, v) with half axes `wide` and `tall`, turned clockwise by `turn` radians."""
        c, s = math.cos(turn), math.sin(turn)
        du, dv = self.u - u, self.v - v
        return np.hypot((c * du + s * dv) / wide, (c * dv - s * du) / tall) - 1

    def box(self, u: float, v: float, wide: float, tall: float) -> Field:
        """Return a box around (u, v) with half sides `wide` and `tall`."""
        return np.maximum(np.abs(self.u - u) / wide, np.abs(self.v - v) / tall) - 1

    def limb(self, u0: float, v0: float, u1: float, v1: float, radius: float) -> Field:
        """Return a straight limb with round ends, from (u0, v0) to (u1, v1)."""
        du, dv = u1 - u0, v1 - v0
        along = np.clip(((self.u - u0) * du + (self.v - v0) * dv) / (du * du + dv * dv), 0, 1)
        return np.hypot(self.u - u0 - along * du, self.v - v0 - along * dv) / radius - 1

    def noise(self, cells: int) -> Field:
        return noise(len(self.u), self.rng, cells, cells)


def join(*forms: Field) -> Field:
    """Return the union of forms."""
    union: Field = np.minimum.reduce(forms)
    return union


def cactus(pen: Pen) -> Iterator[Layer]:
    skin, rib = pen.ink("green", "lime", "teal"), pen.ink("pine")
    left, right, tall = pen.vary(-0.1, 0.4), pen.vary(-0.2, 0.3), pen.vary(0.25, 0.55)
    ribs = 0.8 * stripes(pen.u * pen.vary(5, 7))
    spines = spots(pen.u * 9, pen.v * 7, pen.rng, 0.22)
    for side, at in ((-1, left), (1, right)):
        arm = join(pen.limb(0, at, side * 0.72, at, 0.2), pen.limb(side * 0.72, at, side * 0.72, at - tall, 0.2))
        yield Layer(arm, skin, rib, ribs)
    trunk = pen.limb(0, -0.75, 0, 1.0, pen.vary(0.32, 0.4))
    yield Layer(trunk, skin, rib, ribs)
    yield Layer(np.where(spines > 0.5, trunk, 1), pen.ink("cream"), pen.ink("cream"))
    bloom = pen.ink("pink", "coral", "gold")
    for turn in (-0.6, 0, 0.6):
        yield Layer(pen.ellipse(0.25 * turn, -1.12, 0.09, 0.2, turn), bloom, bloom)


def goldfish(pen: Pen) -> Iterator[Layer]:
    body, fin = pen.ink("orange", "orange", "coral", "gold"), pen.ink("cream", "gold", "coral")
    deep, sweep = pen.vary(0.42, 0.58), pen.vary(0.4, 0.7)
    rays = stripes(6 * np.arctan2(pen.v, pen.u + 0.2))
    tail = join(pen.ellipse(1.0, -0.3, 0.5, 0.24, -sweep), pen.ellipse(1.0, 0.3, 0.5, 0.24, sweep))
    yield Layer(tail, body, fin, rays)
    yield Layer(pen.ellipse(0.0, -deep, 0.42, 0.28, 0.2), body, fin, stripes(pen.u * 7 + pen.v))
    inx, iny, _ = lattice(pen.u * 6.5, pen.v * 6.5, pen.rng)
    scales = soft(np.hypot(inx - 0.5, iny) - 0.45, 0.3) * soft(pen.u + 0.45) * 0.6
    yield Layer(pen.ellipse(-0.1, 0, 0.85, deep), body, fin, scales + 0.5 * soft(pen.v - 0.15, 0.5))
    yield Layer(pen.ellipse(-0.05, 0.2, 0.26, 0.13, 0.6), body, fin, stripes(pen.u * 9))
    pupil = soft(-pen.ellipse(-0.62, -0.1, 0.07, 0.07))
    yield Layer(pen.ellipse(-0.6, -0.1, 0.13, 0.13), pen.ink("white"), pen.ink("black"), pupil)


def jellyfish(pen: Pen) -> Iterator[Layer]:
    bell, glow = pen.ink("violet", "pink", "sky", "coral"), pen.ink("white", "pink", "cream")
    wave, phase, count = pen.vary(4, 8), pen.vary(0, 6), 5 + pen.rng.integers(3)
    for i in range(count):
        at, long = -0.65 + 1.3 * i / (count - 1), pen.vary(0.75, 1.15)
        sway = pen.u - at - 0.1 * np.sin(wave * pen.v + phase + i) * (pen.v + 0.1)
        form = np.maximum(np.abs(sway) / (0.11 - 0.04 * pen.v), np.abs(pen.v - 0.4) / (long - 0.2)) - 1
        yield Layer(form, bell, glow, 0.25 + 0.5 * (i % 2))
    dome = np.where(pen.v < 0.05 + 0.06 * np.cos(14 * pen.u), pen.ellipse(0, 0.1, 0.92, pen.vary(0.85, 1.1)), 1)
    veins = stripes(np.arctan2(pen.u, 0.5 - pen.v) * pen.vary(1.8, 2.6))
    yield Layer(dome, bell, glow, 0.55 * veins + 0.4 * soft(pen.v + 0.1, 0.3))


def ladybird(pen: Pen) -> Iterator[Layer]:
    wing, black = pen.ink("red", "red", "orange", "gold"), pen.ink("black")
    wide, size = pen.vary(0.78, 0.95), pen.vary(1.9, 2.6)
    for v, reach in ((-0.45, -0.3), (0.0, 0.05), (0.45, 0.4)):
        yield Layer(pen.limb(-wide - 0.2, v + reach, wide + 0.2, v + reach, 0.07), black, black)
    yield Layer(pen.ellipse(0, -0.85, 0.45, 0.42), black, pen.ink("white"), spots(pen.u * 2, pen.v * 2, pen.rng, 0.2))
    dots = spots(np.abs(pen.u) * size + 0.5, pen.v * size + pen.vary(0, 1), pen.rng, 0.42)
    yield Layer(pen.ellipse(0, 0.05, wide, 0.95), wing, black, np.maximum(dots, soft(0.035 - np.abs(pen.u), 0.03)))


def mushroom(pen: Pen) -> Iterator[Layer]:
    cap, pale = pen.ink("red", "red", "orange", "brown"), pen.ink("cream", "white")
    wide, tall, size = pen.vary(0.85, 1.05), pen.vary(0.65, 0.95), pen.vary(2.2, 3.2)
    grain, gills = 0.6 * stripes(pen.u * 8 + pen.noise(4)), stripes(6 * np.arctan2(pen.u, 0.4 - pen.v))
    yield Layer(pen.ellipse(0, 0.55, pen.vary(0.26, 0.38), 0.62), pale, pen.ink("sand"), grain)
    yield Layer(pen.ellipse(0, 0.02, wide * 0.9, 0.2), pale, pen.ink("brown"), gills)
    dome = np.where(pen.v < 0.02 + 0.12 * np.cos(pen.u * 1.5), pen.ellipse(0, 0.1, wide, tall), 1)
    yield Layer(dome, cap, pale, spots(pen.u * size + pen.vary(0, 1), pen.v * size + pen.vary(0, 1), pen.rng, 0.4))


def orange(pen: Pen) -> Iterator[Layer]:
    peel, leaf = pen.ink("orange", "orange", "gold"), pen.ink("green", "lime", "pine")
    pores = spots(pen.u * 9, pen.v * 9, pen.rng, 0.35)
    pitted = 0.35 * pores + 0.3 * pen.noise(4)
    yield Layer(pen.ellipse(0, 0.1, 0.9, pen.vary(0.8, 0.95)), peel, pen.ink("brick"), pitted)
    for side in (-1, 1)[: 1 + pen.rng.integers(2)]:
        vein = soft(np.abs(pen.v + 0.85 - side * 0.3 * pen.u) - 0.03, 0.03)
        yield Layer(pen.ellipse(side * 0.42, -0.75, 0.45, 0.2, side * 0.3), pen.ink("lime"), leaf, vein)
    yield Layer(pen.limb(0, -0.95, 0, -0.65, 0.07), pen.ink("bark"), pen.ink("bark"))


def pine(pen: Pen) -> Iterator[Layer]:
    dark, tip = pen.ink("pine"), pen.ink("green", "teal", "lime", "white")
    tiers, wide = 3 + pen.rng.integers(3), pen.vary(0.75, 0.95)
    yield Layer(pen.box(0, 0.95, 0.14, 0.3), pen.ink("bark"), pen.ink("brown"), stripes(pen.u * 12))
    needles = stripes(pen.v * 7 + 2.5 * np.abs(pen.u) + pen.noise(24))
    for i in range(tiers):
        foot, half = 0.8 - 1.35 * i / tiers, wide * (1 - 0.65 * i / tiers)
        rise = 1.9 / tiers + 0.25
        skirt = foot + 0.06 * np.cos(pen.u * 24) - pen.v
        form = np.where((skirt > 0) & (skirt < rise), np.abs(pen.u) / (half * (1 - skirt / rise) + 1e-3), 2) - 1
        yield Layer(form, dark, tip, 0.75 * needles * soft(rise * 0.7 - skirt, rise))


def sunflower(pen: Pen) -> Iterator[Layer]:
    petal, stem, heart = pen.ink("gold", "gold", "orange", "coral"), pen.ink("green", "lime"), pen.vary(0.34, 0.46)
    petals, r, angle = 10 + pen.rng.integers(8), np.hypot(pen.u, pen.v + 0.2), np.arctan2(pen.v + 0.2, pen.u)
    yield Layer(pen.limb(0, 0.3, 0, 1.25, 0.08), stem, stem)
    yield Layer(pen.ellipse(0.35, 0.95, 0.36, 0.17, -0.5), stem, pen.ink("pine"), stripes(pen.u * 8))
    for turn, reach in ((0.5, 0.92), (0.0, 0.86)):
        lobe = np.abs(np.cos(petals / 2 * (angle + turn)))
        form = r / (reach * (0.6 + 0.4 * np.sqrt(lobe))) - 1
        yield Layer(form, pen.ink("brown"), petal, 0.45 + 0.55 * soft(r - heart, 0.5) * lobe)
    seeds = spots(angle * 20 / math.tau + r * 9, r * 12, pen.rng, 0.42)
    yield Layer(r / heart - 1, pen.ink("bark"), pen.ink("brown", "sand"), seeds)


def tower(pen: Pen) -> Iterator[Layer]:
    stone, joint = pen.ink("brick", "brick", "sand", "grey"), pen.ink("bark", "slate")
    wide, fine = pen.vary(0.5, 0.65), pen.vary(5, 7)
    wall = bricks(pen.u * fine, pen.v * fine, pen.rng)
    yield Layer(pen.box(0, 0.2, wide, 1.0), joint, stone, wall)
    top = wide + 0.15
    gaps = np.abs((pen.u / top * 2.5 + 0.5) % 1 - 0.5) > 0.28
    yield Layer(join(np.where(gaps, 1, pen.box(0, -1.0, top, 0.22)), pen.box(0, -0.75, top, 0.16)), joint, stone, wall)
    for v in (-0.3, 0.2):
        yield Layer(join(pen.box(0, v, 0.11, 0.14), pen.ellipse(0, v - 0.14, 0.11, 0.11)), pen.ink("black"), joint)
    door = join(pen.box(0, 1.0, 0.2, 0.2), pen.ellipse(0, 0.8, 0.2, 0.2))
    yield Layer(door, pen.ink("bark"), pen.ink("brown"), stripes(pen.u * 10))


def zebra(pen: Pen) -> Iterator[Layer]:
    coat, dark, neck = pen.ink("white", "cream"), pen.ink("black", "black", "bark"), pen.vary(-0.95, -0.7)
    wave, fine = 0.3 * pen.noise(5), pen.vary(3.5, 5)
    bands, hoops = stripes(pen.u * fine + 1.2 * wave + 0.5 * np.abs(pen.v)), stripes(pen.v * fine * 1.3 + wave)
    yield Layer(pen.limb(-0.8, -0.15, -1.05, 0.35, 0.06), coat, dark, hoops)
    for u in (-0.62, -0.4, 0.42, 0.62):
        leg = pen.limb(u, 0.2, u + pen.vary(-0.12, 0.12), 0.98, 0.12)
        yield Layer(leg, coat, dark, np.maximum(hoops, soft(pen.v - 0.95)))
    yield Layer(pen.limb(0.5, -0.35, 0.82, neck - 0.08, 0.2), dark, dark)
    yield Layer(pen.ellipse(0, 0, 0.88, 0.44), coat, dark, bands)
    yield Layer(pen.limb(0.62, -0.15, 0.92, neck, 0.21), coat, dark, hoops)
    yield Layer(pen.limb(0.84, neck - 0.1, 0.8, neck - 0.25, 0.07), coat, dark, 0.5)
    face = np.maximum(0.8 * stripes(pen.u * 5), soft(pen.u - 1.22))
    yield Layer(pen.limb(0.92, neck, 1.25, neck + 0.2, 0.17), coat, dark, face)


KINDS: dict[str, Callable[[Pen], Iterator[Layer]]] = {
    kind.__name__: kind
    for kind in (cactus, goldfish, jellyfish, ladybird, mushroom, orange, pine, sunflower, tower, zebra)
}
CLASSES: tuple[str, ...] = tuple(sorted(KINDS))
SLACK = 0.2  # largest part of an object outside the picture, in picture widths
_THREADS = "OPENBLAS_NUM_THREADS"  # of numpy's products


# ------------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Drawing:
    """Picture with the mask and the class of its object."""

    image: NDArray[np.uint8]  # [S, S, 3]
    mask: NDArray[np.bool_]  # [S, S], True on the object
    label: int  # index into CLASSES


def draw(index: int, size: int = 96, seed: int = 0) -> Drawing:
    """Draw picture `index` of the set.

    Args:
        index: Index of the picture in the set. Its label is index % 10.
        size: Width and height in pixels.
        seed: Seed of the set. The picture depends only on index, size and seed.
    """
    label, n = index % len(CLASSES), 2 * size
    kind = KINDS[CLASSES[label]]
    rng = np.random.default_rng((seed, index))
    object_seed, turn = int(rng.integers(2**62)), rng.uniform(-math.pi, math.pi)
    aspect = rng.uniform(0.92, 1.08) * (1 - 2 * int(rng.integers(2)))  # slim or stout, and facing left or right
    c, s = math.cos(turn), math.sin(turn)

    def layers(x: Field, y: Field) -> Iterator[Layer]:
        """Draw the object with the same seed each time, so that the rough pass measures the same object."""
        return kind(Pen((c * x + s * y) / aspect, (c * y - s * x) * abs(aspect), np.random.default_rng(object_seed)))

    # A rough pass measures the object, which is then scaled to a random area and placed at random.
    rough = np.linspace(-1.7, 1.7, 48, dtype=np.float32)
    covered = join(*(layer.form for layer in layers(*np.meshgrid(rough, rough)))) < 0
    spans = [rough[covered.any(axis)][[0, -1]] for axis in (0, 1)]  # left and right, top and bottom
    scale = math.sqrt(rng.uniform(0.2, 0.42) / (covered.mean() * 3.4**2))
    scale = min(scale, 1.02 / float(max(high - low for low, high in spans)))
    centre = [rng.uniform(*sorted((-scale * low - SLACK, 1 - scale * high + SLACK))) for low, high in spans]
    x, y = np.meshgrid(*((np.linspace(0, 1, n) - at).astype(np.float32) / scale for at in centre))

    picture, mask, sun = scene(n, rng), np.zeros((n, n), bool), rng.uniform(0, math.tau)
    light = 1 + rng.uniform(0.1, 0.3) * (math.cos(sun) * x + math.sin(sun) * y).astype(np.float32)
    object_pixels = np.zeros_like(picture)
    for layer in layers(x, y):
        inside = layer.form < 0
        pattern = np.broadcast_to(np.float32(layer.pattern), inside.shape)[inside]
        shade = light[inside] * (1 - 0.35 * (1 + layer.form[inside]) ** 4)
        object_pixels[inside] = (layer.low + pattern[:, None] * (layer.high - layer.low)) * shade[:, None]
        mask |= inside
    offset = n // 32  # a paper-cut shadow, away from the sun
    down, right = offset - round(-offset * math.sin(sun)), offset - round(-offset * math.cos(sun))
    picture[np.pad(mask, offset)[down : down + n, right : right + n]] *= 0.6
    picture = np.where(mask[..., None], object_pixels, picture) * np.float32(rng.uniform(0.9, 1.1))
    picture = np.clip(picture, 0, 1)
    # A tenth of the time of a mean over two axes, with the same bits.
    reduced = (picture[::2, ::2] + picture[::2, 1::2] + picture[1::2, ::2] + picture[1::2, 1::2]) / np.float32(4)
    return Drawing((255 * reduced + 0.5).astype(np.uint8), mask.reshape(size, 2, size, 2).mean((1, 3)) >= 0.5, label)


def write_set(
    folder: Path, images: int, size: int = 96, seed: int = 0, masks: Path | None = None, processes: int = 1
) -> None:
    """Write the first `images` pictures as folder/CLASS/00012.jpg, and masks as masks/CLASS/00012.png (0, 255).

    Args:
        folder: Folder for the pictures.
        images: Number of pictures.
        size: Width and height in pixels.
        seed: Seed of the set.
        masks: Folder for masks. If None, none are written.
        processes: Number of processes that draw; 1 draws in this one.
    """
    for root in filter(None, (folder, masks)):
        for name in CLASSES[:images]:
            (root / name).mkdir(parents=True, exist_ok=True)
    write = partial(_write, folder=folder, size=size, seed=seed, masks=masks)
    if processes == 1:
        write(range(images))
        return
    # Spawned: forking a process with torch's threads is unsafe. Each has its share, so none waits for another, and all
    # end soon if this process dies.
    make = get_context("spawn").Process
    workers = [make(target=write, args=(range(i, images, processes),), daemon=True) for i in range(processes)]
    try:
        with _for_children():
            for worker in workers:
                worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.pid:
                worker.kill()
    if any(worker.exitcode for worker in workers):
        raise DinoError("a process that draws has ended early", "free memory, and run the same command again")


@contextmanager
def _for_children() -> Iterator[None]:
    """Set for processes that start in the block: one thread each for products, and no Ctrl-C, which this one handles.

    For matrices this small, more threads only wait for each other.
    """
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "1"
    try:
        with held_back([signal.SIGINT]):
            yield
    finally:
        os.environ.pop(_THREADS)
        if before is not None:
            os.environ[_THREADS] = before


def _write(indices: Iterable[int], *, folder: Path, size: int, seed: int, masks: Path | None) -> None:
    for index in indices:
        drawing = draw(index, size, seed)
        stem = f"{CLASSES[drawing.label]}/{index:05d}"
        Image.fromarray(drawing.image).save(folder / f"{stem}.jpg", quality=92)
        if masks is not None:
            Image.fromarray(drawing.mask.astype(np.uint8) * 255).save(masks / f"{stem}.png")

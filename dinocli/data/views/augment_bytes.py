"""Augmentation of crops in bytes: the views of `augment`, for batches that stay on a CPU, in a fraction of its time.

Pixels are integers from the first operation to the last, and factors are fractions of 256. So every CPU makes the same
bytes, compiled or not. Each operation is within 2 levels of `augment`, which stays the definition of all operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.data.views.augment import blur_kernels, normalize
from dinocli.data.views.crops import Draws

Floats = NDArray[np.float32]
Levels = NDArray[np.uint16]  # 0 to 255 between operations; products within one need 16 bits
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _ROTATE = range(5)
_GRAY = (77, 150, 29)  # weights of red, green and blue, in fractions of 256
_REACH = 6  # pixels that the largest blur reaches
_SHORT = 3 * _REACH  # pixels; the blur matrix of a line of this length has all that longer ones need
_CACHED = 2**18  # numbers to normalize at once, so that they stay in the cache
_FINE = 2**15  # float32 adds up 255 times as much without rounding


class Step(NamedTuple):
    """One operation of color jitter.

    Attributes:
        operation: Index of the operation. Hue shifts beyond a sixth of the circle rotate the channels first.
        amount: Factor, or shift in sixths of the circle, in fractions of `one`. For a rotation, number of channels.
        one: 256, or 128 for factors above 1, whose products would not fit. For hue, the sign of the shift.
    """

    operation: int
    amount: int
    one: int


class Blur(NamedTuple):
    """Blur along a line.

    Attributes:
        weights: Weights of a pixel and of its neighbours at distance 1, 2, ..., in fractions of 256. Empty for a short
            line, which has only ends.
        ends: Blur of the first n pixels of a line from its first m, in fractions of 32768. The other end is its mirror
            image. [n, m]
    """

    weights: list[int]
    ends: Floats


class Changes(NamedTuple):
    """Operations on one crop, in order. Operations that change nothing are omitted.

    Attributes:
        flip: True to mirror the crop.
        jitter: Color jitter.
        gray: True to convert to grey.
        blur: Blur, or None.
        solarize: True to solarize.
    """

    flip: bool
    jitter: list[Step]
    gray: bool
    blur: Blur | None
    solarize: bool

    def flip_only(self) -> Changes:
        """Return the flip, without other operations."""
        return Changes(self.flip, [], False, None, False)


def changes(draws: Draws, sizes: Sequence[int]) -> list[list[Changes]]:
    """Return the operations on each view of each image. [V][B]

    Args:
        draws: Random draws. [V, B, ...]
        sizes: Side of each view in pixels. [V]
    """
    blurs: list[list[Blur | None]] = []
    for size, views in groupby(range(len(sizes)), sizes.__getitem__):
        blurs += _blurs(draws.radius[list(views)], size)
    drawn = zip(*(values.tolist() for values in draws._replace(radius=draws.gray)), blurs, strict=True)
    return [
        [
            Changes(flip, [step for o in order for step in _steps(o, factors[o])], gray, blur, solarize)
            for flip, factors, order, gray, _, solarize, blur in zip(*view, strict=True)
        ]
        for view in drawn
    ]


def _steps(operation: int, factor: float) -> list[Step]:
    if operation != _HUE:
        one = 256 if factor <= 1 else 128
        return [Step(operation, round(factor * one), one)] if factor != 1 else []
    shift, rotation = 6 * factor, []
    if abs(shift) > 1:  # a third of the circle exchanges the channels
        third = 1 if shift > 0 else -1
        shift, rotation = shift - 2 * third, [Step(_ROTATE, -third % 3, 0)]
    amount = round(256 * abs(shift))
    return [*rotation, Step(_HUE, amount, 1 if shift > 0 else -1)] if amount else rotation


def _blurs(radius: Tensor, size: int) -> list[list[Blur | None]]:
    drawn = radius > 0
    kernels = blur_kernels(radius[drawn], min(size, _SHORT), radius.device).numpy()  # [n, short, short]
    ends = np.rint(kernels * _FINE)
    if size < _SHORT:
        blurs = iter([Blur([], e) for e in ends[:, : (size + 1) // 2]])
    else:
        # Round sums of the outer weights, not weights, so that no errors add up at an edge.
        middle = _SHORT // 2
        sums = np.rint(256 * kernels[:, middle, middle - _REACH : middle].cumsum(1)).astype(int)
        blurs = iter([_blur(outer, e) for outer, e in zip(sums.tolist(), ends, strict=True)])
    return [[next(blurs) if one else None for one in view] for view in drawn.tolist()]


def _blur(sums: list[int], ends: Floats) -> Blur:
    outer = [after - before for before, after in zip([0, *sums[:-1]], sums, strict=True)]  # from far to near
    while len(outer) > 1 and not outer[0]:
        del outer[0]
    reach = len(outer)
    return Blur([256 - 2 * sums[-1], *reversed(outer)], ends[:reach, : 2 * reach])


class ByteAugmenter:
    """Augmentation of crops of one shape, with numpy.

    Args:
        channels: Number of channels C. Saturation, grey and hue need three.
        size: Side of the crops in pixels.
    """

    # 16-bit integers: numpy multiplies as many bytes no faster, and half as many floats in the same time.

    def __init__(self, channels: int, size: int) -> None:
        shape = (channels, size, size)
        self._levels, self._other, self._work = (np.empty(shape, np.uint16) for _ in range(3))
        self._planes = np.empty((4, size, size), np.uint16)
        self._white = np.full(shape, 255, np.uint16)  # numpy takes minima with a number in five times the time

    def __call__(self, crop: Tensor, changes: Changes) -> None:
        """Replace a crop by its view, in the same memory. [H, H, C] to [C, H, H], uint8"""
        pixels, x = crop.numpy(), self._levels
        np.copyto(x, (pixels[:, ::-1] if changes.flip else pixels).transpose(2, 0, 1))
        for step in changes.jitter:
            self._jitter(x, step)
        if changes.gray:
            x = self._gray(x)  # one channel until the end
        if changes.blur:
            self._blur(x, changes.blur)
        if changes.solarize:
            inverted = np.right_shift(x, 7, out=self._work[: len(x)])
            inverted *= 255
            x ^= inverted
        np.copyto(pixels.reshape(self._levels.shape), x, casting="unsafe")

    def _jitter(self, x: Levels, step: Step) -> None:
        if step.operation == _BRIGHTNESS:
            self._blend(x, step, None)
        elif step.operation == _CONTRAST:
            self._blend(x, step, self._mean(x))
        elif step.operation == _SATURATION:
            self._blend(x, step, self._gray(x))
        elif step.operation == _HUE:
            self._turn_hue(x, step)
        else:
            x[:] = np.roll(x, -step.amount, 0)

    def _mean(self, x: Levels) -> Levels:
        """Return the mean gray in every pixel, or without colors each channel's mean."""
        sums, area = x.reshape(len(x), -1).sum(1, dtype=np.uint32).tolist(), x[0].size
        if len(x) == 3:
            gray = sum(weight * total for weight, total in zip(_GRAY, sums, strict=True))
            self._planes[0] = (gray + 128 * area) // (256 * area)
            return self._planes[:1]
        for plane, total in zip(self._work, sums, strict=True):
            plane[:] = (2 * total + area) // (2 * area)
        return self._work

    def _gray(self, x: Levels) -> Levels:
        gray, part = self._planes[:2]
        np.multiply(x[0], _GRAY[0], out=gray)
        for channel, weight in zip(x[1:], _GRAY[1:], strict=True):
            gray += np.multiply(channel, weight, out=part)
        gray += 128
        gray >>= 8
        return gray[None]

    def _blend(self, x: Levels, step: Step, other: Levels | None) -> None:
        """Blend with other levels, or with black, in place. The levels of `other` are lost."""
        _, scale, one = step
        x *= scale
        if other is None:
            x += one // 2
        elif one == 256:
            other *= one - scale
            other += one // 2
            x += other
        else:
            other *= scale - one
            np.maximum(x, other, out=x)  # the difference must not fall below 0
            other -= one // 2
            x -= other
        x >>= 8 if one == 256 else 7
        if one == 128:
            np.minimum(x, self._white, out=x)

    def _turn_hue(self, x: Levels, step: Step) -> None:
        """Shift the hue by at most a sixth of the circle, without a division.

        Along the circle, a channel stays high for a third, falls for a sixth, stays low for a third, and rises for a
        sixth. The difference of the other two does the same a quarter of the circle apart. Where it exceeds the chroma
        less the shift, the channel moves by the excess.
        """
        high, low, chroma, most = (plane.view(np.int16) for plane in self._planes)
        levels, excess, inner = (a.view(np.int16) for a in (x, self._other, self._work))
        red, green, blue = levels
        np.maximum(np.maximum(red, green, out=high), blue, out=high)
        np.minimum(np.minimum(red, green, out=low), blue, out=low)
        np.subtract(high, low, out=chroma)
        shift = np.multiply(chroma.view(np.uint16), step.amount, out=most.view(np.uint16))
        shift += 128
        shift >>= 8
        np.subtract(chroma, most, out=most)
        least = np.negative(most, out=chroma)
        for i, (one, other) in enumerate(((green, blue), (blue, red), (red, green))):
            np.subtract(one, other, out=excess[i])
        excess -= np.minimum(np.maximum(excess, least, out=inner), most, out=inner)
        if step.one > 0:
            levels -= excess
        else:
            levels += excess
        np.minimum(np.maximum(levels, low, out=levels), high, out=levels)

    def _blur(self, x: Levels, blur: Blur) -> None:
        other = self._other[: len(x)]
        for pixels, out, along in ((x, other, 1), (other, x, x.shape[2])):
            if blur.weights:
                self._blur_along(pixels, out, blur.weights, along)
            if along == 1:
                _blur_ends(pixels.swapaxes(1, 2), out.swapaxes(1, 2), blur.ends)
            else:
                _blur_ends(pixels, out, blur.ends)

    def _blur_along(self, x: Levels, out: Levels, weights: list[int], along: int) -> None:
        """Blur all but the ends of lines, whose neighbouring pixels are `along` pixels apart in memory."""
        # All lines are one line here. So only the ends of each get wrong values, and those are replaced.
        margin, line = (len(weights) - 1) * along, x.reshape(-1)
        start, stop = margin, x.size - margin
        total = np.multiply(line[start:stop], weights[0], out=out.reshape(-1)[start:stop])
        total += 128
        pair = self._work[: len(x)].reshape(-1)[start:stop]
        for shift, weight in zip(range(along, margin + 1, along), weights[1:], strict=True):
            np.add(line[start - shift : stop - shift], line[start + shift : stop + shift], out=pair)
            pair *= weight
            total += pair
        total >>= 8


def _blur_ends(x: Levels, out: Levels, ends: Floats) -> None:
    """Blur both ends of lines, where Pillow repeats the border in each of its three passes. [C, along, across]"""
    reach, taps = ends.shape
    pixels = np.empty((2, len(x), taps, x.shape[2]), np.float32)
    pixels[0], pixels[1] = x[:, :taps], x[:, : -taps - 1 : -1]
    blurred = ends @ pixels  # integers
    blurred += _FINE / 2
    blurred /= _FINE
    np.copyto(out[:, :reach], blurred[0], casting="unsafe")
    np.copyto(out[:, : -reach - 1 : -1], blurred[1], casting="unsafe")


def normalize_bytes(views: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return normalized views from crops that an augmenter has replaced.

    Args:
        views: Views in the memory of crops. [V, B, H, H, C], uint8
        mean: Channel means of the data. [C]
        std: Channel standard deviations of the data. [C]

    Returns:
        Normalized views. [V, B, C, H, H], float32
    """
    count, images, size, _, channels = views.shape
    views = views.reshape(count * images, channels, size, size)
    out = torch.empty(views.shape, device=views.device)
    step = max(1, _CACHED // out[0].numel())
    for i in range(0, len(out), step):
        normalize(out[i : i + step].copy_(views[i : i + step]), 255 * mean, 255 * std)
    return out.unflatten(0, (count, images))

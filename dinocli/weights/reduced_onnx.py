"""ONNX graphs in float16 and int8, with their distance from float32 and their speed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import Source
from dinocli.features.encoder import Encoder, TokenChoice
from dinocli.weights.graphs import GraphShape, Loaded, load_onnx

OnnxPrecision = Literal["float32", "float16", "int8"]
_IMAGES = 256  # most images that are read, half of them for the calibration
_NOISE = 64  # random images without any
_BATCH = 8
_REPEATS = 5
_LEAST_COSINE = 0.9  # below, the features are others
_PRODUCTS = ["MatMul", "Gemm"]


@dataclass(frozen=True)
class Reduced:
    """Measurements of a reduced graph.

    Attributes:
        precision: `float16` or `int8`.
        cosine: Mean cosine of its features to those of the float32 graph.
        least: Smallest cosine.
        images: Number of images compared.
        noise: True if these are random numbers.
        batch_effect: Difference between an image's features alone and in a batch of 8, in their standard deviations;
            root mean square over the images.
        milliseconds: Time per image in onnxruntime on the CPU, in batches of 8; median of five.
        milliseconds_float32: The same of the float32 graph.
        bytes: Size of the file.
        bytes_float32: Size of the float32 file.
    """

    precision: OnnxPrecision
    cosine: float
    least: float
    images: int
    noise: bool
    batch_effect: float
    milliseconds: float
    milliseconds_float32: float
    bytes: int
    bytes_float32: int


def reduce_onnx(
    path: Path,
    precision: OnnxPrecision,
    encoder: Encoder,
    tokens: TokenChoice,
    shape: GraphShape,
    source: Source | None = None,
) -> Reduced:
    """Replace a float32 graph by one in float16 or int8, and compare the two.

    float16 converts weights and operations; inputs and outputs stay float32. int8 quantizes the weights of matrix
    products per channel and their inputs at run time; with images, it also quantizes convolutions, with ranges that
    are calibrated on half of the images. The other half is for the comparison. Ranges at run time are those of a whole
    batch, so that an image's features depend on the others in it; calibrated ranges are fixed.

    Raises:
        DinoError: If the graph has nothing to quantize, or its features are not finite or have a mean cosine below 0.9.
    """
    images = _read_images(encoder, shape.size, source)
    compared = images[1::2] if source and len(images) > 1 else images
    plain, size = load_onnx(path), path.stat().st_size
    expected, slow = _run(plain, compared)
    if precision == "float16":
        _to_float16(path)
    else:
        logging.disable(logging.WARNING)  # onnxruntime advises, on the root logger, to optimize the graph first
        try:
            _quantize_products(path) if source is None else _quantize_calibrated(path, images[::2])
        finally:
            logging.disable(logging.NOTSET)
    reduced = load_onnx(path)
    made, quick = _run(reduced, compared)
    hint = "--precision float32" if precision == "float16" else "--precision float16, or calibrate with --images IMAGES"
    if bad := made.numel() - int(made.isfinite().sum()):
        raise DinoError(f"{bad:,} of {made.numel():,} features in {precision} are not finite", hint)
    cosines = torch.cosine_similarity(expected.flatten(1).double(), made.flatten(1).double())
    mean, least = float(cosines.mean()), float(cosines.min())
    if not mean >= _LEAST_COSINE:
        raise DinoError(
            f"the features in {precision} have a mean cosine of {mean:.3f} to those in float32; expected "
            f"{_LEAST_COSINE} or more",
            hint,
        )
    effect = _batch_effect(reduced, compared, made)
    return Reduced(
        precision, mean, least, len(compared), source is None, effect, quick, slow, path.stat().st_size, size
    )


def _batch_effect(loaded: Loaded, images: Tensor, together: Tensor) -> float:
    """Return the difference that the other images of a batch make, whose extremes scale all in dynamic quantization."""
    if len(images) < 2:
        return 0.0
    alone = torch.cat([loaded(image) for image in images.split(1)])
    spread = (together - together.mean(0)).square().mean().sqrt()
    return float((alone - together).square().mean().sqrt() / spread.clamp_min(1e-12))


def _read_images(encoder: Encoder, size: int, source: Source | None) -> Tensor:
    """Return normalized images of a source, or noise. [N, C, size, size]"""
    if source is None:
        shape = (_NOISE, encoder.channels, size, size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batches = encoder.batches(source, size=size, batch_size=_BATCH, workers=0)
    read = [batch.images for batch in islice(batches, _IMAGES // _BATCH) if len(batch.images)]
    if not read:
        raise DinoError(f"none of the first {_IMAGES} images of {source.where} can be read", "check those files")
    return torch.cat(read)


def _run(loaded: Loaded, images: Tensor) -> tuple[Tensor, float]:
    """Return the features of images, and the milliseconds per image."""
    features = torch.cat([loaded(batch) for batch in images.split(_BATCH)])
    batch, seconds = images[:_BATCH], []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        loaded(batch)
        seconds.append(time.perf_counter() - start)
    return features, 1000 * float(np.median(seconds)) / len(batch)


def _to_float16(path: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def _quantize_products(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    if not any(node.op_type in _PRODUCTS and weights & set(node.input) for node in model.graph.node):
        raise DinoError(
            "this network has no matrix products with weights, which int8 quantizes without images",
            "calibrate its convolutions with --images IMAGES",
        )
    quantize_dynamic(model, path, op_types_to_quantize=_PRODUCTS, per_channel=True, weight_type=QuantType.QInt8)


def _quantize_calibrated(path: Path, images: Tensor) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.numpy()}

    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    # Attention's products of two activations stay in float32: their ranges vary most.
    kept = [node.name for node in model.graph.node if node.op_type in _PRODUCTS and not weights & set(node.input)]
    quantize_static(
        model,
        path,
        Reader(),
        op_types_to_quantize=[*_PRODUCTS, "Conv"],
        nodes_to_exclude=kept,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )

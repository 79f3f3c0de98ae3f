from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import open_source
from dinocli.features.encoder import Encoder
from dinocli.weights import reduced_onnx
from dinocli.weights.graphs import GraphShape, load_onnx
from dinocli.weights.reduced_onnx import OnnxPrecision, reduce_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SHAPE = GraphShape(16)


def graph(path: Path, *, scale: float = 1.0, product: bool = True) -> Path:
    """Write a network of one convolution and one matrix product: images [B, 3, 16, 16] to features [B, 6]."""
    helper, numbers = onnx.helper, np.random.default_rng(0)
    conv = numbers.standard_normal((5, 3, 8, 8)).astype(np.float32) / 10
    weight = numbers.standard_normal((20, 6)).astype(np.float32) * scale
    nodes = [
        helper.make_node("Conv", ["images", "conv"], ["map"], strides=[8, 8]),
        helper.make_node("Flatten", ["map"], ["features" if not product else "flat"]),
    ]
    stored = [onnx.numpy_helper.from_array(conv, "conv")]
    if product:
        nodes.append(helper.make_node("MatMul", ["flat", "weight"], ["features"], name="product"))
        stored.append(onnx.numpy_helper.from_array(weight, "weight"))
    kinds = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("images", ["batch", 3, 16, 16]), ("features", ["batch", 6 if product else 20]))
    ]
    made = helper.make_graph(nodes, "network", kinds[:1], kinds[1:], stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"dinocli": "x", "mean": json.dumps([0.5])})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("precision", "least"), [("float16", 0.99999), ("int8", 0.999)])
def test_a_reduced_graph_is_smaller_and_its_distance_is_measured(
    tmp_path: Path, encoder: Encoder, precision: OnnxPrecision, least: float
) -> None:
    path = graph(tmp_path / "x.onnx")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    expected = load_onnx(path)(images)
    before = path.stat().st_size
    reduced = reduce_onnx(path, precision, encoder, "cls", SHAPE)
    made = load_onnx(path)(images)
    assert made.dtype == torch.float32 and not torch.equal(made, expected)
    assert torch.cosine_similarity(expected, made).min() > least
    assert least < reduced.least <= reduced.cosine <= 1 + 1e-9
    assert (reduced.images, reduced.noise, reduced.bytes) == (64, True, path.stat().st_size)
    assert reduced.bytes_float32 == before
    assert min(reduced.milliseconds, reduced.milliseconds_float32) > 0
    props = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert props["mean"] == "[0.5]"
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert (onnx.TensorProto.FLOAT16 if precision == "float16" else onnx.TensorProto.INT8) in kinds


def test_the_effect_of_a_batch_on_its_images_is_measured_and_calibration_avoids_it(
    tmp_path: Path, encoder: Encoder
) -> None:
    """Dynamic quantization scales the inputs of a product by the extremes of the whole batch."""
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # the noise that is compared
    for precision, least, most in (("int8", 0.002, 0.1), ("float16", 0, 0.0005)):
        path = graph(tmp_path / f"{precision}.onnx")
        effect = reduce_onnx(path, precision, encoder, "cls", SHAPE).batch_effect  # type: ignore[arg-type]
        assert least <= effect < most
        made = load_onnx(path)
        together = np.concatenate([made(images[i : i + 8]) for i in range(0, 64, 8)])
        alone = np.concatenate([made(image[None]) for image in images])
        assert effect == pytest.approx(np.sqrt(((alone - together) ** 2).mean() / together.var(0).mean()), rel=0.01)
    source = open_source(str(write_images(tmp_path / "images", 32, 16)))
    path = graph(tmp_path / "calibrated.onnx")
    assert reduce_onnx(path, "int8", encoder, "cls", SHAPE, source).batch_effect < 1e-6


def test_int8_without_images_needs_a_product(tmp_path: Path, encoder: Encoder) -> None:
    path = graph(tmp_path / "x.onnx", product=False)
    with pytest.raises(DinoError, match="no matrix products") as error:
        reduce_onnx(path, "int8", encoder, "cls", SHAPE)
    assert error.value.hint == "calibrate its convolutions with --images IMAGES"


def test_images_calibrate_convolutions_too(tmp_path: Path, encoder: Encoder) -> None:
    path = graph(tmp_path / "x.onnx", product=False)
    source = open_source(str(write_images(tmp_path / "images", 9, 16)))
    reduced = reduce_onnx(path, "int8", encoder, "cls", SHAPE, source)
    assert (reduced.images, reduced.noise) == (4, False), "the other five are for the calibration"
    assert reduced.cosine > 0.99
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in onnx.load(path).graph.initializer}


def test_features_that_overflow_are_refused(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced_onnx, "_to_float16", lambda path: graph(path, scale=np.inf))
    with pytest.raises(DinoError, match="384 of 384 features in float16 are not finite") as error:
        reduce_onnx(graph(tmp_path / "x.onnx"), "float16", encoder, "cls", SHAPE)
    assert error.value.hint == "--precision float32"


def test_other_features_are_refused(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced_onnx, "_quantize_products", lambda path: graph(path, scale=-1))
    with pytest.raises(DinoError, match=r"mean cosine of -1\.000 .*expected 0\.9 or more") as error:
        reduce_onnx(graph(tmp_path / "x.onnx"), "int8", encoder, "cls", SHAPE)
    assert error.value.hint == "--precision float16, or calibrate with --images IMAGES"

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROTARY, random_images, write_run

from dinocli.core.errors import DinoError
from dinocli.features.encoder import Encoder
from dinocli.weights import graphs
from dinocli.weights.export import ENDINGS, Format, export
from dinocli.weights.graphs import GraphShape, load_onnx
from dinocli.weights.load import load_encoder

CPU = torch.device("cpu")


def test_a_free_size_is_traced_with_sides_that_differ(encoder: Encoder) -> None:
    assert GraphShape(16).example(encoder).shape == (2, 3, 16, 16)
    assert list(GraphShape(16).dimensions(encoder)) == [0]
    assert GraphShape(16, free=True).example(encoder).shape == (2, 3, 16, 24)
    assert list(GraphShape(16, free=True).dimensions(encoder)) == [0, 2, 3]


def test_a_network_that_cannot_be_traced_is_one_error(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no rule for this\nmore lines")

    monkeypatch.setattr(torch.export, "export", fail)
    for shape, hint in (
        (GraphShape(16), "--to timm"),
        (GraphShape(16, free=True), "omit --any-size, or use --to timm"),
    ):
        with pytest.raises(DinoError, match=r"cannot export a graph of this network: no rule for this\n") as error:
            graphs.write_torch_export(encoder, "cls", shape, Path("x.pt2"))
        assert error.value.hint == hint


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize(
    "changes",
    [[], ["backbone.positions=bicubic"], ["backbone.positions=antialias"], ROTARY],
    ids=["dino", "bicubic", "antialias", "rotary"],
)
def test_a_graph_takes_images_of_any_size(tmp_path: Path, to: Format, changes: list[str]) -> None:
    source, out = write_run(tmp_path, *changes), tmp_path / f"out{ENDINGS[to]}"
    done = export(str(source), to, out, any_size=True)
    assert done.difference < 1e-5
    encoder = load_encoder(str(source), CPU)
    loaded = load_onnx(out) if to == "onnx" else torch.export.load(out).module()
    for height, width in ((48, 48), (24, 24), (24, 72), (104, 56)):
        images = random_images(104)[:, :, :height, :width].contiguous()
        torch.testing.assert_close(loaded(images), encoder.features(images), rtol=1e-4, atol=1e-5)
    if to == "onnx":
        import onnx

        assert json.loads({p.key: p.value for p in onnx.load(out).metadata_props}["any_size"]) is True

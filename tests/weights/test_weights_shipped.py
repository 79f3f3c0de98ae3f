from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dinocli
from dinocli.apps.demo.drawings import draw
from dinocli.core.errors import DinoError
from dinocli.features.store import Provenance
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.identify import kind_of
from dinocli.weights.maker import checkpoints_of
from dinocli.weights.shipped import names, place_of


def test_the_network_that_comes_with_the_package() -> None:
    assert names() == ["mini"]
    assert place_of(Path("runs/x")) == Path("runs/x")
    assert kind_of("dinocli:mini") == "weights"
    weights = read_weights(Path("dinocli:mini"))
    assert weights.preset
    assert (weights.preset.backbone.options["embed_dim"], weights.step) == (128, 3600)


@pytest.mark.parametrize("name", names())
def test_the_header_is_complete(name: str) -> None:
    with place_of(Path(f"dinocli:{name}")).open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode()
    assert "__metadata__" in header
    assert "TODO" not in header


def test_another_name_is_refused() -> None:
    with pytest.raises(DinoError, match="no network dinocli:maxi comes with the package; expected dinocli:mini"):
        read_weights(Path("dinocli:maxi"))


def test_it_tells_drawn_things_apart_better_than_its_untrained_twin() -> None:
    drawings = [draw(i, size=64) for i in range(100)]
    labels = torch.tensor([drawing.label for drawing in drawings])

    def same_kind(source: str) -> float:
        encoder = dinocli.load(source, device="cpu", precision="float32")
        features = torch.nn.functional.normalize(encoder([drawing.image for drawing in drawings]), dim=1)
        nearest = (features @ features.T).fill_diagonal_(-2).argmax(1)
        return float((labels[nearest] == labels).float().mean())

    assert same_kind("dinocli:mini") > same_kind("untrained:mini") + 0.1


def test_features_of_it_name_it_as_their_maker(tmp_path: Path) -> None:
    provenance = Provenance("dinocli:mini", "0", "cls", 1, 64, "data")
    assert checkpoints_of(provenance, tmp_path) == ["dinocli:mini"]

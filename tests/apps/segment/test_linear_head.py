from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinocli.apps.segment import linear_head as module
from dinocli.apps.segment.linear_head import PatchClassifier, SegmentationHead, read_head, train_head, write_head
from dinocli.apps.segment.pairs import LabelledSet, Pairs, labelled_set
from dinocli.core.errors import DinoError
from dinocli.features.encoder import Encoder, NotFinite

COLORS = np.array([[30, 30, 200], [200, 40, 40], [230, 230, 60]])


def scenes(folder: Path, count: int, border: int = 0) -> LabelledSet:
    """Write blue photos with a patch-aligned block of red or yellow, and masks whose top `border` rows are ignored."""
    random = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        truth = np.zeros((6, 6 + i % 3), dtype=np.uint8)
        row, column = random.integers(0, 3, 2)
        truth[row : row + 3, column : column + 3] = 1 + i % 2
        large = truth.repeat(8, 0).repeat(8, 1)
        photo = COLORS[large] + random.normal(0, 8, (*large.shape, 3))
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        large[:border] = 255
        Image.fromarray(large).save(folder / "masks" / f"{i}.png")
    return labelled_set(folder)


def test_a_head_learns_and_is_compared_with_the_commonest_class(tmp_path: Path, encoder: Encoder) -> None:
    data = scenes(tmp_path / "data", 20, border=4)
    stages = []
    head, result = train_head(
        encoder,
        data,
        tmp_path / "out" / "patches",
        short_side=48,
        epochs=40,
        batch_size=4,
        report=lambda stage, done, of: stages.append((stage, done, of)),
    )
    assert result.head.miou > 75
    assert result.head.accuracy > 90
    assert set(result.head.iou) <= {"0", "1", "2"}
    assert result.commonest == "0"
    assert result.baseline.iou["0"] == pytest.approx(result.baseline.accuracy)
    assert result.baseline.miou == pytest.approx(result.baseline.accuracy / len(result.head.iou))
    assert (result.train_photos, result.val_photos, result.split_off) == (18, 2, True)
    assert {"features", "train", "measure"} == {stage for stage, _, _ in stages}
    assert ("train", 160, 160) in stages
    again, _ = train_head(encoder, data, tmp_path / "patches", short_side=48, epochs=40, batch_size=4)
    torch.testing.assert_close(head.weight, again.weight, rtol=0, atol=0)


def test_the_loss_is_the_cross_entropy_of_enlarged_logits_over_labelled_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5
    method = PatchClassifier(5, 3, mean, std)
    with torch.no_grad():
        method.linear.weight.normal_(generator=generator)
        method.linear.bias.normal_(generator=generator)
    part, losses = [], []
    for rows, columns in ((2, 3), (4, 2)):
        features = torch.randn(rows, columns, 5, generator=generator)
        truth = torch.randint(0, 3, (8 * rows, 8 * columns), generator=generator)
        truth[:3] = 255
        part.append((features, truth))
        logits = ((features - mean) / std) @ method.linear.weight.T + method.linear.bias
        large = F.interpolate(logits.permute(2, 0, 1)[None], truth.shape, mode="bilinear")[0].flatten(1).log_softmax(0)
        flat = truth.flatten()
        losses += [-large[flat[i], i] for i in range(len(flat)) if flat[i] != 255]
    torch.testing.assert_close(method(part)["cross_entropy"], torch.stack(losses).mean())
    features, truth = part[0]
    assert method([(features, torch.full_like(truth, 255))])["cross_entropy"] == 0
    weight, bias = method.folded()
    torch.testing.assert_close(F.linear(features, weight, bias), method.linear((features - mean) / std).detach())


def test_scores_equal_a_plain_count() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 3, 500), random.integers(0, 4, 500)
    table = np.zeros((4, 4), dtype=np.int64)
    np.add.at(table, (truth, predicted), 1)
    scores = module._compute_scores(table, list("abcd"))
    expected = {
        name: 100 * ((truth == i) & (predicted == i)).sum() / ((truth == i) | (predicted == i)).sum()
        for i, name in enumerate("abc")
    }
    assert scores.iou == pytest.approx(expected), "a predicted class that is not in the truth lowers the others"
    assert scores.miou == pytest.approx(np.mean(list(expected.values())))
    assert scores.accuracy == pytest.approx(100 * (truth == predicted).mean())


def random_head(encoder: Encoder, classes: int = 7) -> SegmentationHead:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(classes, 16, generator=generator), torch.randn(classes, generator=generator)
    return SegmentationHead(weight, bias, [f"class {i}" for i in range(classes)], 48, encoder.fingerprint)


def test_the_number_of_logits_at_once_does_not_change_the_classes(
    monkeypatch: pytest.MonkeyPatch, encoder: Encoder
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    head = random_head(encoder)
    whole = head.classify(encoder, pixels)
    tokens = encoder.patches(encoder.photo(pixels, 48))[0]
    logits = F.linear(tokens, head.weight, head.bias).permute(2, 0, 1)[None]
    wanted = F.interpolate(logits, (70, 50), mode="bilinear")[0].argmax(0).numpy()
    np.testing.assert_array_equal(whole, wanted)
    monkeypatch.setattr(module, "_AT_ONCE", 2 * 70 * 50)
    np.testing.assert_array_equal(head.classify(encoder, pixels), whole)


def test_a_head_is_read_back_only_for_its_own_encoder(tmp_path: Path, encoder: Encoder) -> None:
    head, path = random_head(encoder), tmp_path / "head.safetensors"
    write_head(path, head)
    again = read_head(path, encoder)
    torch.testing.assert_close(again.weight, head.weight, rtol=0, atol=0)
    torch.testing.assert_close(again.bias, head.bias, rtol=0, atol=0)
    assert (again.classes, again.short_side) == (head.classes, 48)
    with pytest.raises(DinoError, match="other weights"):
        read_head(path, replace(encoder, fingerprint="4567"))
    with pytest.raises(DinoError, match="does not exist"):
        read_head(tmp_path / "gone", encoder)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DinoError, match="no segmentation head"):
        read_head(path, encoder)


def test_unreadable_photos_are_reported_and_an_error_if_all_are(tmp_path: Path, encoder: Encoder) -> None:
    data = scenes(tmp_path / "data", 20)
    some = next(iter(data.train.masks))
    some.write_bytes(b"no image")
    _, result = train_head(encoder, data, tmp_path / "patches", short_side=16, epochs=1)
    assert list(result.skipped) == [str(some)]
    assert result.train_photos == 17
    for part in ({"train": Pairs({some: data.train.masks[some]})}, {"val": Pairs({some: data.train.masks[some]})}):
        with pytest.raises(DinoError, match="none of the photos"):
            train_head(encoder, replace(data, **part), tmp_path / "patches", short_side=16, epochs=1)


def test_photos_without_storable_patches_are_skipped_and_void_masks_are_an_error(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scenes(tmp_path / "data", 10)
    patches, calls = type(encoder).patches, []

    def spoiled(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise NotFinite("not finite: 1 of 9 values of patches")
        return patches(self, images) * (1e6 if len(calls) == 3 else 1)

    monkeypatch.setattr(type(encoder), "patches", spoiled)
    _, result = train_head(encoder, data, tmp_path / "patches", short_side=48, epochs=1, batch_size=4)
    reasons = sorted(reason.partition(":")[0] for reason in result.skipped.values())
    assert reasons == ["not finite", "too large for float16"]
    monkeypatch.undo()
    for mask in data.val.masks.values():
        Image.fromarray(np.full_like(np.array(Image.open(mask)), 255)).save(mask)
    with pytest.raises(DinoError, match="no pixel of the 1 validation masks"):
        train_head(encoder, data, tmp_path / "patches", short_side=48, epochs=1, batch_size=4)


def test_a_head_that_is_not_finite_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    head = SegmentationHead(torch.ones(2, 16), torch.tensor([0.0, torch.nan]), ["a", "b"], 16, encoder.fingerprint)
    write_head(tmp_path / "head.safetensors", head)
    with pytest.raises(DinoError, match="its weights are not finite"):
        read_head(tmp_path / "head.safetensors", encoder)

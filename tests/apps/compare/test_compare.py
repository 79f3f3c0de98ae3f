from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinocli.apps.compare.compare import Comparison, Figures, align, compare, measure, state_difference
from dinocli.core.errors import DinoError
from dinocli.evals.bootstrap import Difference, paired_difference
from dinocli.features.encoder import Encoder
from dinocli.features.store import Features, Provenance

CPU = torch.device("cpu")


def clusters(images: int, noise: float, seed: int = 0, classes: int = 3) -> Features:
    generator = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centers = np.random.default_rng(9).normal(size=(classes, 8))
    values = (centers[labels] + noise * generator.normal(size=(images, 8))).astype(np.float32)
    names = [f"{i}.png" for i in range(images)]
    return Features(values, labels, names, list("abc")[:classes], {}, Provenance("x", "0", "cls", 1, 8, "d"))


def splits(noise: float) -> dict[str, Features]:
    return {"train": clusters(150, noise), "val": clusters(90, noise, seed=1)}


def figures(name: str, identity: str = "") -> Figures:
    return Figures(name, identity or name, None, 8, 8, 100, 0.1, 10.0, 2.0, -1.0)


def compared(*features: dict[str, Features], probe: bool = False, **options: object) -> Comparison:
    names = [figures(name) for name in "ABC"[: len(features)]]
    return compare("data", names, features, probe=probe, device=CPU, **options)  # type: ignore[arg-type]


def plain_knn(features: dict[str, Features], k: int) -> np.ndarray:
    """Classify by the vote of the nearest images, one image at a time in float64."""
    train, test = features["train"], features["val"]
    unit = [x / np.linalg.norm(x) for x in train.values.astype(float)]
    correct = []
    for x, label in zip(test.values.astype(float), test.labels, strict=True):
        cosines = np.array([x @ u / np.linalg.norm(x) for u in unit])
        votes = np.zeros(len(train.classes))
        for row in np.argsort(-cosines)[:k]:
            votes[train.labels[row]] += math.exp(cosines[row] / 0.07)
        correct.append(votes.argmax() == label)
    return np.array(correct)


def test_scores_and_intervals_are_those_of_the_plain_definition() -> None:
    worse, better = splits(2.5), splits(0.8)
    result = compared(worse, better, k=5)
    expected = [plain_knn(each, 5) for each in (worse, better)]
    for network, correct, answers in zip(result.networks, expected, result.answers, strict=True):
        np.testing.assert_array_equal(answers["knn"], correct)
        assert network.knn == pytest.approx(100 * correct.mean())
    assert result.differences == [{}, {"knn": paired_difference(*expected)}]
    assert (result.k, result.images, result.voters, result.leave_one_out, result.split) == (5, 90, 150, False, "val")
    (line,) = result.verdicts
    assert line.startswith("B is better than A by ") and "points of k-NN (95 % interval" in line


def test_every_other_network_is_compared_with_the_first() -> None:
    result = compared(splits(0.8), splits(2.5), splits(0.8), probe=True)
    assert [set(each) for each in result.differences] == [set(), {"knn", "linear"}, {"knn", "linear"}]
    assert all(each.linear is not None and each.linear > 30 for each in result.networks)
    lines = result.verdicts
    assert [line.split()[0] for line in lines] == ["B", "B", "C", "C"]
    assert "worse than A" in lines[0] and "no difference in k-NN beyond chance" in lines[2]


def test_a_network_beside_itself_is_no_difference() -> None:
    features, done = splits(2.5), list[tuple[int, int]]()
    pair = [figures("A", "same"), figures("again", "same")]
    result = compare("d", pair, [features] * 2, device=CPU, report=lambda *count: done.append(count))
    assert result.verdicts == ["again and A: no difference: the weights are the same"]
    assert result.networks[0].linear == result.networks[1].linear
    assert done[-1][0] == done[-1][1], "one probe is trained"


def test_verdicts_state_the_size_and_the_interval_of_a_difference() -> None:
    better = Difference(50.0, 51.2, 0.3, 2.1, 40)
    assert state_difference("B", "A", "k-NN", better) == (
        "B is better than A by 1.2 points of k-NN (95 % interval 0.3 to 2.1)"
    )
    worse = Difference(51.2, 50.0, -2.1, -0.3, 40)
    assert state_difference("B", "A", "k-NN", worse) == (
        "B is worse than A by 1.2 points of k-NN (95 % interval 0.3 to 2.1)"
    )
    few = Difference(50.0, 50.4, 0.1, 0.8, 4)
    assert state_difference("B", "A", "k-NN", few) == (
        "B and A: no difference in k-NN beyond chance (+0.4 points, 95 % interval +0.1 to +0.8)"
    )
    assert "all answers are the same" in state_difference("B", "A", "k-NN", Difference(50.0, 50.0, 0.0, 0.0, 0))


def test_one_split_is_classified_by_leaving_one_out() -> None:
    result = compared({"all": clusters(60, 0.8)}, {"all": clusters(60, 2.5)}, probe=True)
    assert result.leave_one_out and result.voters == 59 and len(result.answers[0]["knn"]) == 60
    assert len(result.answers[0]["linear"]) == 12, "a fifth of each class"


def test_an_unlabelled_split_is_no_test_split() -> None:
    parts = splits(0.8)
    parts = {
        "test": parts["val"],
        "train": parts["train"],
        "val": replace(parts["val"], classes=[], labels=np.full(90, -1)),
    }
    assert compared(parts, parts).split == "test"


def test_unlabelled_images_give_no_verdict() -> None:
    plain = {"all": replace(clusters(20, 1.0), labels=np.full(20, -1), classes=[])}
    result = compared(plain, plain)
    assert result.k is None and result.split == "all" and result.images == 20 and result.answers == [{}, {}]
    assert result.verdicts == ["B and A: no verdict without labels"]


def test_only_images_that_all_networks_have_are_compared() -> None:
    first, second = splits(0.8), splits(2.5)
    without = [row for row in range(90) if row != 4]
    second["val"] = replace(
        second["val"],
        values=second["val"].values[without],
        labels=second["val"].labels[without],
        paths=[second["val"].paths[row] for row in without],
    )
    one, other = align([first, second])
    assert list(one["val"].paths) == list(other["val"].paths) and "4.png" not in one["val"].paths
    np.testing.assert_array_equal(one["val"].labels, first["val"].labels[without])
    np.testing.assert_array_equal(one["val"].values[:], first["val"].values[without])
    assert compared(first, second).images == 89
    apart = {name: replace(part, paths=[f"x{path}" for path in part.paths]) for name, part in first.items()}
    with pytest.raises(DinoError, match="no common image of train"):
        align([first, apart])
    turned = {name: replace(part, paths=list(part.paths)[::-1]) for name, part in first.items()}
    with pytest.raises(DinoError, match="in different orders"):
        align([first, turned])


def test_wrong_numbers_of_neighbours_and_one_class_are_refused() -> None:
    with pytest.raises(DinoError, match="--k 151 is larger than the 150 training images"):
        compared(splits(1.0), splits(1.0), k=151)
    few = {"all": clusters(9, 1.0)}
    with pytest.raises(DinoError, match="at least 12 training images in a class") as error:
        compared(few, few, probe=True)
    assert error.value.hint.startswith("add --no-linear")
    one = {"all": clusters(9, 1.0, classes=1)}
    with pytest.raises(DinoError, match="all 9 labelled images of data are of one class, a"):
        compared(one, one)


def test_figures_without_labels_are_those_of_the_test_split(encoder: Encoder) -> None:
    features = splits(1.0)
    views = np.random.default_rng(0).normal(size=(40, 3, 8)).astype(np.float32)
    found = measure(encoder, "x", "id", 16, 9.0, features, replace(features["train"], views=views))  # type: ignore[arg-type]
    sizes = np.linalg.svd(features["val"].values.astype(float), compute_uv=False)
    shares = sizes / sizes.sum()
    assert found.rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert found.lidar is not None and 1 < found.lidar <= 8 and -4 < found.uniformity < 0
    assert found.parameters == sum(p.numel() for p in encoder.backbone.parameters())
    assert found.megabytes == pytest.approx(4e-6 * found.parameters)
    assert measure(encoder, "x", "id", 16, 9.0, features, None).lidar is None

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinocli.core.errors import DinoError
from dinocli.evals.knn import is_correct, knn, predict_by_votes, vote_logits, votes
from dinocli.evals.nearest import nearest
from dinocli.features.store import Features, Provenance, read_features
from dinocli.features.writer import write_features

PROVENANCE = Provenance("x", "0", "cls", 1, 224, "data")


def features(values: np.ndarray, labels: np.ndarray, classes: int) -> Features:
    names = [str(i) for i in range(classes)]
    return Features(values.astype(np.float32), labels.astype(np.int64), [""] * len(values), names, {}, PROVENANCE)


@pytest.fixture
def stored(original) -> tuple[Features, Features]:
    tensors = original.below("knn/")
    train_labels = tensors.get("train_labels", tensors.get("train_label"))
    test_labels = tensors.get("test_labels", tensors.get("test_label"))
    classes = original.made["knn"]["num_classes_in_data"]
    return (
        features(tensors["train_features"].numpy(), train_labels.numpy(), classes),
        features(tensors["test_features"].numpy(), test_labels.numpy(), classes),
    )


def test_accuracies_equal_the_originals_for_every_k(original, stored: tuple[Features, Features]) -> None:
    results = original.made["knn"]["results"]
    ours = knn(*stored, [int(k) for k in results], original.made["knn"]["T"])
    for score, theirs in zip(ours.scores, results.values(), strict=True):
        assert score.top1 == pytest.approx(theirs["official_top1"])
        assert score.top5 == pytest.approx(theirs["strict_top5"])


@pytest.mark.parametrize("k", [10, 20])
def test_votes_and_predictions_equal_the_originals(original, stored: tuple[Features, Features], k: int) -> None:
    theirs = {name: values.numpy() for name, values in original.below(f"knn/k{k}/").items()}
    train, _ = stored
    [ours] = votes(theirs["similarities"], train.labels[theirs["neighbors"]], [k], 12, original.made["knn"]["T"])
    # dinocli's votes are in units of the nearest neighbour's vote.
    nearest = np.exp(theirs["similarities"].max(axis=1, keepdims=True).astype(np.float64) / original.made["knn"]["T"])
    np.testing.assert_allclose(ours * nearest, theirs["votes"], rtol=1e-5, atol=1e-5 * theirs["votes"].max())
    np.testing.assert_array_equal(ours.argmax(1), theirs["pred"])


def test_no_image_votes_on_itself_in_leave_one_out() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(30, 8))
    values[10:20] = values[:10]  # ten exact copies, of another class
    labels = np.repeat([0, 1, 2], 10)
    result = knn(features(values, labels, 3), None, [1])
    assert result.leave_one_out
    assert result.neighbours == 29
    normalized = values / np.linalg.norm(values, axis=1, keepdims=True)
    similarity = normalized @ normalized.T
    np.fill_diagonal(similarity, -2)
    assert result.scores[0].top1 == pytest.approx(100 * (labels[similarity.argmax(1)] == labels).mean())


def test_votes_are_weighted_by_similarity() -> None:
    counted = votes(np.array([[0.9, 0.5, 0.5]], dtype=np.float32), np.array([[2, 0, 0]]), [1, 3], 3, 0.07)
    for expected in ([[0, 0, 1]], [[2 * np.exp(-0.4 / 0.07), 0, 1]]):
        np.testing.assert_allclose(next(counted), expected, rtol=1e-5)
    [cold] = votes(np.array([[0.9, 0.5]], dtype=np.float32), np.array([[1, 0]]), [2], 2, 1e-4)
    assert np.isfinite(cold).all()


@pytest.mark.parametrize("alone", [True, False])
def test_block_sizes_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    from dinocli.evals import knn as module
    from dinocli.evals import nearest

    generator = np.random.default_rng(0)
    values = generator.normal(size=(50, 4))
    values[30:35] = values[:5]  # copies, in another block than their originals
    train = features(values, generator.integers(0, 5, 50), 5)
    test = None if alone else features(generator.normal(size=(20, 4)), generator.integers(0, 5, 20), 5)
    whole = knn(train, test, [7, 3, 40])
    blocks = (
        (module, "_QUERIES", 7),
        (nearest, "_BLOCK_BYTES", 9 * 4 * 4),
        (nearest, "_ROWS_PER_NEIGHBOUR", 0),
        (module, "_CELLS", 20),
    )
    for place, name, size in blocks:
        monkeypatch.setattr(place, name, size)
        assert knn(train, test, [7, 3, 40]) == whole
    assert [score.k for score in whole.scores] == [7, 3, 40]


def test_features_on_disk_and_in_memory_give_the_same_accuracy(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    data = features(generator.normal(size=(60, 8)), generator.integers(0, 5, 60), 5)
    with write_features(tmp_path / "f.safetensors", PROVENANCE, data.classes, shard_bytes=20 * 8 * 4) as writer:
        for some in np.split(np.arange(60), 12):
            writer.append(data.values[some], data.labels[some].tolist(), [f"{i}.png" for i in some])
    assert knn(read_features(writer.place), None, [1, 5]) == knn(data, None, [1, 5])


@pytest.mark.parametrize(
    ("k", "message", "hint"),
    [
        (0, "--k 0 is below 1", "use --k 9"),
        (-1, "--k -1 is below 1", "use --k 9"),
        (10, "--k 10 is larger than the 9 other images that can vote", "use --k 9 or fewer"),
    ],
)
def test_k_out_of_range_is_an_error_with_a_valid_k(k: int, message: str, hint: str) -> None:
    data = features(np.eye(10), np.arange(10) % 2, 2)
    with pytest.raises(DinoError) as error:
        knn(data, None, [k])
    assert (error.value.message, error.value.hint) == (message, hint)


def test_k_above_the_number_of_training_images_is_an_error() -> None:
    train, test = features(np.eye(3), np.arange(3) % 2, 2), features(np.eye(5)[:, :3], np.arange(5) % 2, 2)
    with pytest.raises(DinoError, match="--k 500 is larger than the 3 training images") as error:
        knn(train, test, [500])
    assert error.value.hint == "use --k 3 or fewer"
    two = features(np.eye(2), np.arange(2), 2)
    with pytest.raises(DinoError) as error:
        knn(two, None, [2])
    assert error.value.hint == "use --k 1"


@pytest.mark.parametrize(("train", "test"), [(1, None), (0, None), (0, 3), (3, 0)])
def test_features_without_voters_or_queries_hint_to_extract_again(train: int, test: int | None) -> None:
    made = [None if n is None else features(np.eye(3)[:n], np.arange(n) % 2, 2) for n in (train, test)]
    for k in (-1, 0, 1, 20):
        with pytest.raises(DinoError, match=r"k-NN needs|holds no images") as error:
            knn(made[0], made[1], [k])
        assert error.value.hint.startswith("dino extract")


def test_the_default_temperature_is_that_of_the_original(original, stored: tuple[Features, Features]) -> None:
    from inspect import signature

    from dinocli.cli.knn import knn as command

    assert knn(*stored, [20]) == knn(*stored, [20], original.made["knn"]["T"])
    assert knn(*stored, [20]).temperature == signature(command).parameters["temperature"].default == 0.07


LIMITED_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from dinocli.evals import knn as module
from dinocli.evals import nearest
from dinocli.features.store import Features, Provenance, read_features
from dinocli.features.writer import write_features

generator, provenance, names = np.random.default_rng(0), Provenance("x", "0", "cls", 1, 8, "d"), ["a", "b"]
with write_features(Path(sys.argv[1]), provenance, names, dtype="float16", shard_bytes=2**25) as writer:
    for _ in range(100):
        writer.append(generator.normal(size=(1000, 384)).astype(np.float32), [0, 1] * 500, ["x"] * 1000)
train = read_features(writer.place)
test = Features(train.values[:50], train.labels[:50], [], names, {}, provenance)
nearest._BLOCK_BYTES = 2**24
module.knn(test, test, [1])  # so that the libraries have their own memory
status = Path("/proc/self/status").read_text().split()
room = 1024 * int(status[status.index("VmData:") + 1]) + 100 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (room, room))
print(module.knn(train, test, [1]).scores[0].top1)
try:
    train.values[:]
except MemoryError:
    print("all at once do not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc and a memory limit that only Linux enforces")
def test_voters_need_not_fit_in_memory(tmp_path: Path) -> None:
    """Classify with 154 MB of float32 features under a limit of 100 MB."""
    command = [sys.executable, "-c", LIMITED_MEMORY, str(tmp_path / "train.safetensors")]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert done.stdout.split("\n")[:2] == ["100.0", "all at once do not fit"], done.stderr


@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_the_scale_of_features_does_not_change_the_accuracy(scale: float) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    values = np.eye(3)[labels].repeat(4, axis=1) + 0.8 * generator.normal(size=(90, 12))
    plain, far = (knn(features(values * s, labels, 3), None, [5]).scores[0] for s in (1, scale))
    assert far == plain
    assert plain.top1 > 50


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_the_share_of_correct_queries_is_the_accuracy(leave_one_out: bool) -> None:
    generator = np.random.default_rng(0)
    train = features(generator.normal(size=(60, 4)), generator.integers(3, size=60), 3)
    test = None if leave_one_out else features(generator.normal(size=(40, 4)), generator.integers(3, size=40), 3)
    correct = is_correct(train, test, 5)
    assert correct.dtype == np.bool_
    assert len(correct) == (60 if leave_one_out else 40)
    assert 100 * correct.mean() == pytest.approx(knn(train, test, [5]).scores[0].top1)


def test_each_query_is_correct_if_its_nearest_neighbours_have_its_class() -> None:
    train = features(np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]]), np.array([0, 0, 1, 1]), 2)
    test = features(np.array([[1, 0.05], [0.05, 1], [1, 0]]), np.array([0, 0, 1]), 2)
    assert is_correct(train, test, 2).tolist() == [True, False, False]


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_predictions_have_the_accuracy_of_the_chosen_k(leave_one_out: bool) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3
    values = np.eye(3)[labels].repeat(2, axis=1) + generator.normal(size=(120, 6))
    train = features(values, labels, 3)
    test = None if leave_one_out else features(values[::2] + 0.5, labels[::2], 3)
    alone = {k: knn(train, None, [k]).scores[0].top1 for k in (1, 30)}
    assert alone[30] > alone[1]
    chosen, calibration, predictions = predict_by_votes(train, test, [1, 30])
    assert chosen == 30, "the best in leave-one-out"
    score = knn(train, test, [30]).scores[0]
    assert predictions.percent(1) == pytest.approx(score.top1)
    assert (predictions.interval, predictions.macro) == (score.interval, pytest.approx(score.macro))
    assert calibration.images == 120
    assert calibration.after == predictions.errors[1] < calibration.before
    assert 1 / 3 < predictions.confidence.min() < predictions.confidence.max() < 1


def test_a_class_without_votes_has_a_small_probability() -> None:
    train = features(np.eye(3), np.array([0, 0, 1]), 4)
    [logits] = vote_logits(train, np.array([[1.0, 0, 0]], np.float32), 2, 0.07)
    assert np.exp(logits[0, 0]) == pytest.approx(1.25, abs=1e-5), "its own vote, and a quarter of the shared one"
    assert np.exp(logits[0, 3]) == pytest.approx(0.25)


def test_another_search_is_used_and_a_neighbour_that_it_misses_has_no_vote() -> None:
    generator = np.random.default_rng(3)
    train, test = (features(generator.normal(size=(n, 8)), np.arange(n) % 3, 3) for n in (60, 20))
    asked: list[int] = []

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(queries))
        cosines, rows = nearest(train.values, queries, k)
        cosines[:, 3:], rows[:, 3:] = -np.inf, -1
        return cosines, rows

    three, cut = knn(train, test, [3]).scores[0], knn(train, test, [7], search=search).scores[0]
    assert (cut.top1, cut.macro) == (three.top1, three.macro)
    assert knn(train, test, [7]).scores[0].top5 > cut.top5
    predicted = predict_by_votes(train, test, [7], search=search)[2].predicted
    assert np.array_equal(predicted, predict_by_votes(train, test, [3])[2].predicted)
    assert asked == [20, 60, 20]

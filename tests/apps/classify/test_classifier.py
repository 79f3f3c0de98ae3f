from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dinocli.apps.classify.classifier import (
    Classifier,
    LinearRule,
    VoteRule,
    check_classifier_file,
    read_classifier,
    write_classifier,
)
from dinocli.core.errors import DinoError
from dinocli.evals.accuracy import Interval
from dinocli.evals.calibration import softmax
from dinocli.evals.knn import vote_logits
from dinocli.features.store import Provenance, compared, read_features
from dinocli.features.writer import write_features

PROVENANCE = Provenance("ckpt.safetensors", "0123456789abcdef", "cls", 1, 16, "data", step=7)
VALUES = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


def classifier(rule: LinearRule | VoteRule) -> Classifier:
    return Classifier(rule, ["cat", "dog", "owl"], PROVENANCE, 1.5, 40, 81.5, Interval(70.1, 90.2), 90, 50)


@pytest.fixture
def linear() -> Classifier:
    generator = np.random.default_rng(1)
    return classifier(LinearRule(generator.normal(size=(3, 4)).astype(np.float32), np.arange(3, dtype=np.float32)))


def stored(folder: Path, shift: float = 0) -> Path:
    path = folder / "features" / "train.safetensors"
    with write_features(path, PROVENANCE, ["cat", "dog", "owl"]) as writer:
        writer.append(VALUES + np.float32(shift), [0, 1, 2] * 2 + [-1, 0, 1], [f"{i}.png" for i in range(9)])
    return path


def votes(folder: Path) -> Classifier:
    train, _ = compared({"train": read_features(stored(folder))})
    return classifier(VoteRule(train, 3, 0.07))


def test_a_linear_classifier_reads_back_as_it_was_written(tmp_path: Path, linear: Classifier) -> None:
    path = tmp_path / "classifier.safetensors"
    write_classifier(path, linear)
    again = read_classifier(path)
    assert {**vars(again), "rule": None} == {**vars(linear), "rule": None}
    logits = VALUES @ linear.rule.weight.T + linear.rule.bias
    np.testing.assert_allclose(again.probabilities(VALUES), softmax(logits, 1.5), rtol=1e-6)
    assert again.rule.name == "linear"


def test_a_vote_refers_to_its_features_and_ignores_unlabelled_images(tmp_path: Path) -> None:
    made = votes(tmp_path)
    path = tmp_path / "classifier.safetensors"
    write_classifier(path, made)
    assert path.stat().st_size < 2000, "no features inside"
    again = read_classifier(path)
    assert (again.rule.name, again.rule.k, len(again.rule.features)) == ("k-NN", 3, 8)
    [logits] = vote_logits(made.rule.features, VALUES, 3, 0.07)
    np.testing.assert_allclose(again.probabilities(VALUES), softmax(logits, 1.5))
    tmp_path.joinpath("project").mkdir()
    path.rename(tmp_path / "project" / path.name)
    (tmp_path / "features").rename(tmp_path / "project" / "features")
    assert len(read_classifier(tmp_path / "project" / path.name).rule.features) == 8, "a project may move as a whole"


def test_changed_or_missing_features_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    write_classifier(path, votes(tmp_path))
    stored(tmp_path, shift=1)
    with pytest.raises(DinoError, match=r"train.safetensors has changed since .*classifier.safetensors") as error:
        read_classifier(path)
    assert error.value.hint == f"dino knn --features {tmp_path / 'features'} --save"
    (tmp_path / "features" / "train.safetensors").unlink()
    with pytest.raises(DinoError, match="which do not exist"):
        read_classifier(path)


def test_damage_is_an_error(tmp_path: Path, linear: Classifier) -> None:
    path = tmp_path / "classifier.safetensors"
    write_classifier(path, linear)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)

    def check(why: str, changed: dict[str, np.ndarray] | None = None, **told: str) -> None:
        save_file(tensors | (changed or {}), path, metadata | told)
        with pytest.raises(DinoError, match=why) as error:
            read_classifier(path)
        assert error.value.hint == "dino finetune DATA --from WEIGHTS, dino linear --save, or dino knn --save"

    check("its checksum does not match", classifier=metadata["classifier"].replace("1.5", "2.5"))
    check("the checksum of its weights", {"weight": tensors["weight"] + 1})
    check("3 classes, weights of shape 2x4", {"weight": tensors["weight"][:2]})
    check("2 classes", classes='["cat", "dog"]')
    check("its metadata cannot be read", recipe="{}")
    check("holds no classifier", dinocli="features")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DinoError):
        read_classifier(path)
    with pytest.raises(DinoError, match="does not exist"):
        read_classifier(tmp_path / "none.safetensors")
    with pytest.raises(DinoError, match="is a folder"):
        read_classifier(tmp_path)


def test_another_file_is_not_overwritten(tmp_path: Path, linear: Classifier) -> None:
    path = tmp_path / "mine.safetensors"
    check_classifier_file(path)
    write_classifier(path, linear)
    check_classifier_file(path)
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(DinoError, match="would be overwritten"):
        check_classifier_file(path)

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dinocli.apps.search import index as module
from dinocli.apps.search.index import digest_of, kind_for, open_index
from dinocli.core.checksums import unseal
from dinocli.evals.nearest import nearest


def drawn(count: int = 3000, width: int = 12) -> np.ndarray:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(30, width))
    return (centers[generator.integers(0, 30, count)] + generator.normal(size=(count, width))).astype(np.float32)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_reaches_its_stated_recall_and_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    values = drawn()
    built: list[int] = []
    index = open_index(values, kind, tmp_path, digest_of(values), built.append)
    assert built[-1] == len(values)
    assert (tmp_path / f"index.{kind}").is_dir(), "named by its kind"
    queries = drawn()[::50] + 0.01
    cosines, found = index.search(queries, 10)
    true_cosines, truth = nearest(values, queries, 10)
    hits = np.mean([len(set(f) & set(t)) / 10 for f, t in zip(found.tolist(), truth.tolist(), strict=True)])
    assert hits > 0.9
    assert index.about.recall == pytest.approx(hits, abs=0.05), "the stated recall"
    assert index.about.recall >= 0.9
    same = found == truth
    np.testing.assert_allclose(cosines[same], true_cosines[same], rtol=1e-5)

    monkeypatch.setattr(module, "_build", None)  # it must not be rebuilt
    again = open_index(values, kind, tmp_path, digest_of(values))
    assert again.about == index.about
    np.testing.assert_array_equal(again.search(queries, 10)[1], found)


def test_an_index_of_other_features_or_a_corrupt_one_is_rebuilt(tmp_path: Path) -> None:
    values = drawn(500)
    built: list[int] = []
    open_index(values, "ivf", tmp_path, digest_of(values))
    changed = values.copy()
    changed[0] += 1
    index = open_index(changed, "ivf", tmp_path, digest_of(changed), built.append)
    assert built == [500]
    assert index.search(changed[:1], 1)[0] == pytest.approx(1, abs=1e-5)
    (tmp_path / "index.ivf" / "index.faiss").write_bytes(b"torn")
    open_index(changed, "ivf", tmp_path, digest_of(changed), built.append)
    assert built == [500, 500]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_corrupt_index_is_never_searched(tmp_path: Path, kind: str) -> None:
    """The index is rebuilt whichever byte of its files has changed."""
    values, built = drawn(200), list[int]()
    open_index(values, kind, tmp_path, "x")
    for name, step in (("index.faiss", 997), ("about.json", 11)):
        path = tmp_path / f"index.{kind}" / name
        content = path.read_bytes()
        for place in range(0, len(content), max(step, len(content) // 10)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            built.clear()
            index = open_index(values, kind, tmp_path, "x", built.append)
            assert built, f"{name}, byte {place}"
            assert index.search(values[:50], 1)[1][:, 0].tolist() == list(range(50))
    open_index(values, kind, tmp_path, "x", built.append)
    about = tmp_path / f"index.{kind}" / "about.json"
    for text in (
        "[" * 100_000,
        "{",
        "[]",
        json.dumps({"novel": 1}),
        json.dumps(unseal(about.read_bytes()) | {"novel": 1}),
    ):
        about.write_text(text)
        built.clear()
        open_index(values, kind, tmp_path, "x", built.append)
        assert built, text[:20]


def test_an_index_that_cannot_be_stored_is_still_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    index = open_index(drawn(300), "ivf", tmp_path / "file", "x")
    assert index.search(drawn(300)[:3], 1)[1][:, 0].tolist() == [0, 1, 2]


def test_a_digest_distinguishes_features() -> None:
    values = drawn(300)
    changed = values.copy()
    changed[-1, 0] += 1
    digests = [digest_of(v, more) for v, more in ((values, ""), (values[:-1], ""), (changed, ""), (values, "x"))]
    assert len(set(digests)) == 4
    assert digest_of(values.copy()) == digests[0]


def test_the_kind_depends_on_the_number_of_features(tmp_path: Path) -> None:
    assert (kind_for(500_000), kind_for(500_001)) == ("exact", "ivf")
    exact = open_index(drawn(40), "exact", tmp_path, "")
    assert exact.about.recall == 1
    assert exact.search(drawn(40)[:2], 99)[1].shape == (2, 40)
    assert not list(tmp_path.iterdir()), "nothing is stored"


def test_a_handful_of_features_can_be_indexed(tmp_path: Path) -> None:
    values = drawn(5)
    for kind in ("ivf", "hnsw"):
        assert open_index(values, kind, tmp_path, "x").search(values, 9)[1][:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize(("share", "sources"), [(0.06, 50), (0.2, 1)])
def test_repeated_images_hide_no_others_and_count_as_found(
    tmp_path: Path, kind: str, share: float, sources: int
) -> None:
    """Any of several equal rows is correct. In a graph, equal rows would hide all others."""
    values = drawn(4000, 24)
    again = int(share * len(values))
    values[-again:] = values[np.random.default_rng(1).integers(0, sources, again)]
    rest = np.arange(sources, len(values) - again, 7)
    index = open_index(values, kind, tmp_path, "x")
    assert index.about.distinct == len(values) - again
    assert index.about.recall >= 0.95
    if kind == "ivf":
        lists = module.faiss.read_index(str(tmp_path / "index.ivf" / "index.faiss")).nlist
        assert index.about.effort < lists / 4, "it searches few lists"
    cosines, found = index.search(values[rest], 1)
    assert np.mean(found[:, 0] == rest) > 0.98
    assert (cosines[found[:, 0] == rest] == 1).all()
    [near], [rows] = index.search(values[-1:], 10)
    assert (near == 1).sum() == min(10, (values == values[-1]).all(1).sum())
    assert len(set(rows.tolist())) == 10, "each row once"
    again_opened = open_index(values, kind, tmp_path, "x", lambda images: pytest.fail("it was rebuilt"))
    np.testing.assert_array_equal(again_opened.search(values[rest], 3)[1], index.search(values[rest], 3)[1])


@pytest.mark.parametrize("spoil", ["old", "torn", "short", "other"])
def test_an_index_without_valid_equal_rows_is_rebuilt(tmp_path: Path, spoil: str) -> None:
    values = drawn(300)
    values[200] = values[4]
    open_index(values, "ivf", tmp_path, "x")
    place = tmp_path / "index.ivf"
    if spoil == "old":  # as stored by an earlier version
        about = json.loads((place / "about.json").read_text())
        about.pop("distinct")
        (place / "about.json").write_text(json.dumps(about))
        (place / "equal.safetensors").unlink()
    elif spoil == "torn":
        (place / "equal.safetensors").write_bytes(b"torn")
    else:
        first = np.arange(299 if spoil == "short" else 300)
        save_file({"first": first}, place / "equal.safetensors")
    built: list[int] = []
    index = open_index(values, "ivf", tmp_path, "x", built.append)
    assert built == [300]
    assert index.search(values[200:201], 2)[1].tolist() == [[4, 200]]
    assert index.search(values[200:201], 2)[0].tolist() == [[1, 1]]

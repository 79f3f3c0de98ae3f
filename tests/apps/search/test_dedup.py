from __future__ import annotations

import numpy as np

from dinocli.apps.search.dedup import choose, find_alike


def test_near_duplicates_are_found_and_the_best_is_kept() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(30, 16)).astype(np.float32)
    values[[5, 9]] = values[2] + 0.01 * generator.normal(size=(2, 16))
    values[20] = values[7] + 0.2 * generator.normal(size=16)
    found = find_alike(values, 0.9)
    assert [group.tolist() for group in found.members] == [[2, 5, 9], [7, 20]]
    assert found.pairs == 4
    size = {9: (800, 1), 5: (800, 2), 2: (700, 9)}
    groups = choose(found, lambda row: size.get(row, (0, 0)))
    assert [(g.kept, g.dropped) for g in groups] == [(7, [20]), (5, [2, 9])], (
        "the least certain group first; the first of equal quality"
    )
    assert groups[0].cosines == found.best[[20]].tolist()
    assert not find_alike(values, None).members
    np.testing.assert_array_equal(find_alike(values, None).best, found.best)


def test_a_threshold_of_1_finds_equal_rows() -> None:
    """Rounding often puts the cosine of equal rows below 1."""
    values = np.random.default_rng(0).normal(size=(400, 96)).astype(np.float32)
    values[200:] = values[:200]
    values[250, 3] += 1e-2
    found = find_alike(values, 1.0)
    assert [g.tolist() for g in found.members] == [[i, i + 200] for i in range(200) if i != 50]
    assert found.pairs == 199
    assert {c for group in choose(found, lambda row: (0, 0)) for c in group.cosines} == {1.0}
    assert found.best.max() == 1 and found.best[50] < 1

from __future__ import annotations

import numpy as np

from dinocli.evals.dedup import choose, find_alike


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
    assert [(g.kept, g.dropped) for g in groups] == [(7, [20]), (5, [2, 9])], "the doubtful first; of equals the first"
    assert groups[0].cosines == found.best[[20]].tolist()
    assert not find_alike(values, None).members
    np.testing.assert_array_equal(find_alike(values, None).best, found.best)

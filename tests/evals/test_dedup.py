from __future__ import annotations

import numpy as np
import pytest

from dinocli.evals.dedup import Components, choose, find_alike


def plain_groups(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Walk from each image to all that it reaches."""
    near: dict[int, set[int]] = {i: set() for i in range(count)}
    for a, b in pairs:
        near[a].add(b)
        near[b].add(a)
    groups, seen = [], set[int]()
    for start in range(count):
        reached, todo = set[int](), [start]
        while todo:
            i = todo.pop()
            if i not in reached:
                reached.add(i)
                todo += near[i]
        if start not in seen and len(reached) > 1:
            groups.append(sorted(reached))
        seen |= reached
    return groups


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_those_of_a_plain_walk(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = 60
    pairs = generator.integers(0, count, (int(generator.integers(0, 90)), 2))
    components = Components(count)
    for some in np.array_split(pairs, 4):
        components.join(some[:, 0], some[:, 1])
    assert [group.tolist() for group in components.groups()] == plain_groups(count, pairs.tolist())


def test_a_long_chain_is_one_group() -> None:
    order = np.random.default_rng(0).permutation(1000)
    components = Components(1001)
    components.join(order, order + 1)
    assert [len(group) for group in components.groups()] == [1001]


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

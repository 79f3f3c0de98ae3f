from __future__ import annotations

import numpy as np
import pytest

from dinocli.evals.components import Pieces, component_at, components, largest_component


def flood_fill(mask: np.ndarray) -> np.ndarray:
    """Label components by flood fill, in the order of their first pixels."""
    numbers = np.zeros(mask.shape, dtype=int)
    for start in zip(*np.nonzero(mask), strict=True):
        if numbers[start]:
            continue
        numbers[start] = number = numbers.max() + 1
        todo = [start]
        while todo:
            row, column = todo.pop()
            for r, c in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                inside = 0 <= r < mask.shape[0] and 0 <= c < mask.shape[1]
                if inside and mask[r, c] and not numbers[r, c]:
                    numbers[r, c] = number
                    todo.append((r, c))
    return numbers


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6, 0.9])
def test_components_equal_those_of_a_flood_fill(share: float) -> None:
    random = np.random.default_rng(0)
    for shape in ((1, 1), (1, 9), (9, 1), (2, 2), (13, 17), (40, 31)):
        for _ in range(5):
            mask = random.random(shape) < share
            np.testing.assert_array_equal(components(mask), flood_fill(mask))


def test_a_spiral_is_one_component_and_corners_do_not_connect() -> None:
    spiral = np.zeros((21, 21), dtype=bool)
    row, column, step = 0, 0, (0, 1)
    for length in [20, 20, 20, 18, 18, 16, 16, 14, 14, 12, 12, 10, 10, 8, 8, 6, 6, 4, 4, 2]:
        for _ in range(length):
            spiral[row, column] = True
            row, column = row + step[0], column + step[1]
        step = (step[1], -step[0])
    assert components(spiral).max() == 1
    assert components(np.eye(3, dtype=bool)).max() == 3


def test_the_largest_component_and_the_one_at_a_position_are_found() -> None:
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1]], dtype=bool)
    assert (
        largest_component(mask).tolist() == np.array([[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]).astype(bool).tolist()
    )
    assert component_at(mask, (0, 1)).sum() == 2
    assert not component_at(mask, (1, 1)).any()
    assert not largest_component(np.zeros((3, 3), dtype=bool)).any()


def search_graph(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Find groups by searching the graph from each image."""
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
def test_groups_equal_those_of_a_graph_search(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = 60
    pairs = generator.integers(0, count, (int(generator.integers(0, 90)), 2))
    pieces = Pieces(count)
    for part in np.array_split(pairs, 4):
        pieces.join(part[:, 0], part[:, 1])
    assert [group.tolist() for group in pieces.groups()] == search_graph(count, pairs.tolist())


def test_a_long_chain_is_one_group() -> None:
    order = np.random.default_rng(0).permutation(1000)
    pieces = Pieces(1001)
    pieces.join(order, order + 1)
    assert [len(group) for group in pieces.groups()] == [1001]

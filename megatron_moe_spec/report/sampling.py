"""Fewer points of series and steps than there are, for figures that cannot show them all."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
Points = Sequence[tuple[float, float]]  # (x, y), by x


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, at even distances, the first and the last among them; ``most``: at least 2."""
    last = len(items) - 1
    if last < most:
        return list(items)
    return [items[round(i * last / (most - 1))] for i in range(most)]


def blocks(points: Points, most: int) -> list[Points]:
    """Neighbours together, in at most so many blocks of the same width in x."""
    number = -(-len(points) // most)  # of points in a block, where they are at even distances
    if number < 2:
        return [[point] for point in points]
    first, last = points[0][0], points[-1][0]
    width = number * (last - first) / (len(points) - 1)
    found: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        found.setdefault(int((x - first) / width + 1e-9), []).append((x, y))
    return list(found.values())


def middle(block: Points) -> float:
    return sum(x for x, _ in block) / len(block)

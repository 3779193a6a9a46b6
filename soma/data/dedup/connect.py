"""Connected components of a graph of duplicates: the same labels for any order of its edges, in any number of parts."""

import numpy as np


def components(size: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The smallest node of each node's component, int64 (size,), given undirected edges left[i] — right[i].

    Roots are hooked onto smaller roots and paths halved until every tree is a star (Shiloach and Vishkin 1982), all
    edges at once in numpy; only nodes that have an edge are touched.
    """
    labels = np.arange(size)
    nodes, ends = np.unique(np.concatenate([left, right]).astype(np.int64), return_inverse=True)
    left, right = ends[: len(left)], ends[len(left) :]
    parent = np.arange(len(nodes))
    while len(left):
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
        while not np.array_equal(above := parent[parent], parent):
            parent = above
        left, right = parent[left], parent[right]
        apart = left != right
        left, right = left[apart], right[apart]
    labels[nodes] = nodes[parent]
    return labels


class Forest:
    """Union-find over any integers, for the edges of one block; keeps the edges that joined something."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.edges: list[tuple[int, int]] = []

    def find(self, node: int) -> int:
        parent = self.parent
        while (above := parent.get(node, node)) != node:
            parent[node] = parent.get(above, above)
            node = above
        return node

    def union(self, left: int, right: int) -> None:
        a, b = self.find(left), self.find(right)
        if a != b:
            self.parent[max(a, b)] = min(a, b)
            self.edges.append((left, right))

"""Neighbours one and two hops away in the graph of training interactions, drawn with a seed (GAL-Rec's hops)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from raygrec.config import StrictConfig
from raygrec.data.arrays import CSR
from raygrec.draws import Draws

_FIRST, _ORDER, _SECOND, _ONE_HOP, _TWO_HOP = range(5)  # what a draw is for


class NeighbourConfig(StrictConfig):
    """How many neighbours a prompt shows, and which. [ours] The paper leaves the choice open."""

    one_hop: int = Field(8, ge=0)
    """Users of an item at most. A user's own one-hop is the shown history: the recipe cuts it, not the sampler."""
    two_hop: int = Field(4, ge=0)
    """Users who share items with a user, or items that share users with an item, at most."""
    choice: Literal["recent", "uniform", "co-occurrence"] = "co-occurrence"
    """Which neighbours come first; draws decide between equals, in every choice.
    `uniform`: all are equal, however many paths lead to one.
    `co-occurrence`: the two-hop neighbours reached by most paths, that is with most shared items (or users). One-hop
    neighbours are all reached by one, so equal.
    `recent`: those reached by the newest edge. An edge's age is the number of later items in its user's history, as
    interactions are in time order only within a user. A path is as old as its first edge and, between equal ones,
    its second: a user's two-hop begins with the users of the newest shown item, among them those for whom it is
    their latest; an item's one-hop begins with users for whom it is the latest, its two-hop with the latest items
    of these. In a store without order, the order of the rows stands for time."""
    candidates: int = Field(2048, ge=1)
    """Paths examined per node, about: the bound on the work that hubs make. A row of more edges is first sampled down
    to so many, each edge with the same probability. Then the nodes between are taken one after the other, in drawn
    order (`recent`: newest first), until their edges are so many: at most twice the number, in all. Within the bound
    every path counts; beyond it a choice is among what was examined."""


class NeighbourSampler:
    """Draws neighbours from the training graph; a node's depend on the node and the draws, not on its batch.

    A repeated interaction counts once, as the latest. Of `draws` it reads numbers by (use, node, …): a caller that
    draws for the same nodes should give draws of another key.
    """

    def __init__(self, by_user: CSR, by_item: CSR, config: NeighbourConfig) -> None:
        """by_user: [U] rows of training items, in time order. by_item: [I] rows of their users, ascending.

        Raises `ValueError` where the two cannot be of one graph.
        """
        self.config, self.num_users, self.num_items = config, len(by_user), len(by_item)
        _numbers(by_user.indices, self.num_items, "item")
        steps = np.diff(by_item.rows * self.num_users + _numbers(by_item.indices, self.num_users, "user"))
        if len(by_user.indices) != len(by_item.indices) or (steps < 0).any():
            raise ValueError("by_item is not by_user grouped by item, with ascending users")
        if not steps.all():
            by_user = _latest(by_user, self.num_items)
            by_item = by_user.transposed(self.num_items)
        self._by_user = self._from_histories(by_user)
        ages = self._by_user.ages
        if config.choice == "recent":
            ages = ages[np.argsort(by_user.indices, kind="stable")]
        self._by_item = _Adjacency(by_item, ages)

    def of_users(self, users: np.ndarray, shown: CSR, draws: Draws) -> CSR:
        """Users who share a shown item with each user, strongest first: [B] rows of at most `two_hop` users.

        users: [B]. shown: [B] rows of the items that the user's prompt shows, in time order. A user's other items
        leave no path, so the targets of a prompt lead nowhere if they are not shown in it. The user itself is left
        out. Raises `ValueError` for numbers out of range.
        """
        users = _numbers(users, self.num_users, "user")
        _numbers(shown.indices, self.num_items, "item")
        if len(shown) != len(users):
            raise ValueError(f"{len(users)} users, but {len(shown)} rows of shown items")
        histories = self._from_histories(_latest(shown, self.num_items))
        rows = np.arange(len(users))
        items = histories.reached(rows, self.config.candidates, draws, _FIRST, users)
        others = self._continued(items, self._by_item, users, draws)
        others = others.where(others.ends != users[others.rows])
        return self._chosen(others, self.config.two_hop, users, draws, _TWO_HOP)

    def edges(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The edges (users [E], items [E]) as distinct ascending numbers, for `of_items` to hide.

        Raises `ValueError` for numbers out of range.
        """
        return np.unique(
            _numbers(users, self.num_users, "user") * self.num_items + _numbers(items, self.num_items, "item")
        )

    def of_items(self, items: np.ndarray, draws: Draws, hidden: np.ndarray | None = None) -> tuple[CSR, CSR]:
        """Users of each item, and items that share users with it, strongest first.

        items: [B]. hidden: the `edges` that are targets in this step; no path uses one of them. Returns [B] rows of at
        most `one_hop` users and [B] rows of at most `two_hop` items, the item itself left out. Shared users count
        whether or not they are among the one-hop users returned. Raises `ValueError` for numbers out of range.
        """
        items = _numbers(items, self.num_items, "item")
        keys = items + self.num_users  # users are nodes 0…U-1, items follow
        users = self._by_item.reached(items, self.config.candidates, draws, _FIRST, keys)
        if hidden is not None:
            users = users.where(~_contains(hidden, users.ends * self.num_items + users.via))
        others = self._continued(users, self._by_user, keys, draws)
        others = others.where(others.ends != items[others.rows])
        if hidden is not None:
            others = others.where(~_contains(hidden, others.via * self.num_items + others.ends))
        return (
            self._chosen(users, self.config.one_hop, keys, draws, _ONE_HOP),
            self._chosen(others, self.config.two_hop, keys, draws, _TWO_HOP),
        )

    def _from_histories(self, rows: CSR) -> "_Adjacency":
        """Histories with the ages of their edges; without `recent` all are equally old."""
        if self.config.choice != "recent":
            return _Adjacency(rows, np.broadcast_to(np.int32(0), len(rows.indices)))
        ends = np.repeat(np.asarray(rows.indptr[1:]), rows.lengths)
        return _Adjacency(rows, (ends - 1 - np.arange(len(ends))).astype(np.int32))

    def _continued(self, reached: "_Reached", adjacency: "_Adjacency", keys: np.ndarray, draws: Draws) -> "_Reached":
        """Follows the edges of what was reached: the paths of one edge more, up to the bound on those of each row."""
        limit = self.config.candidates
        drawn = draws.uniform(_ORDER, keys[reached.rows], reached.ends)
        reached = reached.where(np.lexsort((drawn, reached.ages, reached.rows)))
        paths = np.minimum(adjacency.degrees(reached.ends), limit)
        before = np.cumsum(paths) - paths
        before -= before[_firsts(reached.rows)]
        reached = reached.where(before < limit)
        # A node of more edges than the bound ends its row, so one key per row is enough.
        further = adjacency.reached(reached.ends, limit, draws, _SECOND, keys[reached.rows])
        first = reached.where(further.rows)
        # A history has at most I items, so ages stay below I and the first edge's comes before the second's.
        return _Reached(first.rows, further.via, further.ends, first.ages * self.num_items + further.ages)

    def _chosen(self, reached: "_Reached", limit: int, keys: np.ndarray, draws: Draws, use: int) -> CSR:
        """The first `limit` distinct ends of each row in the order of the choice: [len(keys)] rows."""
        width = max(self.num_users, self.num_items)
        cells = reached.rows * width + reached.ends
        if self.config.choice == "co-occurrence":
            cells, counts = np.unique(cells, return_counts=True)
            ranks = -counts
        else:
            by_age = np.argsort(reached.ages, kind="stable")
            cells, youngest = np.unique(cells[by_age], return_index=True)
            ranks = reached.ages[by_age][youngest]
        rows, ends = np.divmod(cells, width)  # rows ascend, and do so in every order within them
        lowest = ranks.min(initial=0)
        grouped = rows * (ranks.max(initial=0) - lowest + 1) + (ranks - lowest)
        order = np.lexsort((draws.uniform(use, keys[rows], ends), grouped))
        kept = np.arange(len(rows)) - _firsts(rows) < limit
        return CSR.from_pairs(rows[kept], ends[order[kept]], len(keys))


@dataclass(frozen=True)
class _Reached:
    """Where the paths from a batch of nodes have come to, one entry per path, all int64.

    rows: the row of the batch. via, ends: the nodes of the path's last edge. ages: smaller is more recent.
    """

    rows: np.ndarray
    via: np.ndarray
    ends: np.ndarray
    ages: np.ndarray

    def where(self, chosen: np.ndarray) -> "_Reached":
        """The entries that a mask or an array of positions chooses."""
        return _Reached(self.rows[chosen], self.via[chosen], self.ends[chosen], self.ages[chosen])


@dataclass(frozen=True)
class _Adjacency:
    """The edges of each node on one side of the graph, and the age of each edge, int32."""

    rows: CSR
    ages: np.ndarray

    def degrees(self, nodes: np.ndarray) -> np.ndarray:
        return self.rows.indptr[nodes + 1] - self.rows.indptr[nodes]

    def reached(self, nodes: np.ndarray, limit: int, draws: Draws, use: int, keys: np.ndarray) -> _Reached:
        """The edges of each node, of more than `limit` so many; `rows` are positions in `nodes`.

        keys: like `nodes`; what is left out of a node's edges depends on its key alone.
        """
        rows, places = _sampled_places(self.degrees(nodes), limit, draws, use, keys)
        entries = self.rows.indptr[nodes[rows]] + places
        ends = self.rows.indices[entries].astype(np.int64)
        return _Reached(rows, nodes[rows], ends, self.ages[entries].astype(np.int64))


def _sampled_places(
    lengths: np.ndarray, limit: int, draws: Draws, use: int, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and places of the entries of ragged rows; of a row longer than `limit`, so many distinct places.

    Such a row is divided into `limit` stretches and a place drawn in each, then all are rotated by one draw:
    each place is equally likely, and places left out cost nothing.
    """
    kept = np.minimum(lengths, limit)
    rows = np.repeat(np.arange(len(lengths)), kept)
    places = np.arange(len(rows)) - (np.cumsum(kept) - kept)[rows]
    long = lengths[rows] > limit
    if long.any():
        row, stretch = rows[long], places[long]
        length, key = lengths[row], keys[row]
        start, end = stretch * length // limit, (stretch + 1) * length // limit
        inside = (draws.uniform(use, key, stretch) * (end - start)).astype(np.int64)
        rotation = (draws.uniform(use, key, limit) * length).astype(np.int64)
        places[long] = (start + inside + rotation) % length
    return rows, places


def _latest(rows: CSR, num_values: int) -> CSR:
    """The same rows with only the last of equal entries."""
    row = rows.rows
    from_end = np.unique((row * num_values + rows.indices)[::-1], return_index=True)[1]
    kept = np.sort(len(row) - 1 - from_end)
    return CSR.from_pairs(row[kept], rows.indices[kept], len(rows))


def _firsts(ascending: np.ndarray) -> np.ndarray:
    """The place of the first entry that is equal to each."""
    counts = np.bincount(ascending)
    return np.repeat(np.cumsum(counts) - counts, counts)


def _contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each value is among the ascending ones."""
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[place] == values


def _numbers(values: np.ndarray, count: int, kind: str) -> np.ndarray:
    """`values` as int64; `ValueError` unless they are whole numbers 0…count-1."""
    values = np.asarray(values)
    if len(values) and not (values.dtype.kind in "iu" and values.min() >= 0 and values.max() < count):
        raise ValueError(f"{kind} numbers: expected whole numbers 0…{count - 1}")
    return values.astype(np.int64)

"""Sequences: `sequences.txt` with `user item item …` per line in time order, and `items.jsonl` beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raygrec.data.files import read_lines
from raygrec.data.options import PrepareOptions
from raygrec.data.readers.base import Chunk, Source, item_stream, need_one
from raygrec.data.text import Item, make_item
from raygrec.errors import InputError

_CHUNK = 200_000  # interactions


def open_source(options: PrepareOptions) -> Source:
    """Reads such a folder; an item's record has `item`, `title` and `categories` (a list of paths)."""
    sequences = need_one(options.path, "sequences", ["sequences.txt"])
    items = options.path / "items.jsonl"
    has_items = items.is_file()
    return Source(
        files=[sequences, items] if has_items else [sequences],
        chunks=lambda: _chunks(sequences),
        items=(lambda: item_stream(items, _item)) if has_items else None,
        has_times=False,
        has_ratings=False,
        notes=("the order within a line is taken as the order in time; tied times cannot be seen there",),
    )


def _chunks(path: Path) -> Iterator[Chunk]:
    users: list[str] = []
    items: list[str] = []
    done = 0
    for number, line in read_lines(path):
        user, *history = line.split()
        if not history:
            raise InputError(f"{path}, line {number}: user '{user}' has no items; expected 'user item item …'")
        users += [user] * len(history)
        items += history
        if len(items) >= _CHUNK:
            yield _chunk(users, items, done)
            done += len(items)
            users, items = [], []
    if items:
        yield _chunk(users, items, done)


def _chunk(users: list[str], items: list[str], done: int) -> Chunk:
    return Chunk(pa.array(users), pa.array(items), np.arange(done, done + len(items)))


def _item(record: dict[str, Any]) -> Item:
    return make_item(str(record["item"]), record.get("title"), record.get("categories"), record.get("description"))

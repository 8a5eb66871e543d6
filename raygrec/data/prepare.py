"""From source files to a store: read, filter, split, describe the items, write."""

import tempfile
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raygrec.data import files, filters, splits
from raygrec.data.arrays import CSR, Strings, stable_order
from raygrec.data.options import ITEM_OPTIONS, TABLE_OPTIONS, PrepareOptions
from raygrec.data.readers import Chunk, Source, open_source
from raygrec.data.store import Store, StoreWriter, check_output, new_store
from raygrec.data.text import Item, fill_template, has_text, item_terms
from raygrec.errors import InputError

__all__ = ["PrepareOptions", "prepare"]

_DAY = 86_400  # seconds
_GROUP = 64 << 20  # bytes of ids that are numbered together


def prepare(options: PrepareOptions) -> Store:
    """Builds the store that `options` describe and returns it, opened.

    Raises `InputError` for wrong input; then, as after an interrupt, no store and no temporary files remain.
    """
    check_output(options.out, options.overwrite)
    source = open_source(options)
    _check_source(source, options)
    with new_store(options.out, options.overwrite) as writer:
        log = Log(notes=list(source.notes))
        data = _read(source, options, log, writer.folder)
        data = _filter(data, options, log)
        labels = _split(data, options, log)
        data, labels = _drop_unseen(data, labels, options, log)
        _check_splits(labels, options)
        data = data.renumbered()
        items = _describe(source, data.item_ids.to_pylist(), options, log)
        _write(writer, data, labels, items, options)
        draft = writer.finish(_facts(source, data, labels, options, log))
        if options.tokenizer:
            draft.tokens(options.tokenizer)
    return Store.open(options.out)


@dataclass
class Log:
    """What the manifest will tell: interactions left after each step, and remarks."""

    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self, step: str, left: int, options_at_fault: str = "") -> None:
        self.counts[step] = left
        if left == 0:
            hint = f" ({options_at_fault})" if options_at_fault else ""
            raise InputError(f"no interactions are left after: {step}{hint}")


@dataclass(frozen=True)
class Interactions:
    """Interactions and the ids behind their numbers.

    users, items: [entries] int32. times: [entries] int64. Sorted by user, then time, then place in the file.
    user_ids, item_ids: Arrow strings.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_ids: pa.LargeStringArray
    item_ids: pa.LargeStringArray

    def where(self, keep: np.ndarray) -> "Interactions":
        columns = (self.users[keep], self.items[keep], self.times[keep])
        return Interactions(*columns, self.user_ids, self.item_ids)

    def renumbered(self) -> "Interactions":
        """Without the users and items that have no interaction left."""
        users, old_users = filters.compact(self.users)
        items, old_items = filters.compact(self.items)
        user_ids, item_ids = self.user_ids.take(_arrow(old_users)), self.item_ids.take(_arrow(old_items))
        return Interactions(users, items, self.times, user_ids, item_ids)


def _arrow(numbers: np.ndarray) -> pa.Int64Array:
    """A view of them; `pa.array` would import pandas to ask whether they are its own."""
    return pa.Int64Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])


class _Ids:
    """Numbers ids from 0 in the order of their first appearance: in groups of chunks first, then in all at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[pa.StringArray] = []
        self._rows: list[int] = []  # of each group
        self._distinct: list[pa.LargeStringArray] = []

    def add(self, ids: pa.StringArray) -> None:
        """The next chunk."""
        self._waiting.append(ids)
        if sum(chunk.nbytes for chunk in self._waiting) >= _GROUP:
            self._encode()

    def settle(self) -> tuple[np.ndarray, pa.LargeStringArray]:
        """[entries] int32 numbers of all chunks, memory-mapped; the ids in their order."""
        self._encode()
        whole = pa.concat_arrays(self._distinct).dictionary_encode()
        of_groups = np.split(np.from_dlpack(whole.indices), np.cumsum([len(ids) for ids in self._distinct])[:-1])
        self._distinct = []
        numbers = np.memmap(self._path, np.int32, "r+")
        ends = np.cumsum(self._rows)
        for end, rows, in_whole in zip(ends, self._rows, of_groups, strict=True):
            numbers[end - rows : end] = in_whole[numbers[end - rows : end]]
        return numbers, whole.dictionary

    def _encode(self) -> None:
        """Writes the numbers inside the group."""
        if not self._waiting:
            return
        encoded = pa.concat_arrays(self._waiting).dictionary_encode()
        self._waiting = []
        self._rows.append(len(encoded))
        self._distinct.append(encoded.dictionary.cast(pa.large_string()))  # together they may exceed 2 GiB
        with self._path.open("ab") as file:
            np.from_dlpack(encoded.indices).tofile(file)


def _check_source(source: Source, options: PrepareOptions) -> None:
    for option in TABLE_OPTIONS:
        is_set = getattr(options, option) != PrepareOptions.model_fields[option].default
        if is_set and option not in source.reads:
            readers = "format 'table' with an items table" if option in ITEM_OPTIONS else "format 'table'"
            raise InputError(
                f"{option}: {options.format} data at {options.path} have no use for it; only {readers} has"
            )
    if options.min_rating is not None and not source.has_ratings:
        raise InputError(f"min_rating: {options.format} data have no ratings")
    if (options.date_from or options.date_to) and not source.has_times:
        raise InputError("date_from, date_to: these data have an order but no dates")
    if source.items is None and not options.allow_missing_text and options.format != "table":
        raise InputError(
            f"{options.path}: no file that describes the items; add it, or set allow_missing_text to use their ids"
        )


def _read(source: Source, options: PrepareOptions, log: Log, folder: Path) -> Interactions:
    """Streams the source through temporary columns on disk, without a Python object per interaction."""
    read = rated = dated = 0
    with tempfile.TemporaryDirectory(dir=folder, prefix="columns-") as spill:
        users, items = _Ids(Path(spill, "users")), _Ids(Path(spill, "items"))
        with Path(spill, "times").open("wb") as time_file:
            for chunk in source.chunks():
                times = chunk.times if chunk.times is not None else np.arange(read, read + len(chunk.users))
                liked = _liked(chunk, options)
                keep = liked & _in_window(times, chunk.ticks_per_second, options)
                read, rated, dated = read + len(keep), rated + int(liked.sum()), dated + int(keep.sum())
                users.add(_taken(chunk.users, keep))
                items.add(_taken(chunk.items, keep))
                times[keep].astype(np.int64).tofile(time_file)
        log.count("read", read, f"{source.files[0]} is empty")
        if options.min_rating is not None:
            log.count("minimum rating", rated, f"min_rating={options.min_rating}")
        if options.date_from or options.date_to:
            log.count("date window", dated, f"date_from={options.date_from}, date_to={options.date_to}")
        return _sorted(users, items, Path(spill, "times"), log, source.has_times)


def _taken(ids: pa.StringArray, keep: np.ndarray) -> pa.StringArray:
    return ids if keep.all() else ids.take(_arrow(np.flatnonzero(keep)))


def _liked(chunk: Chunk, options: PrepareOptions) -> np.ndarray:
    if options.min_rating is None:
        return np.ones(len(chunk.users), dtype=bool)
    return chunk.ratings >= options.min_rating  # false where there is no rating


def _in_window(times: np.ndarray, ticks: int, options: PrepareOptions) -> np.ndarray:
    keep = np.ones(len(times), dtype=bool)
    if options.date_from:
        keep &= times >= _midnight(options.date_from) * ticks
    if options.date_to:
        keep &= times < (_midnight(options.date_to) + _DAY) * ticks
    return keep


def _midnight(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def _sorted(of_users: _Ids, of_items: _Ids, time_file: Path, log: Log, moments: bool) -> Interactions:
    (users, user_ids), (items, item_ids) = of_users.settle(), of_items.settle()
    times = np.memmap(time_file, np.int64, "r")
    order = stable_order(times, users)  # equal times keep the order of the file
    data = Interactions(users[order], items[order], times[order], user_ids, item_ids)
    if moments:
        log.notes.append(_tie_note(data))
    return data


def _tie_note(data: Interactions) -> str:
    tied = int(((data.users[1:] == data.users[:-1]) & (data.times[1:] == data.times[:-1])).sum())
    return f"{tied} interactions have the same time as the one before them in their history; they keep the file's order"


def _filter(data: Interactions, options: PrepareOptions, log: Log) -> Interactions:
    if options.deduplicate:
        data = data.where(filters.first_occurrences(data.users, data.items))
        log.count("deduplicate (earliest of a user's interactions with an item)", len(data.users))
    if options.k_core:
        data = data.where(filters.k_core(data.users, data.items, options.k_core))
        log.count("k-core", len(data.users), f"k_core={options.k_core}")
    return data


def _split(data: Interactions, options: PrepareOptions, log: Log) -> np.ndarray:
    if options.split == "ratio":
        return splits.ratio(data.users, options.valid_ratio, options.test_ratio, options.seed)
    if options.split == "global-time":
        return splits.global_time(data.times, options.valid_ratio, options.test_ratio)
    return splits.leave_one_out(data.users)


def _drop_unseen(
    data: Interactions, labels: np.ndarray, options: PrepareOptions, log: Log
) -> tuple[Interactions, np.ndarray]:
    """After a cut in time some items appear late only; they cannot be learned, so they are dropped."""
    if (labels == splits.TRAIN).sum() == 0:
        raise InputError(f"no training interactions are left after: split {options.split}")
    if options.split != "global-time":
        return data, labels
    unseen = splits.unseen_in_training(data.items, labels)
    for label in (splits.VALID, splits.TEST):
        name = splits.SPLITS[label]
        log.notes.append(f"{int((unseen & (labels == label)).sum())} {name} interactions dropped: item not in training")
    data, labels = data.where(~unseen), labels[~unseen]
    log.count("items seen in training", len(data.users))
    new_users = splits.unseen_in_training(data.users, labels)
    for label in (splits.VALID, splits.TEST):
        count = len(np.unique(data.users[new_users & (labels == label)]))
        log.notes.append(f"{count} {splits.SPLITS[label]} users have no training interaction")
    return data, labels


def _check_splits(labels: np.ndarray, options: PrepareOptions) -> None:
    """`InputError` where validation or test is asked for and holds nothing."""
    for label, share in ((splits.VALID, "valid_ratio"), (splits.TEST, "test_ratio")):
        hints = {
            "leave-one-out": "no user has 3; filter less by min_rating, date_from, date_to or k_core",
            "ratio": f"no user has enough for {share}={getattr(options, share)}; raise it or k_core",
            "global-time": "none is late enough and of an item that training has seen; change date_from, date_to, "
            f"k_core or {share}",
        }
        asked_for = options.split == "leave-one-out" or getattr(options, share) > 0
        if asked_for and not (labels == label).any():
            name = splits.SPLITS[label]
            raise InputError(f"no {name} interactions are left after: split {options.split} ({hints[options.split]})")


def _describe(source: Source, item_ids: list[str], options: PrepareOptions, log: Log) -> list[Item]:
    """The items in the order of their numbers; only those that are kept are held in memory."""
    items: dict[str, Item | None] = dict.fromkeys(item_ids)
    for item in source.items() if source.items else ():
        if items.get(item.id, item) is None:  # the first record of an id counts
            items[item.id] = item
    template = options.text_template
    missing = [item_id for item_id, item in items.items() if item is None or not has_text(template, item)]
    if missing and source.items and not options.allow_missing_text:
        raise InputError(
            f"{source.files[1]}: {len(missing)} of {len(items)} items have no text there for '{template}', the first "
            f"is '{missing[0]}'; add them, name other fields in text_template, or set allow_missing_text to use ids"
        )
    if missing and source.items:
        log.notes.append(f"{len(missing)} items have no text in the source; their ids stand in")
    return [item or Item(item_id) for item_id, item in items.items()]


def _write(
    writer: StoreWriter, data: Interactions, labels: np.ndarray, items: list[Item], options: PrepareOptions
) -> None:
    for label, name in enumerate(splits.SPLITS):
        part = labels == label
        by_user = CSR.from_pairs(data.users[part], data.items[part], len(data.user_ids))
        writer.write_csr(f"{name}_by_user", by_user)
        if label == splits.TRAIN:
            writer.write_csr("train_by_item", by_user.transposed(len(data.item_ids)))
        if label != splits.TEST and options.split == "global-time":
            writer.write_times(f"{name}_times", data.times[part])  # sorted by user, as the rows are
    terms, term_names = item_terms(items)
    writer.write_csr("terms", terms)
    writer.write_strings("term_names", term_names)
    writer.write_strings("user_ids", Strings.from_arrow(data.user_ids))
    writer.write_strings("item_ids", Strings.from_arrow(data.item_ids))
    writer.write_strings("titles", Strings.from_list(item.title or item.id for item in items))
    writer.write_strings("texts", Strings.from_list(fill_template(options.text_template, item) for item in items))


def _facts(source: Source, data: Interactions, labels: np.ndarray, options: PrepareOptions, log: Log) -> dict[str, Any]:
    per_split = np.bincount(labels, minlength=len(splits.SPLITS)).tolist()
    unseen = len(np.unique(data.items[splits.unseen_in_training(data.items, labels)]))
    log.notes.append("users and items without an interaction after filtering are not in the store")
    log.notes.append(f"{unseen} items have no training interaction")
    return {
        "name": options.name or options.path.resolve().stem,
        "num_users": len(data.user_ids),
        "num_items": len(data.item_ids),
        "num_interactions": dict(zip(splits.SPLITS, per_split, strict=True)),
        "ordered": options.split != "ratio",
        "options": options.model_dump(mode="json"),
        "sources": [{"file": str(path), "sha256": files.sha256(path)} for path in source.files],
        "counts": log.counts,
        "notes": log.notes,
    }

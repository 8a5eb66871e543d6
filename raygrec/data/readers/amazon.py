"""Amazon reviews: the 2014 and 2018 releases (`*.json.gz`) and the 2023 one (`*.jsonl.gz`)."""

from typing import Any

from raygrec.data.options import PrepareOptions
from raygrec.data.readers.base import (
    Row,
    Source,
    find_one,
    item_stream,
    need_one,
    read_number,
    read_time,
    record_chunks,
    texts,
)
from raygrec.data.text import Item, make_item

_RELEASE_2023 = ["*.jsonl.gz", "*.jsonl"]
_OLDER = ["*.json.gz", "*.json"]


def open_source(options: PrepareOptions) -> Source:
    """Reads a folder with one reviews file and its `meta_*` file; of 2023, variants are one item."""
    folder = options.path
    release_2023 = find_one(folder, "reviews", _RELEASE_2023, exclude="meta_") is not None
    patterns = _RELEASE_2023 if release_2023 else _OLDER
    reviews = need_one(folder, "reviews", patterns, exclude="meta_")
    meta = find_one(folder, "meta", [f"meta_{pattern}" for pattern in patterns])
    return Source(
        files=[reviews, meta] if meta else [reviews],
        chunks=lambda: record_chunks(reviews, _row_2023, 1000) if release_2023 else record_chunks(reviews, _row),
        items=(lambda: item_stream(meta, _item, python_literals=not release_2023)) if meta else None,
        has_times=True,
        has_ratings=True,
    )


def _row(review: dict[str, Any]) -> Row:
    return review["reviewerID"], review["asin"], read_number(review, "overall"), read_time(review, "unixReviewTime")


def _row_2023(review: dict[str, Any]) -> Row:
    return review["user_id"], review["parent_asin"], read_number(review, "rating"), read_time(review, "timestamp", 1000)


def _item(record: dict[str, Any]) -> Item:
    """2014: `categories` is a list of paths; 2018: `category` is one path; 2023: `categories` is one path."""
    categories = record.get("categories") or record.get("category")
    item_id = record["parent_asin"] if "parent_asin" in record else record["asin"]
    return make_item(item_id, record.get("title"), categories, _joined(record.get("description")))


def _joined(description: object) -> str:
    if not description or isinstance(description, str):
        return description or ""
    return " ".join(texts("description", description, "text or a list of texts"))

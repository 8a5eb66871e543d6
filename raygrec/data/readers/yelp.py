"""Yelp's open data set: the review and the business file, JSON lines, plain or gzip."""

from datetime import UTC, datetime
from typing import Any

from raygrec.data.options import PrepareOptions
from raygrec.data.readers.base import Row, Source, item_stream, need_one, read_number, record_chunks, texts
from raygrec.data.text import Item, make_item


def open_source(options: PrepareOptions) -> Source:
    """Reads `*review*.json` and `*business*.json`; `date_from` and `date_to` pick a window."""
    reviews = need_one(options.path, "review", ["*review*.json", "*review*.json.gz"])
    businesses = need_one(options.path, "business", ["*business*.json", "*business*.json.gz"])
    return Source(
        files=[reviews, businesses],
        chunks=lambda: record_chunks(reviews, _row),
        items=lambda: item_stream(businesses, _item),
        has_times=True,
        has_ratings=True,
        notes=("dates have no time zone in the source and are taken as UTC",),
    )


def _row(review: dict[str, Any]) -> Row:
    return review["user_id"], review["business_id"], read_number(review, "stars"), _seconds(review["date"])


def _seconds(date: object) -> int:
    """Seconds since 1970 of a date like `2019-01-01 00:00:10`."""
    try:
        return int(datetime.fromisoformat(date).replace(tzinfo=UTC).timestamp())
    except (ValueError, TypeError):
        raise ValueError(f"field 'date': expected a date like '2019-01-01 00:00:10', found {date!r}") from None


def _item(business: dict[str, Any]) -> Item:
    """`categories` is a string with commas since 2018, a list before, and null where there are none."""
    categories = business.get("categories") or []
    names = categories.split(",") if isinstance(categories, str) else categories
    names = texts("categories", names, "names with commas between them or a list of names")
    return make_item(business["business_id"], business["name"], [(name,) for name in names])

"""Yelp's open data set: the review and the business file, JSON lines, plain or gzip."""

from datetime import UTC, datetime
from typing import Any

from raygrec.data.options import PrepareOptions
from raygrec.data.readers.base import Row, Source, item_stream, need_one, read_number, record_chunks
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
    moment = datetime.fromisoformat(review["date"]).replace(tzinfo=UTC)
    return review["user_id"], review["business_id"], read_number(review, "stars"), int(moment.timestamp())


def _item(business: dict[str, Any]) -> Item:
    """`categories` is a string with commas since 2018, a list before, and null where there are none."""
    categories = business.get("categories") or []
    names = categories.split(",") if isinstance(categories, str) else categories
    return make_item(business["business_id"], business["name"], [(name,) for name in names])

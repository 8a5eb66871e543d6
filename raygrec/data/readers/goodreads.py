"""Goodreads as UCSD publishes it: `goodreads_interactions_*.json.gz` and `goodreads_books_*.json.gz`."""

from datetime import datetime, timedelta, timezone
from typing import Any

from raygrec.data.options import PrepareOptions
from raygrec.data.readers.base import Row, Source, item_stream, need_one, read_number, record_chunks, texts
from raygrec.data.text import Item, make_item

_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"
_SHELVES = 5  # shelves taken as categories, the most used first
# Shelves that tell about the reader, not the book.
_PERSONAL = """
    to-read currently-reading read owned favorites favourites default books-i-own own-it library wish-list
    to-buy kindle ebook ebooks e-book audiobook audiobooks owned-books my-books my-library i-own maybe
    did-not-finish dnf re-read reread abandoned borrowed library-book all-time-favorites on-hold
"""


def open_source(options: PrepareOptions) -> Source:
    """Reads one genre's folder; times are `date_added`, rating 0 means unrated, shelves are categories."""
    patterns = ["goodreads_interactions*.json.gz", "goodreads_interactions*.json"]
    interactions = need_one(options.path, "interactions", patterns)
    books = need_one(options.path, "books", ["goodreads_books*.json.gz", "goodreads_books*.json"])
    return Source(
        files=[interactions, books],
        chunks=lambda: record_chunks(interactions, _row),
        items=lambda: item_stream(books, _item),
        has_times=True,
        has_ratings=True,
        notes=("the time of an interaction is its date_added",),
    )


def _row(record: dict[str, Any]) -> Row:
    rating = read_number(record, "rating") or float("nan")
    return record["user_id"], record["book_id"], rating, _seconds(record["date_added"])


def _seconds(text: str) -> int:
    """Seconds since 1970 of a date like `Fri Sep 15 19:35:26 -0700 2017`; strptime is slower by far."""
    try:
        _, month, day, clock, zone, year = text.split()
        offset = timedelta(hours=int(zone[:3]), minutes=int(zone[0] + zone[3:]))
        hour, minute, second = map(int, clock.split(":"))
        moment = datetime(
            int(year), _MONTHS.index(month) // 4 + 1, int(day), hour, minute, second, tzinfo=timezone(offset)
        )
    except (ValueError, AttributeError):
        raise ValueError(
            f"field 'date_added': expected a date like 'Fri Sep 15 19:35:26 -0700 2017', got {text!r}"
        ) from None
    return int(moment.timestamp())


def _shelf_names(found: object) -> list[str]:
    """Their names, the most used first."""
    if not isinstance(found, list) or not all(isinstance(shelf, dict) for shelf in found):
        raise TypeError(f"popular_shelves: expected a list of objects with a 'name', found {found!r}")
    return texts("popular_shelves", [shelf.get("name") for shelf in found], "names that are text")


def _item(book: dict[str, Any]) -> Item:
    personal = _PERSONAL.split()
    shelves = _shelf_names(book.get("popular_shelves") or [])
    names = [name.replace("-", " ") for name in shelves if name not in personal][:_SHELVES]
    return make_item(book["book_id"], book["title"], [(name,) for name in names], book.get("description"))

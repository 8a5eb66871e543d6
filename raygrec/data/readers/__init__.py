"""One reader per source format; each turns files into chunks of interactions and a stream of items."""

from raygrec.data.options import PrepareOptions
from raygrec.data.readers import amazon, goodreads, movielens, sequences, table, yelp
from raygrec.data.readers.base import Chunk, Source

__all__ = ["Chunk", "Source", "open_source"]

_READERS = {
    "amazon": amazon.open_source,
    "movielens": movielens.open_source,
    "yelp": yelp.open_source,
    "goodreads": goodreads.open_source,
    "sequences": sequences.open_source,
    "table": table.open_source,
}


def open_source(options: PrepareOptions) -> Source:
    """The source that `options.path` holds; `InputError` when a file that the format needs is not there."""
    return _READERS[options.format](options)

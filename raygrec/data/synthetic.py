"""A made-up bookshop: small data in which both who buys what and what the titles say tell about taste."""

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raygrec.data.demo_words import GENRES, Shelf
from raygrec.errors import InputError

_LENGTH = 11.0  # interactions per user on average
_SHORTEST = 6
_NEXT_VOLUME = 0.45  # chance that a reader goes on with the series, where it has another volume
_SAME_SHELF = 0.4  # otherwise: the chance of another book from the same shelf
_STRAY = 0.06  # chance of any book at all: gifts, whims, bestsellers
_POPULARITY = 0.9  # exponent of the rank-frequency curve
_DAY = 86_400
_START = 1_640_995_200  # 2022-01-01, UTC


@dataclass(frozen=True)
class _Shop:
    """The catalogue as arrays over books; `following` is the next volume of the series, -1 = none."""

    titles: list[str]
    shelves: np.ndarray
    genres: np.ndarray
    following: np.ndarray
    popularity: np.ndarray


def write_demo(folder: Path, users: int = 1500, items: int = 800, seed: int = 0) -> Path:
    """Writes `interactions.csv` and `items.csv` for the `table` format into `folder`, and returns `folder`.

    Readers have one to three favourite genres out of sixteen, favourite shelves in them, and go on with a
    series they have begun, so that the graph, the text and the order each carry signal. The same seed gives
    the same files. `InputError` when `items` exceeds the titles that the words can make, several thousand.
    """
    rng = np.random.default_rng(seed)
    shelves = [(genre, shelf) for genre, entry in GENRES.items() for shelf in entry]
    shop = _stock(shelves, items, rng)
    folder.mkdir(parents=True, exist_ok=True)
    books = (_item_row(number, shop, shelves) for number in range(items))
    _write_csv(folder / "items.csv", ("item", "title", "categories", "description"), books)
    visits = (row for user in range(users) for row in _visits(user, shop, rng))
    _write_csv(folder / "interactions.csv", ("user", "item", "time"), visits)
    return folder


def _stock(shelves: list[tuple[str, Shelf]], count: int, rng: np.random.Generator) -> _Shop:
    """Fills the shelves, each once and then at random, a series or a single book at a time."""
    titles: list[str] = []
    placed: list[int] = []
    following: list[int] = []
    taken: set[str] = set()  # titles without their series, and names of series
    misses = 0
    turn = 0
    while len(titles) < count:
        number = turn if turn < len(shelves) else int(rng.integers(len(shelves)))
        batch = _new_titles(shelves[number][1], taken, rng)[: count - len(titles)]
        misses = 0 if batch else misses + 1
        if misses > 1000:
            raise InputError(f"items={count}: the made-up bookshop has words for {len(titles)} titles only")
        turn += 1
        following += [*range(len(titles) + 1, len(titles) + len(batch)), -1][: len(batch)]
        titles += batch
        placed += [number] * len(batch)
    genre_numbers = {genre: number for number, genre in enumerate(GENRES)}
    genre_of_shelf = np.array([genre_numbers[genre] for genre, _ in shelves])
    popularity = (1.0 + rng.permutation(count)) ** -_POPULARITY
    return _Shop(titles, np.array(placed), genre_of_shelf[placed], np.array(following), popularity)


def _new_titles(shelf: Shelf, taken: set[str], rng: np.random.Generator) -> list[str]:
    """The volumes of one new series, or one title that stands alone; what exists already is left out."""
    series = _fill(shelf.series, shelf, rng)
    wanted = int(rng.integers(3, 6)) if rng.random() < shelf.series_share and series not in taken else 1
    drawn = dict.fromkeys(_fill(shelf.patterns, shelf, rng) for _ in range(wanted))
    fresh = [title for title in drawn if title not in taken]
    taken.update(fresh)
    if wanted == 1 or len(fresh) < 2:
        return fresh
    taken.add(series)
    return [f"{title} ({series}, Book {volume})" for volume, title in enumerate(fresh, start=1)]


def _fill(patterns: tuple[str, ...], shelf: Shelf, rng: np.random.Generator) -> str:
    words = {"adj": shelf.adjectives, "noun": shelf.nouns, "name": shelf.names}
    drawn = {key: options[rng.integers(len(options))] for key, options in words.items()}
    title = patterns[rng.integers(len(patterns))].format(**drawn)
    for clumsy, better in (("The the ", "The "), ("The The ", "The "), ("s's ", "s' ")):
        title = title.replace(clumsy, better)
    return title


def _item_row(number: int, shop: _Shop, shelves: list[tuple[str, Shelf]]) -> tuple[str, ...]:
    genre, shelf = shelves[shop.shelves[number]]
    return (f"b{number:04d}", shop.titles[number], f"Books|{genre}|{shelf.label}", shelf.blurb)


def _visits(user: int, shop: _Shop, rng: np.random.Generator) -> Iterable[tuple[str, str, int]]:
    """The books of one reader in the order of buying, with times in seconds."""
    length = max(_SHORTEST, min(int(rng.poisson(_LENGTH)), len(shop.titles) // 2))
    taste = _taste(shop, rng)
    time = _START + int(rng.integers(365 * _DAY))
    bought: list[int] = []
    left = np.ones(len(shop.titles), dtype=bool)
    for _ in range(length):
        book = _next_book(bought[-1] if bought else None, taste, shop, left, rng)
        bought.append(book)
        left[book] = False
        time += int(rng.exponential(12 * _DAY)) + 1
        yield f"u{user:05d}", f"b{book:04d}", time


def _taste(shop: _Shop, rng: np.random.Generator) -> np.ndarray:
    """[items] weights of one reader: popularity within favourite genres, more so on favourite shelves."""
    favourites = rng.choice(len(GENRES), size=int(rng.integers(1, 4)), replace=False)
    genre_weights = np.zeros(len(GENRES))
    genre_weights[favourites] = rng.dirichlet(np.full(len(favourites), 2.0))
    shelf_weights = rng.gamma(0.7, size=int(shop.shelves.max()) + 1) + 0.02
    return genre_weights[shop.genres] * shelf_weights[shop.shelves] * shop.popularity


def _next_book(last: int | None, taste: np.ndarray, shop: _Shop, left: np.ndarray, rng: np.random.Generator) -> int:
    draw = rng.random(3)
    if last is not None:
        sequel = int(shop.following[last])
        if sequel >= 0 and left[sequel] and draw[0] < _NEXT_VOLUME:
            return sequel
        neighbours = left & (shop.shelves == shop.shelves[last])
        if draw[1] < _SAME_SHELF and neighbours.any():
            return _pick(shop.popularity * neighbours, rng)
    wanted = taste * left
    if draw[2] < _STRAY or wanted.sum() == 0:
        wanted = shop.popularity * left
    return _pick(wanted, rng)


def _pick(weights: np.ndarray, rng: np.random.Generator) -> int:
    return int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)

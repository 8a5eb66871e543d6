"""MovieLens as GroupLens publishes it: 100K (`u.data`), 1M and 10M (`::`), 20M and later (CSV)."""

from collections.abc import Iterator
from pathlib import Path

from raygrec.data.files import read_lines
from raygrec.data.options import PrepareOptions
from raygrec.data.readers import table
from raygrec.data.readers.base import Source, need_one
from raygrec.data.text import Item, make_item
from raygrec.errors import InputError

_NO_GENRE = {"unknown", "(no genres listed)"}
_COLUMNS = table.Columns(user="user", item="item", time="time", rating="rating")
_TABS = table.Layout("\t", ("user", "item", "rating", "time"))
# Arrow splits at one character, so `1::1193::5::978300760` has an empty column at every second place.
_COLONS = table.Layout(":", ("user", "", "item", " ", "rating", "  ", "time"))


def open_source(options: PrepareOptions) -> Source:
    """Reads the folder of any release; genres are the categories."""
    folder = options.path
    ratings = need_one(folder, "ratings", ["u.data", "ratings.dat", "ratings.csv"])
    if ratings.name == "ratings.csv":
        return _csv_source(folder, ratings)
    movies = folder / ("u.item" if ratings.name == "u.data" else "movies.dat")
    reader, layout = (_read_u_item, _TABS) if ratings.name == "u.data" else (_read_movies_dat, _COLONS)
    files = [ratings, movies, folder / "u.genre"] if ratings.name == "u.data" else [ratings, movies]
    _check_files(files)
    return Source(
        files=files,
        chunks=lambda: table.read_interactions(ratings, _COLUMNS, layout),
        items=lambda: reader(movies),
        has_times=True,
        has_ratings=True,
    )


def _csv_source(folder: Path, ratings: Path) -> Source:
    columns = table.Columns(user="userId", item="movieId", time="timestamp", rating="rating")
    movies = folder / "movies.csv"
    _check_files([movies])
    names = PrepareOptions(format="table", path=movies, out=movies, item_column="movieId", categories_column="genres")
    return Source(
        files=[ratings, movies],
        chunks=lambda: table.read_interactions(ratings, columns),
        items=lambda: (_flat(item) for item in table.read_items(movies, names)),
        has_times=True,
        has_ratings=True,
    )


def _check_files(paths: list[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected the folder of a MovieLens release as published")


def _flat(item: Item) -> Item:
    """Genres are labels side by side, where a table's categories are one path."""
    return make_item(item.id, item.title, _genres(name for path in item.categories for name in path))


def _genres(names: Iterator[str]) -> list[tuple[str]]:
    return [(name,) for name in names if name not in _NO_GENRE]


def _read_u_item(path: Path) -> Iterator[Item]:
    genre_file = path.with_name("u.genre")
    genres = [line.split("|")[0] for _, line in read_lines(genre_file)]
    for number, line in read_lines(path, _encoding(path)):
        fields = line.split("|")
        if len(fields) != 5 + len(genres):
            raise InputError(f"{path}, line {number}: expected {5 + len(genres)} fields, found {len(fields)}")
        flagged = (genre for genre, flag in zip(genres, fields[5:], strict=True) if flag == "1")
        yield make_item(fields[0], fields[1], _genres(flagged))


def _read_movies_dat(path: Path) -> Iterator[Item]:
    for number, line in read_lines(path, _encoding(path)):
        fields = line.split("::")
        if len(fields) != 3:
            raise InputError(f"{path}, line {number}: expected 'id::title::genres', found {len(fields)} fields")
        yield make_item(fields[0], fields[1], _genres(iter(fields[2].split("|"))))


def _encoding(path: Path) -> str:
    """10M is UTF-8; 100K and 1M are latin-1, in which every byte is a character."""
    try:
        path.read_bytes().decode()
        return "utf-8"
    except UnicodeDecodeError:
        return "latin-1"

"""Every format from tiny files: what is read, and what is refused."""

import gzip
import json
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raygrec.data import files
from raygrec.data.options import PrepareOptions
from raygrec.data.readers import open_source
from raygrec.data.text import Item
from raygrec.errors import InputError

SECOND = 1_000_000  # in the ticks of tables


def write(path, content):
    """Writes text, or records as JSON lines; gzip where the name says so."""
    text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
    data = text if isinstance(text, bytes) else text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def read(format_name, path, **options):
    """(users, items, times, ratings) as lists, and items by id."""
    source = open_source(PrepareOptions(format=format_name, path=path, out=path / "out", **options))
    chunks = list(source.chunks())
    users = [name for chunk in chunks for name in chunk.users.to_pylist()]
    items = [name for chunk in chunks for name in chunk.items.to_pylist()]
    times, ratings = (
        np.concatenate([getattr(chunk, column) for chunk in chunks]).tolist()
        if chunks and getattr(chunks[0], column) is not None
        else None
        for column in ("times", "ratings")
    )
    return (users, items, times, ratings), {item.id: item for item in (source.items() if source.items else ())}


def ticks(format_name, path):
    source = open_source(PrepareOptions(format=format_name, path=path, out=path / "out"))
    return [chunk.ticks_per_second for chunk in source.chunks()]


def refused(format_name, path, **options):
    with pytest.raises(InputError) as error:
        read(format_name, path, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path}/", "")


REVIEW_2014 = {
    "reviewerID": "U",
    "asin": "A",
    "overall": 4.0,
    "unixReviewTime": 1400000000,
    "reviewText": "x",
}
REVIEW_2023 = {"user_id": "U", "asin": "V", "parent_asin": "A", "rating": 4.0, "timestamp": 1600000000123}


def test_amazon_2014(tmp_path):
    write(tmp_path / "reviews_Toys_5.json.gz", [REVIEW_2014])
    paths = [["Toys", "Games"], ["Gifts"]]
    meta = {"asin": "A", "title": "Bob's Game", "categories": paths, "description": "Fun"}
    write(tmp_path / "meta_Toys.json.gz", f"{meta}\n")  # a Python literal, not JSON
    rows, items = read("amazon", tmp_path)
    assert rows == (["U"], ["A"], [1400000000], [4.0])
    assert items == {"A": Item("A", "Bob's Game", (("Toys", "Games"), ("Gifts",)), "Fun")}


def test_amazon_2018_and_2023(tmp_path):
    write(tmp_path / "2018/Toys_5.json.gz", [REVIEW_2014])
    write(tmp_path / "2018/meta_Toys.json.gz", [{"asin": "A", "title": "T", "category": ["Toys", "Games"]}])
    assert read("amazon", tmp_path / "2018")[1] == {"A": Item("A", "T", (("Toys", "Games"),))}
    write(tmp_path / "2023/Toys.jsonl.gz", [REVIEW_2023])
    meta = {
        "parent_asin": "A",
        "title": "T",
        "categories": ["Toys", "Games"],
        "description": ["One.", "Two."],
    }
    write(tmp_path / "2023/meta_Toys.jsonl.gz", [meta])
    rows, items = read("amazon", tmp_path / "2023")
    assert rows == (["U"], ["A"], [1600000000123], [4.0])
    assert items == {"A": Item("A", "T", (("Toys", "Games"),), "One. Two.")}
    assert ticks("amazon", tmp_path / "2018") == [1]
    assert ticks("amazon", tmp_path / "2023") == [1000]
    write(tmp_path / "2023/Toys.jsonl.gz", [{**REVIEW_2023, "timestamp": 1600000000123456}])
    message = "Toys.jsonl.gz, line 1: field 'timestamp': expected milliseconds since 1970, found 1600000000123456"
    assert refused("amazon", tmp_path / "2023") == message


@pytest.mark.parametrize("time", ["5", "5.5", "1970-01-02"])
def test_ticks_of_a_table_are_microseconds(tmp_path, time):
    write(tmp_path / "interactions.csv", f"user,item,time\nu,i,{time}\n")
    assert ticks("table", tmp_path) == [SECOND]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([REVIEW_2014, {"asin": "A"}], "line 2: field 'reviewerID' is missing; found asin"),
        ([{**REVIEW_2014, "overall": "good"}], "line 1: field 'overall': expected a number, found 'good'"),
        ([{**REVIEW_2014, "overall": None}], "line 1: field 'overall': expected a number, found None"),
        (
            [REVIEW_2014, {**REVIEW_2014, "unixReviewTime": 1e30}],
            "line 2: field 'unixReviewTime': expected seconds since 1970; these look like milliseconds, found "
            "1000000000000000019884624838656",
        ),
        ([{**REVIEW_2014, "asin": 7}], "line 1: expected ids that are strings and not empty, found ('U', 7)"),
        ("{broken\n", "line 1: expected one JSON object, found '{broken'"),
        ("[1, 2]\n", "line 1: expected one JSON object, found '[1, 2]'"),
    ],
)
def test_amazon_wrong_lines(tmp_path, content, message):
    write(tmp_path / "reviews_Toys.json.gz", content)
    assert refused("amazon", tmp_path) == f"reviews_Toys.json.gz, {message}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"asin": ["x"]}, "id: expected text, found ['x']"),
        (
            {"categories": {"a": 1}},
            "categories: expected a list of paths, each a list of names, found {'a': 1}",
        ),
        ({"description": 5}, "description: expected text or a list of texts, found 5"),
        ({"description": ["Fun", 5]}, "description: expected text or a list of texts, found ['Fun', 5]"),
    ],
)
def test_amazon_wrong_items(tmp_path, wrong, message):
    write(tmp_path / "reviews_Toys.json.gz", [REVIEW_2014])
    write(tmp_path / "meta_Toys.json.gz", [{"asin": "A"}, {"asin": "B", **wrong}])
    assert refused("amazon", tmp_path) == f"meta_Toys.json.gz, line 2: not an item record ({message})"


def test_missing_and_double_files(tmp_path):
    assert "no reviews file there; expected *.json.gz or *.json" in refused("amazon", tmp_path)
    assert "does not exist; expected the folder with the review" in refused("yelp", tmp_path / "nowhere")
    write(tmp_path / "reviews_A.json.gz", "")
    write(tmp_path / "reviews_B.json.gz", "")
    assert "more than one reviews file (reviews_A.json.gz, reviews_B.json.gz)" in refused("amazon", tmp_path)
    assert "no interactions file there" in refused("goodreads", tmp_path)
    assert "no ratings file there; expected u.data or ratings.dat" in refused("movielens", tmp_path)
    assert "no sequences file there" in refused("sequences", tmp_path)
    assert "no table there; expected interactions.csv" in refused("table", tmp_path)


def test_movielens_100k(tmp_path):
    write(tmp_path / "u.data", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    write(tmp_path / "u.genre", "unknown|0\nAction|1\nComedy|2\n\n")
    (tmp_path / "u.item").write_bytes(
        "242|Misérables, Les (1995)|01-Jan-1995||http://x|0|1|1\n302|?||||1|0|0\n".encode("latin-1")
    )
    rows, items = read("movielens", tmp_path)
    assert rows == (["196", "186"], ["242", "302"], [881250949 * SECOND, 891717742 * SECOND], [3.0, 3.0])
    assert items["242"] == Item("242", "Misérables, Les (1995)", (("Action",), ("Comedy",)))
    assert items["302"] == Item("302", "?")
    write(tmp_path / "u.item", "242|only|three\n")
    assert refused("movielens", tmp_path) == "u.item, line 1: expected 8 fields, found 3"


def test_movielens_1m(tmp_path):
    write(tmp_path / "ratings.dat", "1::1193::5::978300760\n1::661::3.5::978302109\n")
    movies = "1193::Cuckoo's Nest: The Film (1975)::Drama\n661::Città::Animation|Children's\n"
    (tmp_path / "movies.dat").write_bytes(movies.encode("latin-1"))
    rows, items = read("movielens", tmp_path)
    assert rows == (["1", "1"], ["1193", "661"], [978300760 * SECOND, 978302109 * SECOND], [5.0, 3.5])
    assert items["1193"] == Item("1193", "Cuckoo's Nest: The Film (1975)", (("Drama",),))
    assert items["661"] == Item("661", "Città", (("Animation",), ("Children's",)))
    (tmp_path / "movies.dat").unlink()
    assert refused("movielens", tmp_path).startswith("movies.dat: no such file")


def test_movielens_csv(tmp_path):
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n")
    movies = 'movieId,title,genres\n2,"Juma, nji (1995)",Adventure|Children\n3,X,(no genres listed)\n'
    write(tmp_path / "movies.csv", movies)
    rows, items = read("movielens", tmp_path, min_rating=3)
    assert rows == (["1"], ["2"], [1112486027 * SECOND], [3.5])
    assert items["2"] == Item("2", "Juma, nji (1995)", (("Adventure",), ("Children",)))
    assert items["3"] == Item("3", "X")


def test_yelp(tmp_path):
    review = {"user_id": "U", "business_id": "B", "stars": 5.0, "date": "2019-01-01 00:00:10"}
    write(tmp_path / "yelp_academic_dataset_review.json", [review, {**review, "date": "2019-01-02"}])
    businesses = [
        {"business_id": "B", "name": "Bar", "categories": "Bars, Night Life"},
        {"business_id": "C", "name": "Old", "categories": ["Food"]},
        {"business_id": "D", "name": "None", "categories": None},
    ]
    write(tmp_path / "yelp_academic_dataset_business.json.gz", businesses)
    rows, items = read("yelp", tmp_path)
    assert rows == (["U", "U"], ["B", "B"], [1546300810, 1546387200], [5.0, 5.0])
    assert items["B"].categories == (("Bars",), ("Night Life",))
    assert (items["C"].categories, items["D"].categories) == ((("Food",),), ())
    write(tmp_path / "yelp_academic_dataset_review.json", [{**review, "date": "yesterday"}])
    message = (
        "yelp_academic_dataset_review.json, line 1: field 'date': expected a date like '2019-01-01 00:00:10', found"
    )
    assert refused("yelp", tmp_path) == f"{message} 'yesterday'"
    write(tmp_path / "yelp_academic_dataset_review.json", [{**review, "date": 5}])
    assert refused("yelp", tmp_path) == f"{message} 5"
    write(tmp_path / "yelp_academic_dataset_review.json", [review])
    for wrong in (5, [5], {"Food": 1}):
        write(tmp_path / "yelp_academic_dataset_business.json.gz", [{**businesses[0], "categories": wrong}])
        message = f"categories: expected names with commas between them or a list of names, found {wrong!r}"
        place = "yelp_academic_dataset_business.json.gz, line 1"
        assert refused("yelp", tmp_path) == f"{place}: not an item record ({message})"


def test_goodreads(tmp_path):
    interaction = {
        "user_id": "u",
        "book_id": "7",
        "rating": 0,
        "date_added": "Fri Sep 15 19:35:26 -0730 2017",
    }
    write(tmp_path / "goodreads_interactions_poetry.json.gz", [interaction, {**interaction, "rating": 4}])
    shelves = [{"name": name, "count": "1"} for name in ("to-read", "poetry", "historical-fiction", "owned")]
    book = {"book_id": "7", "title": "Odes", "popular_shelves": shelves, "description": "Old."}
    write(tmp_path / "goodreads_books_poetry.json.gz", [book])
    (users, books, times, ratings), items = read("goodreads", tmp_path)
    assert (users, books, times) == (["u", "u"], ["7", "7"], [1505520000 + 3 * 3600 + 5 * 60 + 26] * 2)
    assert np.isnan(ratings[0])
    assert ratings[1] == 4
    assert items["7"] == Item("7", "Odes", (("poetry",), ("historical fiction",)), "Old.")
    place = "goodreads_books_poetry.json.gz, line 1"
    expected = "expected a list of objects with a 'name'"
    for wrong in (5, ["poetry"]):
        write(tmp_path / "goodreads_books_poetry.json.gz", [{**book, "popular_shelves": wrong}])
        message = f"popular_shelves: {expected}, found {wrong!r}"
        assert refused("goodreads", tmp_path) == f"{place}: not an item record ({message})"
    write(
        tmp_path / "goodreads_books_poetry.json.gz", [{**book, "popular_shelves": [{"name": "poetry"}, {"count": 5}]}]
    )
    message = "popular_shelves: expected names that are text, found ['poetry', None]"
    assert refused("goodreads", tmp_path) == f"{place}: not an item record ({message})"
    write(tmp_path / "goodreads_books_poetry.json.gz", [book])
    write(tmp_path / "goodreads_interactions_poetry.json.gz", [{**interaction, "date_added": "2017"}])
    assert "line 1: field 'date_added': expected a date like" in refused("goodreads", tmp_path)
    write(tmp_path / "goodreads_interactions_poetry.json.gz", [{**interaction, "date_added": None}])
    assert "line 1: field 'date_added': expected a date like" in refused("goodreads", tmp_path)


def test_sequences(tmp_path):
    write(tmp_path / "sequences.txt", "u 1 2\n\nv 2\n")
    write(tmp_path / "items.jsonl", [{"item": 1, "title": "One", "categories": [["A", "B"]]}])
    rows, items = read("sequences", tmp_path)
    assert rows == (["u", "u", "v"], ["1", "2", "2"], [0, 1, 2], None)
    assert items == {"1": Item("1", "One", (("A", "B"),))}
    write(tmp_path / "items.jsonl", [{"item": 1, "categories": ["A", "B"]}, {"item": 2, "categories": "A"}])
    assert read("sequences", tmp_path)[1] == {"1": Item("1", "", (("A", "B"),)), "2": Item("2", "", (("A",),))}
    write(tmp_path / "sequences.txt", "u 1 2\nv\n")
    assert "sequences.txt, line 2: user 'v' has no items" in refused("sequences", tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path):
    write(tmp_path / "sequences.txt", "\ufeffu 1 2\n")
    write(tmp_path / "items.jsonl", '\ufeff{"item": 1, "title": "One"}\n')
    rows, items = read("sequences", tmp_path)
    assert (rows[0], items) == (["u", "u"], {"1": Item("1", "One")})
    write(tmp_path / "t.csv", "\ufeffuser,item,time\nu,i,1\n")
    assert read("table", tmp_path / "t.csv")[0] == (["u"], ["i"], [SECOND], None)
    write(tmp_path / "u.data", "\ufeff1\t2\t3\t4\n")
    write(tmp_path / "u.genre", "\ufeffAction|0\n")
    (tmp_path / "u.item").write_bytes(b"\xef\xbb\xbf2|Misr\xe9|||x|1\n")
    rows, items = read("movielens", tmp_path)
    assert (rows[0], items) == (["1"], {"2": Item("2", "Misré", (("Action",),))})


CSV = "buyer,when,sku,stars\n7,2020-01-01 00:00:01,A,5\n8,2020-01-01,007,1\n"
NAMES = {"user_column": "buyer", "item_column": "sku", "time_column": "when", "rating_column": "stars"}


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".tsv"])
def test_table_text(tmp_path, ending):
    text = CSV.replace("2020-01-01,", "2020-01-01 00:00:00,")
    write(tmp_path / f"buys{ending}", text.replace(",", "\t") if ending == ".tsv" else text)
    rows, items = read("table", tmp_path / f"buys{ending}", **NAMES, min_rating=2)
    assert rows == (["7", "8"], ["A", "007"], [1577836801000000, 1577836800000000], [5.0, 1.0])
    assert items == {}


def test_table_parquet_with_items(tmp_path):
    table = {"user": [3, 4], "item": [1, 2], "time": [10.25, 11.0]}
    pq.write_table(pa.table(table), tmp_path / "interactions.parquet")
    catalogue = {"item": [1, 2], "title": ["One", None], "categories": [["A", "B"], []]}
    pq.write_table(pa.table(catalogue), tmp_path / "items.parquet")
    rows, items = read("table", tmp_path)
    assert rows == (["3", "4"], ["1", "2"], [10250000, 11000000], None)
    assert items == {"1": Item("1", "One", (("A", "B"),)), "2": Item("2")}


@pytest.mark.parametrize(
    ("column", "values", "found"),
    [
        ("user", [["u"]], "list<element: string>"),
        ("user", [{"a": "u"}], "struct<a: string>"),
        ("time", [[1]], "list<element: int64>"),
        ("rating", [[1.0]], "list<element: double>"),
    ],
)
def test_table_parquet_with_several_values_in_a_row(tmp_path, column, values, found):
    table = {"user": ["u"], "item": ["i"], "time": [1], "rating": [5.0], column: values}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    message = refused("table", tmp_path / "t.parquet", min_rating=1)
    assert message == f"{tmp_path}/t.parquet: column '{column}': expected one value per row, found {found}"


def test_table_parquet_items_have_lists_of_paths_but_not_of_titles(tmp_path):
    pq.write_table(pa.table({"user": ["u"], "item": ["i"], "time": [1]}), tmp_path / "interactions.parquet")

    def write_items(**columns):
        pq.write_table(pa.table({"item": ["i"], "title": ["T"], **columns}), tmp_path / "items.parquet")

    write_items(categories=[[["A", "B"], ["C"]]])
    assert read("table", tmp_path)[1] == {"i": Item("i", "T", (("A", "B"), ("C",)))}
    write_items(categories=[{"a": 1}])
    assert refused("table", tmp_path).startswith("items.parquet, item 'i': categories: expected a list of paths")
    write_items(title=[["T"]])
    message = "items.parquet: column 'title': expected one value per row, found list<element: string>"
    assert refused("table", tmp_path) == message


def test_nanoseconds_lose_their_last_digits(tmp_path):
    write(tmp_path / "t.csv", "user,item,time\nu,i,1970-01-01 00:00:01.000002999\nu,j,1970-01-01 00:00:02.000000000\n")
    assert read("table", tmp_path / "t.csv")[0][2] == [1000002, 2000000]
    times = pa.array([1000002999, 2], pa.timestamp("ns", "UTC"))
    pq.write_table(pa.table({"user": ["u", "u"], "item": ["i", "j"], "time": times}), tmp_path / "t.parquet")
    assert read("table", tmp_path / "t.parquet")[0][2] == [1000002, 0]


def test_table_items_as_csv(tmp_path):
    write(tmp_path / "interactions.csv", "user,item,time\nu,01,5\n")
    write(tmp_path / "items.csv", 'item,title,categories,description\n01,"A, ""B""",Home > Lamps,\n')
    rows, items = read("table", tmp_path, category_separator=">")
    assert rows == (["u"], ["01"], [5 * SECOND], None)
    assert items == {"01": Item("01", 'A, "B"', (("Home", "Lamps"),))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item,when\nu,i,1\n", "t.csv: column 'time' is missing; found user, item, when"),
        ("", "t.csv: empty; expected a header line and rows"),
        ("user,item,time\nu,i,1\n,i,2\n", "t.csv, line 3: column 'user' is empty; expected an id"),
        (
            "user,item,time\nu,i,1\nu,i,\n",
            "t.csv, line 3: column 'time': expected seconds since 1970 or ISO dates in one form",
        ),
        ("user,item,time\nu,i,noon\n", "t.csv, line 2: column 'time': expected seconds since 1970"),
        ("user,item,time\nu,i,nan\n", "t.csv, line 2: column 'time': expected seconds since 1970"),
        ("user,item,time\nu,i,12\nu,j,1x\n", "t.csv, line 3: column 'time': expected seconds since 1970"),
        ("user,item,time\nu,i,99999999999999999999\n", "t.csv, line 2: column 'time': expected seconds"),
        (
            "user,item,time\nu,i,1600000000\nu,j,1600000000000\n",
            "t.csv, line 3: column 'time': expected seconds since 1970; these look like milliseconds, found '16000",
        ),
        ("user,item,time\nu,i,-1e11\n", "line 2: column 'time': expected seconds since 1970; these look like milli"),
        (
            "user,item,time\nu,i,5.5\nu,j,2020-01-01\n",
            "line 3: column 'time': expected seconds since 1970 or ISO dates in one",
        ),
        ("user,item,time\nu,i,2020-01-01\nu,j,5\n", "in one form, found '5'"),
        ("user,item,time\nu,i,2020-01-01\nu,j,2020-01-01T00:00Z\n", "in one form, found '2020-01-01T00:00Z'"),
        ("user,item,time\nu,i,12:30\n", "in one form, found '12:30'"),
        ("user,item,time\nu,i\n", "t.csv, line 2: CSV parse error: Expected 3 columns, got 2"),
        ("user,item,time,user\nu,i,1,v\n", "t.csv: 2 columns are named 'user'; expected one"),
        ("user,item,time\ru,i,1\r", "t.csv: its lines end in CR alone; expected LF or CR LF"),
        (b"user,item,time\nu,i,1\nu,\xff,2\n", "t.csv, line 3: not UTF-8 text"),
    ],
)
def test_table_wrong_content(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read("table", tmp_path / "t.csv")
    assert "\n" not in str(error.value)
    assert message in str(error.value)


def test_ratings_are_numbers_whatever_the_first_of_them_look_like(tmp_path, monkeypatch):
    monkeypatch.setattr("raygrec.data.readers.table._BLOCK", 40)  # two rows or three
    rows = [f"u,i{number},{rating},{number}" for number, rating in enumerate(["", "", "", "5", "4", "3", "4.5", ""])]
    write(tmp_path / "t.csv", "user,item,rating,time\n" + "\n".join(rows) + "\n")
    (_, items, times, ratings), _ = read("table", tmp_path / "t.csv", min_rating=1)
    assert (len(items), times) == (8, [number * SECOND for number in range(8)])
    assert np.array_equal(ratings, [np.nan, np.nan, np.nan, 5, 4, 3, 4.5, np.nan], equal_nan=True)
    write(tmp_path / "t.csv", "user,item,rating,time\nu,i,good,1\n")
    message = "line 2: column 'rating': expected a number, found 'good'"
    assert refused("table", tmp_path / "t.csv", min_rating=1) == f"{tmp_path}/t.csv, {message}"


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([*["5"] * 9, "5.5", "7"], [*[5 * SECOND] * 9, 5_500_000, 7 * SECOND]),
        ([" 5", "-6 ", "1e3"], [5 * SECOND, -6 * SECOND, 1000 * SECOND]),
        (
            ["1970-01-02", "1970-01-02T00:00:01", "1970-01-02 00:00:01.0000029"],
            [86400 * SECOND, 86401 * SECOND, 86401000002],
        ),
        (["1970-01-01T01:00:00+01:00", "1970-01-01T00:00:01Z"], [0, SECOND]),
    ],
)
def test_times_as_text_are_read_alike_in_every_block_and_in_parquet(tmp_path, monkeypatch, times, found):
    monkeypatch.setattr("raygrec.data.readers.table._ROWS", 1)
    rows = "".join(f"u,i,{time}\n" for time in times)
    write(tmp_path / "t.csv", f"user,item,time\n{rows}")
    pq.write_table(
        pa.table({"user": ["u"] * len(times), "item": ["i"] * len(times), "time": times}), tmp_path / "t.parquet"
    )
    for block in (8 << 20, 40):
        monkeypatch.setattr("raygrec.data.readers.table._BLOCK", block)
        assert read("table", tmp_path / "t.csv")[0][2] == found
    assert read("table", tmp_path / "t.parquet")[0][2] == found
    categories = pa.array(times).dictionary_encode()  # as pandas writes a column of few values
    pq.write_table(pa.table({"user": times, "item": times, "time": categories}), tmp_path / "t.parquet")
    assert read("table", tmp_path / "t.parquet")[0][2] == found


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            ["1", "2020-01-01"],
            "row 2: column 'time': expected seconds since 1970 or ISO dates in one form, found '2020-01-01'",
        ),
        (["noon", "1"], "row 1: column 'time': expected seconds since 1970 or ISO dates in one form, found 'noon'"),
        (["1", None], "row 2: column 'time': expected seconds since 1970 or ISO dates in one form, found nothing"),
        (
            [1, 10**12],
            "row 2: column 'time': expected seconds since 1970; these look like milliseconds, found 1000000000000",
        ),
        (
            [1, 10**18],
            "row 2: column 'time': expected seconds since 1970; these look like milliseconds, found 10000000000000",
        ),
        (
            pa.array([1, 2], pa.time32("s")),
            "row 1: column 'time': expected seconds since 1970 or ISO dates in one form, found",
        ),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_wrong_times_of_parquet(tmp_path, monkeypatch, rows, times, message):
    monkeypatch.setattr("raygrec.data.readers.table._ROWS", rows)
    pq.write_table(pa.table({"user": ["u", "u"], "item": ["i", "j"], "time": times}), tmp_path / "t.parquet")
    assert refused("table", tmp_path / "t.parquet").startswith(f"{tmp_path}/t.parquet, {message}")


@pytest.mark.parametrize("block", [8 << 20, 40])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("u,i,bad,1", "column 'rating': expected a number, found 'bad'"),
        ("u,i,5", "CSV parse error: Expected 4 columns, got 3: u,i,5"),
        ("   ", "CSV parse error: Expected 4 columns, got 1:"),
        ("u,i,5,noon", "column 'time': expected seconds since 1970 or ISO dates in one form, found 'noon'"),
    ],
)
def test_wrong_rows_are_named_by_their_line(tmp_path, monkeypatch, block, row, message):
    monkeypatch.setattr("raygrec.data.readers.table._BLOCK", block)
    good = "u,i,5,1\n" * 10
    write(tmp_path / "t.csv", f" \n\nuser,item,rating,time\n{good}\n\n{good}{row}\n{good}")  # 3, 10, 2 and 10 lines
    assert refused("table", tmp_path / "t.csv", min_rating=1).startswith(f"{tmp_path}/t.csv, line 26: {message}")
    write(tmp_path / "t.csv", f'user,item,rating,time\n"u",i,5,1\n{good}{row}\n')
    assert refused("table", tmp_path / "t.csv", min_rating=1).startswith(f"{tmp_path}/t.csv, row 12: {message}")
    if row.strip():
        write(tmp_path / "u.item", "")
        write(tmp_path / "u.genre", "")
        write(tmp_path / "u.data", "u\ti\t5\t1\n\n" + row.replace(",", "\t"))
        assert refused("movielens", tmp_path).startswith("u.data, line 3: ")


def test_table_wrong_files(tmp_path):
    assert "unknown kind of table" in refused_file(tmp_path, "t.xlsx", "x")
    assert "no such file" in refused_file(tmp_path, "absent.csv", None)
    assert "Parquet magic bytes not found" in refused_file(tmp_path, "t.parquet", "this is not a parquet file at all")


def test_a_damaged_parquet_is_not_called_a_gzip_or_a_text_file(tmp_path):
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"user": ["u"], "item": ["i"], "time": [1]}), file)
    content = bytearray(file.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[footer : footer + 40] = b"\xff" * 40
    file.write_bytes(content)
    assert refused("table", file).startswith(f"{file}: cannot be read (Couldn't deserialize thrift")
    pq.write_table(pa.table({"user": [b"\xff"], "item": ["i"], "time": [1]}), file)
    assert refused("table", file) == f"{file}: Invalid UTF8 payload"


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
@pytest.mark.parametrize(
    ("reviews", "line"),
    [
        (["good", '"good', "good", "good"], 3),  # never closed
        (["good", '"good', "good", '"good'], 3),
        (["good", '"good', "good", '"good, indeed"'], 3),
        (['"two\nlines"', '"good', "good", "good"], 4),
        (['"a" b', '"good', "good", "good"], 3),  # the first takes in no other line
    ],
)
def test_a_quote_that_takes_in_other_lines_is_refused(tmp_path, ending, reviews, line):
    rows = "".join(f"u,i{number},{number},{review}\n" for number, review in enumerate(reviews))
    write(tmp_path / f"t{ending}", f"user,item,time,review\n{rows}")
    message = refused("table", tmp_path / f"t{ending}")
    assert message.startswith(f"{tmp_path}/t{ending}, line {line}: a quote is opened there and never closed, or amid")


def test_a_quote_that_is_never_closed_is_found_in_large_files_too(tmp_path, monkeypatch):
    monkeypatch.setattr("raygrec.data.readers.table._BLOCK", 100)
    write(tmp_path / "t.csv", 'user,item,time,review\nu,i,1,"\n' + "u,i,2,good\n" * 100)
    assert ", line 2: a quote is opened there and never closed" in refused("table", tmp_path / "t.csv")


def test_quoted_values_may_hold_line_breaks_and_quotes(tmp_path):
    reviews = ['"two\n\nlines"', '"""so"" they\nsay"', '5" long', '"a" b', '""', '"u,i,9,x"']
    rows = "".join(f"u,i{number},{number},{review}\n" for number, review in enumerate(reviews))
    write(tmp_path / "interactions.csv", f"user,item,time,review\n{rows}")
    write(tmp_path / "items.csv", 'item,title\n"i0","A ""B"",\nC"\n')
    (_, _, times, _), items = read("table", tmp_path)
    assert (times, items) == ([number * SECOND for number in range(6)], {"i0": Item("i0", 'A "B", C')})


def test_places_are_lines_or_where_a_quote_may_hold_some_rows(tmp_path):
    write(tmp_path / "t.csv", "   \n\nuser,item,time\n\n\nu,i,1\n\nu,,2\n")
    assert refused("table", tmp_path / "t.csv") == f"{tmp_path}/t.csv, line 8: column 'item' is empty; expected an id"
    write(tmp_path / "t.csv", 'user,item,time,review\nu,i,1,"two\nlines"\nu,,2,\n')
    assert refused("table", tmp_path / "t.csv") == f"{tmp_path}/t.csv, row 2: column 'item' is empty; expected an id"


def refused_file(folder, name, content):
    if content is not None:
        write(folder / name, content)
    return refused("table", folder / name)


def test_table_items_column_that_was_named_must_exist(tmp_path):
    write(tmp_path / "interactions.csv", "user,item,time\nu,i,5\n")
    write(tmp_path / "items.csv", "item,title\ni,T\n")
    assert read("table", tmp_path)[1] == {"i": Item("i", "T")}
    message = refused("table", tmp_path, categories_column="genre")
    assert message == "items.csv: column 'genre' is missing; found item, title"


def test_a_signal_is_heard_while_the_header_is_read(tmp_path, monkeypatch):
    @contextmanager
    def terminated(path, description):
        monkeypatch.undo()
        try:
            with path.open("rb") as file:
                yield file
        finally:
            raise SystemExit(143)  # as the handler of SIGTERM does, which runs wherever the process is

    write(tmp_path / "interactions.csv", "user,item,time\nu,i,1\n")
    monkeypatch.setattr(files, "open_metered", terminated)
    with pytest.raises(SystemExit):
        read("table", tmp_path)

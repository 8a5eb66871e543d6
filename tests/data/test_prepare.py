import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from raygrec.data.options import TABLE_OPTIONS
from raygrec.data.prepare import PrepareOptions, prepare
from raygrec.errors import InputError

ALL_TRAIN = {"split": "ratio", "valid_ratio": 0, "test_ratio": 0}


def table(folder, rows, items=None):
    """A folder with interactions.csv of (user, item, rating, time) rows, and items.csv of titles by id."""
    folder.mkdir(exist_ok=True)
    lines = ["user,item,rating,time", *(",".join(map(str, row)) for row in rows)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    if items is not None:
        titles = ["item,title", *(f"{name},{title}" for name, title in items.items())]
        (folder / "items.csv").write_text("\n".join(titles) + "\n")
    return folder


def build(tmp_path, rows, items=None, **options):
    source = table(tmp_path / "source", rows, items)
    return prepare(PrepareOptions(format="table", path=source, out=tmp_path / "store", **{"k_core": 0, **options}))


def named(store, split):
    """{user id: [item ids]} of the rows that are not empty."""
    csr = store.interactions(split)
    histories = {store.user_ids[user]: [store.item_ids[item] for item in csr[user]] for user in range(len(csr))}
    return {user: items for user, items in histories.items() if items}


def refused(tmp_path, *args, **options):
    with pytest.raises(InputError) as error:
        build(tmp_path, *args, **options)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    return str(error.value)


def test_time_order_ties_and_leave_one_out(tmp_path):
    rows = [("u", "c", 1, 30), ("v", "a", 1, 5), ("u", "a", 1, 10), ("u", "d", 1, 20), ("u", "b", 1, 20)]
    store = build(tmp_path, rows)
    assert named(store, "train") == {"u": ["a", "d"], "v": ["a"]}
    assert named(store, "valid") == {"u": ["b"]}
    assert named(store, "test") == {"u": ["c"]}
    assert list(store.item_ids) == ["c", "a", "d", "b"]  # first appearance in the file
    assert store.manifest["notes"][1].startswith("1 interactions have the same time as the one before")


def test_deduplicate_keeps_the_earliest_in_time(tmp_path):
    rows = [("u", "a", 1, 9), ("u", "b", 1, 5), ("u", "a", 1, 1), ("u", "c", 1, 7)]
    store = build(tmp_path, rows, split="global-time", valid_ratio=0, test_ratio=0)
    assert named(store, "train") == {"u": ["a", "b", "c"]}


def test_repeats_may_be_kept(tmp_path):
    rows = [("u", "a", 1, 9), ("u", "b", 1, 5), ("u", "a", 1, 1)]
    store = build(tmp_path, rows, deduplicate=False, split="global-time", valid_ratio=0, test_ratio=0)
    assert named(store, "train") == {"u": ["a", "b", "a"]}


def test_filters_are_counted(tmp_path):
    rows = [
        ("u", "a", 5, 1),
        ("u", "b", 4, 2),
        ("v", "a", 4, 3),
        ("v", "b", 5, 4),
        ("v", "b", 5, 5),
        ("w", "a", 3, 6),
    ]
    store = build(tmp_path, [*rows, ("x", "c", 5, 7)], k_core=2, min_rating=4, **ALL_TRAIN)
    assert list(store.manifest["counts"].values()) == [7, 6, 5, 4]
    assert (list(store.user_ids), list(store.item_ids)) == (["u", "v"], ["a", "b"])
    assert store.manifest["num_interactions"] == {"train": 4, "valid": 0, "test": 0}


def test_date_window_takes_both_days(tmp_path):
    day = 86_400
    rows = [("u", name, 1, moment) for name, moment in zip("abcd", (day - 1, day, 2 * day - 1, 2 * day), strict=True)]
    store = build(tmp_path, rows, date_from="1970-01-02", date_to="1970-01-02", **ALL_TRAIN)
    assert list(store.item_ids) == ["b", "c"]
    store = build(tmp_path, rows, date_from="1970-01-03", date_to="9999-12-31", overwrite=True, **ALL_TRAIN)
    assert list(store.item_ids) == ["d"]


def test_ratio(tmp_path):
    rows = [(f"u{user}", f"i{item}", 1, item) for user in range(3) for item in range(10)]
    store = build(tmp_path, rows, split="ratio", seed=1)
    assert not store.ordered
    for user in range(3):
        parts = [store.interactions(split)[user] for split in ("train", "valid", "test")]
        assert [len(part) for part in parts] == [7, 1, 2]
        assert sorted(np.concatenate(parts)) == list(range(10))
        assert np.all(np.diff(parts[0]) > 0)  # still in time order


def test_global_time_drops_items_that_training_has_not_seen(tmp_path):
    rows = [("u", "a", 1, 1), ("u", "b", 1, 2), ("u", "c", 1, 3), ("v", "a", 1, 4), ("u", "d", 1, 5)]
    rows += [("u", "a2", 1, 0), ("w", "b", 1, 6), ("w", "e", 1, 7)]
    store = build(tmp_path, rows, split="global-time", valid_ratio=0.25, test_ratio=0.25)
    # by time: a2 a b c | v:a d | w:b e; d and e are not in training
    assert named(store, "train") == {"u": ["a2", "a", "b", "c"]}
    assert (named(store, "valid"), named(store, "test")) == ({"v": ["a"]}, {"w": ["b"]})
    assert list(store.item_ids) == ["a", "b", "c", "a2"]
    notes = " / ".join(store.manifest["notes"])
    assert "1 valid interactions dropped: item not in training / 1 test interactions dropped" in notes
    assert "1 valid users have no training interaction / 1 test users have no training interaction" in notes


def test_times_are_kept_where_the_split_is_one_in_time(tmp_path):
    rows = [("u", "b", 1, 30), ("v", "a", 1, 5), ("u", "a", 1, 10), ("v", "b", 1, 20), ("u", "c", 1, 7)]
    rows += [("w", "b", 1, 40), ("u", "a2", 1, 1), ("v", "c", 1, 50), ("w", "a", 1, 60), ("w", "new", 1, 61)]
    store = build(tmp_path, rows, split="global-time", valid_ratio=0.2, test_ratio=0.3)
    known = {(user, item): time * 1_000_000 for user, item, _, time in rows}  # this reader counts microseconds
    for split in ("train", "valid"):
        found = [known[user, item] for user, items in named(store, split).items() for item in items]
        assert store.times(split).tolist() == found
        assert len(found) > 0


def test_other_splits_keep_no_times(tmp_path):
    store = build(tmp_path, [("u", "b", 1, 9), ("u", "a", 1, 5), ("u", "c", 1, 1)])
    with pytest.raises(InputError, match="keeps no times; prepare with split=global-time"):
        store.times("train")


def test_file_order_without_times(tmp_path):
    store = build(tmp_path, [("u", "b", 1, 9), ("u", "a", 1, 5), ("u", "c", 1, 1)], time_column="")
    assert named(store, "test") == {"u": ["c"]}
    assert "no time column" in store.manifest["notes"][0]


def test_chunks_and_groups_do_not_show(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    users, items, ratings, times = (rng.integers(most, size=300) for most in (20, 30, 6, 50))
    rows = list(zip((f"u{user}" for user in users), (f"i{item}" for item in items), ratings, times, strict=True))
    whole = build(tmp_path, rows, min_rating=2, k_core=2)
    monkeypatch.setattr("raygrec.data.readers.table._BLOCK", 200)
    monkeypatch.setattr("raygrec.data.prepare._GROUP", 300)
    parts = build(tmp_path, rows, min_rating=2, k_core=2, overwrite=True)
    assert parts.fingerprint == whole.fingerprint


def test_pandas_is_not_imported(tmp_path):
    """It takes half a second, and Arrow imports it by itself where it is asked to compare with values of Python."""
    source = table(tmp_path / "source", ROWS, {"a": "Lamp", "b": "Chair"})
    code = f"""
import sys
from raygrec.data.prepare import PrepareOptions, prepare
prepare(PrepareOptions(format="table", path="{source}", out="{tmp_path / "store"}", k_core=0, **{ALL_TRAIN}))
sys.exit("pandas" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_manifest_tells_what_was_done(tmp_path):
    store = build(tmp_path, [("u", "a", 1, 1)], {"a": "Lamp", "b": "Unused"}, name="shop", seed=7, **ALL_TRAIN)
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert (manifest["name"], manifest["options"]["seed"], manifest["options"]["k_core"]) == ("shop", 7, 0)
    assert [Path(source["file"]).name for source in manifest["sources"]] == ["interactions.csv", "items.csv"]
    assert all(len(source["sha256"]) == 64 for source in manifest["sources"])
    assert list(store.titles) == ["Lamp"]


ROWS = [("u", "a", 3, 1), ("u", "b", 3, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_rating": 4}, "no interactions are left after: minimum rating (min_rating=4.0)"),
        ({"k_core": 2}, "no interactions are left after: k-core (k_core=2)"),
        ({"date_from": "1999-01-01"}, "date window (date_from=1999-01-01, date_to=None)"),
        (
            {"split": "global-time", "test_ratio": 0.9, "valid_ratio": 0.05},
            "no training interactions are left",
        ),
    ],
)
def test_nothing_left_names_the_filter(tmp_path, options, message):
    assert message in refused(tmp_path, ROWS, **options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            ROWS,
            {},
            "no valid interactions are left after: split leave-one-out (no user has 3; filter less by min_rating",
        ),
        (
            ROWS,
            {"split": "ratio"},
            "no valid interactions are left after: split ratio (no user has enough for valid_ratio",
        ),
        (
            [*ROWS, ("u", "c", 3, 3), ("v", "d", 3, 4)],
            {"split": "global-time", "valid_ratio": 0, "test_ratio": 0.5},
            "no test interactions are left after: split global-time (none is late enough and of an item that training",
        ),
    ],
)
def test_nothing_to_evaluate_names_the_split(tmp_path, rows, options, message):
    assert message in refused(tmp_path, rows, **options)


def test_items_without_text(tmp_path):
    given = (tmp_path, ROWS, {"a": "Lamp"})
    message = refused(*given, **ALL_TRAIN)
    assert "items.csv: 1 of 2 items have no text there for '{title}. {categories}', the first is 'b'" in message
    store = build(*given, allow_missing_text=True, **ALL_TRAIN)
    assert list(store.texts) == ["Lamp", "b"]
    assert "1 items have no text in the source; their ids stand in" in store.manifest["notes"]
    described = {"text_template": "{description}", "overwrite": True, **ALL_TRAIN}  # which neither has
    with pytest.raises(InputError, match=r"2 of 2 items have no text there for '\{description\}'"):
        build(*given, **described)
    store = build(*given, **described, allow_missing_text=True)
    assert list(store.texts) == ["a", "b"]
    assert "2 items have no text in the source; their ids stand in" in store.manifest["notes"]


def test_no_items_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "sequences.txt").write_text("u 1 2 1\n")
    options = {"format": "sequences", "path": source, "out": tmp_path / "store"}
    with pytest.raises(InputError, match="no file that describes the items"):
        prepare(PrepareOptions(**options))
    assert list(prepare(PrepareOptions(**options, allow_missing_text=True)).titles) == ["1", "2"]


def test_options_that_do_not_fit_the_data(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "sequences.txt").write_text("u 1 2\n")
    options = {"format": "sequences", "path": source, "out": tmp_path / "store"}
    with pytest.raises(InputError, match="min_rating: sequences data have no ratings"):
        prepare(PrepareOptions(**options, min_rating=3))
    with pytest.raises(InputError, match="these data have an order but no dates"):
        prepare(PrepareOptions(**options, date_to="2020-01-01"))


def test_options_of_tables_are_refused_where_none_is_read(tmp_path):
    folder = table(tmp_path / "source", ROWS)
    (folder / "sequences.txt").write_text("u 1 2\n")
    columns = {"user_column": "u", "item_column": "i", "rating_column": "r", "time_column": None}
    of_items = {"title_column": "t", "categories_column": "c", "description_column": "d", "category_separator": ";"}
    for option, value in {"items": folder / "none.csv", **columns, **of_items}.items():
        given = {"path": folder, "out": tmp_path / "store", option: value}
        message = f"{option}: sequences data at {folder} have no use for it; only format 'table'"
        with pytest.raises(InputError) as error:
            prepare(PrepareOptions(format="sequences", **given))
        assert str(error.value) == message + (" with an items table has" if option in of_items else " has")
        if option in of_items:
            with pytest.raises(InputError, match=f"{option}: table data at .* only format 'table' with an items table"):
                prepare(PrepareOptions(format="table", **given))
    defaults = {option: PrepareOptions.model_fields[option].default for option in TABLE_OPTIONS}
    given = {"path": folder, "out": tmp_path / "store", "allow_missing_text": True, **ALL_TRAIN, **defaults}
    prepare(PrepareOptions(format="sequences", **given))
    prepare(PrepareOptions(format="table", **given, k_core=0, overwrite=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"k_core": -1},
        {"valid_ratio": 0.5, "test_ratio": 0.5},
        {"date_from": "2020-01-02", "date_to": "2020-01-01"},
        {"split": "global-time", "time_column": None},
        {"text_template": "{name}"},
        {"items": "caf\udce9.csv"},  # as Python reads a name with the byte E9
        {"no_such_key": 1},
    ],
)
def test_wrong_options(wrong):
    with pytest.raises(ValidationError):
        PrepareOptions(format="table", path="x", out="y", **wrong)


def test_defaults_follow_the_format():
    table_options = PrepareOptions(format="table", path="x", out="y", k_core=None)
    sequence_options = PrepareOptions(format="sequences", path="x", out="y")
    assert (table_options.k_core, table_options.deduplicate) == (5, True)
    assert (sequence_options.k_core, sequence_options.deduplicate) == (0, False)
    assert PrepareOptions(format="sequences", path="x", out="y", k_core=3).k_core == 3


def test_an_interrupt_while_reading_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("raygrec.data.filters.first_occurrences", interrupt)
    source = table(tmp_path / "source", ROWS)
    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareOptions(format="table", path=source, out=tmp_path / "store"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.data
@pytest.mark.skipif("RAYGREC_DATA" not in os.environ, reason="RAYGREC_DATA is not set")
@pytest.mark.parametrize(
    ("format_name", "folder", "users", "items", "interactions"),
    [
        ("sequences", "amazon_beauty", 22_363, 12_101, 198_502),
        ("sequences", "amazon_toys", 19_412, 11_924, 167_597),
        ("movielens", "ml-100k", 943, 1_682, 100_000),
    ],
)
def test_real_data(tmp_path, format_name, folder, users, items, interactions):
    path = Path(os.environ["RAYGREC_DATA"]) / folder
    store = prepare(PrepareOptions(format=format_name, path=path, out=tmp_path / "store", k_core=0))
    assert (store.num_users, store.num_items) == (users, items)
    assert sum(store.manifest["num_interactions"].values()) == interactions
    assert store.manifest["num_interactions"]["test"] == users
    assert not any("&amp;" in title for title in store.titles)

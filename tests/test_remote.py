import json
import shutil
import threading
from pathlib import Path

import pytest

from raygrec import remote
from raygrec.config import validate
from raygrec.data.store import Store
from raygrec.errors import InputError
from raygrec.serve.topk import evaluate_run
from raygrec.train.folder import RunFolder, run_at, with_absolute_paths
from raygrec.train.local import train_here
from raygrec.train.settings import GLTARun
from tests.train.workers import tiny_graph_config, tiny_sequential_config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the test's own."""
    monkeypatch.setenv("RAYGREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store_address(tiny_store, tmp_path):
    """A copy of the tiny store, as prepared, at a file:// address."""
    folder = tmp_path / "bucket" / "store"
    shutil.copytree(tiny_store.path, folder, ignore=shutil.ignore_patterns("tokens", "graph", "text_vectors"))
    return f"file://{folder}"


def fetched(cache) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir() if not entry.name.startswith("."))


def test_a_store_is_fetched_once_and_again_when_it_has_changed(store_address, tiny_store, cache):
    store = Store.open(store_address)
    assert store.fingerprint == tiny_store.fingerprint
    assert list(store.titles) == list(tiny_store.titles)
    assert [store.path.name] == fetched(cache)
    assert Store.open(store_address).path == store.path
    manifest = Path(store_address.removeprefix("file://")) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "name": "another"}))
    assert Store.open(store_address).name == "another"
    assert len(fetched(cache)) == 2


def test_a_damaged_store_is_refused_and_leaves_nothing_to_be_read(store_address, cache):
    file = Path(store_address.removeprefix("file://")) / "titles.data.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for _ in range(2):
        with pytest.raises(InputError, match=r"titles\.data\.npy: its content is not what was written"):
            Store.open(store_address)
    assert fetched(cache) == []


def test_of_many_at_once_one_fetches(store_address, monkeypatch):
    copies, copy = [], remote._copy_down
    monkeypatch.setattr(remote, "_copy_down", lambda *arguments: (copies.append(1), copy(*arguments)))
    threads = [threading.Thread(target=Store.open, args=(store_address,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copies) == 1


def test_a_run_reads_its_store_and_weights_at_addresses_and_is_copied_to_one(
    store_address, tiny_store, tiny_backbone, tmp_path
):
    plain = train_here(tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "plain", train={"epochs": 1}))
    weights, there = f"file://{tiny_backbone}", f"file://{tmp_path}/bucket/run"
    config = tiny_sequential_config(store_address, weights, tmp_path / "run", train={"epochs": 1}, upload=there)
    metrics = train_here(config)
    for split in ("valid", "test"):
        assert metrics[split] == plain[split]
    copied = tmp_path / "bucket" / "run"
    assert json.loads((copied / "metrics.json").read_text()) == metrics
    assert {entry.name for entry in copied.iterdir()} == {
        "config.yaml",
        "history.jsonl",
        "metrics.json",
        "model",
        "store.id",
    }
    shutil.rmtree(tmp_path / "run")
    assert evaluate_run(there) == {split: metrics[split] for split in ("valid", "test")}


def test_metrics_are_copied_last(tmp_path, monkeypatch):
    folder, there = tmp_path / "run", tmp_path / "there"
    (folder / "model").mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_text("x")
    (folder / "z.json").mkdir()  # a folder where a file would go: the copy breaks off
    (folder / "z.json" / "inside").write_text("x")
    there.mkdir()
    (there / "z.json").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"is finished, but could not be copied to file://.*there"):
        remote.upload(folder, f"file://{there}", "metrics.json")
    assert not (there / "metrics.json").exists()
    with pytest.raises(InputError, match=r"metrics\.json is missing; it is nothing finished"):
        run_at(f"file://{there}")


def test_s3(s3, tiny_store, tiny_backbone, tmp_path, cache):
    remote.upload(tiny_store.path, s3("stores/tiny"), "manifest.json", without=("tokens", "graph", "text_vectors"))
    config = tiny_graph_config(s3("stores/tiny"), tiny_backbone, tmp_path / "run", upload=s3("runs/tiny"))
    metrics = train_here(config)
    assert metrics["store"] == tiny_store.fingerprint
    assert run_at(s3("runs/tiny")).metrics() == metrics
    assert len(fetched(cache)) == 2
    with pytest.raises(InputError, match=r"s3://nobody/here.*: cannot be fetched"):
        Store.open(s3("x").replace("bucket/x", "nobody/here"))


def test_resuming_keeps_an_address_as_it_is(store_address, tiny_backbone, tmp_path):
    config = with_absolute_paths(tiny_graph_config(store_address, tiny_backbone, tmp_path / "run"))
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    assert folder.config().store == store_address
    folder.start(config.model_copy(update={"upload": "s3://bucket/run"}), resume=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"store": "ftp://host/x"}, "key 'store': ftp://host/x: addresses begin with one of s3://, gs://, file://"),
        ({"store": None}, "key 'store': expected a path, or an address"),
        ({"out": "s3://bucket/run"}, "key 'out': a run is written to a path that all nodes share; `upload`"),
        ({"upload": "runs/x"}, "key 'upload': runs/x: addresses begin with one of"),
    ],
)
def test_wrong_places_are_refused_at_once(changes, says):
    with pytest.raises(InputError) as refused:
        validate(GLTARun, {"store": "store", "out": "run", **changes}, "test")
    assert says in str(refused.value)


def test_what_is_not_there(tmp_path):
    for address in (f"file://{tmp_path}/nowhere", f"file://{tmp_path}"):
        with pytest.raises(InputError, match=rf"{address}: "):
            Store.open(address)

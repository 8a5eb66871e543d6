import json
import re
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from raygrec.errors import InputError
from raygrec.serve.topk import FinishedRun, evaluate_run, recommend_all
from raygrec.train.assembly import histories
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.train.workers import tiny_config, tiny_galrec_config, tiny_graph_config, tiny_sequential_config


@pytest.fixture(scope="module")
def run(tiny_store, tiny_backbone, tmp_path_factory):
    """The folder of a finished run."""
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("serve") / "run")
    train_here(config)
    return config.out


def new_items(store, user: int) -> list[int]:
    shown = set(histories(store, "test").shown[user].tolist())
    return [item for item in range(store.num_items) if item not in shown]


def test_evaluating_repeats_the_runs_figures(run):
    written = json.loads((run / "metrics.json").read_text())
    assert evaluate_run(run) == {"valid": written["valid"], "test": written["test"]}


def test_a_run_with_adapters_needs_its_folder_only(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", model={"tuning": "lora"})
    train_here(config)
    monkeypatch.setitem(sys.modules, "peft", None)  # adapters are merged
    written = json.loads((config.out / "metrics.json").read_text())
    found = evaluate_run(config.out)
    assert {split: pytest.approx(figures) for split, figures in found.items()} == {
        "valid": written["valid"],
        "test": written["test"],
    }
    assert recommend_all(config.out, 3, tmp_path / "top.parquet") == 3 * tiny_store.num_users


def test_evaluating_with_another_decoding(run):
    other = evaluate_run(run, "autoregressive")
    first = evaluate_run(run)
    assert other.keys() == first.keys()
    assert other["test"]["hit@2"] != first["test"]["hit@2"] or other["test"]["ndcg@3"] != first["test"]["ndcg@3"]


@pytest.mark.parametrize("make", [tiny_galrec_config, tiny_sequential_config, tiny_graph_config])
def test_a_decoding_that_the_recipe_does_not_have_is_refused(tiny_store, tiny_backbone, tmp_path, make):
    config = make(tiny_store.path, tiny_backbone, tmp_path / "run")
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    folder.write_metrics({"store": tiny_store.fingerprint})
    message = f"{config.out}: evaluate.decoding=slots: {config.name} answers at one position; use first or autoregress"
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate_run(config.out, "slots")


def test_a_list_longer_than_the_slots_is_refused(run):
    config = RunFolder(run).config()
    assert evaluate_run(run, "slots").keys() == {"valid", "test"}
    few = config.model_copy(update={"model": config.model.model_copy(update={"slots": 2})})
    folder = RunFolder(run.with_name("few"))
    folder.start(few, resume=False)
    with pytest.raises(
        InputError, match=r"few: evaluate\.decoding=slots .*: model\.slots is 2, lists of 3 need as many"
    ):
        evaluate_run(folder.path, "slots")


def test_recommending_writes_the_best_new_items_of_every_user(run, tiny_store, tmp_path):
    file = tmp_path / "new" / "top.parquet"
    assert recommend_all(run, 5, file) == 5 * tiny_store.num_users
    table = pq.read_table(file)
    assert table.column_names == ["user", "rank", "item", "score", "title"]
    assert [path.name for path in file.parent.iterdir()] == ["top.parquet"]
    rows = table.to_pylist()
    number = {tiny_store.item_ids[item]: item for item in range(tiny_store.num_items)}
    finished = FinishedRun(run)
    for user in range(tiny_store.num_users):
        mine = rows[5 * user : 5 * user + 5]
        assert [row["user"] for row in mine] == [tiny_store.user_ids[user]] * 5
        assert [row["rank"] for row in mine] == [1, 2, 3, 4, 5]
        items = [number[row["item"]] for row in mine]
        assert [row["title"] for row in mine] == [tiny_store.titles[item] for item in items]
        # An independent ranking: sort everything that is new to the user.
        shown = histories(tiny_store, "test").shown.take(np.array([user]))
        with torch.no_grad():
            batch = finished.builder.recommending(np.array([user]), shown, "test", 1)
            scores = finished.model.slot_logits(batch)[0, 0].log_softmax(0).numpy()
        assert items == sorted(new_items(tiny_store, user), key=lambda item: -scores[item])[:5]
        np.testing.assert_allclose([row["score"] for row in mine], scores[items], rtol=1e-4)


def test_a_list_is_as_long_as_what_is_new(run, tiny_store, tmp_path):
    rows = recommend_all(run, tiny_store.num_items, tmp_path / "all.parquet")
    assert rows == sum(len(new_items(tiny_store, user)) for user in range(tiny_store.num_users))
    scores = pq.read_table(tmp_path / "all.parquet").to_pandas().groupby("user", sort=False)["score"]
    assert scores.apply(lambda column: column.is_monotonic_decreasing).all()


@pytest.mark.parametrize("k", [0, 25])
def test_a_wrong_k_is_refused(run, tmp_path, k):
    with pytest.raises(InputError, match=rf"--k {k}: the catalogue has 24 items"):
        recommend_all(run, k, tmp_path / "top.parquet")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_nothing_behind(run, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken: cannot be written"):
        recommend_all(run, 2, tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"top\.parquet: cannot be written"):
        recommend_all(run, 2, tmp_path / "file" / "top.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    assert not list((tmp_path / "taken").iterdir())


def test_titles_of_a_history(run, tiny_store):
    shown = histories(tiny_store, "test").shown[7]
    assert FinishedRun(run).history(7) == [tiny_store.titles[int(item)] for item in shown]


def test_a_run_that_has_not_finished_is_refused(tiny_store, tiny_backbone, tmp_path):
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run")
    RunFolder(config.out).start(config, resume=False)
    with pytest.raises(InputError, match=r"has not finished \(metrics.json is missing\)"):
        FinishedRun(config.out)
    with pytest.raises(InputError, match=r"no run there \(config.yaml is missing\)"):
        FinishedRun(tmp_path)

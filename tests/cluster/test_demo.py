import pytest

from raygrec.data.store import Store
from raygrec.errors import InputError
from raygrec.train.folder import RunFolder

demo = pytest.importorskip("raygrec.cluster.demo", reason="Ray is not installed")
pytestmark = pytest.mark.cluster


def test_the_demo_shows_a_table_and_examples(local_ray, tiny_backbone, tmp_path, capsys):
    out = tmp_path / "demo"
    settings = {
        "backbone": {"name": str(tiny_backbone)},
        "graph": {"epochs": 4, "evaluate_every": 2, "dim": 8, "folds": 2},
        "alignment": {"epochs": 0},
        "histories": {"epochs": 1, "batch": 16, "micro_batch": 16},
        "train": {"epochs": 1, "batch": 16, "micro_batch": 16},
        "cluster": {"workers": 1},
    }
    galrec = {"train": settings["train"]}
    result = demo.run_demo(out, users=60, items=40, settings=settings, galrec=galrec)
    shown = capsys.readouterr().out
    store = Store.open(out / "store")
    assert f"{store.num_users} readers, {store.num_items} books" in shown
    assert {line.split()[0] for line in shown.splitlines() if "0 ." in line or " ." in line} >= {
        "Popularity",
        "LightGCN",
        "GLTA",
        "GAL-Rec",
    }
    assert f"run folder: {out / 'run'}" in shown
    assert result["test"] == RunFolder(out / "run").metrics()["test"]
    other = out / "run-galrec"
    assert result["galrec"] == {"run": str(other), "test": RunFolder(other).metrics()["test"]}
    assert len(result["examples"]) == 3
    titles = set(store.titles)
    for example in result["examples"]:
        assert f"reader {example['user']}" in shown
        user = list(store.user_ids).index(example["user"])
        read = [store.titles[int(item)] for split in ("train", "valid") for item in store.interactions(split)[user]]
        assert example["history"] == read[-5:]
        assert example["next"] == [store.titles[int(item)] for item in store.interactions("test")[user]]
        assert len(set(example["top"])) == 5
        assert set(example["top"]) <= titles - set(read)
        for line in (*example["history"], *example["top"]):
            assert line[:30] in shown
    with pytest.raises(InputError, match=r"demo: exists already; remove it or name another folder with --out"):
        demo.run_demo(out)


def test_a_demo_without_its_backbone_makes_nothing(tmp_path):
    with pytest.raises(InputError, match="nothing/there"):
        demo.run_demo(tmp_path / "demo", settings={"backbone": {"name": "nothing/there"}})
    assert not (tmp_path / "demo").exists()

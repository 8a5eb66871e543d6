"""`ray job submit` to a real Ray with token authentication: every job; stop, resume, failures that say why."""

import json
import os
import subprocess
import urllib.error
from pathlib import Path

import pandas as pd
import pytest
import yaml

from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.cluster.head import Head, ray
from tests.cluster.test_launcher import wait_for
from tests.train.workers import tiny_graph_config, tiny_sequential_config

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("RAYGREC_SLOW"), reason="takes four minutes; RAYGREC_SLOW=1 runs it"),
]

ROOT = Path(__file__).parent.parent.parent
DRIVER = '{"train_driver": 1}'
# Long enough to be stopped in the middle of it.
LONG = {"epochs": 40, "patience": 40, "evaluate_every": 10, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def submit():
    """Calls `ray job …` against a head of its own, which two drivers and four CPUs fit on."""
    with Head("--num-cpus=4", '--resources={"train_driver": 2}') as head:

        def call(*arguments: object) -> subprocess.CompletedProcess:
            command = ray("job", *arguments)
            return subprocess.run(command, env=head.environment, cwd=ROOT, capture_output=True, text=True)

        call.ask = lambda path, *how, **more: head.ask(f"api/jobs/{path}", *how, **more)
        yield call


def job(submit, name: str, *command: object, wait: bool = True) -> subprocess.CompletedProcess:
    how = ["--runtime-env", "jobs/runtime_env.yaml", "--entrypoint-resources", DRIVER, "--submission-id", name]
    return submit("submit", *how, *([] if wait else ["--no-wait"]), "--", "python", *command)


def test_a_stopped_job_is_resumed_to_the_same_end(submit, tiny_store, tiny_backbone, tmp_path):
    changes = {"train": LONG, "cluster": {"workers": 1}}
    alone = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "alone", **changes)
    config = alone.model_copy(update={"out": tmp_path / "run"})
    file = tmp_path / "run.yaml"
    file.write_text(config.model_dump_json())  # JSON is YAML
    folder = RunFolder(config.out)
    # The head answers before its agent, which starts jobs.
    wait_for(lambda: job(submit, "first", "jobs/train.py", file, wait=False).returncode == 0, 90)
    # Meanwhile, on the second driver's place.
    wrong = job(submit, "wrong", "jobs/train.py", file, "train.epoch=3")
    expected = train_here(alone)
    wait_for(lambda: list(folder.checkpoints.glob("train-*")) or folder.metrics(), 120)
    with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
        submit.ask("first/stop", "POST", bearer="another-token-that-is-as-long-as-the-right-one")
    assert submit.ask("first/stop", "POST") == {"stopped": True}
    wait_for(lambda: submit.ask("first")["status"] == "STOPPED", 30)
    assert folder.metrics() is None  # else it was faster than the stop
    resumed = job(submit, "second", "jobs/train.py", file, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    metrics = folder.metrics()
    assert json.dumps(metrics) in resumed.stdout
    for split in ("valid", "test"):
        assert metrics[split] == pytest.approx(expected[split], abs=1e-6)
    losses = [[record["loss"] for record in one.history()] for one in (folder, RunFolder(alone.out))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    # The job that could not be.
    said = wrong.stdout + wrong.stderr
    assert wrong.returncode == 1
    assert "Job 'wrong' failed" in said
    assert "exit code 2" in said
    assert f"raygrec: {file}: unknown key 'train.epoch'; the nearest known key is 'train.epochs'" in said
    assert "Traceback" not in said


def test_every_job_does_its_work_from_a_source_to_lists(submit, tiny_store, tiny_backbone, tmp_path):
    store, run = tmp_path / "store", tmp_path / "run"
    config = tiny_sequential_config(store, tiny_backbone, run, cluster={"workers": 1})
    (tmp_path / "run.yaml").write_text(config.model_dump_json())  # JSON is YAML
    (tmp_path / "graph.yaml").write_text(tiny_graph_config(store, tiny_backbone, tmp_path / "graph").model_dump_json())
    space = {"job": str(tmp_path / "run.yaml"), "out": str(tmp_path / "sweep"), "metric": "ndcg@3", "trials": 1}
    space["space"] = {"train.lr": {"choice": [0.01]}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    steps = [
        ("prepare.py", "table", tiny_store.path.parent, "--out", store, "k_core=0"),
        ("pretrain_graph.py", tmp_path / "graph.yaml"),
        ("train.py", tmp_path / "run.yaml", "--json"),
        ("evaluate.py", run, "--json"),
        ("recommend.py", run, "--k", 5, "--out", tmp_path / "top.parquet"),
        ("tune.py", tmp_path / "space.yaml"),
    ]
    said = {}
    for name, *arguments in steps:
        done = job(submit, name.replace(".", "-"), f"jobs/{name}", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        said[name] = done.stdout
    assert list((store / "graph").glob("lightgcn-*.safetensors"))
    metrics = RunFolder(run).metrics()
    assert json.dumps(metrics["test"]) in said["train.py"]
    assert json.dumps(metrics["test"]) in said["evaluate.py"]
    assert len(pd.read_parquet(tmp_path / "top.parquet")) == 48 * 5
    trials = pd.read_parquet(tmp_path / "sweep" / "trials.parquet")
    assert trials["status"].tolist() == ["finished"]
    assert trials["score"][0] == pytest.approx(metrics["valid"]["ndcg@3"], abs=1e-6)

import os

import pytest

from raygrec.errors import InputError
from raygrec.serve.topk import evaluate_run
from raygrec.train.local import train_here
from raygrec.train.settings import ClusterConfig
from tests.train.workers import tiny_sequential_config

launcher = pytest.importorskip("raygrec.cluster.launcher", reason="Ray is not installed")
task = pytest.importorskip("raygrec.cluster.task")

ONE = ClusterConfig(max_failures=0)


@pytest.mark.cluster
def test_a_run_is_evaluated_by_another_process(local_ray, tiny_store, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "the one that is joined already")
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run", train={"epochs": 1})
    metrics = train_here(config)
    assert launcher.on_cluster(config.cluster, evaluate_run, config.out) == {
        split: metrics[split] for split in ("valid", "test")
    }
    with pytest.raises(InputError, match=r"nowhere: no run there \(config\.yaml is missing\)$"):
        launcher.on_cluster(config.cluster, evaluate_run, "nowhere")


def die() -> None:
    os._exit(3)


@pytest.mark.cluster
def test_a_task_that_dies_is_one_line(local_ray):
    with pytest.raises(task.TaskLostError, match=r"^die: its process or node was lost \(") as lost:
        task.as_task(ONE, die)
    assert "\n" not in str(lost.value)


def test_without_a_cluster_there_is_no_task(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="--ray: RAY_ADDRESS names no cluster"):
        launcher.on_cluster(ONE, print)


def test_a_run_inside_a_jobs_copy_of_the_code_is_refused(tiny_store, tiny_backbone, tmp_path):
    out = tmp_path / "runtime_resources" / "working_dir_files" / "runs" / "x"
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, out)
    with pytest.raises(InputError, match=r"runs/x: goes away with the job's copy of the code; name an absolute path"):
        launcher.train_on_ray(config)
    assert not out.exists()

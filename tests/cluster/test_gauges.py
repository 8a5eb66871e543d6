import re
import time
import urllib.request
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from raygrec.train import pipeline
from raygrec.train.assembly import prepare_run
from raygrec.train.folder import RunFolder
from raygrec.train.local import bar_reporter
from tests.train.workers import tiny_sequential_config

launcher = pytest.importorskip("raygrec.cluster.launcher", reason="Ray is not installed")
pytestmark = pytest.mark.cluster


def exported(tags: dict[str, str]) -> dict[str, float]:
    """The gauges with these tags, as Prometheus would read them from the node's port."""
    node = launcher.ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    lines = urllib.request.urlopen(address, timeout=10).read().decode().splitlines()
    return {
        line.partition("{")[0].removeprefix("ray_raygrec_"): float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("ray_raygrec_")
        and all(re.search(rf'\b{tag}="{re.escape(tags[tag])}"', line) for tag in tags)
    }


def test_prometheus_finds_a_run_at_the_port_of_rays_own_metrics(local_ray, tiny_store, tiny_backbone, tmp_path):
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "watched", track={"every": 1})
    folder = RunFolder(config.out)
    with folder.claimed(config, resume=False):
        prepare_run(config, folder)
    # In this process, which is one of Ray's: a worker's would take long to start.
    with bar_reporter() as reporter:
        pipeline.run(config, folder, reporter, distributed=False, trackers=[launcher.Gauges(config.out)])
    found, deadline = {}, time.monotonic() + 60
    while found.get("step") != 16:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
        found = exported({"run": "watched", "out": str(config.out), "stage": "train"})
    record = folder.history()[-1]
    assert found["lr"] == pytest.approx(record["lr"])
    assert found["gradient_norm"] == pytest.approx(record["gradient_norm"])
    assert found["valid_ndcg_at_3"] == pytest.approx(record["valid"]["ndcg@3"])
    assert 0 < found["loss"] < 2 * record["loss"]
    assert 0 <= found["padding"] < 1


# ---- what needs no Ray running


def test_workers_have_gauges(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    config, given = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run"), {}
    board = SimpleNamespace(failed=SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(launcher.ray, "get", lambda answer: answer)
    monkeypatch.setattr(launcher.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr(launcher, "Heart", lambda *arguments: SimpleNamespace(beating=nullcontext))
    monkeypatch.setattr(pipeline, "run", lambda *arguments, **named: given.update(named))
    launcher._worker({"config": config.model_dump(mode="json"), "board": board})
    (gauges,) = given["trackers"]
    assert isinstance(gauges, launcher.Gauges)
    assert gauges._tags == {"run": "run", "out": str(config.out)}

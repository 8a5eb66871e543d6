import re
import urllib.request

import pytest

from raygrec.train.assembly import prepare_run
from raygrec.train.folder import RunFolder
from tests.train.workers import tiny_sequential_config

launcher = pytest.importorskip("raygrec.cluster.launcher", reason="Ray is not installed")
pytestmark = pytest.mark.cluster


def test_prometheus_finds_a_run_in_progress(local_ray, tiny_store, tiny_backbone, tmp_path):
    """At the port that Ray's own metrics are exported at."""
    config = tiny_sequential_config(
        tiny_store.path,
        tiny_backbone,
        tmp_path / "watched",
        train={"epochs": 5000, "patience": 5000, "evaluate_every": 1, "checkpoint_every": 10**6},
        cluster={"workers": 1},
        track={"every": 2},
    )
    folder = RunFolder(config.out)
    with folder.claimed(config, resume=False):
        prepare_run(config, folder)
    node = launcher.ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    run, found = launcher.RunOnWorkers(config, folder), {}
    while run.goes_on(0.3) and "valid_ndcg_at_3" not in found:
        lines = urllib.request.urlopen(address, timeout=10).read().decode().splitlines()
        tags = re.escape(f'out="{config.out}"'), 'run="watched"', 'stage="train"'
        found = {
            line.partition("{")[0].removeprefix("ray_raygrec_"): float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("ray_raygrec_") and all(re.search(tag, line) for tag in tags)
        }
    run.stop()
    assert found.keys() >= {"loss", "lr", "gradient_norm", "tokens_per_second", "padding", "step", "valid_ndcg_at_3"}
    assert 0 < found["loss"] < 10
    assert 0 <= found["padding"] < 1

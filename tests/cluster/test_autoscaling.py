"""A run that waits for nodes which are not there yet, and leaves none behind, on a real local Ray that starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raygrec.train.local import train_here
from tests.cluster.head import Head
from tests.cluster.test_launcher import wait_for
from tests.train.workers import tiny_sequential_config

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("RAYGREC_SLOW"), reason="takes two minutes; RAYGREC_SLOW=1 runs it"),
]

HEAD_NODE = "f" * 51 + "00000"  # what Ray's own provider of pretended machines calls the head
NODES = 2
PROVIDER = {
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "launch_multiple": True,
    "head_node_id": HEAD_NODE,
}
CLUSTER = {
    "cluster_name": "growing",
    "max_workers": NODES,
    "idle_timeout_minutes": 0.3,
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0, "train_driver": 1}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": NODES},
    },
    "head_node_type": "ray.head.default",
    # Ray fills these in for its own providers only.
    **{f"{of}setup_commands": [] for of in ("", "head_", "worker_")},
    **{f"{of}_start_ray_commands": [] for of in ("head", "worker")},
    "initialization_commands": [],
    "cluster_synced_files": [],
    "file_mounts": {},
    "auth": {},
}


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """A head without CPUs, and up to two nodes of one CPU each when somebody waits for them."""
    file: Path = tmp_path_factory.mktemp("growing") / "cluster.yaml"
    own = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
    }
    options = ["--num-cpus=0", '--resources={"train_driver": 1}', f"--autoscaling-config={file}"]
    head = Head(*options, **own)
    file.write_text(yaml.safe_dump(CLUSTER | {"provider": PROVIDER | {"gcs_address": head.address}}))
    with head:
        yield head


def nodes(head: Head) -> int:
    summary = head.ask("nodes?view=summary")["data"]["summary"]
    return sum(node["raylet"].get("state") == "ALIVE" for node in summary)


def test_nodes_come_for_a_run_and_go_after_it(growing, tiny_store, tiny_backbone, tmp_path):
    alone = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "alone", cluster={"workers": NODES})
    expected = train_here(alone)
    file = tmp_path / "run.yaml"
    file.write_text(alone.model_copy(update={"out": tmp_path / "run"}).model_dump_json())  # JSON is YAML
    wait_for(lambda: nodes(growing) == 1, 60)
    command = [sys.executable, "-m", "raygrec.cli", "train", file, "--json"]
    environment = growing.environment | {"RAY_ADDRESS": growing.address}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "2 × 1 CPU = 2 CPU, the cluster has 0; ask for fewer, or set RAYGREC_AUTOSCALING=1" in refused.stderr
    environment |= {"RAYGREC_AUTOSCALING": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: nodes(growing) == 1 + NODES or run.poll() is not None, 120)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    metrics = json.loads(said.splitlines()[-1])
    assert metrics["workers"] == NODES
    for split in ("valid", "test"):
        assert metrics[split] == pytest.approx(expected[split], abs=1e-6)
    wait_for(lambda: nodes(growing) == 1, 120)

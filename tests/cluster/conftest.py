"""One local Ray for all tests of this folder that need not start their own."""

import os

import pytest

from tests.train.workers import tiny_config


@pytest.fixture(scope="package")
def local_ray(tiny_store, tiny_backbone, tmp_path_factory):
    """Starts it as a sweep of one trial at once and two workers would, and ends it after the folder's last test."""
    ray = pytest.importorskip("ray")
    # Its metrics are exported every ten seconds otherwise.
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112  (how Ray spells it)
    from raygrec.cluster.launcher import connect

    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("ray") / "run")
    assert connect(config.cluster, trials=1)
    yield
    ray.shutdown()

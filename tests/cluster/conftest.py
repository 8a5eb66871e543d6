"""One local Ray for all tests of this folder that need not start their own."""

import pytest

from tests.train.workers import tiny_config


@pytest.fixture(scope="session")
def local_ray(tiny_store, tiny_backbone, tmp_path_factory):
    """Starts it as a run of two workers would, and ends it after the last test."""
    ray = pytest.importorskip("ray")
    from raygrec.cluster.launcher import connect

    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("ray") / "run")
    assert connect(config.cluster)
    yield
    ray.shutdown()

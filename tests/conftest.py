"""Fixtures that several rooms share: a tiny data set, a tiny backbone, quiet bars."""

import os
import subprocess
import sys
from pathlib import Path

# Before torch is imported, and for the processes that tests start: sums of one thread have one order.
os.environ["OMP_NUM_THREADS"] = "1"
# Only what tests marked `gpu` start sees the GPUs; they are noted for the workers of pytest-xdist, too.
os.environ.setdefault("RAYGREC_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from tests.tiny import make_backbone, make_store

os.environ["RAYGREC_QUIET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Beside each other (`pytest -n 2 --dist loadgroup`) run modules; all that start a Ray stay together."""
    for item in items:
        place = item.path.parent if item.path.parent.name == "cluster" else item.path
        item.add_marker(pytest.mark.xdist_group(str(place)))


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory):
    """48 users, 24 items in four tastes, leave-one-out."""
    return make_store(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_unordered_store(tmp_path_factory: pytest.TempPathFactory):
    """The same interactions, split per user at random."""
    return make_store(tmp_path_factory.mktemp("tiny"), "ratio")


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random BERT with a word-piece tokenizer, as a folder in `transformers` format."""
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def gpu() -> dict[str, str]:
    """The environment of processes that see the machine's GPUs."""
    if torch.version.cuda is None:
        pytest.skip("needs a GPU: this torch is built for the CPU")
    seen = os.environ["RAYGREC_TESTS_GPUS"]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if seen == "all" else {"CUDA_VISIBLE_DEVICES": seen}
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    if not int(subprocess.run(count, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout):
        pytest.skip("needs a GPU: torch sees none")
    return environment


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A server that speaks S3, with a bucket; calls with a folder give its address."""
    server = pytest.importorskip("moto.server", reason="moto's server needs flask")
    boto3 = pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        running = server.ThreadedMotoServer(port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="bucket")
        yield lambda name: f"s3://bucket/{name}?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        running.stop()

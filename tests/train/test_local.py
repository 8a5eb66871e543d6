"""What a GPU computes, against the CPU. These tests start processes that see the GPUs; all others see none."""

import subprocess
import sys
from pathlib import Path

import pytest

from raygrec.train.assembly import prepare_run
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.tiny import make_store
from tests.train.workers import tiny_config, tiny_galrec_config, tiny_graph_config, tiny_sequential_config

RECIPES = {
    "glta": tiny_config,
    "galrec": tiny_galrec_config,
    "sequential": tiny_sequential_config,
    "graph": tiny_graph_config,
}
ONE_RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from raygrec.train.folder import RunFolder
from raygrec.train.pipeline import run
from tests.train.workers import Silent

folder = RunFolder(Path(sys.argv[1]))
dist.init_process_group("nccl", init_method=f"file://{folder.path}/meeting", rank=0, world_size=1)
run(folder.config(), folder, Silent(), distributed=True)
dist.destroy_process_group()
"""


def assert_same_losses(found: Path, expected: Path) -> None:
    """Of every report, for what two devices make of the same sums; both have ended."""
    records, wanted = RunFolder(found).history(), RunFolder(expected).history()
    assert [(one["stage"], one["step"]) for one in records] == [(one["stage"], one["step"]) for one in wanted]
    assert [one["loss"] for one in records] == pytest.approx([one["loss"] for one in wanted], rel=1e-3)
    assert RunFolder(found).metrics()["test"].keys() == RunFolder(expected).metrics()["test"].keys()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_trains_as_the_cpu_does(gpu, recipe, tiny_store, tiny_backbone, tmp_path):
    train_here(RECIPES[recipe](tiny_store.path, tiny_backbone, tmp_path / "cpu"))
    # A store of its own: node and text vectors are kept there, and are to be computed anew.
    config = RECIPES[recipe](make_store(tmp_path).path, tiny_backbone, tmp_path / "gpu")
    (tmp_path / "job.yaml").write_text(config.model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "raygrec.cli", "train", str(tmp_path / "job.yaml"), "--local"]
    subprocess.run(command, env=gpu, check=True)
    assert_same_losses(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("zero_stage", range(4))
def test_deepspeed_on_a_gpu_trains_as_the_cpu_does(gpu, zero_stage, tiny_store, tiny_backbone, tmp_path):
    train_here(tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "cpu"))
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "gpu", engine={"zero_stage": zero_stage})
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    prepare_run(config, folder)
    environment = gpu | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    subprocess.run([sys.executable, "-c", ONE_RANK, str(config.out)], env=environment, check=True)
    assert_same_losses(tmp_path / "gpu", tmp_path / "cpu")

"""What a GPU computes, against the CPU, in processes that see the GPUs, where there are some: all other tests see none.
And what meets on a GPU that is only pretended."""

import subprocess
import sys
from pathlib import Path

import pytest

from raygrec.serve.topk import evaluate_run, recommend_all
from raygrec.train.assembly import prepare_run
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.pretend import pretended_gpu
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


VARIANTS = {
    "glta": {},
    "glta, tied head": {"model": {"head": "tied", "user_vector": "full"}, "graph": {"folds": 2}},
    "glta, in time": {"model": {"trend": 0.3, "order": False}, "evaluate": {"decoding": "autoregressive"}},
    "glta, checkpointed": {"engine": {"precision": "bf16", "activation_checkpointing": True}},
    "galrec": {"engine": {"precision": "bf16"}},
    "galrec, adapters": {
        "model": {
            "tuning": "lora",
            "title_tokens": 2,
            "readout": "hop2",
            "contrast": {"momentum": 0.9, "projection": 8},
        },
        "graph": {"folds": 2},
    },
    "galrec, texts alone": {"model": {"tuning": "frozen", "graph_vectors": False, "contrast": {"queue": 0}}},
    "galrec, successors": {"model": {"successors": {}}, "graph": {"folds": 2}},
    "galrec, tuned texts": {"model": {"successors": {"alike": 2}}, "text_tuning": {"updates": 2}},
    "sequential": {"model": {"filter": "frequency", "predicts": "newest", "text_vectors": True, "successors": {}}},
    "graph": {"graph": {"text_weight": 0.1}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_meets_is_on_one_device(variant, tiny_backbone, tmp_path):
    make, changes = RECIPES[variant.split(",")[0]], VARIANTS[variant]
    split = "global-time" if "trend" in changes.get("model", {}) else "leave-one-out"
    store = make_store(tmp_path, split)  # node and text vectors, kept in the store, are to be made there, too
    config = make(store.path, tiny_backbone, tmp_path / "run", **changes)
    with pretended_gpu():
        found = train_here(config)
        assert evaluate_run(config.out) == {split: pytest.approx(found[split]) for split in ("valid", "test")}
        recommend_all(config.out, 3, tmp_path / "lists.parquet")


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

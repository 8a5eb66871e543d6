"""The whole pipeline: the same curve on any number of workers and ZeRO stages, and after being cut off."""

import functools
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from raygrec.errors import InputError
from raygrec.train.assembly import load_model
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.train.workers import run_workers, tiny_config

STAGES = ("alignment", "histories", "train")


def curve(folder: RunFolder) -> list[float]:
    return [record["loss"] for record in folder.history()]


def final(folder: RunFolder) -> dict[str, torch.Tensor]:
    return folder.load_parts(folder.model_file)


@pytest.fixture(scope="module")
def alone(tiny_store, tiny_backbone, tmp_path_factory) -> RunFolder:
    """The run in one process, plain torch: what all others must reproduce."""
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("alone") / "run")
    train_here(config)
    return RunFolder(config.out)


def test_the_loss_falls_and_everything_is_reported(alone):
    stages = [record["stage"] for record in alone.history()]
    assert stages == ["alignment"] * 2 + ["histories"] + ["train"] * 3
    losses = curve(alone)
    assert losses[-1] < losses[3] < losses[2]
    metrics = alone.metrics()
    assert set(metrics["baselines"]) == {"Popularity", "LightGCN"}
    assert 0 <= metrics["test"]["ndcg@3"] <= 1
    assert metrics["split"] == "leave-one-out"


@pytest.fixture(scope="module")
def finished(tiny_store, tiny_backbone, tmp_path_factory) -> Callable[[int, int], RunFolder]:
    """Runs that were not disturbed, by (workers, ZeRO stage); each is made once."""

    @functools.cache
    def run(workers: int, zero_stage: int) -> RunFolder:
        out = tmp_path_factory.mktemp("finished") / "run"
        config = tiny_config(tiny_store.path, tiny_backbone, out, engine={"zero_stage": zero_stage})
        return run_workers(config, workers)

    return run


@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 1), (2, 0), (2, 2), (2, 3), (4, 2)])
def test_workers_and_zero_stages_do_not_change_the_curve(alone, finished, workers, zero_stage):
    folder = finished(workers, zero_stage)
    np.testing.assert_allclose(curve(folder), curve(alone), rtol=2e-4)
    for split in ("valid", "test"):
        assert folder.metrics()[split] == pytest.approx(alone.metrics()[split], abs=1e-6)
    assert len(folder.metrics()["peak_memory_mib"]) == workers


@pytest.mark.parametrize(
    ("workers", "zero_stage", "cut", "stage"),
    [(2, 2, 13, "train"), (2, 3, 9, "train"), (2, 2, 5, "histories"), (2, 0, 1, "alignment")],
)
def test_a_run_that_was_cut_off_ends_with_the_same_parameters(
    finished, tiny_store, tiny_backbone, tmp_path, workers, zero_stage, cut, stage
):
    expected = final(finished(workers, zero_stage))
    part = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "part", engine={"zero_stage": zero_stage})
    run_workers(part, workers, stop_after=cut)
    assert RunFolder(part.out).metrics() is None
    assert [one for one in STAGES if RunFolder(part.out).last_checkpoint(one)][-1] == stage
    assert stage == "train" or not RunFolder(part.out).parts_file(stage).exists()
    resumed = run_workers(part, workers)
    found = final(resumed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert curve(resumed) == curve(finished(workers, zero_stage))


# ---- what each stage trains

PROJECTORS = {f"{side}_projector.{kind}" for side in ("item", "user") for kind in ("weight", "bias")}
HEAD = {
    "head.rows.from_node.weight",
    "head.rows.from_text.weight",
    "head.rows.free",
    "head.query.weight",
    "head.query.bias",
    "head.bias",
}
ITEM = {"item_projector.weight", "item_projector.bias"}
USER = PROJECTORS - ITEM
SLOTS, OFFSETS = {"answer_slots.weight"}, {"item_offsets.weight"}


def trained_in(folder: RunFolder) -> dict[str, set[str]]:
    files = {stage: folder.parts_file(stage) for stage in STAGES}
    return {stage: set(folder.load_parts(file)) for stage, file in files.items() if file.exists()}


def test_each_stage_trains_its_parts_and_no_others(alone):
    assert trained_in(alone) == {
        "alignment": ITEM | SLOTS | HEAD,
        "histories": ITEM | OFFSETS | HEAD,
        "train": ITEM | USER | SLOTS | OFFSETS | HEAD,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The paper's: what stage 2 has trained of the items is fixed from there on.
        (
            {"model": {"tune_items": False, "user_token": "id", "head": "tied", "head_texts": False}},
            {
                "alignment": ITEM | SLOTS | HEAD - {"head.rows.from_text.weight", "head.rows.free"},
                "histories": HEAD - {"head.rows.from_text.weight", "head.rows.free"},
                "train": SLOTS | HEAD - {"head.rows.from_text.weight", "head.rows.free"},
            },
        ),
        # Without stage 2, something must train the item projector.
        (
            {"model": {"tune_items": False, "item_alignment": False}},
            {"histories": ITEM | HEAD, "train": ITEM | USER | SLOTS | HEAD},
        ),
        (
            {"model": {"tune_items": False}, "alignment": {"epochs": 0}, "histories": {"epochs": 0}},
            {"train": ITEM | USER | SLOTS | HEAD},
        ),
        (
            {"model": {"history_loss": False}},
            {"alignment": ITEM | SLOTS | HEAD, "train": ITEM | USER | SLOTS | OFFSETS | HEAD},
        ),
    ],
    ids=["paper", "no stage 2", "train only", "no history loss"],
)
def test_what_is_frozen_where(tiny_store, tiny_backbone, tmp_path, changes, expected):
    short = {"alignment": {"epochs": 1}, "train": {"epochs": 1}}
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", **{**short, **changes})
    train_here(config)
    folder = RunFolder(config.out)
    assert trained_in(folder) == expected
    assert set(final(folder)) == set().union(*expected.values())
    load_model(config, folder, tiny_store)  # refuses a file in which a part is missing


def test_a_stage_goes_on_from_what_the_earlier_ones_have_trained(tiny_store, tiny_backbone, tmp_path):
    """With updates of no size, a stage ends where it began."""
    still = {"epochs": 1, "lr": 1e-12}

    def parts(out: str, **changes: object) -> dict[str, dict[str, torch.Tensor]]:
        config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / out, **changes)
        train_here(config)
        folder = RunFolder(config.out)
        return {stage: folder.load_parts(folder.parts_file(stage)) for stage in STAGES} | {"end": final(folder)}

    moved = parts("aligned", histories=still, train=still)
    for stage in ("histories", "train", "end"):
        for name in moved["alignment"].keys() & moved[stage].keys():
            torch.testing.assert_close(moved[stage][name], moved["alignment"][name], rtol=1e-6, atol=1e-9, msg=name)
    moved = parts("histories", alignment=still, train=still)
    for name in moved["histories"]:
        torch.testing.assert_close(moved["train"][name], moved["histories"][name], rtol=1e-6, atol=1e-9, msg=name)
        assert not torch.allclose(moved["histories"][name], moved["alignment"].get(name, torch.zeros(())), atol=1e-4), (
            name
        )


def test_a_used_run_folder_is_refused(alone):
    with pytest.raises(InputError, match="holds a run already"):
        train_here(alone.config())


def test_a_finished_run_is_not_run_again(alone):
    before = json.dumps(alone.metrics())
    train_here(alone.config(), resume=True)
    assert json.dumps(alone.metrics()) == before

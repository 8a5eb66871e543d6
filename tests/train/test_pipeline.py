"""The whole pipeline: the same curve on any number of workers and ZeRO stages, and after being cut off."""

import functools
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from raygrec.errors import InputError
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.train.workers import run_workers, tiny_config


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
    losses = curve(alone)
    assert len(losses) == 2 + 3
    assert losses[-1] < losses[2]
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


@pytest.mark.parametrize(("workers", "zero_stage", "cut"), [(2, 2, 9), (2, 3, 5), (2, 0, 1)])
def test_a_run_that_was_cut_off_ends_with_the_same_parameters(
    finished, tiny_store, tiny_backbone, tmp_path, workers, zero_stage, cut
):
    expected = final(finished(workers, zero_stage))
    part = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "part", engine={"zero_stage": zero_stage})
    run_workers(part, workers, stop_after=cut)
    assert RunFolder(part.out).metrics() is None
    resumed = run_workers(part, workers)
    found = final(resumed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert curve(resumed) == curve(finished(workers, zero_stage))


def test_a_used_run_folder_is_refused(alone):
    with pytest.raises(InputError, match="holds a run already"):
        train_here(alone.config())


def test_a_finished_run_is_not_run_again(alone):
    before = json.dumps(alone.metrics())
    train_here(alone.config(), resume=True)
    assert json.dumps(alone.metrics()) == before

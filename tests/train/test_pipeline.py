"""The whole pipeline: the same curve on any number of workers and ZeRO stages, and after being cut off."""

import functools
import json
import shutil
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from raygrec.draws import Draws
from raygrec.errors import InputError
from raygrec.model.galrec import HopBatch, HopPrompts
from raygrec.serve.topk import evaluate_run, recommend_all
from raygrec.train import loop
from raygrec.train.assembly import load_model
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from raygrec.train.settings import RunConfig
from tests.train.test_trackers import scalars
from tests.train.workers import (
    run_several,
    run_workers,
    tiny_config,
    tiny_galrec_config,
    tiny_graph_config,
    tiny_sequential_config,
)

STAGES = ("alignment", "histories", "train")
TRACK = {"tensorboard": True, "every": 2}


def curve(folder: RunFolder) -> list[float]:
    return [record["loss"] for record in folder.history()]


def assert_same_figures(folder: RunFolder, expected: RunFolder, names: set[str]) -> None:
    """What was told of every second update while the runs went on."""
    for stage in (path.name for path in (expected.path / "tensorboard").iterdir()):
        found, wanted = (scalars(one.path / "tensorboard" / stage) for one in (folder, expected))
        assert found.keys() == wanted.keys() >= names
        for name in names:
            assert len(found[name]) == len(wanted[name]) > 0
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, err_msg=f"{stage}, {name}")


def final(folder: RunFolder) -> dict[str, torch.Tensor]:
    """All that the finished run's model folder holds."""
    parts = folder.load_parts(folder.model_file)
    assert not any(name.startswith("backbone.") for name in parts)
    weights = folder.backbone_folder / "model.safetensors"
    inside = folder.load_parts(weights) if weights.exists() else {}
    return parts | {f"backbone.{name}": value for name, value in inside.items()}


@pytest.fixture(scope="module")
def alone(tiny_store, tiny_backbone, tmp_path_factory) -> RunFolder:
    """The run in one process, plain torch: what all others must reproduce."""
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("alone") / "run", track=TRACK)
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
        config = tiny_config(tiny_store.path, tiny_backbone, out, engine={"zero_stage": zero_stage}, track=TRACK)
        return run_workers(config, workers)

    return run


@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 1), (2, 0), (2, 2), (2, 3), (4, 2)])
def test_workers_and_zero_stages_do_not_change_the_curve(alone, finished, workers, zero_stage):
    folder = finished(workers, zero_stage)
    np.testing.assert_allclose(curve(folder), curve(alone), rtol=2e-4)
    for split in ("valid", "test"):
        assert folder.metrics()[split] == pytest.approx(alone.metrics()[split], abs=1e-6)
    assert len(folder.metrics()["peak_memory_mib"]) == workers
    # On one and two workers micro-batches are the same here, and so are their passes, but under ZeRO-3.
    same_passes = workers <= 2 and zero_stage < 3
    assert_same_figures(folder, alone, {"loss", "lr", "gradient_norm"} | ({"padding"} if same_passes else set()))


def test_a_random_language_model_is_the_same_under_zero_3(tiny_store, tiny_backbone, tmp_path):
    random = {"name": str(tiny_backbone), "pretrained": False}
    one = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "alone", backbone=random)
    train_here(one)
    other = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", backbone=random, engine={"zero_stage": 3})
    folder, alone = run_workers(other, 2), RunFolder(one.out)
    np.testing.assert_allclose(curve(folder), curve(alone), rtol=2e-4)
    assert folder.metrics()["test"] == pytest.approx(alone.metrics()["test"], abs=1e-6)


@pytest.mark.parametrize(
    ("workers", "zero_stage", "cut", "stage"),
    [(2, 3, 9, "train"), (2, 2, 5, "histories"), (2, 0, 1, "alignment")],
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


# ---- GAL-Rec

QUEUES = {f"carried/{side}2/{part}" for side in ("user", "item") for part in ("rows", "ids", "oldest")}


def queues(folder: RunFolder) -> dict[str, torch.Tensor]:
    """The queues of negatives in the last checkpoint."""
    _, tensors = folder.last_checkpoint("train")
    return {name: tensors[name] for name in QUEUES}


@pytest.fixture(scope="module")
def galrec_alone(tiny_store, tiny_backbone, tmp_path_factory) -> RunFolder:
    out = tmp_path_factory.mktemp("galrec") / "run"
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, out, track=TRACK)
    train_here(config)
    return RunFolder(config.out)


@pytest.fixture(scope="module")
def galrec_finished(tiny_store, tiny_backbone, tmp_path_factory) -> Callable[[int, int], RunFolder]:
    """As `finished`, of GAL-Rec."""

    @functools.cache
    def run(workers: int, zero_stage: int) -> RunFolder:
        out = tmp_path_factory.mktemp("galrec-finished") / "run"
        config = tiny_galrec_config(tiny_store.path, tiny_backbone, out, engine={"zero_stage": zero_stage}, track=TRACK)
        return run_workers(config, workers)

    return run


def test_every_update_of_every_epoch_has_draws_of_its_own_and_another_seed_has_others(
    tiny_store, tiny_backbone, tmp_path, monkeypatch
):
    """Neighbours, dropout and what is contrasted: all that prompts draw."""
    given: list[float] = []
    training = HopPrompts.training

    def recording(self: HopPrompts, users: np.ndarray, draws: Draws) -> HopBatch:
        given.append(float(draws.uniform(0)))
        return training(self, users, draws)

    monkeypatch.setattr(HopPrompts, "training", recording)
    found = []
    for number, seed in enumerate((0, 0, 1)):
        given.clear()
        train_here(tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / str(number), seed=seed))
        found.append(set(given))
    assert len(found[0]) == 8  # two epochs of four updates
    assert found[0] == found[1]
    assert not found[0] & found[2]


def test_galrec_learns_and_reports_its_terms(galrec_alone, tiny_store):
    records = galrec_alone.history()
    assert [(record["stage"], record["step"]) for record in records] == [("train", 4), ("train", 8)]
    weights = {"cross_entropy": 1.0, "l1": 0.1, "l2": 0.1, "l3": 0.1}
    for record in records:
        assert record["terms"].keys() == weights.keys()
        assert min(record["terms"].values()) > 0
        assert record["loss"] == pytest.approx(sum(weights[name] * value for name, value in record["terms"].items()))
    assert records[1]["terms"]["cross_entropy"] < records[0]["terms"]["cross_entropy"] < 1.5 * np.log(24)
    metrics = galrec_alone.metrics()
    assert set(metrics["baselines"]) == {"Popularity", "LightGCN"}
    assert 0 <= metrics["test"]["ndcg@3"] <= 1
    # Eight updates of twelve users have filled the queue of users; none of its rows is of a user that is none.
    found = queues(galrec_alone)
    assert found["carried/user2/rows"].shape == (20, 5)
    assert found["carried/user2/ids"].min() >= 0
    assert found["carried/user2/ids"].max() > 24 > found["carried/item2/ids"].max()
    load_model(galrec_alone.config(), galrec_alone, tiny_store)
    points = scalars(galrec_alone.path / "tensorboard" / "train")
    fill = [value for _, value in points["queue_fill"]]
    assert 0 < fill[0] < fill[-1] <= 1
    parts = [points[f"terms/{name}"] for name in weights]
    assert [sum(value for _, value in one) for one in zip(*parts, strict=True)] == pytest.approx(
        [value for _, value in points["loss"]], rel=1e-5
    )


@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 0), (2, 2), (2, 3), (4, 2)])
def test_workers_and_zero_stages_do_not_change_galrec(galrec_alone, galrec_finished, workers, zero_stage):
    """Neither the curve, nor a term of it, nor the queues, which hold the users and items of all workers."""
    folder = galrec_finished(workers, zero_stage)
    np.testing.assert_allclose(curve(folder), curve(galrec_alone), rtol=2e-4)
    for record, expected in zip(folder.history(), galrec_alone.history(), strict=True):
        assert record["terms"] == pytest.approx(expected["terms"], rel=2e-4)
    for split in ("valid", "test"):
        assert folder.metrics()[split] == pytest.approx(galrec_alone.metrics()[split], abs=1e-6)
    found = queues(folder)
    for name, value in queues(galrec_alone).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)
    assert_same_figures(folder, galrec_alone, {"loss", "terms/l1", "terms/cross_entropy", "queue_fill"})


@pytest.mark.parametrize(
    ("workers", "engine"),
    [
        (1, {"zero_stage": 2, "offload_optimizer": True}),
        (2, {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}),
    ],
)
def test_offloading_does_not_change_galrec(galrec_alone, tiny_store, tiny_backbone, tmp_path, workers, engine):
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", engine=engine)
    folder = run_workers(config, workers)
    np.testing.assert_allclose(curve(folder), curve(galrec_alone), rtol=2e-4)
    assert folder.metrics()["test"] == pytest.approx(galrec_alone.metrics()["test"], abs=1e-6)


LORA = {"tuning": "lora", "lora": {"rank": 2}, "head": "tied", "successors": {"alike": 2}}


@pytest.fixture(scope="module")
def lora_alone(tiny_store, tiny_backbone, tmp_path_factory) -> RunFolder:
    """GAL-Rec with adapters and successors, in one process."""
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("lora") / "run", model=LORA)
    train_here(config)
    return RunFolder(config.out)


def test_adapters_are_all_that_is_trained_and_kept_of_the_language_model(lora_alone):
    tuned = lora_alone.load_parts(lora_alone.parts_file("train"))
    _, tensors = lora_alone.last_checkpoint("train")
    for names in (set(tuned), {name.partition("/")[2] for name in tensors if not name.startswith("carried/")}):
        inside = {name for name in names if name.startswith("backbone.")}
        assert len(inside) == 2 * 6 * 2  # two layers of six linear ones
        assert all(".lora_A." in name or ".lora_B." in name for name in inside)
    assert all(value.abs().max() > 1e-3 for name, value in tuned.items() if ".lora_B." in name)


@pytest.mark.parametrize(("workers", "zero_stage"), [(2, 3), (4, 2)])
def test_workers_and_zero_stages_do_not_change_adapters_and_successors(
    lora_alone, tiny_store, tiny_backbone, tmp_path, workers, zero_stage
):
    config = tiny_galrec_config(
        tiny_store.path, tiny_backbone, tmp_path / "run", model=LORA, engine={"zero_stage": zero_stage}
    )
    folder = run_workers(config, workers)
    np.testing.assert_allclose(curve(folder), curve(lora_alone), rtol=2e-4)
    assert folder.metrics()["test"] == pytest.approx(lora_alone.metrics()["test"], abs=1e-6)
    expected = final(lora_alone)
    for name, value in final(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3, msg=name)


def test_adapters_without_peft_leave_no_run(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", model=LORA)
    with pytest.raises(InputError, match=r"pip install 'raygrec\[lora\]'$"):
        train_here(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("model", "zero_stage"),
    [({}, 2), ({}, 3), (LORA, 0), (LORA, 3)],
    ids=["full, 2", "full, 3", "adapters, 0", "adapters, 3"],
)
def test_galrec_in_bf16_under_deepspeed(
    galrec_alone, lora_alone, tiny_store, tiny_backbone, tmp_path, model, zero_stage
):
    engine = {"zero_stage": zero_stage, "precision": "bf16"}
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", model=model, engine=engine)
    folder = run_workers(config, 1)
    for found, expected in zip(folder.history(), (lora_alone if model else galrec_alone).history(), strict=True):
        assert found["terms"] == pytest.approx(expected["terms"], rel=0.02)
    _, tensors = folder.last_checkpoint("train")
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {torch.float32}


def test_galrec_that_was_cut_off_ends_with_the_same_parameters_and_queues(
    galrec_finished, tiny_store, tiny_backbone, tmp_path
):
    whole = galrec_finished(2, 2)
    part = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "part", engine={"zero_stage": 2})
    run_workers(part, 2, stop_after=7)
    cut = RunFolder(part.out)
    assert cut.metrics() is None
    assert cut.last_checkpoint("train")[0].step == 6
    assert not torch.equal(queues(cut)["carried/user2/ids"], queues(whole)["carried/user2/ids"])
    resumed = run_workers(part, 2)
    assert curve(resumed) == curve(whole)
    for found, expected in ((final(resumed), final(whole)), (queues(resumed), queues(whole))):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_galrec_goes_on_with_other_numbers_of_workers(galrec_alone, tiny_store, tiny_backbone, tmp_path):
    """Cut off on two, resumed on one and on four: queues and the order of the data are not of a number of workers."""
    cut = {
        stage: tiny_galrec_config(
            tiny_store.path, tiny_backbone, tmp_path / f"two-{stage}", engine={"zero_stage": stage}
        )
        for stage in (0, 2, 3)
    }
    for folder in run_several(list(cut.values()), 2, stop_after=7):
        assert folder.metrics() is None
        assert folder.last_checkpoint("train")[0].step == 6
    for workers, stages in ((1, (0, 2, 3)), (4, (2,))):
        configs = [cut[stage].model_copy(update={"out": tmp_path / f"{workers}-{stage}"}) for stage in stages]
        for config, stage in zip(configs, stages, strict=True):
            shutil.copytree(cut[stage].out, config.out)
        for folder in run_several(configs, workers):
            assert folder.metrics()["workers"] == workers
            np.testing.assert_allclose(curve(folder), curve(galrec_alone), rtol=1e-4)
            for record, expected in zip(folder.history(), galrec_alone.history(), strict=True):
                assert record["terms"] == pytest.approx(expected["terms"], rel=1e-4)
            for split in ("valid", "test"):
                assert folder.metrics()[split] == pytest.approx(galrec_alone.metrics()[split], rel=1e-4)
            found = queues(folder)
            for name, value in queues(galrec_alone).items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_galrec_goes_on_under_another_zero_stage(galrec_alone, tiny_store, tiny_backbone, tmp_path):
    """Cut off and resumed on two workers: parameters, moments and queues are not of a stage, nor of where they are."""
    ways = {
        0: {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        2: {"zero_stage": 0, "activation_checkpointing": True},
        3: {"zero_stage": 1, "offload_optimizer": True},
    }

    def made(stage: int, engine: dict[str, object]) -> RunConfig:
        return tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / f"from-{stage}", engine=engine)

    for folder in run_several([made(stage, {"zero_stage": stage}) for stage in ways], 2, stop_after=7):
        assert folder.metrics() is None
        assert folder.last_checkpoint("train")[0].step == 6
    for folder in run_several([made(stage, engine) for stage, engine in ways.items()], 2):
        np.testing.assert_allclose(curve(folder), curve(galrec_alone), rtol=1e-4)
        for split in ("valid", "test"):
            assert folder.metrics()[split] == pytest.approx(galrec_alone.metrics()[split], rel=1e-4)
        found, expected = final(folder), final(galrec_alone)
        for name, value in {**expected, **queues(galrec_alone)}.items():
            torch.testing.assert_close({**found, **queues(folder)}[name], value, rtol=1e-3, atol=1e-3, msg=name)


SLOW = {"contrast": {"queue": 20, "users": 0.6, "items": 0.5, "momentum": 0.6}}


def carried(folder: RunFolder) -> dict[str, torch.Tensor]:
    """Queues and momentum copies in the last checkpoint."""
    _, tensors = folder.last_checkpoint("train")
    return {name: value for name, value in tensors.items() if name.startswith("carried/")}


@pytest.fixture(scope="module")
def slow_alone(tiny_store, tiny_backbone, tmp_path_factory) -> RunFolder:
    """GAL-Rec with a momentum encoder, in one process."""
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("slow") / "run", model=SLOW)
    train_here(config)
    return RunFolder(config.out)


@pytest.mark.parametrize("workers", [2, 4])
def test_the_momentum_encoder_is_the_same_on_workers(
    slow_alone, galrec_alone, tiny_store, tiny_backbone, tmp_path, workers
):
    """Whole on every worker, and spread over them."""
    assert curve(slow_alone)[1] != pytest.approx(curve(galrec_alone)[1], rel=1e-3)
    ways = [{"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 3, "offload_parameters": True}]
    configs = [
        tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / f"run-{number}", model=SLOW, engine=engine)
        for number, engine in enumerate(ways)
    ]
    for folder in run_several(configs, workers):
        np.testing.assert_allclose(curve(folder), curve(slow_alone), rtol=2e-4)
        found = carried(folder)
        assert found.keys() == carried(slow_alone).keys()
        for name, value in carried(slow_alone).items():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-3, msg=name)


def test_ranks_without_contrasted_prompts_take_part(tiny_store, tiny_backbone, tmp_path):
    """In every stage and precision, and in the passes of a momentum encoder that all ranks make together."""
    rare = {"queue": 20, "users": 0.1, "items": 0.1, "momentum": 0.6, "projection": 5}

    def made(name: str, **engine: object) -> RunConfig:
        train = {"batch": 12, "micro_batch": 2}
        model = {"contrast": rare, "layer_dropout": 0.0}
        return tiny_galrec_config(
            tiny_store.path, tiny_backbone, tmp_path / name, model=model, engine=engine, train=train
        )

    ways = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 2, 3)]
    configs = [made(f"{stage}-{precision}", zero_stage=stage, precision=precision) for stage, precision in ways]
    found = [[record["terms"] for record in folder.history()] for folder in run_several(configs, 2)]
    for (_, precision), records in zip(ways, found, strict=True):
        for record, expected in zip(records, found[0], strict=True):
            if precision == "fp32":
                assert record == pytest.approx(expected, rel=2e-4)
            assert record["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-2)
            assert record["l1"] > 0 and record["l3"] > 0  # of a few anchors, which bf16 takes elsewhere


def test_a_momentum_encoder_goes_on_under_another_zero_stage(slow_alone, tiny_store, tiny_backbone, tmp_path):
    """From three workers that share each parameter to two that have it whole, and the other way round."""

    def made(first: int, then: int) -> RunConfig:
        out = tmp_path / f"from-{first}"
        return tiny_galrec_config(tiny_store.path, tiny_backbone, out, model=SLOW, engine={"zero_stage": then})

    run_workers(made(3, 3), 3, stop_after=7)
    run_workers(made(2, 2), 2, stop_after=7)
    for folder in run_several([made(3, 2), made(2, 3)], 2):
        np.testing.assert_allclose(curve(folder), curve(slow_alone), rtol=2e-4)
        found = carried(folder)
        for name, value in carried(slow_alone).items():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-3, msg=name)


def test_a_momentum_encoder_that_was_cut_off_goes_on(tiny_store, tiny_backbone, tmp_path):
    """With adapters, of which alone it has copies; in bf16, where these stay in fp32."""
    whole, part = (
        tiny_galrec_config(
            tiny_store.path,
            tiny_backbone,
            tmp_path / name,
            model={**SLOW, **LORA},
            engine={"zero_stage": 2, "precision": "bf16"},
        )
        for name in ("whole", "part")
    )
    expected = run_workers(whole, 1)
    slow = {name for name in carried(expected) if name.startswith("carried/momentum/")}
    trained = expected.load_parts(expected.parts_file("train"))
    assert slow == {f"carried/momentum/{name}" for name in trained if not name.startswith(("head.", "successors."))}
    run_workers(part, 1, stop_after=7)
    found = run_workers(part, 1)
    assert curve(found) == curve(expected)
    for one, other in ((carried(found), carried(expected)), (final(found), final(expected))):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=0, atol=0, msg=name)


# ---- sequential baselines


@pytest.fixture(scope="module")
def sequential_alone(tiny_store, tiny_backbone, tmp_path_factory) -> RunFolder:
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("sequential") / "run")
    train_here(config)
    return RunFolder(config.out)


def test_a_sequential_baseline_is_a_run_like_the_others(sequential_alone, tiny_store, tmp_path):
    records = sequential_alone.history()
    assert [(record["stage"], record["step"]) for record in records] == [("train", 4 * epoch) for epoch in (1, 2, 3, 4)]
    assert curve(sequential_alone)[-1] < curve(sequential_alone)[0] < 1.1 * np.log(24)
    metrics = sequential_alone.metrics()
    assert set(metrics["baselines"]) == {"Popularity"}
    assert not sequential_alone.nodes_file.exists()
    assert evaluate_run(sequential_alone.path) == {"valid": metrics["valid"], "test": metrics["test"]}
    assert recommend_all(sequential_alone.path, 3, tmp_path / "top.parquet") == 3 * tiny_store.num_users
    whole = final(sequential_alone)
    assert {"table.free", "table.from_text.weight", "layers.1.filter.root_beta", "head.bias"} < whole.keys()


def test_workers_do_not_change_a_sequential_baseline(tiny_store, tiny_backbone, tmp_path):
    # A batch of more than the 48 users: all of them, in two micro-batches a worker.
    changes = {"engine": {"zero_stage": 3}, "train": {"batch": 256, "micro_batch": 12}}
    one, two = (
        tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / name, **changes) for name in ("one", "two")
    )
    alone, folder = train_here(one), run_workers(two, 2)
    np.testing.assert_allclose(curve(folder), curve(RunFolder(one.out)), rtol=2e-4)
    for split in ("valid", "test"):
        assert folder.metrics()[split] == pytest.approx(alone[split], abs=1e-6)


def test_a_sequential_baseline_that_was_cut_off_ends_with_the_same_parameters(
    sequential_alone, tiny_store, tiny_backbone, tmp_path, monkeypatch
):
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "part")
    step, seen = loop._step, []

    def cut(*arguments: object) -> object:
        seen.append(1)
        if len(seen) > 7:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", cut)
    with pytest.raises(KeyboardInterrupt):
        train_here(config)
    monkeypatch.setattr(loop, "_step", step)
    folder = RunFolder(config.out)
    assert folder.last_checkpoint("train")[0].step == 6
    train_here(config, resume=True)
    assert curve(folder) == curve(sequential_alone)
    for name, value in final(sequential_alone).items():
        torch.testing.assert_close(final(folder)[name], value, rtol=0, atol=0, msg=name)


# ---- graph baselines


def test_a_graph_baseline_is_a_run_like_the_others(alone, tiny_store, tiny_backbone, tmp_path):
    figures = {}
    for weight in (0.0, 5.0):
        graph = {"text_weight": weight}
        config = tiny_graph_config(tiny_store.path, tiny_backbone, tmp_path / str(weight), graph=graph)
        metrics = figures[weight] = train_here(config)
        assert set(metrics["baselines"]) == {"Popularity"}
        assert evaluate_run(config.out) == {"valid": metrics["valid"], "test": metrics["test"]}
        assert recommend_all(config.out, 3, tmp_path / f"{weight}.parquet") == 3 * tiny_store.num_users
    plain, texts = figures.values()
    # The very figures that other recipes report of LightGCN, and with texts others.
    assert {split: plain[split] for split in ("valid", "test")} == alone.metrics()["baselines"]["LightGCN"]
    assert texts["test"] != plain["test"]


def test_workers_share_the_ranking_of_a_graph_baseline(tiny_store, tiny_backbone, tmp_path):
    one, two = (tiny_graph_config(tiny_store.path, tiny_backbone, tmp_path / name) for name in ("one", "two"))
    alone, folder = train_here(one), run_workers(two, 2)
    for split in ("valid", "test"):
        assert folder.metrics()[split] == pytest.approx(alone[split], abs=1e-9)
    assert final(folder).keys() == {"items", "users_ego", "items_inductive"}


# ---- what each stage trains

ROWS = {"rows.from_node.weight", "rows.from_text.weight"}
MAPS = {f"item_projector.{part}" for part in ROWS}
ITEM = MAPS | {"item_projector.trained.weight"}
HEAD = {"head.query.weight", "head.query.bias", "head.bias"} | {f"head.{part}" for part in ROWS}
USER = {"user_projector.weight", "user_projector.bias"}
SLOTS, OWN, FREE = {"answer_slots.weight"}, {"item_projector.rows.free"}, {"head.rows.free"}


def trained_in(folder: RunFolder) -> dict[str, set[str]]:
    files = {stage: folder.parts_file(stage) for stage in STAGES}
    return {stage: set(folder.load_parts(file)) for stage, file in files.items() if file.exists()}


def test_each_stage_trains_its_parts_and_no_others(alone):
    assert trained_in(alone) == {
        "alignment": ITEM | SLOTS | HEAD,
        "histories": ITEM | OWN | HEAD | FREE,
        "train": ITEM | USER | SLOTS | OWN | HEAD | FREE,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The paper's: what stage 2 has trained of the items is fixed from there on.
        (
            {"model": {"tune_items": False, "user_token": "id", "text_vectors": False}},
            {
                "alignment": {part for part in ITEM | SLOTS | HEAD if "text" not in part},
                "histories": {part for part in HEAD | FREE if "text" not in part},
                "train": {part for part in SLOTS | HEAD | FREE if "text" not in part},
            },
        ),
        (
            {"model": {"head": "tied"}},
            {
                "alignment": MAPS | SLOTS | {"head.bias"},
                "histories": MAPS | OWN | {"head.bias"},
                "train": MAPS | USER | SLOTS | OWN | {"head.bias"},
            },
        ),
        # Without stage 2, something must train the item projector.
        (
            {"model": {"tune_items": False, "item_alignment": False}},
            {"histories": ITEM | HEAD | FREE, "train": ITEM | USER | SLOTS | HEAD | FREE},
        ),
        (
            {"model": {"tune_items": False}, "alignment": {"epochs": 0}, "histories": {"epochs": 0}},
            {"train": ITEM | USER | SLOTS | HEAD | FREE},
        ),
        (
            {"model": {"history_loss": False}},
            {"alignment": ITEM | SLOTS | HEAD, "train": ITEM | USER | SLOTS | OWN | HEAD | FREE},
        ),
    ],
    ids=["paper", "tied", "no stage 2", "train only", "no history loss"],
)
def test_what_is_frozen_where(tiny_store, tiny_backbone, tmp_path, changes, expected):
    short = {"alignment": {"epochs": 1}, "train": {"epochs": 1}}
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", **{**short, **changes})
    train_here(config)
    folder = RunFolder(config.out)
    assert trained_in(folder) == expected
    fixed = {"item_projector.fixed_Dr"} if config.model.head == "tied" else set()
    assert set(final(folder)) == fixed.union(*expected.values())
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
        for name in (moved["alignment"].keys() & moved[stage].keys()) - SLOTS:
            torch.testing.assert_close(moved[stage][name], moved["alignment"][name], rtol=1e-6, atol=1e-9, msg=name)
    assert moved["alignment"]["answer_slots.weight"].abs().max() > 1e-2
    assert moved["train"]["answer_slots.weight"].abs().max() < 1e-9  # in stage 3 the seed alone speaks
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

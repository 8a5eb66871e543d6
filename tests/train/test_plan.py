"""Plans: parameters against real models, bytes by hand, and the choice."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raygrec.cli import main
from raygrec.draws import Draws
from raygrec.errors import InputError
from raygrec.model.backbone import Backbone, BackboneConfig
from raygrec.model.galrec import tuned
from raygrec.model.last_layer import Asked
from raygrec.model.successors import SuccessorConfig, Successors, alike
from raygrec.train.accelerators import ACCELERATORS, Accelerator, accelerator
from raygrec.train.assembly import build_model, build_prompts, prepare_run
from raygrec.train.engine import LocalEngine
from raygrec.train.folder import RunFolder
from raygrec.train.plan import (
    GIB,
    SETTINGS,
    Setting,
    Sizes,
    Stage,
    Work,
    estimate,
    kept_bytes,
    plan,
    sent_parameters,
    sizes_of,
    state_bytes,
    table,
    work_of,
)
from raygrec.train.settings import RunConfig, run_config
from tests.train.workers import tiny_config, tiny_galrec_config, tiny_sequential_config

H100 = ACCELERATORS["H100"]
WORK = Work(
    total=1000,
    trained=400,
    language_model=900,
    frozen=500,
    followed=0,
    largest=50,
    fixed=10,
    logits=20,
    prompt=30,
    longest=9,
    most=8.0,
    mean=6.0,
    answers=3,
    forward=1e6,
    passes=3,
)


def config_of(recipe: str, store, backbone: Path, out: Path, **changes: object) -> RunConfig:
    make = {"glta": tiny_config, "galrec": tiny_galrec_config}[recipe]
    return make(store.path, backbone, out, **changes)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("glta", {}),
        ("glta", {"model": {"tune_items": False, "user_token": "id"}}),
        ("glta", {"model": {"head": "tied"}}),
        ("galrec", {}),
        ("galrec", {"model": {"tuning": "lora", "contrast": {"momentum": 0.9}}}),
        ("galrec", {"model": {"head": "linear", "contrast": {"momentum": 0.9}}}),
        ("galrec", {"model": {"tuning": "frozen", "text_vectors": False, "title_tokens": 2}}),
    ],
)
def test_parameters_and_tables_are_those_of_the_real_model(recipe, changes, tiny_store, tiny_backbone, tmp_path):
    config = config_of(recipe, tiny_store, tiny_backbone, tmp_path / "run", **changes)
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    prepare_run(config, folder)
    prompts = build_prompts(config, tiny_store, folder)
    model = build_model(config, tiny_store, prompts, folder, distributed=False)
    if recipe == "glta":
        model.train_stage_3(aligned=True)
    work = work_of(config, sizes_of(config, None, None, None), "cpu")
    assert work.total == sum(parameter.numel() for parameter in model.parameters())
    assert work.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    slow = getattr(model, "slow", None)
    assert work.followed == (sum(value.numel() for value in slow.state().values()) if slow else 0)
    assert work.fixed >= sum(buffer.nbytes for buffer in model.buffers())
    # Adam's two moments in fp32, as the optimizer really makes them.
    engine = LocalEngine(model, config.engine)
    for parameter in (p for group in engine.optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    engine.update(0.0)
    moments = sum(
        value.nbytes
        for state in engine.optimizer.state.values()
        for kind, value in state.items()
        if kind.startswith("exp_avg")
    )
    assert state_bytes(work, Setting(0), 1, 4)[0]["optimizer"] == moments
    # What bf16 makes of the weights; autocast's copies of those that are trained come and go.
    LocalEngine(model, config.engine.model_copy(update={"precision": "bf16"}))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert state_bytes(work, Setting(0), 1, 2)[0]["weights"] == weights + 2 * work.trained


def test_a_trend_is_a_table_of_its_own(tiny_store, tiny_backbone, tmp_path):
    with_trend, without = (
        config_of("glta", tiny_store, tiny_backbone, tmp_path / "run", model={"trend": trend}) for trend in (0.3, None)
    )
    sizes = Sizes(users=10, items=1000, interactions=100, shown=8)
    more = work_of(with_trend, sizes, "cpu").fixed - work_of(without, sizes, "cpu").fixed
    assert more == 4 * (64 + 2) * 1000  # fp32, before 64 parts of training and when validation and test are read


@pytest.mark.parametrize("recipe", ["glta", "galrec"])
def test_no_prompt_is_longer_than_the_longest(recipe, tiny_store, tiny_backbone, tmp_path):
    config = config_of(recipe, tiny_store, tiny_backbone, tmp_path / "run")
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    prepare_run(config, folder)
    prompts = build_prompts(config, tiny_store, folder)
    found = work_of(config, sizes_of(config, None, None, None), "cpu")
    batch = prompts.training(np.flatnonzero(prompts.train.lengths >= 2), Draws(0))
    assert batch.symbols.shape[1] <= found.longest
    assert len(batch.answers) <= found.answers * len(prompts.train)


@pytest.mark.parametrize(("contrasted", "lending"), [(1.0, 0.0), (0.3, 0.5), (1.0, 1.0)])
def test_tokens_of_a_user_are_those_of_its_prompts(contrasted, lending, tiny_store, tiny_backbone, tmp_path):
    """Users whose histories are cut; 6 more tokens where one is contrasted, and 11 of the item that it lends."""
    model = {
        "max_history": 2,
        "neighbours": {"one_hop": 3, "two_hop": 2},
        "contrast": {"users": contrasted, "items": lending},
    }
    config = config_of("galrec", tiny_store, tiny_backbone, tmp_path / "run", model=model)
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    prepare_run(config, folder)
    prompts = build_prompts(config, tiny_store, folder)
    users = np.flatnonzero(prompts.train.lengths >= 3)
    batch = prompts.training(users, Draws(0))
    drawn = float((batch.hops[: batch.num_users, 2] >= 0).sum()) / len(users) - contrasted
    lent = (len(batch.lengths) - len(users)) / len(users) - lending
    found = work_of(config, sizes_of(config, None, None, None), "cpu")
    assert int(batch.lengths.sum()) / len(users) == pytest.approx(found.most + drawn * 6 + lent * 11, rel=0.05)


@pytest.mark.parametrize("answers", [3, 9])
@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_what_is_kept_is_what_autograd_keeps(tuning, answers, tiny_store, tiny_backbone, tmp_path):
    """Adapters keep what stands between their two factors, and no copy of what they read."""
    config = config_of("galrec", tiny_store, tiny_backbone, tmp_path, model={"tuning": tuning})
    backbone = tuned(Backbone(config.backbone), config.model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.nn.Identity()):
        embeds = torch.zeros(1, 9, backbone.width, requires_grad=True)
        backbone(embeds, torch.ones(1, 9, 9, dtype=torch.bool), asked=Asked.first(answers))
    assert kept_bytes(backbone, config, 9, answers) == sum(storage.nbytes() for storage in kept.values())


def test_state_by_hand():
    """1000 parameters of which 400 are trained, on 4 GPUs. fp32: 4 bytes each; Adam: two moments of 4, and a copy."""
    by_stage = {stage: state_bytes(WORK, Setting(stage), 4, 4)[0] for stage in range(4)}
    assert by_stage[0] == {"weights": 4000, "gradients": 1600, "optimizer": 3200, "momentum": 0}
    assert by_stage[1] == {"weights": 4000, "gradients": 1600 + 4 * 400, "optimizer": 1200, "momentum": 0}
    assert by_stage[2] == {"weights": 4000, "gradients": 400 + 4 * 400, "optimizer": 1200, "momentum": 0}
    assert by_stage[3] == {"weights": 1000 + 4000, "gradients": 400 + 4 * 400, "optimizer": 1200, "momentum": 0}


def test_state_in_bf16_by_hand():
    """2 bytes a weight, an fp32 copy of what is trained.

    Without ZeRO 500 frozen parameters have 2 bytes, other 500 have 4, and 400 of these, which are trained, 2 more.
    """
    assert state_bytes(WORK, Setting(0), 4, 2)[0] == {
        "weights": 3000 + 800,
        "gradients": 1600,
        "optimizer": 3200,
        "momentum": 0,
    }
    assert state_bytes(WORK, Setting(2), 4, 2)[0] == {
        "weights": 2000,
        "gradients": 200 + 2 * 400,
        "optimizer": 1200,
        "momentum": 0,
    }


def test_what_is_offloaded_is_in_the_hosts_memory():
    held, host = state_bytes(WORK, Setting(2, True), 4, 2)
    assert held == {"weights": 2000, "gradients": 2 * 400, "optimizer": 0, "momentum": 0}
    assert host == 1200 + 400  # 12 bytes of a quarter of 400, and their gradients in fp32
    held, host = state_bytes(WORK, Setting(3, True, True), 4, 2)
    assert held == {"weights": 2000, "gradients": 2 * 400, "optimizer": 0, "momentum": 0}
    assert host == 1200 + 400 + 500


def test_the_momentum_encoder_by_hand():
    """300 parameters in fp32, whole but under ZeRO-3, which also sends all weights twice more a micro-batch."""
    work = replace(WORK, followed=300)
    found = {stage: state_bytes(work, Setting(stage), 4, 2)[0]["momentum"] for stage in range(4)}
    assert found == {0: 1200, 1: 1200, 2: 1200, 3: 300}
    held, host = state_bytes(work, Setting(3, True, True), 4, 2)
    assert (held["momentum"], host) == (0, 1200 + 400 + 500 + 300)
    assert sent_parameters(work, 3, 64, 3) == 3 * (1000 + 400 + 2 * 1000)
    assert sent_parameters(work, 2, 64, 3) == sent_parameters(WORK, 2, 64, 3)
    large = replace(work, total=1_000_000_000, trained=900_000_000, language_model=900_000_000)
    assert sent_parameters(large, 3, 64, 1) == 4 * 900e6 + 100e6 + 900e6 + 1000e6 + 50e6 + 900e6


def config_with(**changes: object) -> RunConfig:
    return run_config({"recipe": "galrec", "store": "s", "out": "o", **changes}, "test")


SIZES = Sizes(users=1000, items=500, interactions=9000, shown=8.0)


def test_the_micro_batch_is_what_room_is_left_for():
    """Room for exactly seven prompts, and for a hair less; and never more than a GPU's share of the batch."""
    config = config_with(train={"batch": 64})
    roomy = Accelerator(1000.0, 1.0, 1.0, 1.0)
    work = replace(WORK, prompt=GIB)
    static = estimate(config, SIZES, work, Setting(0), 2, roomy, 0.5).total - 32 * GIB
    for more, micro in ((7 * GIB, 7), (7 * GIB - 2**20, 6), (0, 0), (100 * GIB, 32)):
        gpu = replace(roomy, memory=(static + more) / GIB)
        assert estimate(config, SIZES, work, Setting(0), 2, gpu, 0.5).micro == micro


def test_time_by_hand():
    """One GPU, nothing to send: batch · passes · forward / (rate · MFU)."""
    config = config_with(train={"batch": 64})
    gpu = Accelerator(80.0, 2.0, 1.0, 100.0)
    one = estimate(config, SIZES, WORK, Setting(0), 1, gpu, 0.25)
    seconds = 64 * 3 * 1e6 / (1e12 * 0.25)
    assert one.tokens_per_second == pytest.approx(64 * 6 / seconds)
    assert one.hours_per_epoch == pytest.approx(1000 * 6 / one.tokens_per_second / 3600)
    two = estimate(config, SIZES, WORK, Setting(0), 2, gpu, 0.25)
    seconds = 32 * 3 * 1e6 / (1e12 * 0.25) + 2 * 4 * 400 * 0.5 / 100e9
    assert two.tokens_per_second == pytest.approx(64 * 6 / seconds)


def test_all_stages_take_their_time():
    """Each in its own batches: prompts · passes · forward / (rate · MFU), and for each update what is sent."""
    config = config_with(train={"batch": 64, "epochs": 5})
    earlier = (Stage("alignment", 2, 32, 8, 100, 9.0, 4e6), Stage("histories", 3, 50, 50, 1000, 4.0, 2e6))
    one = estimate(
        config, SIZES, replace(WORK, earlier=earlier), Setting(0), 2, Accelerator(80.0, 2.0, 1.0, 100.0), 0.25
    )
    sent = 2 * 4 * 400 * 0.5 / 100e9
    seconds = {
        "alignment": 100 / 2 * 3 * 4e6 / 0.25e12 + 100 / 32 * sent,
        "histories": 1000 / 2 * 3 * 2e6 / 0.25e12 + 1000 / 50 * sent,
        "train": 1000 / 2 * 3 * 1e6 / 0.25e12 + 1000 / 64 * sent,
    }
    assert one.stages == pytest.approx({name: value / 3600 for name, value in seconds.items()})
    assert one.hours_per_epoch == one.stages["train"]
    assert one.hours == pytest.approx(sum(map(lambda n, v: n * v / 3600, (2, 3, 5), seconds.values())))


def test_the_stages_of_glta_are_those_that_are_trained(tiny_store, tiny_unordered_store, tiny_backbone, tmp_path):
    def stages(store, **changes: object) -> dict[str, int]:
        config = config_of("glta", store, tiny_backbone, tmp_path, **changes)
        return plan(config, sizes_of(config, None, None, None), 1, H100)["stages"]

    assert stages(tiny_store) == {"alignment": 2, "histories": 1, "train": 3}
    assert stages(tiny_store, model={"item_alignment": False}) == {"histories": 1, "train": 3}
    for changes in ({"histories": {"epochs": 0}}, {"model": {"history_loss": False}}, {"model": {"order": False}}):
        assert stages(tiny_store, **changes) == {"alignment": 2, "train": 3}
    assert stages(tiny_unordered_store) == {"alignment": 2, "train": 3}


def test_tokens_of_earlier_stages_are_those_of_their_prompts(tiny_store, tiny_backbone, tmp_path):
    config = config_of("glta", tiny_store, tiny_backbone, tmp_path / "run")
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    prepare_run(config, folder)
    prompts = build_prompts(config, tiny_store, folder)
    alignment, histories = work_of(config, sizes_of(config, None, None, None), "cpu").earlier
    items = np.arange(24).reshape(6, 4)
    longest = prompts.item_tokens.lengths.max()
    assert alignment.prompts == len(items)
    assert alignment.tokens - 4 * (24 - min(longest, 24)) >= prompts.alignment(items, Draws(0)).lengths.max()
    users = np.flatnonzero(prompts.train.lengths >= 2)
    read = prompts.training(users, Draws(0), whole=False)
    mean = int(read.lengths.sum()) / len(users)  # of histories from which some items are held out
    assert mean <= histories.tokens <= 1.5 * mean


def test_successors_are_in_the_memory_of_every_host(tiny_store, tiny_backbone, tmp_path):
    held = {}
    for steps in (None, 1, 9):
        model = {"successors": None if steps is None else {"steps": steps}}
        config = config_of("galrec", tiny_store, tiny_backbone, tmp_path / f"run-{steps}", model=model)
        sizes = sizes_of(config, None, None, None)
        held[steps] = work_of(config, sizes, "cpu").host
        assert all(one["host"] >= held[steps] for one in plan(config, sizes, 4, H100)["settings"])
    counts = Successors(tiny_store.interactions("train"), tiny_store.num_items, SuccessorConfig(steps=9))._all
    assert held[None] == 0
    assert held[1] == sizes.interactions * (8 + 4) + (24 + 1) * 4
    assert held[9] >= counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes
    assert held[9] == 24**2 * (8 + 4) + (24 + 1) * 4  # every item after every item
    config = config_of("galrec", tiny_store, tiny_backbone, tmp_path / "run", model={"successors": {"alike": 5}})
    shares = alike(torch.randn(24, 3), 5, 0.1)
    kept = shares.data.nbytes + shares.indices.nbytes + shares.indptr.nbytes
    plain = config.model.successors.model_copy(update={"alike": 0})
    without = config.model_copy(update={"model": config.model.model_copy(update={"successors": plain})})
    more = work_of(config, sizes, "cpu").host - work_of(without, sizes, "cpu").host
    assert kept <= more == 24 * 5 * (8 + 4) + (24 + 1) * 4


@pytest.mark.parametrize(("stage", "width"), [(0, 4), (1, 2)])
def test_what_is_sent_in_bf16(stage, width):
    """Without ZeRO gradients are fp32."""
    config = config_with(engine={"precision": "bf16"}, train={"batch": 64})
    two = estimate(config, SIZES, WORK, Setting(stage), 2, Accelerator(80.0, 2.0, 1.0, 100.0), 0.25)
    seconds = 32 * 3 * 1e6 / (2e12 * 0.25) + 2 * width * 400 * 0.5 / 100e9
    assert two.tokens_per_second == pytest.approx(64 * 6 / seconds)


@pytest.mark.parametrize(
    ("stage", "gpus", "pieces", "sent"),
    [
        (0, 4, 3, 2 * 400),
        (1, 4, 3, 400 + 400),
        (2, 4, 3, 3 * 400 + 400),
        (1, 64, 3, 2 * 400 + 400),
        (2, 64, 3, 3 * 2 * 400 + 400),
        (3, 64, 3, 3 * (1000 + 400)),
    ],
)
def test_what_is_sent_by_hand(stage, gpus, pieces, sent):
    """Gradients of 400 parameters, three micro-batches. On few GPUs they are added up where they are needed."""
    assert sent_parameters(WORK, stage, gpus, pieces) == sent


def test_large_models_come_again_under_zero_3():
    """For two passes and back, but for the token table of 100 M."""
    large = replace(WORK, total=1_000_000_000, trained=900_000_000, language_model=900_000_000)
    assert sent_parameters(large, 3, 64, 1) == 4 * 900e6 + 100e6 + 900e6


def test_the_choice_is_the_simplest_that_fits(tiny_store, tiny_backbone, tmp_path):
    """With all the room there is, ZeRO 0; with room for less, a higher stage or offload; with none, nothing."""
    # Two large tables: ZeRO-3 gathers one parameter whole, and saves nothing where that is all there is.
    config = config_of("galrec", tiny_store, tiny_backbone, tmp_path, model={"head": "linear"})
    sizes = sizes_of(config, None, None, None)
    found = plan(config, sizes, 8, H100, price=2.0)
    assert (found["choice"]["stage"], found["choice"]["offload"]) == (0, "-")
    assert found["cost_per_epoch"] == pytest.approx(found["choice"]["hours_per_epoch"] * 8 * 2.0)
    assert found["cost"] == pytest.approx(found["choice"]["hours"] * 8 * 2.0)
    large = config.model_copy(update={"graph": config.graph.model_copy(update={"dim": 4096})})
    sizes = replace(sizes, items=300_000)  # of which each has an offset, a row and their moments
    totals = {(one["stage"], one["offload"]): one["total"] for one in plan(large, sizes, 8, H100)["settings"]}
    assert totals[3, "all"] < totals[3, "-"] < totals[2, "-"] < totals[1, "-"] < totals[0, "-"]
    middle = (totals[0, "-"] + totals[1, "-"]) / 2 / GIB
    assert plan(large, sizes, 8, replace(H100, memory=middle))["choice"]["stage"] in (1, 2)
    none = plan(large, sizes, 8, replace(H100, memory=1.0))
    assert none["choice"] is None
    assert any(line.startswith("nothing fits") for line in table(none))


def test_more_gpus_than_an_update_has_prompts_are_refused(tiny_store, tiny_backbone, tmp_path):
    config = config_of("glta", tiny_store, tiny_backbone, tmp_path)
    fewest = min(config.alignment.batch, config.train.batch)
    with pytest.raises(InputError, match=r"^alignment: an update of \d+ prompts has none for some of \d+ GPUs"):
        plan(config, sizes_of(config, None, None, None), fewest + 1, H100)


def test_checkpointing_keeps_less_and_computes_more(tiny_store, tiny_backbone, tmp_path):
    config = config_of("galrec", tiny_store, tiny_backbone, tmp_path)
    sizes = sizes_of(config, None, None, None)
    plain = work_of(config, sizes, "cpu")
    engine = config.engine.model_copy(update={"activation_checkpointing": True})
    less = work_of(config.model_copy(update={"engine": engine}), sizes, "cpu")
    assert less.prompt < plain.prompt
    assert less.passes == plain.passes + 1


def test_checkpointing_keeps_inputs_and_one_layer(tiny_store, tiny_backbone, tmp_path):
    """A single layer is the last, kept as it is read; of two, the first is whole while it is computed again."""
    plain = config_of("galrec", tiny_store, tiny_backbone, tmp_path)
    again = plain.model_copy(update={"engine": plain.engine.model_copy(update={"activation_checkpointing": True})})
    one, two = (Backbone(plain.backbone.model_copy(update={"layers": layers})).tune() for layers in (1, 2))
    of_input = 4 * 9 * one.width
    assert kept_bytes(one, again, 9, 2) == of_input + kept_bytes(one, plain, 9, 2)
    of_first = kept_bytes(two, plain, 9, 2) - kept_bytes(one, plain, 9, 2)
    assert kept_bytes(two, again, 9, 2) == pytest.approx(2 * of_input + of_first, rel=0.1)
    assert kept_bytes(two, again, 9, 2) < kept_bytes(two, plain, 9, 2)


def test_the_table_fits_80_columns(tiny_store, tiny_backbone, tmp_path):
    config = config_of("galrec", tiny_store, tiny_backbone, tmp_path)
    lines = table(plan(config, sizes_of(config, None, None, None), 12, H100, 3.5))
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("→") for line in lines) == 1
    assert len([line for line in lines if line[5:6].isdigit() and line[1:5].isspace()]) == len(SETTINGS)


def test_what_is_told_of_time_and_cost(tiny_store, tiny_backbone, tmp_path):
    config = config_of("glta", tiny_store, tiny_backbone, tmp_path)
    found = plan(config, sizes_of(config, None, None, None), 1, H100, 3.5)
    lines = table(found)
    assert max(map(len, lines)) <= 80
    speed, stages, cost, caveat = lines[-4:]
    assert re.fullmatch(r"then at most [\d.]+ [kM] tokens/s in train, at least [\d.e-]+ s for all epochs:", speed)
    assert re.fullmatch(r"alignment 2 × [\d.e-]+ s, histories 1 × [\d.e-]+ s, train 3 × [\d.e-]+ s", stages)
    assert cost == "cost: under 0.01 USD for all epochs"
    assert caveat == "arithmetic only: add prompt assembly, kernel launches, LightGCN, evaluation"
    assert table(found | {"cost": 1234.5})[-2] == "cost: 1,234.50 USD for all epochs"
    without = config_of("galrec", tiny_store, tiny_backbone, tmp_path, model={"graph_vectors": False})
    lines = table(plan(without, sizes_of(without, None, None, None), 1, H100))
    assert lines[-1] == "arithmetic only: add prompt assembly, kernel launches, evaluation"
    assert not any("USD" in line for line in lines)


def test_gpus_are_known_by_name():
    assert accelerator("h100") is H100
    with pytest.raises(InputError, match=r"--gpu-type H10: expected one of H100, .*; the nearest known key is 'H100'"):
        accelerator("H10")


def test_sizes_stand_in_for_a_store(tiny_store, tiny_backbone, tmp_path):
    config = config_of("glta", tiny_store, tiny_backbone, tmp_path)
    assert sizes_of(config, 10, 20, 30) == Sizes(10, 20, 30, 3.0)
    assert sizes_of(config, 10, 20, 30_000).shown == config.model.max_history
    of_store = sizes_of(config, None, None, None)
    assert (of_store.users, of_store.items) == (48, 24)
    with pytest.raises(InputError, match="--interactions is missing"):
        sizes_of(config, 10, 20, None)
    with pytest.raises(InputError, match="or give --users, --items and --interactions"):
        sizes_of(config.model_copy(update={"store": tmp_path / "none"}), None, None, None)


def test_recipes_without_a_language_model_have_no_plan(tiny_store, tiny_backbone, tmp_path):
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path)
    with pytest.raises(InputError, match="recipe sequential: a plan is of recipes with a language model"):
        work_of(config, sizes_of(config, None, None, None), "cpu")


def test_the_command(tiny_store, tiny_backbone, tmp_path, capsys):
    job = tmp_path / "job.yaml"
    job.write_text(f"recipe: galrec\nstore: {tiny_store.path}\nout: o\nbackbone: {{name: {tiny_backbone}}}\n")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(job), "--gpus", "4", "--gpu-type", "L4", "--price", "1", "--json"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(job), "--gpu-type", "X1"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_language_model_that_is_tuned_on_texts_is_counted_with_all_its_layers(tiny_store, tiny_backbone, tmp_path):
    """Against what PyTorch holds of it after an update."""
    config = config_of("galrec", tiny_store, tiny_backbone, tmp_path / "run", text_tuning={})
    short = config.backbone.model_copy(update={"layers": 1})
    config = config.model_copy(update={"backbone": short})
    sizes = sizes_of(config, None, None, None)
    backbone = Backbone(BackboneConfig(name=str(tiny_backbone))).tune()
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    held = [*backbone.parameters(), *(parameter.grad for parameter in trained)]
    held += [moment for state in optimizer.state.values() for name, moment in state.items() if name != "step"]
    found = plan(config, sizes, 2, H100)
    assert found["work"]["tuning"] == sum(tensor.nbytes for tensor in held)
    assert any(line.startswith("before that, texts are tuned on one GPU: 0.00 GiB") for line in table(found))
    plain = config.model_copy(update={"text_tuning": None})
    assert work_of(plain, sizes, "cpu").tuning == 0
    assert not any("tuned on one GPU" in line for line in table(plan(plain, sizes, 2, H100)))

import itertools
import json
import math
import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raygrec.draws import Draws
from raygrec.errors import InputError
from raygrec.ranks import from_rank_0
from raygrec.train import loop
from raygrec.train.assembly import build_model, build_prompts, prepare_run
from raygrec.train.engine import (
    EngineConfig,
    LocalEngine,
    NonFiniteError,
    _deepspeed_settings,
    give_back_memory,
    make_engine,
)
from raygrec.train.folder import LoopState, RunFolder
from raygrec.train.loop import ORDER, Stage, _resume, epoch_order, learning_rate, portions, run_stage, weighted_loss
from raygrec.train.settings import RunConfig, StageConfig
from tests.ranks import run_ranks
from tests.train.workers import Silent, tiny_config

MIB = 2**20
LR, DECAY, BETAS, CLIP = 0.1, 0.04, (0.8, 0.9), 2.0


class Regression(nn.Module):
    """Summed squared error of a linear function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        self.fixed = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x @ self.weight + self.fixed - y) ** 2).sum()


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)


def engine() -> LocalEngine:
    return LocalEngine(Regression(), EngineConfig(weight_decay=DECAY, betas=BETAS, clip=CLIP))


def step(engine: LocalEngine, seed: int, lr: float = LR) -> float:
    engine.backward(engine.loss(*batch(seed)) / 8, last=True)
    return engine.update(lr)


def adamw_by_hand(steps: int) -> tuple[np.ndarray, list[float]]:
    """Weights after `steps` updates, and the gradient norms before clipping (Loshchilov & Hutter, algorithm 2)."""
    weight, first, second, norms = np.array([0.5, -1.0, 2.0]), np.zeros(3), np.zeros(3), []
    for t in range(1, steps + 1):
        x, y = (part.numpy().astype(np.float64) for part in batch(t))
        gradient = 2 * x.T @ (x @ weight + 1.0 - y) / 8
        norms.append(float(np.linalg.norm(gradient)))
        gradient = gradient * min(1.0, CLIP / (norms[-1] + 1e-6))
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        moved = first / (1 - BETAS[0] ** t) / (np.sqrt(second / (1 - BETAS[1] ** t)) + 1e-8)
        weight = weight - LR * DECAY * weight - LR * moved
    return weight, norms


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep no such holes")
def test_memory_in_holes_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [torch.ones(25_000) for _ in range(2000)]  # 191 MiB, each too small for a mapping of its own
    last = blocks.pop()
    full = resident()
    del blocks
    give_back_memory()
    assert full - resident() > 150 * MIB
    assert float(last.sum()) == 25_000


def test_updates_are_adamw_with_clipping():
    local = engine()
    norms = [step(local, seed) for seed in (1, 2, 3)]
    weight, expected = adamw_by_hand(3)
    assert max(expected) > CLIP > min(expected)  # both sides of the limit are tested
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    np.testing.assert_allclose(local.model.weight.detach(), weight, rtol=1e-5)
    assert local.model.fixed.item() == 1.0


def test_state_goes_on_identically():
    straight, first, second = engine(), engine(), engine()
    for seed in (1, 2, 3, 4):
        step(straight, seed)
    for seed in (1, 2):
        step(first, seed)
    state = first.state()
    assert state.keys() == {"param/weight", "exp_avg/weight", "exp_avg_sq/weight"}
    second.load_state(state, 2, batch(0))
    for seed in (3, 4):
        step(second, seed)
    assert torch.equal(second.model.weight, straight.model.weight)


def test_state_before_the_first_update():
    local = engine()
    assert local.state().keys() == {"param/weight"}
    other = engine()
    nn.init.zeros_(other.model.weight)
    other.load_state(local.state(), 0, batch(0))
    assert torch.equal(other.model.weight, local.model.weight)


def test_a_state_is_a_copy():
    local = engine()
    step(local, 1)
    state = local.state()
    before = {name: value.clone() for name, value in state.items()}
    step(local, 2)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_gradient_that_is_not_finite_updates_nothing():
    local = engine()
    step(local, 1)
    before = local.state()
    x, y = batch(2)
    x[0, 0] = math.nan
    local.backward(local.loss(x, y), last=True)
    with pytest.raises(NonFiniteError, match="the gradient norm is nan"):
        local.update(LR)
    assert all(torch.equal(local.state()[name], value) for name, value in before.items())


# ---- learning rates of parts

START, SHARE = {"backbone.weight": 1.0, "weight": -2.0, "backbone.bias": 0.5}, 0.25


class Parts(nn.Module):
    """A loss whose gradient is known: `slopes` of each parameter, summed over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.lr_shares = {"backbone.": SHARE}
        self.backbone = nn.Module()
        self.backbone.weight = nn.Parameter(torch.full((5,), START["backbone.weight"]))
        self.weight = nn.Parameter(torch.full((3,), START["weight"]))
        self.backbone.bias = nn.Parameter(torch.full((2,), START["backbone.bias"]))

    def forward(self, slopes: torch.Tensor) -> torch.Tensor:
        parameters = (self.backbone.weight, self.weight, self.backbone.bias)
        return sum(slope * parameter.sum() for slope, parameter in zip(slopes, parameters, strict=True))


def assert_moved_by_shares(state: dict[str, torch.Tensor], norm: float) -> None:
    """One update of AdamW moves every entry by its rate, against the sign of its gradient."""
    signs = {"backbone.weight": 1.0, "weight": -1.0, "backbone.bias": 1.0}
    for name, start in START.items():
        rate = LR * (SHARE if name.startswith("backbone.") else 1.0)
        expected = start - rate * DECAY * start - rate * signs[name]
        torch.testing.assert_close(
            state[f"param/{name}"], torch.full_like(state[f"param/{name}"], expected), rtol=1e-5, atol=1e-6, msg=name
        )
    assert norm == pytest.approx(np.sqrt(5 * 3.0**2 + 3 * 1.0**2 + 2 * 2.0**2), rel=1e-5)
    assert {name.split("/")[0] for name in state} == {"param", "exp_avg", "exp_avg_sq"}
    scale = 100 / (norm + 1e-6)
    assert scale > 1  # the limit is not reached
    torch.testing.assert_close(state["exp_avg/weight"], torch.full((3,), (1 - BETAS[0]) * -1.0), rtol=1e-5, atol=1e-6)


def updated(config: EngineConfig, distributed: bool, slopes: list[float]) -> tuple[dict[str, torch.Tensor], float]:
    made = make_engine(Parts(), config, 1, distributed)
    made.backward(made.loss(torch.tensor(slopes)), last=True)
    norm = made.update(LR)
    return made.state(), norm


def test_parts_learn_at_their_share_of_the_rate():
    state, norm = updated(EngineConfig(weight_decay=DECAY, betas=BETAS, clip=100.0), False, [3.0, -1.0, 2.0])
    assert_moved_by_shares(state, norm)


def test_what_deepspeed_is_told_to_offload():
    def section(**config: object) -> dict[str, object]:
        zero = _deepspeed_settings(EngineConfig(**config), 1)["zero_optimization"]
        return {name: value for name, value in zero.items() if name.startswith("offload")}

    cpu = {"device": "cpu"}
    assert section(zero_stage=3) == {}
    assert section(zero_stage=2, offload_optimizer=True) == {"offload_optimizer": cpu}
    both = section(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    assert both == {"offload_optimizer": cpu, "offload_param": cpu}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer needs zero_stage=1, 2 or 3"),
        ({"zero_stage": 2, "offload_parameters": True}, "offload_parameters needs zero_stage=3"),
    ],
)
def test_what_is_not_partitioned_is_not_offloaded(config, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**config)


def shares_worker(rank: int, folder: str) -> None:
    """One of two ranks, whose slopes add to those of the test in one process; every ZeRO stage."""
    slopes = [[2.5, 1.0, -1.0], [0.5, -2.0, 3.0]][rank]
    found = {}
    for stage in (0, 1, 2, 3):
        config = EngineConfig(weight_decay=DECAY, betas=BETAS, clip=100.0, zero_stage=stage)
        found[stage] = updated(config, True, slopes)
    torch.save(found, f"{folder}/{rank}.pt")


def test_parts_learn_at_their_share_of_the_rate_under_every_zero_stage(tmp_path):
    run_ranks(shares_worker, 2, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == {0, 1, 2, 3}
        for state, norm in found.values():
            assert_moved_by_shares(state, norm)


RESUMED = [
    *({"zero_stage": stage, "precision": precision} for precision in ("fp32", "bf16") for stage in range(4)),
    {"zero_stage": 3, "offload_optimizer": True},
]


def resuming_worker(rank: int, folder: str) -> None:
    """One of three ranks, which divide neither five entries nor two: of the two, the third rank has none."""
    found = {}
    for settings in RESUMED:
        straight, resumed = (make_engine(Parts(), EngineConfig(**settings), 1, True) for _ in range(2))
        for update, slopes in enumerate(([1.0, -2.0, 3.0], [-0.5, 1.0, 2.0])):
            if update:
                resumed.load_state(straight.state(), 1, (torch.ones(3),))
                loaded = _same(straight.state(), resumed.state())
            for one in (straight, resumed)[: 1 + update]:
                one.backward(one.loss(torch.tensor(slopes)), last=True)
                one.update(LR)
        found[str(settings)] = loaded, _same(straight.state(), resumed.state()), _whole(resumed.state())
    torch.save(found, f"{folder}/{rank}.pt")


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())


def _whole(state: dict[str, torch.Tensor]) -> bool:
    """Whether each parameter is there with both moments, all in fp32, and of more than bf16's precision."""
    keys = {f"{kind}/{name}" for kind in ("param", "exp_avg", "exp_avg_sq") for name in START}
    in_fp32 = all(value.dtype == torch.float32 for value in state.values())
    return state.keys() == keys and in_fp32 and not _same(state, {n: v.bfloat16().float() for n, v in state.items()})


def test_a_state_goes_on_identically_under_every_zero_stage(tmp_path):
    run_ranks(resuming_worker, 3, str(tmp_path))
    for rank in range(3):
        assert torch.load(tmp_path / f"{rank}.pt") == {str(settings): (True, True, True) for settings in RESUMED}


class CastParts(Parts):
    """Keeps whether autocast was on in its last forward pass."""

    def forward(self, slopes: torch.Tensor) -> torch.Tensor:
        self.cast = torch.is_autocast_enabled("cpu")
        return super().forward(slopes)


def casting_worker(rank: int, folder: str) -> None:
    enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device="cpu": enabled(device)  # as on a GPU, of which it tells by default
    found = {}
    for precision in ("fp32", "bf16"):
        for stage in range(4):
            made = make_engine(CastParts(), EngineConfig(zero_stage=stage, precision=precision), 1, True)
            made.loss(torch.ones(3))
            found[stage, precision] = made.model.cast
    torch.save(found, f"{folder}/found.pt")


def test_deepspeed_leaves_autocast_on(tmp_path):
    run_ranks(casting_worker, 1, str(tmp_path))
    found = torch.load(tmp_path / "found.pt")
    assert found == {(stage, kind): kind == "bf16" for stage in range(4) for kind in ("fp32", "bf16")}


POISONED = [
    {"zero_stage": 0},
    {"zero_stage": 0, "precision": "bf16"},
    {"zero_stage": 2},
    {"zero_stage": 2, "offload_optimizer": True},
    {"zero_stage": 3},
]


def faults_worker(rank: int, folder: str) -> None:
    """One of two ranks: an update, then one whose gradient is not finite, on one rank or only in the sum of both.

    Then what rank 0 alone decides: a checkpoint that rank 1 could not see, and an error.
    """
    found = {}
    for settings in POISONED:
        for kind, poison in {"nan": [1.0, math.nan], "sum": [3e38, 3e38]}.items():
            made = make_engine(Parts(), EngineConfig(**settings), 1, True)
            made.backward(made.loss(torch.tensor([1.0, -2.0, 3.0])), last=True)
            made.update(LR)
            before = made.state()
            made.backward(made.loss(torch.tensor([1.0, poison[rank], 2.0])), last=True)
            try:
                made.update(LR)
                message = "updated"
            except NonFiniteError as error:
                message = str(error)
            found[f"{settings} {kind}"] = (_same(before, made.state()), message)
    run = RunFolder(Path(folder) / "run")
    if rank == 1:
        run.newest_checkpoint = None
    state = _resume(two_terms_stage(), LocalEngine(TwoTerms(), EngineConfig()), 0, run, Silent())
    try:
        from_rank_0(lambda: RunFolder(Path(f"{folder}/nothing-{rank}")).config())
    except InputError as error:
        torch.save((found, state.step, str(error)), f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[tuple[dict[str, tuple[bool, str]], int, str]]:
    """What each rank has found; of the run's two checkpoints, the newest is damaged."""
    path = tmp_path_factory.mktemp("ranks")
    run = RunFolder(path / "run")
    tensors = {"param/weight": torch.ones(2), "carried/updates": torch.tensor(1)}
    for step in (1, 2):
        run.save_checkpoint(LoopState("train", step, records=0), tensors)
    (run.checkpoints / "train-00000002" / "loop.json").write_text("{}")
    run_ranks(faults_worker, 2, str(path))
    return [torch.load(path / f"{rank}.pt") for rank in range(2)]


def test_all_ranks_take_the_checkpoint_that_rank_0_has_chosen(two_ranks):
    for _, step, message in two_ranks:
        assert step == 1
        assert message.endswith("nothing-0: no run there (config.yaml is missing)")


def test_a_gradient_that_is_not_finite_updates_nothing_under_any_zero_stage(two_ranks):
    for found, _, _ in two_ranks:
        assert len(found) == 2 * len(POISONED)
        for case, (same, message) in found.items():
            assert message.startswith("the gradient norm is "), (case, message)
            assert same, case


def starting_worker(rank: int, folder: str) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    made = make_engine(Parts(), EngineConfig(), 1, True)
    made.backward(made.loss(torch.tensor([1.0, -2.0, 3.0])), last=True)
    made.update(LR)


def test_a_lock_that_a_killed_compiler_left_behind_holds_nobody_up(tmp_path):
    for name in ("deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    run_ranks(starting_worker, 1, str(tmp_path), seconds=60)


# ---- the loop around an engine


def test_the_weighted_loss_by_hand():
    terms = {"cross_entropy": 1.0, "l1": 0.5, "l2": 2.0}
    assert weighted_loss(terms, [6.0, 8.0, 3.0], [3.0, 4.0, 6.0]) == pytest.approx(6 / 3 + 0.5 * 8 / 4 + 2.0 * 3 / 6)
    assert weighted_loss(terms, [6.0, 0.0, 0.0], [3.0, 0.0, 0.0]) == 2.0  # of which nothing was in the batches
    with pytest.raises(ValueError, match="zip"):
        weighted_loss(terms, [6.0], [3.0])


class TwoTerms(nn.Module):
    """Terms over different counts, and something that is carried from update to update."""

    def __init__(self) -> None:
        super().__init__()
        self.terms = {"first": 1.0, "second": 0.5}
        self.weight = nn.Parameter(torch.zeros(2))
        self.updates, self.passes = 0, 0

    def forward(self, batch: "Numbers") -> torch.Tensor:
        self.passes += 1
        return torch.stack([batch.things.sum() + self.weight[0], 10.0 * len(batch.things) + self.weight[1]])

    def after_update(self) -> None:
        self.updates += 1
        assert self.weight.grad is None or not self.weight.grad.any()  # what enters the queues is of the update before

    def carried_state(self, keep: bool = True) -> dict[str, torch.Tensor]:
        return {"updates": torch.tensor(self.updates)}

    def load_carried_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self.updates = int(tensors["updates"])


class Numbers:
    """A batch of numbers: the first term is summed over them, the second over half as many."""

    def __init__(self, things: np.ndarray) -> None:
        self.things = torch.from_numpy(things).float()
        self.symbols = torch.from_numpy(things)
        self.counts = torch.tensor([len(things), len(things) / 2], dtype=torch.float64)

    @property
    def lengths(self) -> torch.Tensor:
        return (self.symbols >= 0).reshape(len(self.things), -1).sum(1)

    def to(self, device: torch.device | str) -> "Numbers":
        return self


def two_terms_stage(epochs: int = 2) -> Stage:
    config = StageConfig(epochs=epochs, batch=4, micro_batch=2, lr=1e-12, warmup=0.0, checkpoint_every=1)
    return Stage("train", 1, "numbers", config, np.arange(8), lambda things, draws: Numbers(things))


def test_the_loop_reports_the_terms_of_the_loss(tmp_path):
    local = LocalEngine(TwoTerms(), EngineConfig())
    folder = RunFolder(tmp_path)
    run_stage(two_terms_stage(), local, 0, folder, Silent())
    for record in folder.history():
        # Eight numbers 0 … 7 in an epoch: their mean, and twice ten.
        assert record["terms"] == pytest.approx({"first": 28 / 8, "second": 80 / 4}, rel=1e-6)
        assert record["loss"] == pytest.approx(28 / 8 + 0.5 * 80 / 4, rel=1e-6)
    assert len(folder.history()) == 2
    assert (local.model.updates, local.model.passes) == (4, 8)  # two micro-batches make an update
    state, tensors = folder.last_checkpoint("train")
    assert (state.sums, state.counts) == ([], [])
    assert int(tensors["carried/updates"]) == 4


def test_what_a_model_carries_and_the_sums_of_an_epoch_survive_a_cut(tmp_path, monkeypatch):
    folder, saved = RunFolder(tmp_path), RunFolder.save_checkpoint

    def cut(self: RunFolder, state: object, tensors: dict[str, torch.Tensor]) -> None:
        saved(self, state, tensors)
        if state.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_checkpoint", cut)
    with pytest.raises(KeyboardInterrupt):
        run_stage(two_terms_stage(), LocalEngine(TwoTerms(), EngineConfig()), 0, folder, Silent())
    monkeypatch.undo()
    state, _ = folder.last_checkpoint("train")
    assert (state.step, state.counts) == (3, [4.0, 2.0])
    local = LocalEngine(TwoTerms(), EngineConfig())
    run_stage(two_terms_stage(), local, 0, folder, Silent())
    assert local.model.updates == 4
    assert [record["terms"] for record in folder.history()] == [
        pytest.approx({"first": 28 / 8, "second": 80 / 4}, rel=1e-6)
    ] * 2


class Padded(Numbers):
    """Of each number n, the n mod 4 + 1 first of four places hold a symbol."""

    def __init__(self, things: np.ndarray) -> None:
        super().__init__(things)
        self.symbols = torch.where(torch.arange(4) <= self.symbols[:, None] % 4, 1, -1)


class Watched(loop.Reporter):
    """Keeps the points."""

    def __init__(self, every: int) -> None:
        self.every, self.points = every, {}

    def point(self, stage: str, step: int, values: dict[str, float]) -> None:
        assert (stage, step in self.points) == ("train", False)
        self.points[step] = values


@pytest.mark.parametrize("every", [1, 3])
def test_live_figures_by_hand(tmp_path, every):
    reporter = Watched(every)
    validated = iter([0.5, 0.25])
    stage = replace(
        two_terms_stage(),
        build=lambda things, draws: Padded(things),
        validate=lambda: {"ndcg@3": next(validated)},
        metric="ndcg@3",
    )
    run_stage(stage, LocalEngine(TwoTerms(), EngineConfig()), 0, RunFolder(tmp_path), reporter)
    # Two updates are an epoch, after which it is validated.
    assert sorted(reporter.points) == ([1, 2, 3, 4] if every == 1 else [2, 3, 4])
    for step, values in reporter.points.items():
        things = epoch_order(stage.lengths, 4, Draws(0, 1, ORDER, (step - 1) // 2))[(step - 1) % 2]
        assert values["terms/first"] == pytest.approx(things.mean(), rel=1e-6)
        assert values["terms/second"] == pytest.approx(0.5 * 40 / 2)
        assert values["loss"] == pytest.approx(values["terms/first"] + values["terms/second"])
        assert values["lr"] == learning_rate(step - 1, 4, stage.config)
        lengths = things.reshape(2, 2) % 4 + 1  # of two micro-batches, each as wide as its longest
        assert values["padding"] == pytest.approx(1 - lengths.sum() / (2 * lengths.max(1).sum()))
        assert values["gradient_norm"] == pytest.approx(np.hypot(2 / 4, 2 * 0.5 / 2))  # of two micro-batches
        assert values["tokens_per_second"] > 0 < values["peak_memory_mib"]
        assert values.get("valid/ndcg_at_3") == {2: 0.5, 4: 0.25}.get(step)


def test_nobody_watches_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_figures", None)
    run_stage(two_terms_stage(), LocalEngine(TwoTerms(), EngineConfig()), 0, RunFolder(tmp_path), Silent())


@pytest.mark.parametrize(("every", "asked", "saved"), [(-1.0, 8, [3, 4, 8]), (3600.0, 0, [4, 8])])
def test_a_checkpoint_is_written_when_the_reporter_wants_one(tmp_path, monkeypatch, every, asked, saved):
    """Beside those at the ends of epochs; and it is not asked all the time."""
    monkeypatch.setattr(loop, "ASK_EVERY", every)

    class Noticed(Silent):
        asked = 0

        def wants_checkpoint(self) -> bool:
            self.asked += 1
            return self.asked == 3

    steps, stage, reporter = [], two_terms_stage(), Noticed()
    config = stage.config.model_copy(update={"batch": 2, "checkpoint_every": 99})
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda self, state, tensors: steps.append(state.step))
    stage, local = replace(stage, config=config), LocalEngine(TwoTerms(), EngineConfig())
    run_stage(stage, local, 0, RunFolder(tmp_path), reporter)
    assert (reporter.asked, steps) == (asked, saved)


def test_the_batch_whose_gradient_is_not_finite_is_named(tmp_path):
    """By its numbers in the store, with what was updated before it untouched."""

    class Steep(TwoTerms):
        def forward(self, batch: Numbers) -> torch.Tensor:
            slope = math.inf if 5 in batch.things else 1.0
            return super().forward(batch) + (slope * self.weight).nan_to_num() * 0

    local = LocalEngine(Steep(), EngineConfig())
    stage = replace(two_terms_stage(), made_of="items", numbers=np.arange(8) * 10)
    order = epoch_order(stage.lengths, 4, Draws(0, 1, ORDER, 0))
    place = int(np.flatnonzero((order == 5).any(1))[0])
    folder = RunFolder(tmp_path)
    message = rf"train: the gradient norm is nan in step {place + 1} \(epoch 1\); its 4 items are in \S+json; nothing"
    with pytest.raises(NonFiniteError, match=message):
        run_stage(stage, local, 0, folder, Silent())
    batch = json.loads(folder.batch_file.read_text())
    assert batch["items"] == (10 * order[place]).tolist()
    assert batch["error"] == "the gradient norm is nan"
    assert local.model.weight.isfinite().all()
    assert local.model.updates == place


def test_the_learning_rate_by_hand():
    config = StageConfig(lr=3.0, warmup=0.5)
    rates = [learning_rate(step, 4, config) for step in range(4)]
    assert rates == pytest.approx([1.0, 2.0, 3.0, 1.5])  # thirds of the way up, then cos 0 and cos π/2
    assert learning_rate(0, 10, StageConfig(lr=3.0, warmup=0.0)) == 3.0
    assert learning_rate(5, 10, StageConfig(lr=3.0, warmup=0.0)) == pytest.approx(1.5)
    assert learning_rate(9, 10, StageConfig(lr=3.0, warmup=1.0)) == pytest.approx(3.0 * 10 / 11)


def test_an_epoch_shows_everything_once():
    lengths = np.random.default_rng(0).integers(1, 50, 640)
    order = epoch_order(lengths, 8, Draws(1))
    assert order.shape == (80, 8)
    assert sorted(order.ravel()) == list(range(640))
    # Batches hold things of like length: a fraction of the spread that random ones would have.
    assert np.ptp(lengths[order], axis=1).mean() < 0.2 * np.ptp(lengths[np.arange(640).reshape(80, 8)], axis=1).mean()


def test_an_epoch_is_a_function_of_its_draws():
    lengths = np.arange(50) % 7
    same = epoch_order(lengths, 4, Draws(1, 2)), epoch_order(lengths, 4, Draws(1, 2))
    assert np.array_equal(*same)
    assert not np.array_equal(same[0], epoch_order(lengths, 4, Draws(1, 3)))
    left_out = [set(range(50)) - set(epoch_order(lengths, 4, Draws(seed)).ravel()) for seed in range(5)]
    assert all(len(two) == 2 for two in left_out)
    assert len(set().union(*left_out)) > 2


def test_micro_batches_that_an_update_needs():
    assert portions(256, 256, 1) == 1
    assert portions(256, 64, 2) == 2
    assert portions(10, 3, 1) == 4
    assert portions(4, 256, 2) == 1


def test_no_micro_batch_is_empty_and_none_has_two_prompts_too_many():
    for batch, micro, workers in itertools.product((7, 64, 100), (1, 3, 256), (1, 3, 8, 64)):
        if workers <= batch:
            parts = np.array_split(np.arange(batch), workers * portions(batch, micro, workers))
            assert min(map(len, parts)) >= 1 and max(map(len, parts)) <= micro + 1


def test_where_there_are_fewer_things_than_a_batch_an_update_has_all_of_them():
    config = StageConfig(batch=256, micro_batch=64)
    stage = Stage("train", 1, "numbers", config, np.ones(101), lambda things, draws: Numbers(things))
    assert (stage.prompts, stage.portions(1), stage.portions(2)) == (101, 2, 1)
    stage = Stage("train", 1, "numbers", config, np.ones(101), lambda things, draws: Numbers(things), per_prompt=8)
    assert (stage.prompts, stage.portions(1)) == (12, 1)


def test_workers_without_a_prompt_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("raygrec.train.loop.world", lambda: (0, 5))
    with pytest.raises(InputError, match=r"^train: an update of 4 prompts has none for some of 5 workers"):
        run_stage(two_terms_stage(), LocalEngine(TwoTerms(), EngineConfig()), 0, RunFolder(tmp_path), Silent())


@pytest.fixture(scope="module")
def prepared(tiny_store, tiny_backbone, tmp_path_factory) -> RunConfig:
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("engine") / "run")
    folder = RunFolder(config.out)
    with folder.claimed(config, resume=False):
        prepare_run(config, folder)
    return config


def train(prepared: RunConfig, store, out: Path, micro_batch: int = 12, **settings: object) -> LocalEngine:
    """The engine after a few updates of stage 3 on the real model."""
    source = RunFolder(prepared.out)
    builder = build_prompts(prepared, store, source)
    local = make_engine(
        build_model(prepared, store, builder, source, distributed=False), EngineConfig(**settings), 1, distributed=False
    )
    stage = Stage(
        name="train",
        number=2,
        title="user-item alignment",
        config=StageConfig(epochs=1, batch=12, micro_batch=micro_batch, lr=0.01, warmup=0.0),
        lengths=builder.train.lengths[:24],  # two updates
        build=builder.training,
    )
    run_stage(stage, local, 0, RunFolder(out), Silent())
    return local


def assert_same_parameters(first: LocalEngine, second: LocalEngine, tolerance: float = 1e-5) -> None:
    ones, others = first.state(), second.state()
    assert ones.keys() == others.keys()
    for name in filter(lambda name: name.startswith("param/"), ones):
        torch.testing.assert_close(ones[name], others[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def plain(prepared, tiny_store, tmp_path_factory) -> LocalEngine:
    return train(prepared, tiny_store, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("micro_batch", [6, 5])
def test_an_update_does_not_depend_on_how_its_batch_is_split(prepared, tiny_store, tmp_path, plain, micro_batch):
    assert_same_parameters(plain, train(prepared, tiny_store, tmp_path, micro_batch))


def test_activation_checkpointing_gives_the_same_update(prepared, tiny_store, tmp_path, plain):
    other = train(prepared, tiny_store, tmp_path, activation_checkpointing=True)
    assert other.model.backbone.model.is_gradient_checkpointing
    assert_same_parameters(plain, other)


def test_bf16_trains_fp32_weights(prepared, tiny_store, tmp_path, plain):
    other = train(prepared, tiny_store, tmp_path, precision="bf16")
    assert {value.dtype for value in other.state().values()} == {torch.float32}
    with torch.no_grad():
        builder = build_prompts(prepared, tiny_store, RunFolder(prepared.out))
        prompts = builder.training(np.arange(8), Draws(5))
        assert float(other.loss(prompts)) == pytest.approx(float(plain.loss(prompts)), rel=0.02)


def test_in_bf16_matrices_that_are_never_trained_are_kept_in_bf16_and_nothing_else_changes(
    prepared, tiny_store, tmp_path, monkeypatch
):
    """GLTA's language model is frozen. Autocast reads the same values as it would of fp32, to the bit."""
    builder = build_prompts(prepared, tiny_store, RunFolder(prepared.out))
    prompts = builder.training(np.arange(8), Draws(5))

    def made() -> LocalEngine:
        model = build_model(prepared, tiny_store, builder, RunFolder(prepared.out), distributed=False)
        return LocalEngine(model, EngineConfig(precision="bf16"))

    kept = made()
    modules = dict(kept.model.named_modules())
    halved = {name.rpartition(".")[0] for name, p in kept.model.named_parameters() if p.dtype == torch.bfloat16}
    inside = {name for name, module in modules.items() if isinstance(module, nn.Linear) and "backbone." in name}
    assert halved == inside and inside
    monkeypatch.setattr("raygrec.train.engine._frozen_in_bf16", lambda model: None)
    assert torch.equal(kept.loss(prompts), made().loss(prompts))


def test_a_loss_that_is_not_finite_updates_nothing(prepared, tiny_store, tmp_path, plain):
    builder = build_prompts(prepared, tiny_store, RunFolder(prepared.out))
    model = build_model(prepared, tiny_store, builder, RunFolder(prepared.out), distributed=False)
    model.item_projector.trained.weight.data[0, 0] = math.nan
    broken = LocalEngine(model, EngineConfig())
    before = broken.state()
    stage = Stage("train", 2, "user-item alignment", StageConfig(batch=12), builder.train.lengths, builder.training)
    message = (
        r"train: the loss is nan in step 1 \(epoch 1\); its 12 users are in \S+; nothing was updated, lower train\.lr"
    )
    with pytest.raises(NonFiniteError, match=message):
        run_stage(stage, broken, 0, RunFolder(tmp_path), Silent())
    assert all(torch.equal(broken.state()[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())
    batch = json.loads((tmp_path / "not_finite.json").read_text())
    users = epoch_order(builder.train.lengths, 12, Draws(0, 2, ORDER, 0))[0]
    assert batch == {"error": "the loss is nan", "stage": "train", "step": 1, "epoch": 1, "users": users.tolist()}
    assert [path.name for path in tmp_path.iterdir()] == ["not_finite.json"]

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raygrec.draws import Draws
from raygrec.train.assembly import build_model, build_prompts, prepare_run
from raygrec.train.engine import EngineConfig, LocalEngine, NonFiniteError, make_engine
from raygrec.train.folder import RunFolder
from raygrec.train.loop import Stage, epoch_order, learning_rate, portions, run_stage
from raygrec.train.settings import RunConfig, StageConfig
from tests.train.workers import tiny_config

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
    engine.backward(engine.loss(*batch(seed)), 1 / 8, last=True)
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
    local.backward(local.loss(x, y), 1.0, last=True)
    with pytest.raises(NonFiniteError, match="gradient norm is nan"):
        local.update(LR)
    assert all(torch.equal(local.state()[name], value) for name, value in before.items())


# ---- the loop around an engine


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


@pytest.fixture(scope="module")
def prepared(tiny_store, tiny_backbone, tmp_path_factory) -> RunConfig:
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("engine") / "run")
    folder = RunFolder(config.out)
    with folder.claimed(config, resume=False):
        prepare_run(config, folder)
    return config


def train(
    prepared: RunConfig, store, out: Path, micro_batch: int = 12, chunks: int = 1, **settings: object
) -> LocalEngine:
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
    run_stage(stage, local, 0, RunFolder(out), Silent(), chunks)
    return local


class Silent:
    def progress(self, task: str, done: int, total: int, note: str = "") -> None: ...

    def report(self, record: dict[str, object]) -> None: ...


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


def test_an_update_does_not_depend_on_the_chunks_of_its_loss(prepared, tiny_store, tmp_path, plain):
    assert_same_parameters(plain, train(prepared, tiny_store, tmp_path, chunks=3))


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


def test_a_loss_that_is_not_finite_updates_nothing(prepared, tiny_store, tmp_path, plain):
    builder = build_prompts(prepared, tiny_store, RunFolder(prepared.out))
    model = build_model(prepared, tiny_store, builder, RunFolder(prepared.out), distributed=False)
    model.item_projector.weight.data[0, 0] = math.nan
    broken = LocalEngine(model, EngineConfig())
    before = broken.state()
    stage = Stage("train", 2, "user-item alignment", StageConfig(batch=12), builder.train.lengths, builder.training)
    with pytest.raises(NonFiniteError, match=r"train: the loss is nan; nothing was updated, lower train\.lr"):
        run_stage(stage, broken, 0, RunFolder(tmp_path), Silent(), 1)
    assert all(torch.equal(broken.state()[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())
    assert not list(tmp_path.iterdir())

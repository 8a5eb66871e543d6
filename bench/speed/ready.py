"""Models and prompts that are ready to train, as the pipeline makes them, for what is measured about their steps."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.quality import ROOT, WORK, prepare
from raygrec.config import apply_overrides, read_yaml
from raygrec.data.store import Store
from raygrec.draws import Draws
from raygrec.train.assembly import Model, Prompts, build_model, build_prompts, prepare_run
from raygrec.train.folder import RunFolder
from raygrec.train.loop import Stage
from raygrec.train.settings import RunConfig, run_config

FEW = "graph.epochs=2"  # steps take as long whatever the nodes know


@dataclass
class Ready:
    """A model before its first step."""

    config: RunConfig
    model: Model
    prompts: Prompts

    @property
    def trainable(self) -> np.ndarray:
        """Users that have a training prompt."""
        return np.flatnonzero(self.prompts.train.lengths >= 2)

    def users(self, step: int) -> np.ndarray:
        """A batch of them, drawn."""
        return self.trainable[Draws(step).permutation(len(self.trainable))[: self.config.train.batch]]

    def step(self, users: np.ndarray, number: int) -> None:
        """Prompts, forward and backward pass."""
        batch = self.prompts.training(users, Draws(0, number))
        weights = torch.tensor(list(self.model.terms.values())) / batch.counts.clamp(min=1)
        (self.model(batch) * weights).sum().backward()
        if hasattr(self.model, "after_update"):
            self.model.after_update()
        self.model.zero_grad()


def job_config(job: str, store: Path, name: str, *settings: str) -> RunConfig:
    """`jobs/<job>` with some settings, on a store."""
    given = [f"store={store}", f"out={WORK / 'ready' / name}", *settings]
    return run_config(apply_overrides(read_yaml(ROOT / "jobs" / job), given), job)


def ready(job: str, store: Path, name: str, *settings: str, distributed: bool = False) -> Ready:
    """The model and the prompts of a job; what it has pretrained is kept under `name`."""
    config = job_config(job, store, name, *settings)
    prompts = prompts_of(config)
    model = build_model(config, Store.open(store), prompts, RunFolder(config.out), distributed)
    return Ready(config, model, prompts)


def prompts_of(config: RunConfig) -> Prompts:
    """The prompts of a job, whose nodes are pretrained where they are not yet."""
    folder = RunFolder(config.out)
    folder.path.mkdir(parents=True, exist_ok=True)
    for file in (folder.nodes_file, folder.vectors_file):
        file.unlink(missing_ok=True)  # of another config, perhaps; the store keeps what is this one's
    prepare_run(config, folder)
    return build_prompts(config, Store.open(config.store), folder)


def stage_of(config: RunConfig, prompts: Prompts, *options: object) -> Stage:
    """The training of the users that have a prompt, as the loop wants it, without validation; options: for prompts."""
    trainable = np.flatnonzero(prompts.train.lengths >= 2)
    return Stage(
        name="train",
        number=0,
        title="",
        config=config.train,
        lengths=np.minimum(prompts.train.lengths[trainable], config.model.max_history),
        build=lambda numbers, draws: prompts.training(trainable[numbers], draws, *options),
    )


def beauty() -> Path:
    """The store of Amazon Beauty."""
    return prepare("beauty")
